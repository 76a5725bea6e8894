"""FoCa: features follow an ODE, whose slope is held between that of the last computed ones and the present one.

Forecast then calibrate (Zheng et al., arXiv 2508.16211). A feature F along the path is taken for the solution of an ODE
of which only past values are known. With h the step to evaluation k + 1, F_k and F_(k-1) the two latest values,
*computed or predicted*, and F' slopes:

    forecast   F^ = 4/3 F_k - 1/3 F_(k-1) + 2/3 h F'_k                                  (7, BDF2 made explicit)
    slope      F'_(k+1) = (3 F^ - 4 F_k + F_(k-1)) / 2h                                 (6, BDF2)
    calibrate  F_(k+1) = F_k + h/2 (F'_anchor + F'_(k+1))                               (8, Heun)

F'_anchor is the slope at the last computed evaluation. Put into (6), (7) leaves F'_(k+1) = F'_k, at any h: so what is
executed is (8) with the slope F'_k = (F_k - F_(k-1)) / (s_k - s_(k-1)), and along a run of predictions the slope goes
half of the way to the anchor's at each, where a polynomial goes on with what it began with.

From the paper's equations, which we know with their numbers from a reader's notes; not compared with released code (at
the time of the paper there was none). Inferred: F'_anchor is the difference of the last two computed values over their
distance; F_(k-1) of the first prediction after a computed evaluation is the value of the evaluation before that one,
predicted where it was not computed; one computed value is repeated. Differences are taken in fp32.

Specification: methods/feature-cache-baselines.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edit.caching.engine import Predictor, each
from edit.caching.forecast import Forecast, Site
from edit.inputs.limits import Count
from edit.stream import Branch


@dataclass
class FoCa(Forecast):
    """A cache that follows an ODE; it needs no training, and does nothing while the model is trained.

    Args:
        interval: N, in evaluations; 1 computes all
        first: E, evaluations at the beginning that are all computed
        site: of the features
        spare: for "span": units in front of it and behind it, which always run
    """

    interval: Count = 4
    first: Count = 2
    site: Site = "module"
    spare: tuple[int, int] = (0, 0)

    @property
    def predictor(self) -> Predictor:
        return Calibrated()

    def check(self, sampler: Any, times: tuple[float, ...]) -> None:
        super().check(sampler, times)
        if self.interval > 1 and (anchors := self.anchors(times)) < 2:
            raise ValueError(
                f"{self.name} (FoCa): a slope needs 2 computed evaluations, and of the {len(times) - 1} of this "
                f"sampler {anchors} is: lower interval, or take more steps"
            )


@dataclass(frozen=True)
class Calibrated(Predictor):
    """The forecast of the two latest values, computed or predicted, calibrated by the last two computed ones."""

    def observe(self, state: dict, at: float, value: Branch, rows: Tensor | None = None) -> None:
        assert rows is None, "all samples have the same anchors"
        anchor = state.get("anchor")
        if anchor is not None and anchor[0] != at:  # Heun comes to a time twice: the slope is the one before
            state["slope"] = slope(value, at, *reversed(anchor))
        state["anchor"] = [at, value]
        self._follow(state, at, value)

    def predict(self, state: dict, at: float) -> Branch:
        if "slope" not in state:
            return state["anchor"][1]
        (before, older), (place, latest) = state["latest"]
        local, step = slope(latest, place, older, before), at - place
        value = each(
            lambda v, a, b: torch.add(v.float(), a + b, alpha=step / 2).to(v.dtype), latest, state["slope"], local
        )
        self._follow(state, at, value)
        return value

    def _follow(self, state: dict, at: float, value: Branch) -> None:
        """Keep the two latest values with their places."""
        kept = [pair for pair in state.get("latest", []) if pair[0] != at]
        state["latest"] = [*kept[-1:], [at, value]]


def slope(value: Branch, at: float, older: Branch, before: float) -> Branch:
    """The difference of two values over that of their places, in fp32."""
    return each(lambda v, o: (v.float() - o.float()) / (at - before), value, older)
