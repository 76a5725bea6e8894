"""Extrapolation of features by finite differences: the ladder of TaylorSeer (arXiv 2503.06923).

Where a policy is static, all divisors and factors of a generation are known at its first evaluation: `tick` puts them
into one table on the device, so that evaluations differ in the contents of tensors alone (`edit.caching.graphs`).

Specification: methods/taylorseer.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from edit.caching.engine import Predictor, each, put
from edit.inputs.limits import Limits
from edit.routing.batches import uploaded
from edit.stream import Branch

Form = Literal["taylor", "newton"]
Order = Annotated[int, Limits(0, 4)]


@dataclass(frozen=True)
class Row:
    """What a ladder needs to know of an evaluation's place.

    Args:
        numbers: scalar tensors: where the evaluation is computed, what differences are divided by, of degree 1, 2, ...;
            where it is predicted, factors of these degrees
        again: it is computed at the place of the one computed before
    """

    numbers: Sequence[Tensor]
    again: bool = False


@dataclass(frozen=True)
class Ladder(Predictor):
    """A polynomial of degree m through the last computed values.

    With anchors s_1 < s_2 < ... (evaluations that were computed) and d = s_n - s_(n-1), D^0 = f and

        taylor:  D^(i+1)_n = (D^i_n - D^i_(n-1)) / d,              f(s) = sum_i D^i_n (s - s_n)^i / i!
        newton:  D^(i+1)_n = (D^i_n - D^i_(n-1)) / (s_n - s_(n-i-1)),  f(s) = sum_i D^i_n prod_(j<i) (s - s_(n-j))

    `taylor` is the published form, which divides by the latest gap whatever the others are and has a remainder even on
    polynomials of degree two; `newton` is exact on polynomials of degree m at any anchors. Degrees build up: degree i
    needs i + 1 anchors. Differences are taken in fp32.

    A place is a number, and the anchors are in the state; or a `Row`, for which the anchors were known beforehand.

    Args:
        order: m; 0 repeats the last value
        form: of the polynomial
        fp32: keep differences in fp32, else in the type of the values
    """

    order: int
    form: Form = "taylor"
    fp32: bool = False

    def observe(self, state: dict, at: float | Row, value: Branch, rows: Tensor | None = None) -> None:
        assert rows is None, "each sample has anchors of its own: RowLadder"
        old = state.get("ladder", [])
        if not isinstance(at, Row):
            anchors = state.get("places", [])
            at, state["places"] = self.row(anchors, at, True, value.image.device), self.after(anchors, at)
        if at.again:  # Heun comes to a time twice: no difference can be taken
            state["ladder"] = [value, *old[1:]]
            return
        ladder = [value]
        for before, gap in zip(old[: self.order], at.numbers, strict=False):
            ladder.append(each(lambda new, b, gap=gap: self._slope(new, b, gap), ladder[-1], before))
        state["ladder"] = ladder

    def _slope(self, new: Tensor, before: Tensor, gap: Tensor) -> Tensor:
        slope = (new.float() - before.float()) / gap
        return slope if self.fp32 else slope.to(new.dtype)

    def predict(self, state: dict, at: float | Row) -> Branch:
        ladder = state["ladder"]
        if not isinstance(at, Row):
            at = self.row(state["places"], at, False, ladder[0].image.device)
        value = ladder[0]
        for slope, factor in zip(ladder[1:], at.numbers, strict=False):
            value = each(lambda v, s, factor=factor: torch.addcmul(v.float(), s.float(), factor), value, slope)
        return each(lambda v, like: v.to(like.dtype), value, ladder[0])

    # ---- numbers, on the host ----------------------------------------------------------------------------------------

    def numbers(self, anchors: Sequence[float], at: float, computed: bool) -> list[float]:
        """Divisors or factors, as of `Row`, for an evaluation at a place behind these anchors."""
        if computed:
            return [at - (anchors[-1] if self.form == "taylor" else anchors[-1 - i]) for i in self._degrees(anchors)]
        if self.form == "taylor":
            return [(at - anchors[-1]) ** (i + 1) / math.factorial(i + 1) for i in self._degrees(anchors)]
        return [math.prod(at - anchors[-1 - j] for j in range(i + 1)) for i in self._degrees(anchors)]

    def _degrees(self, anchors: Sequence[float]) -> range:
        return range(min(self.order, len(anchors)))

    def after(self, anchors: Sequence[float], at: float) -> list[float]:
        """The anchors that are needed, after one more."""
        return list(anchors) if at in anchors[-1:] else [*anchors, at][-self.order - 1 :]

    def row(self, anchors: Sequence[float], at: float, computed: bool, device: torch.device) -> Row:
        found = [] if at in anchors[-1:] else self.numbers(anchors, at, computed)
        return Row([torch.full((), v, device=device) for v in found], at in anchors[-1:] and computed)


@torch.compiler.disable
def tick(clock: dict, ladder: Ladder, places: Sequence[float], computed: Sequence[bool], device: torch.device) -> None:
    """Begin a clock, or go to the next evaluation.

    What counts and what is looked up are tensors in the generation's memory: an evaluation that was recorded once (a
    CUDA graph) goes on by itself when it is run again.

    Args:
        clock: its state; without a table, this evaluation is the first, and counts as computed
        ladder: whose numbers these are
        places: of this evaluation and all that follow; read at the first
        computed: whether they are; read at the first
        device: of the tokens
    """
    if "table" not in clock:
        rows, anchors = [], list[float]()
        again: list[int] = []
        for i, (at, due) in enumerate(zip(places, (True, *computed[1:]), strict=True)):
            twice = due and at in anchors[-1:]
            found = [] if twice else ladder.numbers(anchors, at, due)
            rows.append([*found, *[1.0] * (ladder.order - len(found))])
            again += [i] if twice else []
            anchors = ladder.after(anchors, at) if due else anchors
        table = uploaded(torch.tensor(rows, dtype=torch.float32, device="cpu"), device)
        clock.update(table=table, next=torch.zeros(1, dtype=torch.int64, device=device), again=again)
    clock["row"] = clock["table"].index_select(0, clock["next"])[0]
    clock["next"] = clock["next"] + 1


def present(clock: dict, number: int) -> Row:
    """What a ladder needs to know at the present evaluation, which is `number` evaluations behind the first."""
    return Row(clock["row"].unbind(), number in clock["again"])


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
