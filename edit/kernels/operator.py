"""The kernels as operators of torch, so that compilers, fake tensors and counters of work see one node.

A part is flat in a schema: seven tables (index, row offsets, column offsets, bias, keys left out, positions of queries
and of keys), four sizes (rows, columns, limit, disc) and a constant bias.

Counted work is what kernels compute: two products forward, and seven backward, as logits and dO v' are computed for
queries and again for keys. Entries below 0 in a list are computed, too, as are pairs that `near` or `without` hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from edit.kernels.backward import backward
from edit.kernels.forward import forward
from edit.kernels.parts import Near, Part
from edit.kernels.plans import Plan, on
from edit.kernels.valueless import valueless

SHARED = (
    "Tensor q, Tensor[] k, Tensor[] v, Tensor?[] tables, int[] sizes, float[] shifts, float scale, bool deterministic"
)
Flat = tuple[list[Tensor], list[Tensor], list[Tensor | None], list[int], list[float]]


def flat(parts: Sequence[Part]) -> Flat:
    tables: list[Tensor | None] = []
    sizes: list[int] = []
    for part in parts:
        cuts = [cut if isinstance(cut, Tensor) else None for cut in (part.rows, part.columns)]
        near = (None, None) if part.near is None else (part.near.queries, part.near.keys)
        tables += [part.index, *cuts, part.bias if isinstance(part.bias, Tensor) else None, part.without, *near]
        sizes += [0 if isinstance(cut, Tensor) else cut for cut in (part.rows, part.columns)]
        sizes += [0, 0] if part.near is None else [part.near.limit, int(part.near.shape == "disc")]
    shifts = [0.0 if part.bias is None or isinstance(part.bias, Tensor) else float(part.bias) for part in parts]
    return [part.k for part in parts], [part.v for part in parts], tables, sizes, shifts


def solid(k: Sequence[Tensor], v: Sequence[Tensor], tables: Sequence, sizes: Sequence, shifts: Sequence) -> list[Part]:
    """The inverse of `flat`."""
    parts = []
    for i, (keys, values, shift) in enumerate(zip(k, v, shifts, strict=True)):
        index, rows, columns, bias, without, near_queries, near_keys = tables[7 * i : 7 * i + 7]
        row, column, limit, disc = sizes[4 * i : 4 * i + 4]
        near = None if near_queries is None else Near(near_queries, near_keys, limit, "disc" if disc else "box")
        rows, columns = row if rows is None else rows, column if columns is None else columns
        parts.append(Part(keys, values, index, rows, columns, shift if bias is None else bias, without, near))
    return parts


def plans(q: Tensor, *rest: Any) -> list[Plan]:
    *lists, scale, deterministic = rest
    return [Plan(q, part, scale, deterministic) for part in solid(*lists)]


@torch.library.custom_op("edit::block_sparse", mutates_args=(), schema=f"({SHARED}) -> (Tensor, Tensor)")
def block_sparse(q, *rest):
    with on(q.device):
        return forward(q.contiguous(), plans(q, *rest))


@block_sparse.register_fake
def _(q, k, v, *rest):
    return q.new_empty(*q.shape[:3], v[0].shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "edit::block_sparse_backward",
    mutates_args=(),
    schema=f"({SHARED}, Tensor o, Tensor lse, Tensor d_o, Tensor d_lse) -> Tensor[]",
)
def block_sparse_backward(q, *rest):
    *given, o, lse, do, dlse = rest
    with on(q.device):
        dq, dk, dv = backward(q.contiguous(), plans(q, *given), o, lse, do, dlse.contiguous())
    return [dq, *dk, *dv]


@block_sparse_backward.register_fake
def _(q, k, v, *rest):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, *k, *v)]


def remember(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, tables, *ctx.numbers = inputs
    ctx.parts = len(k)
    ctx.save_for_backward(q, *k, *v, *tables, *output)


def gradients(ctx: Any, do: Tensor, dlse: Tensor) -> tuple:
    q, *rest = ctx.saved_tensors
    p = ctx.parts
    k, v, tables, (o, lse) = rest[:p], rest[p : 2 * p], rest[2 * p : -2], rest[-2:]
    dq, *grads = block_sparse_backward(q, k, v, tables, *ctx.numbers, o, lse, do, dlse)
    return dq, grads[:p], grads[p:], None, None, None, None, None


block_sparse.register_autograd(gradients, setup_context=remember)


def pairs(q: Tensor, *lists: Any) -> int:
    """Pairs of query and key that are computed, from shapes, and real lengths where groups have given ones."""
    return sum(part_pairs(q, part) for part in solid(*lists))


def part_pairs(q: Tensor, part: Part) -> int:
    (b, h, n, _), m = q.shape, part.k.shape[2]
    if part.index is None:
        return b * h * n * m
    of_rows, of_blocks = group_lengths(part.rows, n), group_lengths(part.columns, m)
    if isinstance(of_rows, int) and isinstance(of_blocks, int):
        return b * h * n * part.index.shape[3] * of_blocks
    if any(isinstance(x, Tensor) and valueless(x) for x in (of_rows, of_blocks)):  # groups of equal length
        return b * h * n * part.index.shape[3] * -(-m // part.blocks)
    index = part.index.expand(b, h, -1, -1).long()
    if isinstance(of_blocks, int):
        wide = torch.full(index.shape[:3], of_blocks * index.shape[3], device=q.device)
    else:
        of_blocks = of_blocks.expand(b, h, -1).long()
        wide = of_blocks.gather(-1, index.clamp_min(0).flatten(2)).view_as(index).masked_fill(index < 0, 0).sum(-1)
    if isinstance(of_rows, int):
        assert isinstance(part.rows, int)
        of_rows = (n - torch.arange(0, n, part.rows, device=q.device)).clamp_max(part.rows)
    return int((of_rows * wide).sum())


def group_lengths(cut: int | Tensor, tokens: int) -> int | Tensor:
    return cut.diff(dim=-1) if isinstance(cut, Tensor) else min(cut, tokens)


@register_flop_formula(torch.ops.edit.block_sparse, get_raw=True)
def forward_flops(q, k, v, tables, sizes, shifts, scale, deterministic, *_, **__) -> int:
    return 2 * pairs(q, k, v, tables, sizes, shifts) * (q.shape[3] + v[0].shape[3])


@register_flop_formula(torch.ops.edit.block_sparse_backward, get_raw=True)
def backward_flops(q, k, v, tables, sizes, shifts, scale, deterministic, *_, **__) -> int:
    return 2 * pairs(q, k, v, tables, sizes, shifts) * (4 * q.shape[3] + 3 * v[0].shape[3])


def attend_kernel(q: Tensor, parts: Sequence[Part], scale: float, deterministic: bool) -> tuple[Tensor, Tensor]:
    return block_sparse(q, *flat(parts), scale, deterministic)
