"""Pyramids of pooled tokens, and top-k down their levels (methods/llsa.md, "Definition").

    X^0 = X,   X^l[j] = mean of X^(l-1)[j B .. j B + B - 1]
    I_L = top_K(Q^L K^L'),   I_l[u] = top_K over { c B + r : c in I_(l+1)[u // B], r < B } of <Q^l[u], K^l[c B + r]>

Means are in fp32 at least, and over the tokens that a block has: the last one of a level may be shorter. Selections are
without gradients, of equal scores the first keys win, and lists ascend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def lengths(count: int, size: int, like: Tensor) -> Tensor:
    """How many of `count` tokens each block of `size` has; the last may have fewer. Numbers `like` others."""
    first = torch.arange(0, count, size, device=like.device)
    return (count - first).clamp_max_(size).to(like.dtype)


def pyramid(x: Tensor, block: int, levels: int) -> list[Tensor]:
    """X^1 .. X^L, means over the tokens that a block has, in fp32 at least: b h n e -> b h N_l e each."""
    count, found = x.shape[2], []
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    for level in range(1, levels + 1):  # sums of sums: a mean of means would count a short last block too much
        ragged = -x.shape[2] % block
        x = F.pad(x, (0, 0, 0, ragged)) if ragged else x
        x = x.unflatten(2, (-1, block)).sum(3)
        found.append(x / lengths(count, block**level, x)[:, None])
    return found


@torch.no_grad()
def select(queries: Sequence[Tensor], keys: Sequence[Tensor], block: int, top_k: int) -> list[Tensor]:
    """I_1 .. I_L: for each pooled query the keys of its level that it selects, ascending: b h N_l K, int32.

    Args:
        queries, keys: Q^1 .. Q^L and K^1 .. K^L
        block: B
        top_k: K, of which a level with fewer keys takes all
    """
    found = [best(product(queries[-1], keys[-1]), min(top_k, keys[-1].shape[2]))]
    for q, k in zip(reversed(queries[:-1]), reversed(keys[:-1]), strict=True):
        parents, count = found[0], k.shape[2]  # I_(l+1): b h N_(l+1) K
        short = parents.shape[2] * block - count
        q, k = (F.pad(x, (0, 0, 0, short)).unflatten(2, (-1, block)) for x in (q, k))  # b h N_(l+1) B e
        children = (parents.long()[..., None] * block + torch.arange(block, device=k.device)).flatten(3)  # b h N (K B)
        seen = gathered(k, parents).flatten(3, 4)  # b h N (K B) e
        scores = product(q, seen)  # b h N B (K B)
        if short:  # a token that is not there is no candidate
            scores = scores.masked_fill((children >= count)[:, :, :, None], -math.inf)
        places = best(scores, min(top_k, count))
        own = children[:, :, :, None].expand(-1, -1, -1, block, -1).gather(-1, places.long())
        found.insert(0, own.flatten(2, 3)[:, :, :count].int())
    return found


def product(q: Tensor, k: Tensor) -> Tensor:
    """q k', under autocast too as exact as they are: equal scores would be many in bf16, and the first ones win."""
    kind = "cpu" if q.device.type == "meta" else q.device.type  # there is no autocast of meta
    with torch.autocast(kind, enabled=False):
        return q @ k.transpose(-1, -2)


def best(scores: Tensor, count: int) -> Tensor:
    """Places of the largest along the last dimension, ascending; of equal ones the first: int32."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return order.sort(dim=-1).values.int()


def gathered(blocks: Tensor, index: Tensor) -> Tensor:
    """The blocks that each row lists: b h c B e, b h r n -> b h r n B e."""
    places = index.long().flatten(2)[..., None, None].expand(-1, -1, -1, *blocks.shape[3:])
    return blocks.gather(2, places).unflatten(2, index.shape[2:])
