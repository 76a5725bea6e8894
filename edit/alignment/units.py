"""Units that are compared, and samples cut as their tokens are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from edit.denoiser import Denoiser


def as_units(who: str, units: Sequence[int]) -> tuple[int, int]:
    """The unit m of a student and n of its teacher, from configuration.

    Raises:
        ValueError: if they are not two, counted from 0, or n comes before m
    """
    whole = len(units) == 2 and all(isinstance(i, int) and i >= 0 for i in units)
    if not whole or units[1] < units[0]:
        raise ValueError(
            f"{who}: units are two, m of the student and n of its teacher, counted from 0, and n is no shallower than "
            f"m; got {list(units)}"
        )
    return units[0], units[1]


def check_unit(who: str, unit: int, model: Denoiser, role: str) -> None:
    """Refuse a unit that a model does not have."""
    if unit >= len(model.units):
        raise ValueError(f"{who}: unit {unit} of {role} is wanted, which has units 0 to {len(model.units) - 1}")


def patches(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Samples b c *sizes in the order of their tokens, of a grid of frames, rows, columns: b n (c a p q)."""
    frames, rows, columns = grid
    x = x if x.ndim == 5 else x[:, :, None]
    return rearrange(x, "b c (f a) (y p) (x q) -> b (f y x) (c a p q)", f=frames, y=rows, x=columns)


def grid_of(denoiser: Denoiser) -> tuple[int, int, int]:
    """Frames, rows and columns of a model's tokens, from its structure alone: its weights may be shards."""
    with torch.device("meta"), torch.no_grad():
        bare = denoiser.family.from_config(denoiser.config)
        told = denoiser.example(1, text=1).map(lambda v: v.to("meta"))
        stream = bare.embed(**bare.pack(torch.empty(1, *denoiser.sample_shape), torch.empty(1), told))
    return stream.layout.grid
