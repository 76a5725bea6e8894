"""Delta-DiT: first the rear units are repeated between evaluations, later the front ones.

Delta-DiT (arXiv 2406.01125). Front units draw outlines, which are settled early, and rear units details, which come
late. Of the units a range of N_c is repeated: the last N_c at the evaluations before the part b of the generation, the
first N_c from there on. With h_in and h_out the tokens in front of the range and behind it,

    D = h_out - h_in at computed evaluations;   h_out = h_in + D at the others

The deviation D is repeated, not h_out, so that the present h_in passes on. Every N-th evaluation is computed. Ranges
may overlap. Written from abstract and reviews of the paper, which has no released code. Inferred: the interval begins
anew at b, where the front's first deviation is computed.
`edit.caching.span_reuse.SpanReuse` repeats one range from beginning to end.

Specification: methods/feature-cache-baselines.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from edit.caching.engine import Cached, Latest, Scheduled, covered
from edit.caching.spans import Span
from edit.denoiser import Denoiser
from edit.inputs.limits import Count, Share, Units, check_numbers
from edit.stream import Step, Stream
from edit.unit import Wrapper


@dataclass
class DeltaDiT(Cached):
    """A cache of the deviations of rear units, then of front units; it needs no training.

    Args:
        blocks: N_c, units that are repeated together, fewer than there are
        interval: N, in evaluations; 1 computes all
        switch: b, part of the evaluations before which rear units are repeated
    """

    blocks: Units
    interval: Count = 2
    switch: Share = 0.5

    def __post_init__(self):
        check_numbers(self)

    def late(self, step: Step) -> bool:
        """Whether it is the front's turn."""
        return step.index >= math.ceil(self.switch * step.count)

    def due(self, step: Step) -> bool:
        """Whether an evaluation is computed."""
        begun = math.ceil(self.switch * step.count) if self.late(step) else 0
        return (step.index - begun) % self.interval == 0

    def kind(self, step: Step) -> tuple[bool, bool]:
        return self.late(step), self.due(step)

    def ranges(self, denoiser: Denoiser) -> tuple[range, range]:
        """The units of the rear, and those of the front.

        Raises:
            ValueError: if these were all
        """
        depth = len(denoiser.units)
        if self.blocks >= depth:
            raise ValueError(
                f"DeltaDiT: blocks must be fewer than the {depth} units of this {denoiser.name}, got {self.blocks}: "
                "one unit must read the present tokens"
            )
        return range(depth - self.blocks, depth), range(self.blocks)

    def covers(self, denoiser: Denoiser) -> Collection[tuple[int, str]]:
        rear, front = self.ranges(denoiser)
        return covered(denoiser, sorted({*rear, *front}))

    def apply(self, denoiser: Denoiser) -> None:
        ranges = self.ranges(denoiser)
        self.refuse_cached(denoiser)
        gate = Scheduled(self.due)
        rear, front = (Span(self, r[0], r[-1], gate, Latest(), "residual", self.at) for r in ranges)
        for span in (rear, front):
            span.read(denoiser)
        for i in sorted({*rear.places, *front.places}):
            denoiser.units[i] = TurnUnit(denoiser.units[i], i, self, rear, front)


class TurnUnit(Wrapper):
    """A unit of the rear, of the front, or of both: in the span whose turn it is, else computed."""

    def __init__(self, unit: Any, index: int, edit: DeltaDiT, rear: Span, front: Span):
        super().__init__(unit)
        self.index, self.edit, self.rear, self.front = index, edit, rear, front

    def __call__(self, stream: Stream) -> Stream:
        if stream.step is None:
            return self.unit(stream)
        span = self.front if self.edit.late(stream.step) else self.rear
        if self.index in span.places:
            return span.around(self.index, self.unit, stream)
        stream = self.unit(stream)
        executed = stream.image.new_ones(len(stream.image))
        return replace(stream, trace={**stream.trace, self.edit.record(self.index): executed})
