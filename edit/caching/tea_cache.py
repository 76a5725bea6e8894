"""TeaCache: the whole stack is skipped until its input has changed by a certain amount.

TeaCache (Liu et al., CVPR 2025, arXiv 2411.19108). With m_s the tokens that the first attention reads at evaluation s,
modulated by the time, and p a polynomial fitted once for a model,

    d_s = mean|m_s - m_(s-1)| / mean|m_(s-1)|,   acc <- acc + p(d_s)
    acc < threshold:   h <- h + R, R what all units added when they last ran;   else they run and acc <- 0

The first and the last evaluation are computed. The comparison is with the evaluation before, computed or not.

The default polynomial is the release's for FLUX.1. For a model without one take [1, 0], p(d) = d: the threshold is then
one of the change itself.

Specification: methods/feature-cache-baselines.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from edit.caching.engine import Gate, Latest, distance
from edit.caching.spans import SpanCached
from edit.denoiser import Denoiser
from edit.inputs.limits import NotNegative, check_numbers
from edit.routing.batches import gathered
from edit.stream import Step, Stream
from edit.unit import Unit

FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)


@dataclass
class TeaCache(SpanCached):
    """A cache that decides by the change of the modulated input; it needs no training.

    Args:
        threshold: of the accumulated change
        polynomial: coefficients of p, of the highest power first
    """

    threshold: NotNegative = 0.25
    polynomial: tuple[float, ...] = FLUX

    batchwise = True

    def __post_init__(self):
        check_numbers(self)
        self.polynomial = tuple(self.polynomial)
        if not self.polynomial:
            raise ValueError("TeaCache: polynomial has no coefficient: [1, 0] is the change itself")

    def apply(self, denoiser: Denoiser) -> None:
        self.cache(denoiser, Accumulated(self.threshold, self.polynomial), Latest())


@dataclass(frozen=True)
class Accumulated(Gate):
    """Computes when the accumulated change has reached a threshold."""

    threshold: float
    polynomial: tuple[float, ...]

    def computes(self, unit: Unit, stream: Stream, state: dict) -> bool:
        step = stream.step
        assert step is not None
        with gathered(unit):
            entered = unit.enter(stream, unit.modulate(stream)).image
        return self.after(unit, entered, step, state)

    def after(self, unit: Unit, entered: Tensor, step: Step, state: dict) -> bool:
        """The decision for these modulated tokens, b n d."""
        before, state["entered"] = state.get("entered"), entered
        if before is None or step.index in (0, step.count - 1):
            state["sum"] = 0.0
            return True
        state["sum"] += value_of(self.polynomial, distance(unit, entered, before).item())
        if state["sum"] < self.threshold:
            return False
        state["sum"] = 0.0
        return True


def value_of(polynomial: Sequence[float], x: float) -> float:
    """By Horner's rule; the coefficient of the highest power comes first."""
    value = 0.0
    for coefficient in polynomial:
        value = value * x + coefficient
    return value
