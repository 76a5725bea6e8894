"""What a span of units adds is computed at every N-th evaluation and added again in between.

DeepCache's idea (arXiv 2312.00858), which keeps shallow layers and repeats deep ones, on a stack of blocks: the first F
and the last B units always run ("FnBn"), and with h_F the tokens behind the first F units and h_E those in front of the
last B,

    R = h_E - h_F at computed evaluations;   h_E = h_F + R at the others

`edit.caching.delta_dit.DeltaDiT` repeats one end of the stack, and later the other.

Specification: methods/feature-cache-baselines.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edit.caching.engine import Latest, Scheduled
from edit.caching.spans import SpanCached
from edit.denoiser import Denoiser
from edit.inputs.limits import Count, Natural, Share, check_numbers
from edit.stream import Step


@dataclass
class SpanReuse(SpanCached):
    """A cache of a span's residual; it needs no training.

    Args:
        interval: N, in evaluations; 1 computes all
        front: F, units at the beginning that always run
        back: B, units at the end that always run
        start: part of the evaluations, from the first on, that are all computed
    """

    interval: Count = 2
    front: Natural = 1
    back: Natural = 0
    start: Share = 0.0

    def __post_init__(self):
        check_numbers(self)

    @property
    def spared(self) -> tuple[int, int]:
        return self.front, self.back

    def apply(self, denoiser: Denoiser) -> None:
        self.cache(denoiser, Scheduled(self.due), Latest())

    def due(self, step: Step) -> bool:
        """Whether the span is computed."""
        place = step.index - math.ceil(self.start * step.count)
        return place < 0 or place % self.interval == 0
