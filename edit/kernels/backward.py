"""Block-sparse attention, backward, in Triton: gradients of queries, keys and values, through o and lse.

    D_t = <dO_t, O_t> - dlse_t,    P_te = w_te exp(s q_t k_e') / sum = exp(s q_t k_e' + bias_e - lse_t)
    dV_e = sum_t P_te dO_t,   dS_te = P_te (dO_t v_e' - D_t),   dQ_t = s sum_e dS_te k_e,   dK_e = s sum_t dS_te q_t

P needs o and lse of all parts together, so that parts need nothing of each other. Programs that own queries sum dQ from
part to part in fp32. Programs that own keys walk over the rows of queries that the transposed lists name. Keys that all
queries see are few: their queries are split into chunks, which are summed afterwards, in one order and without atomics.
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
def query_kernel(
    q, k, v, o, lse, do, dlse, delta, dq_before, dq,
    index, rows, columns, bias, without, near_queries, near_keys,
    index_step, rows_step, columns_step, bias_step, without_step,
    n, m, reach, entries, blocks, left, scale, shift, limit, factor,
    E: tl.constexpr, F: tl.constexpr, EP: tl.constexpr, FP: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    ROW: tl.constexpr, COLUMN: tl.constexpr, NARROW: tl.constexpr, NESTED: tl.constexpr, AXES: tl.constexpr,
    DISC: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries, and D for the other kernel; arguments as of `forward_kernel`."""
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
    g = vectors(do + bh * n * F, query, there, F, FP)
    ln = tl.load(lse + bh * n + query, mask=there, other=float("inf"))
    d = tl.sum(g.to(tl.float32) * vectors(o + bh * n * F, query, there, F, FP).to(tl.float32), 1)
    if dlse is not None:
        d -= tl.load(dlse + bh * n + query, mask=there, other=0.0)
    d = tl.where(ln == float("-inf"), 0.0, d)  # nothing seen: whatever came for lse, no gradient goes on
    tl.store(delta + bh * n + query, d, mask=there)
    ln = tl.where(ln == float("-inf"), 0.0, ln * 1.4426950408889634)
    acc = tl.zeros([EP, T] if NARROW else [T, EP], tl.float32)
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
            p = tl.exp2(s - tl.expand_dims(ln, KEYS))
            ds = p * (product(g, z, NARROW) - tl.expand_dims(d, KEYS))
            acc = mixture(acc, ds, y, NARROW)
    acc = upright(acc, NARROW) * factor
    if dq_before is not None:
        acc += vectors(dq_before + bh * n * E, query, there, E, EP)
    keep(dq + bh * n * E, acc, query, there, E, EP)


@triton.jit
def key_kernel(
    q, k, v, lse, do, delta, dk, dv, starts, listed, rows, columns, bias, without, near_queries, near_keys,
    starts_step, listed_step, rows_step, columns_step, bias_step, without_step,
    n, m, reach, each, groups, left, scale, shift, limit, factor,
    E: tl.constexpr, F: tl.constexpr, EP: tl.constexpr, FP: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    ROW: tl.constexpr, COLUMN: tl.constexpr, NARROW: tl.constexpr, NESTED: tl.constexpr,
    AXES: tl.constexpr, DISC: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, summed over one chunk of queries: grid (tiles, chunks, b h).

    starts, listed: rows by block; None: all rows, of which a chunk takes `each`, in queries, or in rows where nested.
    columns: a table of tiles. rows: offsets. dk, dv: chunks b h m width.
    """
    chunk, bh = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if columns is not None:
        columns += bh * columns_step
    block, start, end = own_tile(columns, tl.program_id(0), m, T, COLUMN)
    if start >= end:
        return
    if listed is not None:
        listed += bh * listed_step
    if rows is not None:
        rows += bh * rows_step
    if bias is not None:
        bias += bh * bias_step
    if without is not None:
        without += bh * without_step
    lowest, highest = chunk * each, tl.minimum(chunk * each + each, reach)
    if starts is not None:
        segment = starts + bh * starts_step + block
        lowest, highest = tl.load(segment), tl.load(segment + 1)
        if not NESTED:
            lowest, highest = lowest * ROW, highest * ROW
    key = start + tl.arange(0, T)
    there = key < end
    y = vectors(k + bh * m * E, key, there, E, EP)
    z = vectors(v + bh * m * F, key, there, F, FP)
    sum_k = tl.zeros([EP, T] if NARROW else [T, EP], tl.float32)
    sum_v = tl.zeros([FP, T] if NARROW else [T, FP], tl.float32)
    for j in range(lowest if NESTED else 0, highest if NESTED else 1):
        row, first, last = span(j, lowest, highest, listed, rows, groups, n, ROW, NESTED)
        key_there = there
        if without is not None:
            key_there = there & (left_out(key, without + row * left, left) == 0)
        for t in range(first, last, S):
            query, query_there = other_tokens(t, last, listed, n, S, ROW, NESTED)
            x = vectors(q + bh * n * E, query, query_there, E, EP)
            g = vectors(do + bh * n * F, query, query_there, F, FP)
            ln = tl.load(lse + bh * n + query, mask=query_there, other=float("inf")) * 1.4426950408889634
            ln = tl.where(ln == float("-inf"), 0.0, ln)
            d = tl.load(delta + bh * n + query, mask=query_there, other=0.0)
            s = logits(product(y, x, NARROW), query, query_there, key, key_there, bias, near_queries, near_keys,
                       scale, shift, limit, AXES, DISC, KEYS)  # fmt: skip
            p = tl.exp2(s - tl.expand_dims(ln, KEYS))
            sum_v = mixture(sum_v, p, g, NARROW)
            ds = p * (product(z, g, NARROW) - tl.expand_dims(d, KEYS))
            sum_k = mixture(sum_k, ds, x, NARROW)
    place = (chunk * tl.num_programs(2) + bh) * m
    keep(dk + place * E, upright(sum_k, NARROW) * factor, key, there, E, EP)
    keep(dv + place * F, upright(sum_v, NARROW), key, there, F, FP)


def backward(
    q: Tensor, plans: Sequence[Plan], o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dQ, and dK and dV of each part, in the types of q, k and v."""
    do = do.contiguous()
    seen = {"q": q, "lse": lse, "do": do, "delta": torch.empty_like(lse), "factor": plans[0].scale}
    running = torch.empty_like(q, dtype=torch.float32) if len(plans) > 1 else None
    dq = torch.empty_like(q)
    for i, plan in enumerate(plans):
        sums = {"dq_before": running if i else None, "dq": dq if i == len(plans) - 1 else running}
        launch(query_kernel, plan.queries(q, backward=True), {**seen, "o": o, "dlse": dlse, **sums})
    dk, dv = [], []
    for plan in plans:
        grid, arguments = plan.keys(q)
        chunks = grid[1]
        made = [x.new_empty(chunks, *x.shape, dtype=torch.float32 if chunks > 1 else x.dtype) for x in (plan.k, plan.v)]
        launch(key_kernel, (grid, arguments), {**seen, "dk": made[0], "dv": made[1]})
        for x, grads in zip(made, (dk, dv), strict=True):
            grads.append(x[0] if chunks == 1 else x.sum(0).to(q.dtype))
    return dq, dk, dv
