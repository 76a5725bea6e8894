"""FORA: residual branches are computed at every N-th evaluation, counted from the last one, and repeated in between.

FORA (arXiv 2407.01425), the naive baseline of feature caches, on the schedule of its release for DiT. That counts
evaluations down, s = T - 1, ..., 0, and with F a branch before its gate, norm included:

    F_s = F(x_s)  where s = T - 1 or s mod N = 0,  else F_s = F_(s+1);  x <- x + g_s F_s

so that the first and the last evaluation are computed, and the run after the first one may be shorter than N. Gates and
modulation are those of the present step. `edit.caching.reuse.Reuse` counts upwards from the first evaluation, and
chooses units, branches and a warm-up. Repeated values are those of TaylorSeer of order 0 at the same evaluations.

Specification: methods/feature-cache-baselines.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from edit.caching.branches import BranchCached
from edit.caching.engine import Latest, Predictor
from edit.inputs.limits import Count, check_numbers
from edit.stream import Step


@dataclass
class FORA(BranchCached):
    """A cache of all residual branches; it needs no training.

    Args:
        interval: N, in evaluations; 1 computes all
    """

    interval: Count = 3

    units = ()
    branches = ()

    def __post_init__(self):
        check_numbers(self)

    @property
    def predictor(self) -> Predictor:
        return Latest()

    def due(self, step: Step, branch: str) -> bool:
        return step.index == 0 or (step.count - 1 - step.index) % self.interval == 0

    def remembers(self, step: Step, branch: str) -> bool:
        return self.interval > 1
