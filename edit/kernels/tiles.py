"""What the kernels of block-sparse attention share: which tokens a tile holds, who sees whom, and two products.

A program has a tile of T *own* tokens, all of one group (of a row of queries, or a block of keys), and walks in steps
of S over *other* tokens, those of the groups that a list names. Equal groups are walked flat: 64 keys are four blocks
of 16, gathered. Groups of given lengths, and those where single keys are left out, are walked one by one ("nested").
Trip counts are read on the device.

Products come in two forms. A wide tile (64 own tokens and more) computes own x other', and its own tokens are rows of
the tensor cores' products. A narrow one (16 or 32) computes other x own', with the S gathered tokens as rows, as
`wgmma` wants 64 rows; what it sums is transposed, [width, T], too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edit.kernels.language import tl, triton


@triton.jit
def own_tile(table, tile, tokens, T: tl.constexpr, GROUP: tl.constexpr):
    """Group, first token and end of a tile: from a table of (group, start, end), or of equal groups."""
    if table is not None:
        group = tl.load(table + 3 * tile)
        start = tl.load(table + 3 * tile + 1)
        end = tl.load(table + 3 * tile + 2)
    else:
        each: tl.constexpr = (GROUP + T - 1) // T
        group = tile // each
        start = group * GROUP + (tile % each) * T
        end = tl.minimum(group * GROUP + GROUP, tokens)
    return group, start, end


@triton.jit
def span(j, first, last, listed, cut, groups, tokens, GROUP: tl.constexpr, NESTED: tl.constexpr):
    """Group j of a nested walk with its tokens' range; the whole walk where it is flat."""
    group, start, end = j, first, last
    if NESTED:
        if listed is not None:
            group = tl.load(listed + j)
        there = (group >= 0) & (group < groups)
        group = tl.where(there, group, 0)
        if cut is not None:
            start, end = tl.load(cut + group), tl.load(cut + group + 1)
        else:
            start = group * GROUP
            end = tl.minimum(start + GROUP, tokens)
        end = tl.where(there, end, start)
    return group, start, end


@triton.jit
def other_tokens(t, end, listed, tokens, S: tl.constexpr, GROUP: tl.constexpr, NESTED: tl.constexpr):
    """The S tokens of a step from place t of the walk, and which of them are there."""
    place = t + tl.arange(0, S)
    there = place < end
    token = place
    if listed is not None and not NESTED:
        group = tl.load(listed + place // GROUP, mask=there, other=-1)
        token = group * GROUP + place % GROUP
        there = there & (group >= 0) & (token < tokens)
    return token, there


@triton.jit
def vectors(base, token, there, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a tensor: [tokens, PADDED], zero where there is no token and beyond the width."""
    column = tl.arange(0, PADDED)
    mask = there[:, None] & (column < WIDTH)[None, :]
    return tl.load(base + token[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)


@triton.jit
def keep(base, x, token, there, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    column = tl.arange(0, PADDED)
    mask = there[:, None] & (column < WIDTH)[None, :]
    tl.store(base + token[:, None] * WIDTH + column[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def product(own, other, NARROW: tl.constexpr):
    """Inner products: [T, S], or [S, T] where narrow."""
    if NARROW:
        s = tl.dot(other, tl.trans(own), input_precision="ieee")
    else:
        s = tl.dot(own, tl.trans(other), input_precision="ieee")
    return s


@triton.jit
def mixture(acc, weight, other, NARROW: tl.constexpr):
    """acc + sum over other tokens of weight x vector: [T, width], or [width, T] where narrow."""
    weight = weight.to(other.dtype)
    if NARROW:
        acc = tl.dot(tl.trans(other), weight, acc, input_precision="ieee")
    else:
        acc = tl.dot(weight, other, acc, input_precision="ieee")
    return acc


@triton.jit
def upright(x, NARROW: tl.constexpr):
    """[T, width] of a sum, or back."""
    if NARROW:
        x = tl.trans(x)
    return x


@triton.jit
def left_out(key, without, count):
    """Which keys are in a row's list of those that it does not see."""
    hits = tl.zeros_like(key)
    for j in range(0, count, 16):
        at = j + tl.arange(0, 16)
        each = tl.load(without + at, mask=at < count, other=-1)
        hits += tl.sum((key[:, None] == each[None, :]).to(tl.int32), 1)
    return hits > 0


@triton.jit
def logits(s, query, query_there, key, key_there, bias, near_queries, near_keys, scale, shift, limit,
           AXES: tl.constexpr, DISC: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """Base-2 logits of products, -inf where a query does not see a key; keys run along the axis KEYS."""
    s = s * scale + shift
    if bias is not None:
        b = tl.load(bias + key, mask=key_there, other=0.0).to(tl.float32) * 1.4426950408889634
        s += tl.expand_dims(b, 1 - KEYS)
    seen = tl.expand_dims(query_there, KEYS) & tl.expand_dims(key_there, 1 - KEYS)
    if near_queries is not None:
        apart = tl.zeros_like(s).to(tl.int32)
        for axis in tl.static_range(AXES):  # pyright: ignore[reportGeneralTypeIssues]
            p = tl.load(near_queries + query * AXES + axis, mask=query_there, other=0)
            r = tl.load(near_keys + key * AXES + axis, mask=key_there, other=0)
            d = tl.expand_dims(p, KEYS) - tl.expand_dims(r, 1 - KEYS)
            apart = apart + d * d if DISC else tl.maximum(apart, tl.abs(d))
        seen = seen & (apart <= limit)
    return tl.where(seen, s, float("-inf"))


def table(cut: Tensor, tokens: int, tile: int) -> Tensor:
    """Tiles of groups of given lengths: (group, start, end) of each, int32, start at the end where there is none.

    Args:
        cut: ... g+1, offsets of groups
        tile: most tokens in a tile; there are tokens / tile + g of them, whatever the lengths
    """
    cut = cut.long()
    groups = cut.shape[-1] - 1
    each = (cut.diff(dim=-1) + tile - 1) // tile
    ends = each.cumsum(-1)
    number = torch.arange(tokens // tile + groups, device=cut.device).expand(*cut.shape[:-1], -1).contiguous()
    group = torch.searchsorted(ends, number, right=True).clamp_max(groups - 1)
    start = cut.gather(-1, group) + (number - (ends - each).gather(-1, group)) * tile
    end = cut.gather(-1, group + 1)
    return torch.stack((group, start.minimum(end), end), -1).int()
