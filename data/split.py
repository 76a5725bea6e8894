"""The contract between data sets, the loader and recipes.

A data set is a plain class that Hydra builds from `configs/data/<name>.yaml`. It hands out splits; a split is
map-style and stateless: what `sample` returns depends on its two arguments and the seed alone, so a restarted run, or
one on another number of ranks, sees the same pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from edit import noise
from edit.data_set import Split, Splits


class DataSet(Splits, Protocol):
    shape: tuple[int, ...]  # (c, *sizes) of one training sample
    num_classes: int | None
    classes: list[str] | None  # their names, where known
    # a set with texts has `text_length`: the tokens they all have, with their padding; None if they differ
    # and, where new prompts can be embedded as its captions were, `encode(prompts)`: fields of a `Condition`, b each
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
