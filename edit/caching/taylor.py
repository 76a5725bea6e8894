"""Extrapolation of features by finite differences: the ladder of TaylorSeer (arXiv 2503.06923).

Specification: methods/taylorseer.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from edit.caching.engine import Predictor, each
from edit.inputs.limits import Limits
from edit.stream import Branch

Form = Literal["taylor", "newton"]
Order = Annotated[int, Limits(0, 4)]


@dataclass(frozen=True)
class Ladder(Predictor):
    """A polynomial of degree m through the last computed values.

    With anchors s_1 < s_2 < ... (evaluations that were computed) and d = s_n - s_(n-1), D^0 = f and

        taylor:  D^(i+1)_n = (D^i_n - D^i_(n-1)) / d,              f(s) = sum_i D^i_n (s - s_n)^i / i!
        newton:  D^(i+1)_n = (D^i_n - D^i_(n-1)) / (s_n - s_(n-i-1)),  f(s) = sum_i D^i_n prod_(j<i) (s - s_(n-j))

    `taylor` is the published form, which divides by the latest gap whatever the others are and has a remainder even on
    polynomials of degree two; `newton` is exact on polynomials of degree m at any anchors. Degrees build up: degree i
    needs i + 1 anchors. Differences are taken in fp32.

    Args:
        order: m; 0 repeats the last value
        form: of the polynomial
        fp32: keep differences in fp32, else in the type of the values
    """

    order: int
    form: Form = "taylor"
    fp32: bool = False

    def observe(self, state: dict, at: float, value: Branch) -> None:
        old, places = state.get("ladder", []), state.get("places", [])
        if places and places[-1] == at:  # Heun comes to a time twice: no difference can be taken
            state["ladder"] = [value, *old[1:]]
            return
        ladder = [value]
        for i in range(min(self.order, len(old))):
            gap = at - (places[-1] if self.form == "taylor" else places[-1 - i])
            ladder.append(each(lambda new, before, gap=gap: self._slope(new, before, gap), ladder[i], old[i]))
        state["ladder"], state["places"] = ladder, [*places[-self.order :], at] if self.order else [at]

    def _slope(self, new: Tensor, before: Tensor, gap: float) -> Tensor:
        slope = (new.float() - before.float()) / gap
        return slope if self.fp32 else slope.to(new.dtype)

    def predict(self, state: dict, at: float) -> Branch:
        ladder, places = state["ladder"], state["places"]
        value = ladder[0]
        for i, slope in enumerate(ladder[1:], 1):
            factor = self._factor(i, at, places)
            value = each(lambda v, s, factor=factor: torch.add(v.float(), s.float(), alpha=factor), value, slope)
        return each(lambda v, like: v.to(like.dtype), value, ladder[0])

    def _factor(self, i: int, at: float, places: list[float]) -> float:
        if self.form == "taylor":
            return (at - places[-1]) ** i / math.factorial(i)
        return math.prod(at - places[-1 - j] for j in range(i))
