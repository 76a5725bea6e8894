"""ToCa: between computed evaluations, the feed-forward runs again on those tokens that need it most.

ToCa (Zou et al., arXiv 2410.05317). All branches are repeated, and in each unit the feed-forward is run on a part of
its tokens (`edit.caching.tokens`), at every evaluation that is not computed. A token's score is

    s1 = column sum of the self-attention map, mean over heads, of norm 1 over the tokens: how many others read it
    s2 = entropy of its cross-attention to the text, of norm 1 over the tokens, in families that have one
    s3 = evaluations since it was run / N
    S  = s1 + w2 s2 + w3 s3, and 0.6 S more for the best token of each 2 x 2 block of the grid, so that picks spread

With s = T - 1, ..., 0 evaluations counted down, the part of unit l of L that is run is

    ratio * 2.5 * (1 + a - 2 a l / (L - 1)) * (1 + w - 2 w s / T),   a = -0.2, w = 2, within [0, 1]

The interval behind a computed evaluation s is n = round(N / (1 + 0.4 - 0.8 s / T)), or 2 for s in [0.2 T, 0.4 T). The
next computed one is the next s that n divides. N = 1 computes all.

The map is not kept. Its column sums are computed from queries and keys, in chunks of queries, at computed evaluations
that a partial one follows: that product runs a second time there. DuCa does without.

Inferred: k is rounded down; cross-attention and a second attention have ratio 0 like the first; w2 = 1 and w3 = 0.25
(the release for PixArt scores by s2 alone); text tokens of two-stream families are scored by s1 and s3. Scores of cond
and uncond are not joined.

Specification: methods/feature-cache-baselines.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edit.caching.tokens import Kind, TokenCached, Watched
from edit.denoiser import Denoiser
from edit.inputs.limits import Count, NotNegative, Share, check_numbers
from edit.stream import Branch, Layout, Step, Stream
from edit.unit import Unit

FEED_FACTOR = 2.5  # of the feed-forward's ratio; the attention has 0
INTERVAL_SLOPE = 0.4
MAPS = 2**24  # elements of attention maps that are held at once


@dataclass
class ToCa(TokenCached):
    """A cache that renews the tokens of the highest scores; it needs no training.

    Args:
        interval: N, in evaluations; 1 computes all
        ratio: of the tokens that are renewed, before the factors
        by_unit: a, by which later units renew more (below 0) or less than earlier ones
        by_step: w, by which later evaluations renew more than earlier ones
        cross: w2, weight of the cross-attention's entropy
        age: w3, weight of the age
        spread: part of its score that the best token of a 2 x 2 block is given in addition
        units: which, counted from 0; none given: all
    """

    interval: Count = 4
    ratio: Share = 0.07
    by_unit: float = -0.2
    by_step: float = 2.0
    cross: NotNegative = 1.0
    age: NotNegative = 0.25
    spread: NotNegative = 0.6
    units: tuple[int, ...] = ()

    def __post_init__(self):
        check_numbers(self)
        self.units = tuple(self.units)

    # ---- schedule ----------------------------------------------------------------------------------------------

    def interval_at(self, s: int, count: int) -> int:
        """The interval behind a computed evaluation, s of them before the last."""
        if self.interval == 1:
            return 1
        if 0.2 * count <= s < 0.4 * count:
            return 2
        return max(1, round(self.interval / (1 + INTERVAL_SLOPE - 2 * INTERVAL_SLOPE * s / count)))

    def kind(self, step: Step) -> Kind:
        wanted = step.count - 1 - step.index
        s = step.count - 1
        while s > wanted:  # from one computed evaluation to the next
            interval = self.interval_at(s, step.count)
            s = (s - 1) // interval * interval
        return "computed" if s == wanted else "partial"

    def share(self, step: Step, index: int, depth: int) -> float:
        s, place = step.count - 1 - step.index, index / max(1, depth - 1)
        unit = 1 + self.by_unit - 2 * self.by_unit * place
        part = self.ratio * FEED_FACTOR * unit * (1 + self.by_step - 2 * self.by_step * s / step.count)
        return min(1.0, max(0.0, part))

    # ---- scores ------------------------------------------------------------------------------------------------

    def scores(self, stream: Stream, index: int, memory: dict, age: Branch) -> Branch:
        layout = stream.layout
        image, text = (
            None if at is None else F.normalize(read, dim=1) + self.age * at / self.interval
            for read, at in zip(memory["read"], age, strict=True)
        )
        assert image is not None
        if "entropy" in memory:
            image = image + self.cross * F.normalize(memory["entropy"].image, dim=1)
        return Branch(spread(image, layout, self.spread), text)

    def apply(self, denoiser: Denoiser) -> None:
        """Raises ValueError, too, if an attention is another than that of the model."""
        for i, unit in self.sites(denoiser).items():
            self.refuse_filled(unit, i, denoiser, ("attention", "mixer", "cross"), "has not the map that scores tokens")
        super().apply(denoiser)

    def watched(self, unit: Unit, index: int) -> None:
        # a family that leaves out masked text does so in an attention of its own
        masks = type(unit).own_attention is not Unit.own_attention

        def read(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
            return column_sums(q, k, layout.joint_mask(k.shape[2]) if masks else None)

        def entropy(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
            return entropies(q, k, layout.text_mask)

        unit.slots.attention = Watched(unit.slots.attention, index, self, read, "read", unit.anatomy.joint)
        if unit.anatomy.cross is not None:
            unit.slots.cross = Watched(unit.slots.cross, index, self, entropy, "entropy", False)


def spread(scores: Tensor, layout: Layout, bonus: float) -> Tensor:
    """Scores of image tokens with those of the best of each 2 x 2 block enlarged: b n -> b n."""
    frames, rows, columns = layout.grid
    own = layout.of_image(scores)
    order = layout.permutation
    grid = own if order is None else own[:, order.argsort()]
    maps = grid.reshape(-1, 1, rows, columns)  # (b f) 1 y x
    top, places = F.max_pool2d(maps, 2, ceil_mode=True, return_indices=True)
    added = torch.zeros_like(maps).flatten(1).scatter(1, places.flatten(1), top.flatten(1)).reshape(grid.shape)
    grid = grid + bonus * added
    own = grid if order is None else grid[:, order]
    end = scores.shape[1] - layout.further
    return torch.cat((scores[:, : layout.registers], own, scores[:, end:]), 1)


def chunks(q: Tensor, k: Tensor, most: int) -> tuple[Tensor, ...]:
    """Queries in parts whose maps have at most `most` elements each, or of one query."""
    return q.split(max(1, most // (q.shape[0] * q.shape[1] * k.shape[2])), 2)


def map_of(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(e)) in fp32, of keys that the mask b s leaves: b h r e, b h s e -> b h r s."""
    logits = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).float()
    return (logits if mask is None else logits.masked_fill(~mask.bool()[:, None, None], -1e4)).softmax(-1)


def column_sums(q: Tensor, k: Tensor, mask: Tensor | None = None, most: int = MAPS) -> Tensor:
    """How much each key is read by all queries, mean over heads: b h r e, b h s e -> b s."""
    total = q.new_zeros(q.shape[0], k.shape[2], dtype=torch.float32)
    for part in chunks(q, k, most):
        total = total + map_of(part, k, mask).sum(2).mean(1)
    return total


def entropies(q: Tensor, k: Tensor, mask: Tensor | None = None, most: int = MAPS) -> Tensor:
    """How evenly each query reads the keys, in nats, of the mean over heads: b h r e, b h s e -> b r."""
    means = (map_of(part, k, mask).mean(1) for part in chunks(q, k, most))
    return torch.cat([torch.special.entr(mean).sum(-1) for mean in means], 1)
