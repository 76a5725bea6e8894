"""A data set as models meet it: the contract, one that a description names, and what it tells a model of a sample.

The classes are those of the package `data`, which a description names by their import paths.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from edit.inputs import trust
from edit.stream import Condition

NOWHERE = os.devnull  # in place of a folder for index files: none is written
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


# ---- opened ---------------------------------------------------------------------------------------------------------


def opened(node: Mapping[str, Any], trusted: Sequence[str] = (), who: str = "the artifact") -> Any:
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


# ---- what a model is told -------------------------------------------------------------------------------------------


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack; pad text and its mask at the end; leave strings a list.

    Raises:
        ValueError: if samples differ in their parts or shapes
    """
    if odd := next((s for s in samples if s.keys() != samples[0].keys()), None):
        raise ValueError(f"samples of one batch have different parts: {sorted(samples[0])} and {sorted(odd)}")
    return {name: _join(name, [s[name] for s in samples]) for name in samples[0]}


def _join(name: str, values: list[Any]) -> Any:
    if name == "draw":
        return torch.tensor(values)
    if isinstance(values[0], str):
        return values
    if name in ("text", "text_mask"):
        return pad_sequence(values, batch_first=True)
    try:
        return torch.stack(values)
    except RuntimeError as error:
        shapes = sorted({tuple(v.shape) for v in values})
        raise ValueError(f"{name} has samples of different shapes in one batch: {shapes}") from error


def conditions(data: Any) -> Callable[[Tensor], Condition]:
    """Maps sample numbers, b int64, to conditions: balanced classes, or the texts of the real samples in order."""
    if data.num_classes:
        return lambda numbers: Condition(label=numbers % data.num_classes)
    split = data.heldout() or data.train()
    names = [f.name for f in fields(Condition)]

    def of(numbers: Tensor) -> Condition:
        samples = [split.sample(int(k) % len(split), int(k)) for k in numbers]
        return Condition(**collate([{key: s[key] for key in names if key in s} for s in samples]))

    return of


def null_condition(data: Any) -> Condition | None:
    """The data set's own null condition, batch size 1; None where it has none."""
    null = getattr(data, "null", None)
    return None if null is None else Condition(**{name: value[None] for name, value in null.items()})


def captions(data: Any, count: int) -> list[str]:
    """Captions of the first `count` samples; "sample 0", "sample 1", ... where the data has none."""
    told = getattr(data.heldout() or data.train(), "captions", None)
    return [told[k % len(told)] if told else f"sample {k}" for k in range(count)]


def told(data: Any, count: int) -> list[str]:
    """What `conditions` gives to the first `count` samples, in words: classes or captions; empty without either."""
    if data.num_classes:
        return [class_name(data, k % data.num_classes) for k in range(count)]
    return captions(data, count) if getattr(data.heldout() or data.train(), "captions", None) else []


def class_name(data: Any, label: int) -> str:
    """Its number where the data set knows no names."""
    return data.classes[label] if data.classes else str(label)
