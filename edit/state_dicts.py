"""Names and shapes of state dicts, compared before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def check_layout(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Refuse a state dict whose keys or shapes differ from what a model wants, in one sentence.

    Both may be on the meta device: only names and shapes are compared.
    """
    if missing := [k for k in wanted if k not in given]:
        raise ValueError(
            f"{what} does not fit this model: {len(missing)} keys are missing, such as {first_names(missing)}"
        )
    if extra := [k for k in given if k not in wanted]:
        raise ValueError(
            f"{what} does not fit this model: it has {len(extra)} unknown keys, such as {first_names(extra)}"
        )
    for k, v in wanted.items():
        if v.shape != given[k].shape:
            shapes = f"{k} has shape {tuple(given[k].shape)}, expected {tuple(v.shape)}"
            raise ValueError(f"{what} does not fit this model: {shapes}")


def first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3])
