"""FirstBlockCache and DBCache: the rest of the model is predicted where its first units have changed little.

FirstBlockCache (ParaAttention; `FirstBlockCacheConfig` of diffusers) and DBCache (cache-dit). Units 0, ..., F - 1
always run. With r_s what they add to the image tokens at evaluation s, and r_ref the same at the last evaluation whose
other units ran,

    mean|r_s - r_ref| / mean|r_ref| <= threshold:   h <- h + R,   else the other units run and r_ref <- r_s

where R predicts what the units F, ..., depth - 1 - B add, of image and text; the last B units always run.
FirstBlockCache has F = 1, B = 0 and R the last one; DBCache has F = 8, limits and a predictor of R: a
polynomial, exponentials (DMD) or an ODE (FoCa).

Specification: methods/feature-cache-baselines.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edit.caching.engine import Gate, Latest, Predictor, distance
from edit.caching.spans import SpanCached
from edit.caching.taylor import Ladder, Order
from edit.denoiser import Denoiser
from edit.inputs.limits import Count, Natural, NotNegative, check_numbers
from edit.stream import Stream
from edit.unit import Unit


@dataclass
class FirstBlockCache(SpanCached):
    """A cache that decides by the change of the first unit; it needs no training.

    Args:
        threshold: relative change up to which the rest is predicted
    """

    threshold: NotNegative = 0.05

    batchwise = True

    def __post_init__(self):
        check_numbers(self)

    @property
    def spared(self) -> tuple[int, int]:
        return 1, 0

    def apply(self, denoiser: Denoiser) -> None:
        self.cache(denoiser, Change(self.threshold), Latest(), front=0)


@dataclass
class DBCache(FirstBlockCache):
    """FirstBlockCache with more units that always run, limits, and a predictor.

    Args:
        threshold: relative change up to which the rest is predicted
        front: F, units at the beginning that always run
        back: B, units at the end that always run
        warmup: evaluations at the beginning that are all computed
        most: predicted evaluations of a generation at most; none: no limit
        most_in_a_row: predicted evaluations one after the other at most
        budget: limit of the sum of the changes since the last computed evaluation
        order: of the polynomial that predicts; 0 repeats the last value
        predictor: another one in its place: `edit.caching.dmd.Modes`, `edit.caching.foca.Calibrated`
    """

    threshold: NotNegative = 0.08
    front: Count = 8
    back: Natural = 0
    warmup: Natural = 8
    most: Natural | None = None
    most_in_a_row: Natural | None = None
    budget: NotNegative | None = None
    order: Order = 0
    predictor: Predictor | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.predictor is not None and self.order:
            raise ValueError(
                f"DBCache: order {self.order} is of a polynomial, and predictor is {type(self.predictor).__name__}: "
                "leave one of the two out"
            )

    @property
    def spared(self) -> tuple[int, int]:
        return self.front, self.back

    def apply(self, denoiser: Denoiser) -> None:
        gate = Change(self.threshold, self.warmup, self.most, self.most_in_a_row, self.budget)
        self.cache(denoiser, gate, self.predictor or (Ladder(self.order) if self.order else Latest()), front=0)


@dataclass(frozen=True)
class Change(Gate):
    """Computes where what the first units add has changed by more than a threshold since the last computed evaluation.

    Args:
        threshold, warmup, most, most_in_a_row, budget: as of `DBCache`
    """

    threshold: float
    warmup: int = 0
    most: int | None = None
    most_in_a_row: int | None = None
    budget: float | None = None

    def computes(self, unit: Unit, stream: Stream, state: dict) -> bool:
        assert stream.step is not None
        added = stream.image - state.pop("front")
        if "added" not in state:
            state.update(predicted=0, row=0, spent=0.0)
        if not self.predicts(unit, stream.step.index, state, added):
            state.update(added=added, row=0, spent=0.0)
            return True
        state["predicted"] += 1
        state["row"] += 1
        return False

    def predicts(self, unit: Unit, index: int, state: dict, added: Any) -> bool:
        full = self.most is not None and state["predicted"] >= self.most
        full |= self.most_in_a_row is not None and state["row"] >= self.most_in_a_row
        if "added" not in state or index < self.warmup or full:
            return False
        change = distance(unit, added, state["added"]).item()
        state["spent"] += change
        return change <= self.threshold and (self.budget is None or state["spent"] <= self.budget)
