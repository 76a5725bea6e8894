"""CG-Taylor: the last hidden state is extrapolated where the same extrapolation of the first unit's output was right.

Confidence-gated Taylor (arXiv 2508.02240). With u the image tokens behind the first unit, which always runs, h the
tokens behind the last, and two ladders of finite differences (`edit.caching.taylor`), A of u and B of h:

    e = mean|A(s) - u_s| / mean|u_s|
    e < tau, s > W and s not the last:   h = B(s);   else the other units run, and A and B take u_s and h_s

A is refreshed with B alone: so both look equally far ahead, and e tells how far B can be trusted. Were A refreshed at
every evaluation, e would stay small while B drifts.

The mean is over the batch, as published. Defaults are those of the release for DiT-XL/2 at 50 steps of DDIM; it has
tau = 0.13 or 0.03 and order_gate = 1 for FLUX, 0.36 and 3 for Wan 2.1. tau depends on model, steps and schedule. Gate
and target look at image tokens (ours for two-stream families: the text is not needed where units are predicted).

Specification: methods/cg-taylor.md.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from edit.caching.engine import Cached, Gate, Span, covered, distance, units_between
from edit.caching.taylor import Ladder, Order
from edit.denoiser import Denoiser
from edit.inputs.limits import Count, Natural, NotNegative, check_numbers
from edit.stream import Branch, Step, Stream
from edit.unit import Unit


@dataclass
class CGTaylor(Cached):
    """A cache that extrapolates as long as it is confident; it needs no training.

    Args:
        tau: relative error of the gate's extrapolation below which the target's is trusted
        order_gate: of the polynomial of the first unit's output
        order_target: of the polynomial of the last unit's output
        warmup: W, the last of the evaluations at the beginning that are all computed
        max_skip: predicted evaluations one after the other at most; none, as published: no limit
    """

    tau: NotNegative = 0.008
    order_gate: Order = 3
    order_target: Order = 1
    warmup: Natural = 2
    max_skip: Count | None = None

    batchwise = True

    def __post_init__(self):
        check_numbers(self)

    def check(self, sampler: Any, times: tuple[float, ...]) -> None:
        if (count := len(times) - 1) <= self.warmup + 2:
            raise ValueError(
                f"{self.name} (CGTaylor): evaluations 0 to {self.warmup} and the last are computed, which are all "
                f"{count} of this sampler: take more steps, or lower warmup"
            )

    def covers(self, denoiser: Denoiser) -> Collection[tuple[int, str]]:
        return covered(denoiser, units_between(self, denoiser, 1, 0))

    def apply(self, denoiser: Denoiser) -> None:
        units = units_between(self, denoiser, 1, 0)
        self.refuse_cached(denoiser)
        gate = Confidence(self.tau, Ladder(self.order_gate), self.warmup, self.max_skip)
        Span(self, units[0], units[-1], gate, Ladder(self.order_target), "hidden", self.at).wrap(denoiser)

    def at(self, step: Step) -> float:
        return float(step.index)


@dataclass(frozen=True)
class Confidence(Gate):
    """Computes where the extrapolation of the tokens in front of the span is wrong; arguments as of `CGTaylor`."""

    tau: float
    ladder: Ladder
    warmup: int
    max_skip: int | None = None

    def computes(self, unit: Unit, stream: Stream, state: dict) -> bool:
        step, tokens = stream.step, Branch(stream.image)
        assert step is not None
        row = state.get("row", 0)
        forced = step.index <= self.warmup or step.index == step.count - 1 or "ladder" not in state
        forced |= self.max_skip is not None and row >= self.max_skip
        at = float(step.index)
        if not forced and distance(self.ladder.predict(state, at).image, stream.image) < self.tau:
            state["row"] = row + 1
            return False
        state["row"] = 0
        self.ladder.observe(state, at, tokens)
        return True
