"""LLSA: trainable log-linear sparse attention (arXiv 2512.16615), in place of softmax attention between image tokens.

Tokens stand in Morton order (`edit.attention.orders`). Queries and keys, rotated and normalised already, and values are
pooled in fp32 by the block size B, level by level, N_l = N / B^l:

    X^0 = X,   X^l[j] = mean of X^(l-1)[j B .. j B + B - 1],   l = 1 .. L,   X one of Q, K, V

Selection, without a gradient: at the top every query scores all keys; below, a query scores the B children of each of
the K keys that its parent selected, so that all of it costs O(N K):

    I_L = top_K(Q^L K^L'),   I_l[u] = top_K over { c B + r : c in I_(l+1)[u // B], r < B } of <Q^l[u], K^l[c B + r]>

A query block i, B consecutive tokens, sees in one softmax, with p_l(i) = i // B^(l-1):

    level 0         the tokens of each block in I_1[i],                                weight 1
    level l < L     the children of each entry of I_(l+1)[p_(l+1)(i)],                 weight B^l
    level L         all N_L tokens,                                                    weight B^L
    o = sum w exp(s q k') v / sum w exp(s q k'),   a weight is the logit's bias l ln B: as many tokens as it stands for

which are M = K B + sum_(l=1)^(L-1) K B + N / B^L keys: with L growing as ln N, O(N log N) in all. Levels above
`enrichment` (L_e) are left out: 0 is plain hierarchical top-k. Gradients reach K^l and V^l, and through the pooling K
and V, each with its weight, which the reference's single-level backward omits.

Ours: K is at most N_l. N may be no multiple of B^L: the last block of a level is then shorter, means are over the
tokens that it has, and its weight is their number n_e (the same where N is a multiple). `overlap=False` drops a coarse
token where all of its children are seen one level below, so that every token is seen at one level alone. In joint
sequences the pyramid is of image tokens; text, registers and further tokens are keys that every query sees, and queries
that see all keys densely. Masked text is not seen, in families that mask it. SD3's second attention stays dense.

All weights are trained. Specification: methods/llsa.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.attention.orders import morton, reordered
from edit.attention.pyramid import lengths, pyramid, select
from edit.denoiser import Denoiser, Edit
from edit.edits import chosen
from edit.inputs.limits import Count, Limits, Natural, check_numbers
from edit.kernels.block_sparse import Part, attend
from edit.stream import Condition, Layout, Step, Stream
from edit.structure import grid_of
from edit.unit import Unit, core

AUTO = ((262_144, 3), (16_384, 2))  # from so many tokens on as many levels; the reference's rule


@dataclass
class LLSA(Edit):
    """Image tokens see the keys of a few blocks, and means of all others.

    Args:
        block: B, a power of two
        top_k: K, of all levels
        levels: L; None: 1, from 16,384 tokens on 2, from 262,144 on 3
        enrichment: L_e, levels whose means are seen; None: all of them
        overlap: means are seen beside the tokens that they are of, as published; False: only of what is not seen
        dense_below: with fewer image tokens attention stays dense, in their own order: nothing is gained there
        units: which, counted from 0; none given: all
    """

    block: Annotated[int, Limits(2, 1024)] = 16
    top_k: Count = 8
    levels: Annotated[int, Limits(1, 20)] | None = None
    enrichment: Annotated[int, Limits(0, 20)] | None = None
    overlap: bool = True
    dense_below: Natural = 4096
    units: tuple[int, ...] = ()

    subsets = False

    def __post_init__(self):
        check_numbers(self)
        self.units = tuple(self.units)
        if self.block & (self.block - 1):
            raise ValueError(
                f"LLSA: block must be a power of two, as only these are boxes in Morton order, got {self.block}: take "
                f"{1 << self.block.bit_length() - 1} or {1 << self.block.bit_length()}"
            )

    def apply(self, denoiser: Denoiser) -> None:
        try:
            self.depth(math.prod(grid_of(denoiser)))
        except ValueError as error:
            raise ValueError(f"this {denoiser.name} has too few image tokens for {error}") from error
        for i in chosen("LLSA", self.units, denoiser):
            unit = core(denoiser.units[i])
            if "attention" in unit.slots or "mixer" in unit.slots:
                raise ValueError(
                    f"LLSA: another edit has replaced the attention of unit {i} of this {denoiser.name}: leave it out"
                )
            unit.slots.attention = Sparse(unit, self, denoiser.masks)

    def embed(self, stream: Stream, t: Tensor, condition: Condition, own: nn.Module | None) -> Stream:
        grid = stream.layout.grid
        if not self.depth(math.prod(grid)):
            return stream
        return reordered(stream, morton(grid, stream.image.device), "LLSA")

    def depth(self, tokens: int) -> int:
        """L for so many image tokens; 0: attention stays dense.

        Raises:
            ValueError: if there are too few tokens for the block size, the levels or top_k
        """
        if tokens < self.dense_below:
            return 0
        if tokens < self.block:
            raise ValueError(
                f"LLSA: a block of {self.block} tokens is more than the {tokens} that there are: set block to at most "
                f"{tokens}, or dense_below to {tokens + 1}"
            )
        most = deepest(tokens, self.block)
        if self.levels is not None and self.levels > most:
            raise ValueError(
                f"LLSA: levels={self.levels} of blocks of {self.block} need {self.block ** (self.levels + 1)} image "
                f"tokens and there are {tokens}: set levels to at most {most}"
            )
        if self.top_k > (blocks := -(-tokens // self.block)):
            raise ValueError(
                f"LLSA: top_k={self.top_k} of {blocks} blocks, as there are {tokens} image tokens in blocks of "
                f"{self.block}: set top_k to at most {blocks}"
            )
        return min(most, self.levels or next((n for count, n in AUTO if tokens >= count), 1))

    def keys_per_query(self, tokens: int) -> int:
        """M, image keys that a query sees: of levels below the top in full blocks; all tokens where it is dense."""
        if not (top := self.depth(tokens)):
            return tokens
        sizes = [-(-tokens // self.block**level) for level in range(top + 1)]
        seen = [min(self.top_k, n) * self.block for n in sizes[1:]] + [sizes[top]]  # of levels 0 .. L - 1, and L
        return sum(seen[: 1 + (top if self.enrichment is None else self.enrichment)])


def deepest(tokens: int, block: int) -> int:
    """L_max = floor(log_B N - 1), so that the top has B tokens or more; but 1 at least."""
    levels = 1
    while block ** (levels + 2) <= tokens:
        levels += 1
    return levels


class Sparse:
    """The slot `attention` of a unit.

    Args:
        unit: whose own attention runs where there are few tokens
        edit: its settings
        masks: whether the family leaves masked text out
    """

    def __init__(self, unit: Unit, edit: LLSA, masks: bool):
        self.unit, self.edit, self.masks = unit, edit, masks

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, step: Step | None = None) -> Tensor:
        """b h s e each, in the joint order -> b h s e."""
        count = math.prod(layout.grid)
        if not (levels := self.edit.depth(count)):
            return self.unit.own_attention(q, k, v, layout, step)
        if layout.maps is not None:
            raise ValueError("LLSA: attention in blocks has no map of all tokens: compare branches")
        text = layout.text_length if self.unit.anatomy.joint else 0
        if (total := count + layout.registers + layout.further + text) != q.shape[2]:
            raise ValueError(
                f"LLSA: the grid {' x '.join(map(str, layout.grid))} with its text and registers has {total} tokens, "
                f"queries are of {q.shape[2]}: give the layout of these tokens"
            )
        q, k = q.to(v.dtype), k.to(v.dtype)  # QK-norms answer in fp32 under autocast
        start = layout.registers + (text if layout.side == "front" else 0)
        image = slice(start, start + count)
        parts = seen_by_images(q[:, :, image], k[:, :, image], v[:, :, image], self.edit, levels)
        if total == count:
            return attend(q, parts)[0]
        mask = layout.joint_mask(total) if self.masks and text else None
        others = others_part(k, v, image, mask)
        o, _ = attend(q[:, :, image], [*parts, others])
        asked = torch.cat((q[:, :, :start], q[:, :, image.stop :]), 2)
        told = F.scaled_dot_product_attention(asked, k, v, attn_mask=None if mask is None else mask[:, None, None])
        return torch.cat((told[:, :, :start], o, told[:, :, start:]), 2)


def others_part(k: Tensor, v: Tensor, image: slice, mask: Tensor | None) -> Part:
    """All keys but those of image tokens, for every query: b h s e; mask b s, bool, those that are there; None: all."""

    def others(x: Tensor, dim: int) -> Tensor:
        before = x.narrow(dim, 0, image.start)
        return torch.cat((before, x.narrow(dim, image.stop, x.shape[dim] - image.stop)), dim)

    bias = None
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -math.inf)
        bias = others(bias, 1)[:, None]
    return Part(others(k, 2), others(v, 2), bias=bias)


def seen_by_images(q: Tensor, k: Tensor, v: Tensor, edit: LLSA, levels: int) -> list[Part]:
    """The keys of all levels that image queries see: b h n e each, in Morton order."""
    block, count = edit.block, k.shape[2]
    keys, values = pyramid(k, block, levels), pyramid(v, block, levels)
    with torch.no_grad():
        index = select(pyramid(q, block, levels), keys, block, edit.top_k)
    parts = [Part(k, v, index[0], rows=block, columns=block)]
    for level in range(1, 1 + (levels if edit.enrichment is None else min(edit.enrichment, levels))):
        size, bias = block**level, level * math.log(block)
        lists = index[level] if level < levels else None  # I_(l+1), of rows of B^(l+1) queries
        rows, without = size * block, None
        if not edit.overlap:  # a token of this level whose children are all seen: those of I_l, of rows of B^l queries
            rows, without = size, index[level - 1]
            if lists is not None:
                lists = lists.repeat_interleave(block, 2)[:, :, : without.shape[2]]
        weight = bias if count % size == 0 else lengths(count, size, keys[level - 1]).log()[None, None]
        parts.append(
            Part(
                keys[level - 1].to(k.dtype),
                values[level - 1].to(v.dtype),
                lists,
                rows=rows,
                columns=block,
                bias=weight,
                without=without,
            )
        )
    return parts
