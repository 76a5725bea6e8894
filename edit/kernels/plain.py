"""Block-sparse attention in plain PyTorch: the reference of the kernels, and the path where there is no GPU.

    w_te = exp(s q_t k_e' + bias_e) over the entries e that query t sees, in all parts
    o_t = sum_e w_te v_e / sum_e w_te,     lse_t = ln sum_e w_te

The listed blocks of each row of queries are gathered, so that memory is O(n M) for M keys a query, and gradients are
autograd's. There are no loops over rows, blocks or heads. The largest logit of a query over all parts is subtracted
before exponentials; it is a constant that cancels. Half precisions are computed in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from edit.kernels.parts import Near, Part
from edit.kernels.valueless import valueless


class Seen(NamedTuple):
    """What rows of queries see of one part."""

    logits: Tensor  # b h r R M, -inf: not seen
    values: Tensor  # b h r M f, or b h 1 M f for all rows
    rows: int | Tensor


def attend_plain(q: Tensor, parts: Sequence[Part], scale: float) -> tuple[Tensor, Tensor]:
    """b h n e -> o b h n f in q's type, lse b h n in fp32 (fp64 of fp64)."""
    n = q.shape[2]
    exact = torch.promote_types(q.dtype, torch.float32)
    seen = [look(q.to(exact), part, scale) for part in parts]
    tops = [unrowed(x.logits.detach().amax(-1, keepdim=True), x.rows, n) for x in seen]  # b h n 1 each
    top = torch.stack(tops).amax(0)
    top = top.masked_fill(top == -math.inf, 0)
    over, under = [], []
    for x in seen:
        weight = (x.logits - rowed(top, x.rows)).exp()
        mixed = weight @ x.values if x.values.shape[2] > 1 else flat_product(weight, x.values)
        over.append(unrowed(mixed, x.rows, n))
        under.append(unrowed(weight.sum(-1, keepdim=True), x.rows, n))
    total = torch.stack(under).sum(0)  # b h n 1
    none = total == 0
    safe = total.masked_fill(none, 1)
    o = torch.stack(over).sum(0) / safe
    lse = (top + safe.log()).masked_fill(none, -math.inf)
    return o.to(q.dtype), lse.squeeze(-1)


def look(q: Tensor, part: Part, scale: float) -> Seen:
    """Logits and values of one part; q in the precision to compute in."""
    n, m = q.shape[2], part.k.shape[2]
    alike = part.index is None and part.without is None  # all rows see the same: one row of all queries
    rows = n if alike else part.rows
    k, v = part.k.to(q.dtype), part.v.to(q.dtype)
    queries = tokens(rows, n, q.device)  # 1 1 r R, or b h r R
    rowed_q = scale * rowed(q, rows)
    if part.index is None:
        keys = torch.arange(m, device=q.device).view(1, 1, 1, m)
        k, v = k.unsqueeze(2), v.unsqueeze(2)
        logits = flat_product(rowed_q, k.mT)
    else:
        keys, k, v = listed(part, part.index, k, v)
        logits = rowed_q @ k.mT
    if isinstance(part.bias, Tensor):
        logits = logits + take(part.bias.to(q.dtype).unsqueeze(-1), keys).mT
    elif part.bias is not None:
        logits = logits + part.bias
    hidden = (keys < 0).unsqueeze(-2) | (queries < 0).unsqueeze(-1)  # b h r R M
    if part.without is not None:
        hidden = hidden | excluded(keys, part.without, m).unsqueeze(-2)
    if part.near is not None:
        hidden = hidden | ~close(part.near, queries, keys)
    return Seen(logits.masked_fill(hidden, -math.inf), v, rows)


def listed(part: Part, index: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys b h r M (-1: none), and k and v at them, b h r M e."""
    m, index = k.shape[2], index.long()
    if isinstance(part.columns, Tensor):
        members = tokens(part.columns, m, k.device)  # b h c C
        keys = take(members, index).masked_fill(index.unsqueeze(-1) < 0, -1).flatten(-2)
        return keys, take(k, keys), take(v, keys)
    size = part.columns
    keys = index.unsqueeze(-1) * size + torch.arange(size, device=k.device)
    keys = keys.masked_fill((keys >= m) | (index.unsqueeze(-1) < 0), -1).flatten(-2)
    blocks = [take(rowed(x, size).flatten(-2), index).unflatten(-1, (size, -1)).flatten(3, 4) for x in (k, v)]
    return keys, blocks[0], blocks[1]


def tokens(cut: int | Tensor, count: int, device: torch.device) -> Tensor:
    """The tokens of each group, one group a row, -1 where it is shorter: 1 1 r R, or b h r R of offsets."""
    if isinstance(cut, Tensor):
        start, end = cut[..., :-1, None].long(), cut[..., 1:, None].long()
        ids = start + torch.arange(longest(cut, count), device=device)
        return ids.masked_fill(ids >= end, -1)
    groups = -(-count // cut)
    ids = torch.arange(groups * cut, device=device)
    return ids.masked_fill(ids >= count, -1).view(1, 1, groups, cut)


def longest(cut: Tensor, count: int) -> int:
    """Tokens in the longest group; where there are no numbers, of groups of equal length."""
    return -(-count // (cut.shape[-1] - 1)) if valueless(cut) else max(1, int(cut.diff(dim=-1).max()))


def rowed(x: Tensor, cut: int | Tensor) -> Tensor:
    """Tokens in their groups: b h n w -> b h r R w. Behind a shorter group lie zeros or other tokens."""
    if isinstance(cut, Tensor):
        return take(x, tokens(cut, x.shape[2], x.device))
    short = -x.shape[2] % cut
    return (F.pad(x, (0, 0, 0, short)) if short else x).unflatten(2, (-1, cut))


def unrowed(x: Tensor, cut: int | Tensor, n: int) -> Tensor:
    """The inverse of `rowed`: b h r R w -> b h n w."""
    if not isinstance(cut, Tensor):
        return x.flatten(2, 3)[:, :, :n]
    token = torch.arange(n, device=cut.device, dtype=cut.dtype).expand(*cut.shape[:2], n)
    row = torch.searchsorted(cut[..., 1:].contiguous(), token.contiguous(), right=True)
    place = token - cut.long().gather(-1, row)
    return take(x.flatten(2, 3), row * x.shape[3] + place)


def take(x: Tensor, ids: Tensor) -> Tensor:
    """x[ids] along the third axis: b h m w, b h ... -> b h ... w; 1 is allowed for b and h of either. Below 0: any."""
    b, h, m, w = x.shape
    batch, heads = max(b, ids.shape[0]), max(h, ids.shape[1])
    at = torch.arange(b * h, device=x.device).view(b, h, *(1,) * (ids.ndim - 2)) * m + ids.clamp_min(0)
    at = at.expand(batch, heads, *ids.shape[2:])
    return x.flatten(0, 2).index_select(0, at.flatten()).view(*at.shape, w)


def flat_product(x: Tensor, y: Tensor) -> Tensor:
    """b h r R i, b h 1 i j -> b h r R j, without copies of y for rows."""
    return (x.flatten(2, 3) @ y.squeeze(2)).unflatten(2, x.shape[2:4])


def excluded(keys: Tensor, without: Tensor, m: int) -> Tensor:
    """Whether a key of a row is one that the row does not see: b h r M."""
    b, h, r, _ = without.shape
    table = torch.zeros(b, h, r, m + 1, dtype=torch.bool, device=without.device)
    table.scatter_(-1, without.long().masked_fill(without < 0, m), True)
    shape = [max(i, j) for i, j in zip(keys.shape[:3], table.shape[:3], strict=True)]
    return table.expand(*shape, -1).gather(-1, keys.clamp_min(0).expand(*shape, -1))


def close(near: Near, queries: Tensor, keys: Tensor) -> Tensor:
    """Whether the predicate holds: b h r R, b h r M -> b h r R M."""
    p = take(near.queries.long()[None, None], queries).unsqueeze(-2)
    apart = p - take(near.keys.long()[None, None], keys).unsqueeze(-3)
    if near.shape == "disc":
        return apart.square().sum(-1) <= near.limit
    return (apart.abs() <= near.limit).all(-1)
