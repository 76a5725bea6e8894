"""Targets of `edit.alignment.repa`: tokens of the encoder and of the student brought together, and cached ones checked.

Specification: methods/repa.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from edit.alignment.encoder import Encoder
from edit.grid import Grid

SMALL = 1e-6


def resized(h: Tensor, grid: Grid, to: Grid) -> Tensor:
    """Tokens b (f n) d on a grid of rows and columns of another size, each frame by itself, bilinear.

    Raises:
        ValueError: if the tokens are no such grid
    """
    if h.shape[1] != math.prod(grid):
        raise ValueError(
            f"REPA: {h.shape[1]} tokens are no grid of {' x '.join(map(str, grid))}: align a unit that has all of them"
        )
    if grid == to:
        return h
    maps = h.unflatten(1, grid).flatten(0, 1).movedim(-1, 1)  # (b f) d y x
    maps = F.interpolate(maps, to[1:], mode="bilinear", align_corners=False)
    return maps.movedim(1, -1).reshape(len(h), -1, h.shape[-1])


def averaged(tokens: Tensor, samples: int, frames: int, count: int) -> Tensor:
    """The encoder's tokens of all frames (b F) n d -> b (f n) d: the mean over the frames of each frame of tokens."""
    y = tokens.unflatten(0, (samples, -1))  # b F n d
    if y.shape[1] != frames:
        y = F.adaptive_avg_pool1d(y.flatten(2).transpose(1, 2), frames).transpose(1, 2).unflatten(2, (count, -1))
    return y.flatten(1, 2)


def standardised(y: Tensor, gamma: float) -> Tensor:
    """iREPA's targets: b n d, mean and deviation over the tokens of a sample, per channel."""
    return (y - gamma * y.mean(1, keepdim=True)) / (y.std(1, keepdim=True) + SMALL)


def side_by_side(count: int, grid: Grid) -> tuple[int, int]:
    """Rows and columns of cached features: the student's, where there are as many; else they are a square.

    Raises:
        ValueError: if they are neither
    """
    if count == grid[1] * grid[2]:
        return grid[1], grid[2]
    if (side := math.isqrt(count)) ** 2 != count:
        raise ValueError(
            f"REPA: the data have features of {count} patches, which are neither the {grid[1]} x {grid[2]} of the "
            "model nor a square: make them anew of square pictures, or say cached=false"
        )
    return side, side


def check_cached(encoder: Encoder, record: Mapping[str, Any] | None) -> None:
    """Refuse features that the data do not have, or have of another encoder.

    Args:
        encoder: that the term names
        record: what the data say of their features: sha256, width, side, and grid as rows and columns; None: none

    Raises:
        ValueError: with what to do
    """
    if record is None:
        raise ValueError(
            "cached=true, and the data give no features: make them with `python -m data.precompute ... --features` and "
            "say data.set.encoded=true, or say cached=false"
        )
    mine = encoder.identity()
    if differing := [k for k in ("sha256", "width", "side") if k in record and record[k] != mine[k]]:
        k = differing[0]
        raise ValueError(
            f"the data have features of another encoder: {record.get('name')}, {k} {record[k]}, and the term names "
            f"{mine['name']}, {k} {mine[k]}: make them anew, name that encoder, or say cached=false"
        )
