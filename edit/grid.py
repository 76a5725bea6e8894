"""Samples and the grid of their tokens: frames, rows, columns."""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange, repeat
from torch import Tensor

Grid = tuple[int, int, int]


def patch_of(sizes: Sequence[int], grid: Grid) -> Grid:
    """Frames, rows and columns of a token's patch, in samples of one to three sizes.

    Raises:
        ValueError: if there are more sizes, which no grid of tokens tells apart
    """
    if len(sizes) > 3:
        raise ValueError(f"samples have at most frames, rows and columns, got {len(sizes)} sizes")
    frames, rows, columns = (s // g for s, g in zip((*[1] * (3 - len(sizes)), *sizes), grid, strict=True))
    return frames, rows, columns


def patches(x: Tensor, grid: Grid) -> Tensor:
    """Samples b c *sizes in the order of their tokens, of a grid of frames, rows, columns: b n (c a p q)."""
    frames, rows, columns = grid
    x = x if x.ndim == 5 else x[:, :, None]
    return rearrange(x, "b c (f a) (y p) (x q) -> b (f y x) (c a p q)", f=frames, y=rows, x=columns)


def pixels(tokens: Tensor, grid: Grid, sizes: Sequence[int]) -> Tensor:
    """One value for each token, b n, at all places of its part of a sample: b 1 *sizes."""
    frames, rows, columns = grid
    a, p, q = patch_of(sizes, grid)
    out = repeat(tokens, "b (f y x) -> b 1 (f a) (y p) (x q)", f=frames, y=rows, x=columns, a=a, p=p, q=q)
    return out.view(len(tokens), 1, *sizes)
