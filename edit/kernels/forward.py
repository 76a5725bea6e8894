"""Block-sparse attention, forward, in Triton: one launch for each part, each from where the part before ended.

    o_t, lse_t over the entries seen so far  ->  o_t, lse_t with those of this part, too

A softmax over a first set of entries is summed up by (o, lse): as if it were one entry of logit lse and value o. So the
running maximum starts at lse, the sum at 1, and parts need no merging kernel. Each part has tiles of its own: 16
queries share a list of fine blocks, while 128 queries read pooled keys together. Logits are in base 2, sums in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edit.kernels.language import tl, triton
from edit.kernels.plans import Plan, launch
from edit.kernels.tiles import (
    keep,
    left_out,
    logits,
    mixture,
    other_tokens,
    own_tile,
    product,
    span,
    upright,
    vectors,
)


@triton.jit
def forward_kernel(
    q, k, v, o_before, lse_before, o, lse, index, rows, columns, bias, without, near_queries, near_keys,
    index_step, rows_step, columns_step, bias_step, without_step,  # from one batch and head to the next; 0: shared
    n, m, reach, entries, blocks, left, scale, shift, limit,
    E: tl.constexpr, F: tl.constexpr, EP: tl.constexpr, FP: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    ROW: tl.constexpr, COLUMN: tl.constexpr, NARROW: tl.constexpr, NESTED: tl.constexpr,
    AXES: tl.constexpr, DISC: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one batch and head: grid (tiles, b h).

    index: row r -> its `entries` blocks; None: all keys. rows: a table of tiles; None: equal rows of ROW. columns:
    offsets; None: equal blocks of COLUMN. reach: how far the walk over keys goes, in keys, or in blocks where nested.
    KEYS: the axis of logits along which keys run.
    """
    bh = tl.program_id(1).to(tl.int64)
    if rows is not None:
        rows += bh * rows_step
    row, start, end = own_tile(rows, tl.program_id(0), n, T, ROW)
    if start >= end:
        return
    if index is not None:
        index += bh * index_step + row * entries
    if without is not None:
        without += bh * without_step + row * left
    if columns is not None:
        columns += bh * columns_step
    if bias is not None:
        bias += bh * bias_step
    query = start + tl.arange(0, T)
    there = query < end
    x = vectors(q + bh * n * E, query, there, E, EP)
    top = tl.full([T], float("-inf"), tl.float32)
    total = tl.zeros([T], tl.float32)
    acc = tl.zeros([FP, T] if NARROW else [T, FP], tl.float32)
    if o_before is not None:
        top = tl.load(lse_before + bh * n + query, mask=there, other=float("-inf")) * 1.4426950408889634
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        acc = upright(vectors(o_before + bh * n * F, query, there, F, FP), NARROW)
    for j in range(0, reach if NESTED else 1):
        _, first, last = span(j, 0, reach, index, columns, blocks, m, COLUMN, NESTED)
        for t in range(first, last, S):
            key, key_there = other_tokens(t, last, index, m, S, COLUMN, NESTED)
            y = vectors(k + bh * m * E, key, key_there, E, EP)
            z = vectors(v + bh * m * F, key, key_there, F, FP)
            if without is not None:
                key_there = key_there & (left_out(key, without, left) == 0)
            s = logits(product(x, y, NARROW), query, there, key, key_there, bias, near_queries, near_keys,
                       scale, shift, limit, AXES, DISC, KEYS)  # fmt: skip
            higher = tl.maximum(top, tl.max(s, KEYS))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(s - tl.expand_dims(safe, KEYS))
            less = tl.exp2(top - safe)
            total = total * less + tl.sum(p, KEYS)
            acc = mixture(acc * tl.expand_dims(less, KEYS), p, z, NARROW)
            top = higher
    some = total > 0
    total = tl.where(some, total, 1.0)
    keep(o + bh * n * F, upright(acc / tl.expand_dims(total, KEYS), NARROW), query, there, F, FP)
    ln = tl.where(some, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    tl.store(lse + bh * n + query, ln, mask=there)


def forward(q: Tensor, plans: Sequence[Plan]) -> tuple[Tensor, Tensor]:
    """o b h n f in q's type and lse b h n in fp32; what goes from part to part is in fp32."""
    shape = (*q.shape[:3], plans[0].v.shape[-1])
    lse = q.new_empty(shape[:3], dtype=torch.float32)
    o = q.new_empty(shape)
    between = q.new_empty(shape, dtype=torch.float32) if len(plans) > 1 else o
    for i, plan in enumerate(plans):
        before = {"o_before": between if i else None, "lse_before": lse if i else None}
        last = i == len(plans) - 1
        launch(forward_kernel, plan.queries(q), {"q": q, **before, "o": o if last else between, "lse": lse})
    return o, lse
