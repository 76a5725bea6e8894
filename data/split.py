"""The contract between data sets, the loader and recipes.

A data set is a plain class that Hydra builds from `configs/data/<name>.yaml`. It hands out splits; a split is
map-style and stateless: what `sample` returns depends on its two arguments and the seed alone, so a restarted run, or
one on another number of ranks, sees the same pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from data.tar_index import NOWHERE
from edit import noise
from edit.inputs import trust

WRITTEN = ("cache",)  # arguments of data sets that name a place to write to
MOST = {
    "count": 100_000,
    "held": 100_000,
    "copies": 1_000,
    "size": 16_384,
    "frames": 1_024,
}  # that an artifact may ask for


class Split(Protocol):
    def __len__(self) -> int: ...

    def sample(self, index: int, draw: int) -> dict[str, Tensor]:
        """One sample.

        Args:
            index: which, from 0 to len - 1
            draw: the running number of this sample in the run; all augmentation is a pure function of (seed, draw)

        Returns:
            x: c *sizes float32, pixels in [-1, 1] or latents already scaled: c y x of an image, c t y x of a video
            label: int64 scalar, where there are labels
            text, text_mask, pooled: l c float32, l bool, c float32, where there is text
            caption: a string, where the data set was asked for captions
            kind: int64 scalar, the class of the visible thing, to train a feature space on; never a condition
        """
        ...


@runtime_checkable
class Splits(Protocol):
    """The methods by which a class is known to be a data set before it is built."""

    def train(self) -> Split: ...

    def heldout(self) -> Split | None: ...

    def to_frames(self, x: Tensor) -> Tensor:
        """Samples as trained on, b c *sizes -> their frames as seen, uint8 b f y x 3; f = 1 for images."""
        ...


class DataSet(Splits, Protocol):
    shape: tuple[int, ...]  # (c, *sizes) of one training sample
    num_classes: int | None
    classes: list[str] | None  # their names, where known
    # a set with texts has `text_length`: the tokens they all have, with their padding; None if they differ
    # a set of latents has `decoder()`: frozen, with gradients, latents b c *sizes -> pixels b 3 *sizes in [-1, 1]


class CaptionedSplit(Split, Protocol):
    captions: list[str]  # of all samples, in order


@runtime_checkable
class CheckedSet(DataSet, Protocol):
    """A data set of captions that can tell whether a picture, or a video, shows what a caption says."""

    judged: int  # samples have a `kind` from 0 to judged - 1

    def heldout(self) -> CaptionedSplit: ...

    def follows(self, frames: Tensor, captions: Sequence[str]) -> Tensor:
        """Whether each sample's frames, uint8 b f y x 3, show what its caption says: b bool."""
        ...

    def scores(self, frames: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Parts of the caption that hold, b float32 each: 1, 0, or NaN where the caption does not name the part."""
        ...


def opened(node: Mapping[str, Any], trusted: Sequence[str] = (), who: str = "the artifact") -> DataSet:
    """Build the data set that an artifact or a manifest describes. The description is not trusted: no file is written.

    Args:
        node: configuration, import path as `_target_`
        trusted: packages besides `data` whose classes may be built
        who: author of the description, for messages

    Raises:
        ValueError: if the class is no data set, or does not take these arguments
        OSError: if its files are missing
    """
    given = {k: v for k, v in node.items() if k not in ("_target_", *WRITTEN)}
    trust.refuse_enormous(given, who)
    for key, limit in MOST.items():
        if isinstance(given.get(key), int) and given[key] > limit:
            raise ValueError(f"{who}: {key} is {trust.cut(given[key])}, expected at most {limit}")
    cls = trust.named(node.get("_target_"), ("data", *trusted), (Splits,), who)
    hints = trust.check_arguments(cls, given, f"{who}'s")
    if built := next((place for place, key, _ in trust.walk(given, who) if key == "_target_"), None):
        raise ValueError(f"{who} asks for something to be built at {built}: a data set is described by plain values")
    if cls.__module__.startswith("data.") and "cache" in hints:
        given["cache"] = NOWHERE
    try:
        return cls(**given)
    except (ValueError, OSError):
        raise
    except Exception as error:  # a value of another type can raise anything
        raise ValueError(f"{type(error).__name__}: {trust.cut(str(error), quoted=False)}") from error


def flipped(seed: int, draw: int) -> bool:
    """Whether this draw is mirrored; half of them are."""
    return bool(noise.uniform(seed, torch.tensor([draw]), noise.FLIP) < 0.5)


def held_out(name: str, fraction: float) -> bool:
    """Whether the sample of this name belongs to the held-out part.

    A hash of the name decides, so files that are added later do not move other samples.
    """
    return (
        int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big")
        < fraction * 2**64
    )
