"""The data set of an artifact or a run: how it is opened, and the conditions that it gives to a model.

Torch is imported inside: settings are checked before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from recipes.config.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from data.split import DataSet
    from edit.artifacts.checkpoint import Artifact
    from edit.denoiser import Denoiser
    from edit.stream import Condition


def build_data(artifact: Artifact, trusted: Sequence[str] = ()) -> DataSet:
    """Open the data set that an artifact was trained on, as the artifact describes it.

    Raises:
        UserError: if the artifact names no data set, or one outside of `data` and the trusted packages
    """
    from data.split import opened

    if "_target_" not in artifact.data:
        raise UserError(f"{artifact.path} does not say which data it was trained on: it was not made by train.py")
    try:
        return opened(artifact.data, trusted)
    except (ValueError, OSError) as error:
        raise UserError(f"the data set of {artifact.path} cannot be opened: {error}") from error


def conditions(data: DataSet) -> Callable[[Tensor], Condition]:
    """Maps sample numbers, b int64, to conditions: balanced classes, or the texts of the real samples in order."""
    from edit.stream import Condition

    if data.num_classes:
        return lambda numbers: Condition(label=numbers % data.num_classes)
    split = data.heldout() or data.train()
    names = [f.name for f in fields(Condition)]

    def of(numbers: Tensor) -> Condition:
        from data.loader import collate

        samples = [split.sample(int(k) % len(split), int(k)) for k in numbers]
        batch = collate([{key: s[key] for key in names if key in s} for s in samples])
        return Condition(**batch)

    return of


def captions(data: DataSet, count: int) -> list[str]:
    """Captions of the first `count` samples; "sample 0", "sample 1", ... where the data has none."""
    known = getattr(data.heldout() or data.train(), "captions", None)
    return [known[k % len(known)] if known else f"sample {k}" for k in range(count)]


def told(data: DataSet, count: int) -> list[str]:
    """What `conditions` gives to the first `count` samples, in words: classes or captions; empty without either."""
    if data.num_classes:
        return [class_name(data, k % data.num_classes) for k in range(count)]
    return captions(data, count) if getattr(data.heldout() or data.train(), "captions", None) else []


def class_name(data: DataSet, label: int) -> str:
    """Its number where the data set knows no names."""
    return data.classes[label] if data.classes else str(label)


def check_told(denoiser: Denoiser, data: DataSet) -> None:
    """Raise a ValueError if the denoiser does not accept the conditions of this data set."""
    import torch

    one = conditions(data)(torch.arange(1))
    device = next(denoiser.parameters()).device
    one = one.map(lambda v: v.to(device))
    denoiser.pack(torch.zeros(1, *data.shape, device=device), torch.ones(1, device=device), one)
    if hasattr(data, "text_length"):
        denoiser.need_length(data.text_length)


def null_condition(data: DataSet) -> Condition | None:
    """The data set's own null condition, batch size 1; None where it has none."""
    from edit.stream import Condition

    null = getattr(data, "null", None)
    return None if null is None else Condition(**{name: value[None] for name, value in null.items()})
