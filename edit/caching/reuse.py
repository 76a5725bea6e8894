"""Interval reuse: residual branches are computed at every N-th evaluation of a generation and repeated in between.

FORA's idea (arXiv 2407.01425), the naive baseline of feature caches, with evaluations counted from the first one. With
F a branch before its gate, norm included, s the evaluation and s0 the first one after the warm-up:

    F_s = F(x_s)  where s < s0 or (s - s0) mod N = 0,  else F_s = F_(s-1);  x <- x + g_s F_s

Gates and modulation are those of the present step. A repeated branch runs neither norm nor product. Each guidance
branch repeats its own; where the sampler starts or stops to join two of them, all is computed.

FORA as released, which counts them down to 0, is `edit.caching.fora.FORA`; `backwards` is the same here. Ours: families
other than DiT, where image and text are repeated together; chosen units and branches; a warm-up. Between two
evaluations the model keeps one tensor of tokens for each branch.

Specification: methods/feature-cache-baselines.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edit.caching.branches import BranchCached
from edit.caching.engine import Latest, Predictor
from edit.inputs.limits import Count, Share, check_numbers
from edit.stream import Step


@dataclass
class Reuse(BranchCached):
    """A cache of residual branches that needs no training, and does nothing while the model is trained.

    Args:
        interval: N, in evaluations (Heun makes two in a step); 1 computes all
        units: which, counted from 0; none given: all
        branches: which of "attention", "feed", "cross", "second", "fused"; none given: all. The one branch of a fused
            unit is "fused"
        start: part of the evaluations, from the first on, that are all computed
        backwards: count from the last evaluation, which is then computed, instead of from the first
    """

    interval: Count = 2
    units: tuple[int, ...] = ()
    branches: tuple[str, ...] = ()
    start: Share = 0.0
    backwards: bool = False

    def __post_init__(self):
        check_numbers(self)
        self.units, self.branches = tuple(self.units), tuple(self.branches)

    @property
    def predictor(self) -> Predictor:
        return Latest()

    def due(self, step: Step, branch: str) -> bool:
        first = math.ceil(self.start * step.count)
        place = step.count - 1 - step.index if self.backwards else step.index - first
        return step.index < first or place % self.interval == 0

    def remembers(self, step: Step, branch: str) -> bool:
        return self.interval > 1
