"""Transposition of lists on the device: which rows of queries see a block of keys.

    C[j] = number of entries below j,   R[C[j] : C[j+1]] = the rows whose lists name block j

Two ways, with the same sets: a stable sort, whose segments ascend in every run, and two small kernels that count and
place by atomic additions, whose order within a segment is that of a race.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edit.kernels.language import tl, triton


def transposed(index: Tensor, blocks: int, deterministic: bool = True) -> tuple[Tensor, Tensor]:
    """Lists of rows by block.

    Args:
        index: b h r n, int32; entries below 0 and from `blocks` on are left out
        blocks: c
        deterministic: the same order at each run

    Returns:
        C b h c+1 and R b h r*n, int32; R behind C[c] is without meaning
    """
    if not deterministic and index.is_cuda:
        return raced(index, blocks)
    flat = index.flatten(-2).long()
    flat = flat.masked_fill((flat < 0) | (flat >= blocks), blocks)  # behind all
    counts = torch.zeros(*flat.shape[:-1], blocks + 1, dtype=torch.int32, device=index.device)
    counts.scatter_add_(-1, flat, torch.ones_like(flat, dtype=torch.int32))
    starts = torch.nn.functional.pad(counts[..., :-1].cumsum(-1, dtype=torch.int32), (1, 0))
    rows = flat.argsort(dim=-1, stable=True) // index.shape[-1]
    return starts, rows.int()


@triton.jit
def count_kernel(index, counts, total, blocks, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    bh = tl.program_id(1).to(tl.int64)
    block = tl.load(index + bh * total + at, mask=at < total, other=-1)
    tl.atomic_add(counts + bh * blocks + block, 1, mask=(block >= 0) & (block < blocks))


@triton.jit
def place_kernel(index, places, rows, total, blocks, entries, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    bh = tl.program_id(1).to(tl.int64)
    block = tl.load(index + bh * total + at, mask=at < total, other=-1)
    there = (block >= 0) & (block < blocks)
    place = tl.atomic_add(places + bh * blocks + block, 1, mask=there)
    tl.store(rows + bh * total + place, at // entries, mask=there)


def raced(index: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """`transposed` by atomic additions; index is contiguous."""
    b, h, r, entries = index.shape
    counts = torch.zeros(b, h, blocks, dtype=torch.int32, device=index.device)
    rows = torch.empty(b, h, r * entries, dtype=torch.int32, device=index.device)
    grid = (-(-r * entries // 1024), b * h)
    count_kernel[grid](index, counts, r * entries, blocks, N=1024)
    starts = torch.nn.functional.pad(counts.cumsum(-1, dtype=torch.int32), (1, 0))
    places = starts[..., :-1].contiguous()
    place_kernel[grid](index, places, rows, r * entries, blocks, entries, N=1024)
    return starts, rows
