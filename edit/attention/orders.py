"""Orders of image tokens: curves along which neighbours in the sequence are neighbours in the picture or the video.

A method whose blocks are runs of consecutive tokens sets an order once, in `Edit.embed`: `Denoiser.run` applies the
permutation to tokens and positions in front of the first unit, and undoes it behind the last. An order depends on the
grid alone, and is made on the device without a wait. It lists row-major positions in the grid: x[order] is the
sequence, x[order.argsort()] undoes it.

Morton's Z-order (methods/llsa.md, "Token reordering") interleaves the bits of column (lowest), row and frame. Only bits
that a side has take part, so that 2^a x 2^b x 2^c grids are covered without gaps, and every aligned run of 2^i tokens
is a box: 2^(2i) tokens of a picture a square, 2^(3i) of a video a cube, as far as no side ends. Other sides are those
of the next power of two, without the cells outside: a run is then no box at the border.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from edit.grid import Grid
from edit.stream import Stream


def morton(grid: Grid, device: torch.device | None = None) -> Tensor:
    """The Z-order of a grid of frames, rows and columns: n, int64."""
    return z_codes(grid, device).argsort()


def z_codes(grid: Grid, device: torch.device | None = None) -> Tensor:
    """The place of each cell, row-major, on the Z-curve through the grid's power-of-two cover: n, int64, all different.

    Raises:
        ValueError: for a grid without tokens
    """
    if min(grid) < 1:
        raise ValueError(f"an order is of a grid of frames, rows and columns, at least 1 each, got {list(grid)}")
    bits = [(side - 1).bit_length() for side in grid]
    axes = [a for level in range(max(bits)) for a in (2, 1, 0) if level < bits[a]][::-1]  # of each bit, highest first
    covered = torch.arange(2 ** sum(bits), device=device).view([2] * len(axes))  # a dimension for each bit of the code
    by_axis = [d for a in range(3) for d in range(len(axes)) if axes[d] == a]  # all bits of frames, of rows, of columns
    cells = covered.permute(by_axis).reshape([2**b for b in bits])
    frames, rows, columns = grid
    return cells[:frames, :rows, :columns].flatten()


def reordered(stream: Stream, order: Tensor, who: str) -> Stream:
    """The stream whose image tokens stand in this order while the units run; called in an edit's `embed`.

    Args:
        stream: embedded, in the order of the grid
        order: n, int64
        who: the edit, for messages

    Raises:
        ValueError: if another edit has given the tokens an order, or there are more or fewer of them
    """
    if stream.layout.permutation is not None:
        raise ValueError(f"{who} orders the image tokens, and another edit has done so already: leave one of them out")
    if (count := stream.layout.of_image(stream.image).shape[1]) != len(order):
        raise ValueError(f"{who} has an order of {len(order)} image tokens and there are {count}: leave one edit out")
    return replace(stream, layout=replace(stream.layout, permutation=order))
