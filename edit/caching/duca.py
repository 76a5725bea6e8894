"""DuCa: evaluations between computed ones repeat everything and renew a few tokens by turns.

DuCa (Zou et al., arXiv 2412.18911). After a computed evaluation the next repeats all branches (the paper's aggressive
step), the one after it runs the feed-forward again on a part of the tokens (conservative), and so on by turns
(`edit.caching.tokens`). Tokens are chosen at random, which the paper finds no worse than ToCa's scores, or by the norm
of their values in the attention. Neither needs the attention map, so the attention stays the fused kernel.

Inferred: a constant interval, counted from the first evaluation; the same part in all units; the largest norms of the
last computed evaluation are chosen. Random picks are a function of seed, evaluation and unit, the same for all samples
and guidance branches: a picture does not depend on its batch.

Specification: methods/feature-cache-baselines.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edit import noise
from edit.caching.engine import each
from edit.caching.tokens import Kind, TokenCached, Watched
from edit.denoiser import Denoiser
from edit.inputs.limits import Count, Seed, Share, check_numbers
from edit.stream import Branch, Layout, Step, Stream
from edit.unit import Unit

MOST_UNITS = 1024


@dataclass
class DuCa(TokenCached):
    """A cache that renews tokens at every second evaluation that is not computed; it needs no training.

    Args:
        interval: N, in evaluations; 1 computes all, and up to 2 none renews tokens
        ratio: of the tokens that are renewed
        by: what they are chosen by: "random", or "norm", of their values
        seed: of random choices
        units: which, counted from 0; none given: all
    """

    interval: Count = 5
    ratio: Share = 0.1
    by: Literal["random", "norm"] = "random"
    seed: Seed = 0
    units: tuple[int, ...] = ()

    def __post_init__(self):
        check_numbers(self)
        self.units = tuple(self.units)
        if self.by not in ("random", "norm"):
            raise ValueError(f"DuCa: by must be one of random, norm, got {self.by!r}")

    def kind(self, step: Step) -> Kind:
        place = step.index % self.interval
        return "computed" if place == 0 else "replayed" if place % 2 else "partial"

    def share(self, step: Step, index: int, depth: int) -> float:
        return self.ratio

    def scores(self, stream: Stream, index: int, memory: dict, age: Branch) -> Branch:
        if self.by == "norm":
            return memory["norm"]
        assert stream.step is not None
        drawn = torch.tensor([stream.step.index * MOST_UNITS + index], device=stream.image.device)
        count = sum(at.shape[1] for at in age if at is not None)
        image, text = noise.hashes(self.seed, drawn, noise.PICK, count).split(
            (age.image.shape[1], count - age.image.shape[1]), 1
        )
        picks = Branch(image, None if age.text is None else text)
        return each(lambda at, part: part.expand(len(at), -1), age, picks)

    def apply(self, denoiser: Denoiser) -> None:
        """Raises ValueError, too, if values are wanted of an attention that is another's."""
        if self.by == "norm":
            for i, unit in self.sites(denoiser).items():
                self.refuse_filled(unit, i, denoiser, ("mixer",), "shows no values")
        super().apply(denoiser)

    def watched(self, unit: Unit, index: int) -> None:
        if self.by == "norm":
            unit.slots.attention = Watched(unit.slots.attention, index, self, norms, "norm", unit.anatomy.joint)


def norms(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Norms of values over all heads: b h s e -> b s."""
    return v.float().square().sum((1, 3)).sqrt()
