"""Sites and schedules of forecasts: which evaluations are computed, and whose features the others predict.

Evaluations s = 0, 1, ... are computed by a schedule, of which three are public under the same letters:

    paper      s < E, then every N-th: s = E + N - 1, E + 2N - 1, ...
    diffusers  s < E or (s - E - 1) mod N = 0
    cache_dit  s < E or (s - E + 1) mod N = 0

Features are the residual branches of all units before their gates (`site="module"`), the tokens behind the last unit
("last"), or what the units first, ..., depth - 1 - last add to the tokens ("span"). Gates, modulation and the output
layer are those of the present evaluation.

Specification: methods/taylorseer.md.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from edit.caching.branches import BranchCached
from edit.caching.engine import Axis, Scheduled, place
from edit.caching.spans import SpanCached
from edit.denoiser import Denoiser
from edit.inputs.limits import check_numbers
from edit.stream import Step

Schedule = Literal["paper", "diffusers", "cache_dit"]
Site = Literal["module", "last", "span"]


class Forecast(BranchCached, SpanCached):
    """A cache on a schedule; a method is a dataclass with these fields, or values, and a predictor."""

    interval: int  # N, in evaluations; 1 computes all
    first: int  # E, evaluations at the beginning that are all computed
    site: Site  # of the features
    spare: tuple[int, int]  # for "span": units in front of it and behind it, which always run
    schedule: Schedule = "paper"  # of the computed evaluations
    axis: Axis = "step"  # in which the predictor looks ahead

    units = ()
    branches = ()

    def __post_init__(self):
        check_numbers(self)
        self.spare = tuple(self.spare)
        if len(self.spare) != 2 or min(self.spare) < 0 or (any(self.spare) and self.site != "span"):
            raise ValueError(
                f"{type(self).__name__}: spare is two numbers of units, for site=span alone, got {list(self.spare)}"
            )

    def computed(self, index: int) -> bool:
        """Whether evaluation `index` is computed."""
        place = index - self.first
        return place < 0 or (place - {"paper": -1, "diffusers": 1, "cache_dit": -1}[self.schedule]) % self.interval == 0

    def due(self, step: Step, branch: str) -> bool:
        return self.computed(step.index)

    def remembers(self, step: Step, branch: str) -> bool:
        return self.interval > 1

    def at(self, step: Step) -> Any:
        return place(step, self.axis)

    def anchors(self, times: tuple[float, ...]) -> int:
        """How many evaluations of a sampler with these times, and 0 behind them, are computed."""
        return sum(self.computed(s) for s in range(len(times) - 1))

    @property
    def spared(self) -> tuple[int, int]:
        return self.spare

    def covers(self, denoiser: Denoiser) -> Collection[tuple[int, str]]:
        return SpanCached.covers(self, denoiser)

    def apply(self, denoiser: Denoiser) -> None:
        if self.site == "module":
            return BranchCached.apply(self, denoiser)
        gate = Scheduled(lambda step: self.due(step, ""))
        self.cache(denoiser, gate, self.predictor, "hidden" if self.site == "last" else "residual")
