"""TaylorSeer: features of evaluations that are not computed are extrapolated from those that were.

TaylorSeer (arXiv 2503.06923). Instead of its last value, a feature f that is not computed has the value of a polynomial
through its last computed ones (`edit.caching.taylor`). Sites and schedules are those of `edit.caching.forecast`, which
tells three of one name apart; the paper's are `site="module"` and `schedule="paper"`, "last" is its Lite variant.

Defaults are those of the release for DiT. For FLUX it has N = 6, m = 1 or 2, E = 3, for video N = 5, m = 1, E = 1. With
`module` a generation holds m + 1 tensors of tokens for each branch of each unit: beyond small models "last" or "span".

Specification: methods/taylorseer.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from edit.caching.engine import Axis, place
from edit.caching.forecast import Forecast, Schedule, Site
from edit.caching.taylor import Form, Ladder, Order, Row, present, tick
from edit.inputs.limits import Count
from edit.stream import Condition, Step, Stream

CLOCK = -1  # in place of a unit's number: memory of all units together


@dataclass
class TaylorSeer(Forecast):
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
    site: Site = "module"
    spare: tuple[int, int] = (0, 0)
    axis: Axis = "step"
    form: Form = "taylor"
    fp32: bool = False

    @property
    def predictor(self) -> Ladder:
        return Ladder(self.order, self.form, self.fp32)

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
        super().check(sampler, times)
        if self.interval > 1 and (anchors := self.anchors(times)) <= self.order:
            raise ValueError(
                f"{self.name} (TaylorSeer): order {self.order} needs {self.order + 1} computed evaluations, and of the "
                f"{len(times) - 1} of this sampler {anchors} are: lower order to {anchors - 1} at most, or interval"
            )
