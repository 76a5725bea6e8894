"""Extrapolation of features by finite differences: the ladder of TaylorSeer (arXiv 2503.06923).

Specification: methods/taylorseer.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from edit.caching.engine import Predictor, each, put
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

    def observe(self, state: dict, at: float, value: Branch, rows: Tensor | None = None) -> None:
        assert rows is None, "each sample has anchors of its own: RowLadder"
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


@dataclass(frozen=True)
class RowLadder(Predictor):
    """The same in the published form, with anchors of each sample's own.

    Args:
        order: m
    """

    order: int

    def observe(self, state: dict, at: float, value: Branch, rows: Tensor | None = None) -> None:
        image = value.image
        if not state:
            state["ladder"] = [each(torch.zeros_like, value) for _ in range(self.order + 1)]
            state["place"], state["known"] = image.new_zeros(len(image)).float(), image.new_zeros(len(image)).int()
        everyone = torch.arange(len(state["place"]), device=image.device)
        rows = everyone if rows is None else rows
        gap, known = at - state["place"][rows], state["known"][rows]  # k
        ladder = [value]
        for i, old in enumerate(state["ladder"][:-1]):
            before = each(lambda v: v[rows], old)
            slope = each(lambda new, b: ((new.float() - b.float()) / lined(gap)).to(new.dtype), ladder[i], before)
            ladder.append(each(lambda s, i=i: torch.where(lined(known > i), s, torch.zeros_like(s)), slope))
        state["ladder"] = [put(old, rows, new) for old, new in zip(state["ladder"], ladder, strict=True)]
        state["place"] = state["place"].index_fill(0, rows, at)
        state["known"] = state["known"].index_add(0, rows, torch.ones_like(known))

    def predict(self, state: dict, at: float) -> Branch:
        far, value = at - state["place"], state["ladder"][0]
        for i, slope in enumerate(state["ladder"][1:], 1):
            factor = lined(far**i / math.factorial(i))
            value = each(lambda v, s, factor=factor: torch.addcmul(v.float(), s.float(), factor), value, slope)
        return each(lambda v, like: v.to(like.dtype), value, state["ladder"][0])


def lined(v: Tensor) -> Tensor:
    """b -> b 1 1."""
    return v[:, None, None]
