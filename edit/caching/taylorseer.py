"""TaylorSeer: features of evaluations that are not computed are extrapolated from those that were.

TaylorSeer (arXiv 2503.06923). Instead of its last value, a feature f that is not computed has the value of a polynomial
through its last computed ones (`edit.caching.taylor`). Evaluations s = 0, 1, ... are computed by a schedule, of which
three are public under the same letters:

    paper      s < E, then every N-th: s = E + N - 1, E + 2N - 1, ...
    diffusers  s < E or (s - E - 1) mod N = 0
    cache_dit  s < E or (s - E + 1) mod N = 0

Features are the residual branches of all units before their gates (`site="module"`, the paper's), the tokens behind the
last unit ("last", its Lite variant), or what the units first, ..., depth - 1 - last add to the tokens ("span").
Gates, modulation and the output layer are those of the present evaluation.

Defaults are those of the release for DiT. For FLUX it has N = 6, m = 1 or 2, E = 3, for video N = 5, m = 1, E = 1. With
`module` a generation holds m + 1 tensors of tokens for each branch of each unit: beyond small models "last" or "span".

Specification: methods/taylorseer.md.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from edit.caching.engine import Axis, BranchCached, Scheduled, SpanCached, place
from edit.caching.taylor import Form, Ladder, Order, Row, present, tick
from edit.denoiser import Denoiser
from edit.inputs.limits import Count, check_numbers
from edit.stream import Condition, Step, Stream

CLOCK = -1  # in place of a unit's number: memory of all units together
Schedule = Literal["paper", "diffusers", "cache_dit"]


@dataclass
class TaylorSeer(BranchCached, SpanCached):
    """A cache that extrapolates; it needs no training, and does nothing while the model is trained.

    Args:
        interval: N, in evaluations; 1 computes all
        order: m of the polynomial, 0 to 4; it builds up as evaluations are computed
        first: E, evaluations at the beginning that are all computed
        schedule: of the computed evaluations
        site: of the features
        spare: for "span": units in front of it and behind it, which always run
        axis: in which the polynomial is one
        form: of the polynomial
        fp32: keep differences in fp32, else in the type of the features
    """

    interval: Count = 4
    order: Order = 4
    first: Count = 2
    schedule: Schedule = "paper"
    site: Literal["module", "last", "span"] = "module"
    spare: tuple[int, int] = (0, 0)
    axis: Axis = "step"
    form: Form = "taylor"
    fp32: bool = False

    units = ()
    branches = ()

    def __post_init__(self):
        check_numbers(self)
        self.spare = tuple(self.spare)
        if len(self.spare) != 2 or min(self.spare) < 0 or (any(self.spare) and self.site != "span"):
            raise ValueError(f"TaylorSeer: spare is two numbers of units, for site=span alone, got {list(self.spare)}")

    @property
    def predictor(self) -> Ladder:
        return Ladder(self.order, self.form, self.fp32)

    def computed(self, index: int) -> bool:
        """Whether evaluation `index` is computed."""
        place = index - self.first
        return place < 0 or (place - {"paper": -1, "diffusers": 1, "cache_dit": -1}[self.schedule]) % self.interval == 0

    def due(self, step: Step, branch: str) -> bool:
        return self.computed(step.index)

    def remembers(self, step: Step, branch: str) -> bool:
        return self.interval > 1

    # ---- the places of evaluations -----------------------------------------------------------------------------------

    def embed(self, stream: Stream, t: Tensor, condition: Condition, own: nn.Module | None) -> Stream:
        step = stream.step
        if step is None or not self.foreseen(step):
            return stream
        clock = step.recall(self.name, CLOCK)
        to_come: list[Step] = []
        if not clock:
            clock["first"] = step.index
            times = step.times or (step.sigma,) * (step.count + 1)
            to_come = [replace(step, index=s, sigma=times[s]) for s in range(step.index, step.count)]
        places, computed = [place(s, self.axis) for s in to_come], [self.computed(s.index) for s in to_come]
        tick(clock, self.predictor, places, computed, stream.image.device)
        return stream

    def foreseen(self, step: Step) -> bool:
        """Whether the places of all evaluations to come are known."""
        return self.order > 0 and self.interval > 1 and (self.axis == "step" or bool(step.times))

    def at(self, step: Step) -> float | Row:
        if self.order == 0:
            return Row(())
        if not self.foreseen(step):
            return place(step, self.axis)
        clock = step.recall(self.name, CLOCK)
        return present(clock, step.index - clock["first"])

    def kind(self, step: Step) -> bool:
        """Whether it is at the place of the one before."""
        clock = step.memory.get((self.name, CLOCK, step.branch))
        return bool(clock) and step.index - clock["first"] in clock["again"]

    def check(self, sampler: Any, times: tuple[float, ...]) -> None:
        anchors = sum(self.computed(s) for s in range(len(times) - 1))
        if self.interval > 1 and anchors <= self.order:
            raise ValueError(
                f"{self.name} (TaylorSeer): order {self.order} needs {self.order + 1} computed evaluations, and of the "
                f"{len(times) - 1} of this sampler {anchors} are: lower order to {anchors - 1} at most, or interval"
            )

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
