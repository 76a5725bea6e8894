"""Dynamic mode decomposition: features that are not computed go on as the exponentials that fit the last computed ones.

DMD (Schmid 2010), Prony's method for vectors; nothing to do with distribution matching. With snapshots Y_0, ...,
Y_m of a feature at computed evaluations an even gap apart, X = (Y_0 ... Y_(m-1)) and X' = (Y_1 ... Y_m), the linear map
that leads from each snapshot to the next is looked for in the space of the first m:

    X = U S V',   A = U' X' V S^-1 = W L W^-1,   Y(m + k) = U W L^k W^-1 U' Y_m,   k = (s - s_m) / gap

Equations are the textbook's; cache-dit has such a predictor of DBCache, not compared with its code. Singular values
below 1e-4 of the largest are noise and left out. Each sample has its fit, image and text apart. With 1 + m snapshots
the fit is exact on sums of m exponentials; where a polynomial runs away, they decay or turn.

Ours: U is never made, since everything follows from products of pairs of snapshots, and a forecast is a weighted sum of
snapshots. The part of Y_m outside of the modes is repeated. Eigenvalues are held to `growth` in size. One snapshot is
repeated; a fit begins with two, where cache-dit waits for four and follows a line until then.

A change of the gap begins anew with the last two. The window is short, as the map itself drifts along the path.

Specification: methods/feature-cache-baselines.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from edit.caching.engine import Predictor
from edit.caching.forecast import Forecast, Site
from edit.inputs.limits import Count, Limits, check_numbers
from edit.stream import Branch, Step

Window = Annotated[int, Limits(2, 16)]
Growth = Annotated[float, Limits(1, 10)]
NOISE = 1e-4  # singular values, as parts of the largest, that no mode is made of


@dataclass
class DMD(Forecast):
    """A cache that goes on with exponentials; it needs no training, and does nothing while the model is trained.

    Args:
        interval: N, in evaluations; 1 computes all
        window: computed evaluations that are fitted
        growth: of an exponential from one computed evaluation to the next at most
        first: E, evaluations at the beginning that are all computed
        site: of the features
        spare: for "span": units in front of it and behind it, which always run
    """

    interval: Count = 4
    window: Window = 6
    growth: Growth = 1.25
    first: Count = 1
    site: Site = "last"
    spare: tuple[int, int] = (0, 0)

    @property
    def predictor(self) -> Predictor:
        return Modes(self.window, self.growth)

    def kind(self, step: Step) -> int:
        return step.index  # a forecast's horizon is a number of the host

    def check(self, sampler: Any, times: tuple[float, ...]) -> None:
        super().check(sampler, times)
        if self.interval > 1 and (anchors := self.anchors(times)) < 3:
            raise ValueError(
                f"{self.name} (DMD): exponentials are fitted to 3 computed evaluations and more, and of the "
                f"{len(times) - 1} of this sampler {anchors} are: lower interval, or take more steps"
            )


@dataclass(frozen=True)
class Modes(Predictor):
    """Exponentials through the last computed values.

    Args:
        window: values that are fitted
        growth: of an exponential from one value to the next at most
    """

    window: Window = 6
    growth: Growth = 1.25

    def __post_init__(self):
        check_numbers(self)

    def observe(self, state: dict, at: float, value: Branch, rows: Tensor | None = None) -> None:
        assert rows is None, "all samples have the same anchors"
        places, values = state.get("places", []), state.get("values", [])
        if places and places[-1] == at:  # Heun comes to a time twice
            places, values = places[:-1], values[:-1]
        keep = self.window - 1
        if len(places) > 1 and at - places[-1] != places[-1] - places[-2]:
            keep = 1
        places, values = [*places[-keep:], at], [*values[-keep:], value]
        state.update(places=places, values=values, fits=[])
        if len(values) > 1:
            parts = [v.image for v in values], [v.text for v in values if v.text is not None]
            state["fits"] = [list(fitted(part, self.growth)) for part in parts if part]

    def predict(self, state: dict, at: float) -> Branch:
        places, values = state["places"], state["values"]
        if len(values) == 1:
            return values[0]
        horizon = (at - places[-1]) / (places[-1] - places[-2])
        parts = [
            continued([v[i] for v in values], *fit, horizon)  # type: ignore[arg-type]
            for i, fit in enumerate(state["fits"])
        ]
        return Branch(*parts)


def fitted(values: list[Tensor], growth: float) -> tuple[Tensor, Tensor, Tensor]:
    """The modes of values at even distances.

    Args:
        values: m + 1 of b n d
        growth: see `Modes`

    Returns:
        Sizes and angles of the eigenvalues, b m float64 each; their parts in the weight of each value, b m m complex
    """
    products = gram(values)  # b (m + 1) (m + 1)
    squares, v = torch.linalg.eigh(products[:, :-1, :-1])  # of X' X: b m, b m m
    kept = (squares > NOISE**2 * squares[:, -1:]) & (squares > 0)
    inverse = torch.where(kept, squares, 1).rsqrt() * kept  # S^-1, 0 for what is left out
    vs = v * inverse[:, None]
    step = vs.mT @ products[:, :-1, 1:] @ vs  # A: S^-1 V' X' X' V S^-1
    eigenvalues, w = torch.linalg.eig(step)
    start = (vs.mT @ products[:, :-1, -1:]).to(w.dtype)  # U' Y_m: b m 1
    amplitudes, _ = torch.linalg.solve_ex(w, start)
    parts = (vs.to(w.dtype) @ w) * amplitudes.mT
    sound = torch.view_as_real(parts).isfinite().all(-1) & (parts.abs() < 1e9)  # eigenvectors that are one: no fit
    sound = sound.flatten(1).all(1)[:, None, None]
    return eigenvalues.abs().clamp(max=growth), eigenvalues.angle(), torch.where(sound, parts, 0)


def gram(values: list[Tensor]) -> Tensor:
    """Products of all pairs, each sample's: m of b n d -> b m m float64."""
    rows = [[(a.double() * b.double()).flatten(1).sum(1) for b in values[: i + 1]] for i, a in enumerate(values)]
    full = [[rows[max(i, j)][min(i, j)] for j in range(len(values))] for i in range(len(values))]
    return torch.stack([torch.stack(row, -1) for row in full], -2)


def continued(values: list[Tensor], sizes: Tensor, angles: Tensor, parts: Tensor, horizon: float) -> Tensor:
    """The value `horizon` distances behind the last: that one, and what the modes change of it."""
    change = torch.polar(sizes**horizon, angles * horizon) - 1  # b m
    weights = (parts @ change[..., None].to(parts.dtype)).real.squeeze(-1).float()  # b m
    out = values[-1].float()
    for value, weight in zip(values, weights.unbind(1), strict=False):  # all but the last
        out = torch.addcmul(out, value.float(), weight[:, None, None])
    return out.to(values[-1].dtype)
