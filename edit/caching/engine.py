"""Feature caches: at some evaluations of a generation, parts of the model are predicted instead of run.

A cache is a *site* (residual branches of units: `edit.caching.branches`; a span of units: `edit.caching.spans`), a
*gate* (decides which evaluations are computed) and a *predictor* (gives the values of the others). A method is an
`Edit` that puts the three together. Its state is in the generation's memory alone, apart for each guidance branch.

Specification: methods/feature-cache-baselines.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from edit.denoiser import Denoiser, Edit
from edit.routing.batches import sharded
from edit.solvers import Grid
from edit.stream import Branch, Step, Stream
from edit.unit import Unit, core

EXECUTED = "executed"
FEW = 4  # evaluations of a few-step sampler, below which there is next to nothing to predict
Axis = Literal["step", "t", "sigma", "logsnr"]


def place(step: Step, axis: Axis) -> float:
    """Where an evaluation stands for a predictor: its index, or a function of its time t in [0, 1], 1 = noise.

    "sigma" is noise over data, t / (1 - t), "logsnr" the logarithm of its inverse square; both with t at most 0.999,
    since generations begin at pure noise.
    """
    if axis == "step":
        return float(step.index)
    if axis == "t":
        return step.sigma
    t = min(max(step.sigma, 1e-3), 0.999)
    return t / (1 - t) if axis == "sigma" else 2 * math.log((1 - t) / t)


def each(f: Callable[..., Tensor], *values: Branch) -> Branch:
    """Apply `f` to the image tokens of all values and, where there are any, to their text tokens."""
    images, texts = [v.image for v in values], [v.text for v in values if v.text is not None]
    return Branch(f(*images), f(*texts) if len(texts) == len(values) else None)


def put(whole: Branch, rows: Tensor, part: Branch) -> Branch:
    """The whole, with the samples `rows` replaced by those of a part."""
    return each(lambda w, p: w.index_copy(0, rows, p), whole, part)


# ---- predictors -----------------------------------------------------------------------------------------------------


class Predictor(ABC):
    """What stands in for a value that is not computed. Its state is a dict of tensors, numbers, lists and `Branch`."""

    @abstractmethod
    def observe(self, state: dict, at: Any, value: Branch, rows: Tensor | None = None) -> None:
        """Take a computed value at a place (`place`).

        Args:
            state: of this predictor
            at: the place
            value: b n d image tokens, and text tokens where there are any; k n d of `rows`
            rows: k int64, samples that were computed, after all were at least once; None: all
        """

    @abstractmethod
    def predict(self, state: dict, at: Any) -> Branch:
        """The value at a later place; called after `observe`."""


@dataclass(frozen=True)
class Latest(Predictor):
    """The last computed value."""

    def observe(self, state: dict, at: Any, value: Branch, rows: Tensor | None = None) -> None:
        state["value"] = value if rows is None else put(state["value"], rows, value)

    def predict(self, state: dict, at: Any) -> Branch:
        return state["value"]


# ---- gates ----------------------------------------------------------------------------------------------------------


class Gate(ABC):
    """Whether a span of units is computed at an evaluation, decided in front of its first unit."""

    @abstractmethod
    def computes(self, unit: Unit, stream: Stream, state: dict) -> bool | Tensor:
        """Decide.

        Args:
            unit: the first of the span
            stream: in front of it, with a step
            state: of the gate in this generation and guidance branch

        Returns:
            One decision for all samples, the same on all ranks of a sharded unit (`quotient`, `anywhere`); or b bool,
            one for each: those that are computed run as one batch
        """


@dataclass(frozen=True)
class Scheduled(Gate):
    """Decided by the evaluation's number alone: no number of the generation is read, and the host never waits."""

    due: Callable[[Step], bool]

    def computes(self, unit: Unit, stream: Stream, state: dict) -> bool:
        assert stream.step is not None
        return self.due(stream.step)


def distance(unit: Unit, new: Tensor, old: Tensor) -> Tensor:
    """mean|new - old| / mean|old|, a scalar over all samples, as published: a decision depends on the batch. Of a
    sharded unit, over those of all ranks."""
    new, old = new.float(), old.float()
    return quotient(unit, (new - old).abs().mean(), old.abs().mean(), len(new))


def quotient(unit: Unit, above: Tensor, below: Tensor, samples: int) -> Tensor:
    """The quotient of two means over a batch, scalars; of a sharded unit, over the batches of all ranks.

    A call of a sharded unit is a collective: did one rank decide otherwise, the others would wait for it for ever.
    """
    above, below = over_ranks(torch.stack((above, below)) * samples) if sharded(unit) else (above, below)
    return above / below


def anywhere(unit: Unit, flag: bool, device: torch.device) -> bool:
    """The flag; of a sharded unit, whether that of any rank is set."""
    return over_ranks(torch.tensor(float(flag), device=device)).item() > 0 if sharded(unit) else flag


def over_ranks(v: Tensor) -> Tensor:
    """The sum over all ranks, the same to the last bit on each."""
    import torch.distributed as dist  # a second, which commands that do not train are spared

    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(v)
    return v


# ---- the edit -------------------------------------------------------------------------------------------------------


class Cached(Edit):
    """An edit that predicts parts of the model at some evaluations. It does nothing while the model is trained."""

    caches = True
    excludes = ("Elastic", "DyDiT")  # they run parts of a batch, whose samples a memory of the whole does not find
    decides = {"executed": "units that were computed, not predicted"}

    @abstractmethod
    def covers(self, denoiser: Denoiser) -> Collection[tuple[int, str]]:
        """Unit and branch of all that this cache predicts, for caches that are applied together."""

    def check(self, sampler: Any, times: tuple[float, ...]) -> None:
        """Raises ValueError, too, for a few-step student's sampler with fewer than `FEW` evaluations: each of them goes
        all the way to the data or to the next one, and their features have little to do with one another."""
        if isinstance(sampler.solver, Grid) and (count := len(times) - 1) < FEW:
            raise ValueError(
                f"{self.name} ({type(self).__name__}): the {count} evaluations of a few-step sampler are too far apart "
                f"to predict one from another: take {FEW} or more, or leave the cache out"
            )

    def at(self, step: Step) -> Any:
        """The place of an evaluation, for the predictor: a number, or what the predictor takes in its place."""
        return float(step.index)

    def kind(self, step: Step) -> Hashable:
        """What tells evaluations apart besides what is computed, known beforehand: `edit.caching.graphs` keys by it."""
        return None

    def refuse_cached(self, denoiser: Denoiser) -> None:
        """Raises ValueError if another cache predicts one of the branches that this one does."""
        mine = set(self.covers(denoiser))
        for name, other in denoiser.applied.items():
            if isinstance(other, Cached) and (both := sorted(mine & set(other.covers(denoiser)))):
                unit, branch = both[0]
                raise ValueError(
                    f"{type(self).__name__}: {name!r} caches {branch} of unit {unit} already: choose other units or "
                    "branches, or leave one of the two out"
                )

    def decisions(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of each unit with a cache, in their order: 1 where it was computed, 0 where it was predicted."""
        shares = [share for key, share in trace.items() if key.startswith(f"{self.name}.{EXECUTED}.")]
        return {EXECUTED: torch.stack(shares)} if shares else {}

    def record(self, index: int) -> str:
        """The name of the executed share of a unit in the trace."""
        return f"{self.name}.{EXECUTED}.{index}"


def names_of(unit: Unit) -> tuple[str, ...]:
    """The residual branches of a unit, as its family names them."""
    a = unit.anatomy
    further = {"cross": a.cross is not None, "second": a.second is not None, "fused": a.fused}
    return ("attention", "feed", *(name for name, has in further.items() if has))


def covered(denoiser: Denoiser, units: Sequence[int], branches: Collection[str] = ()) -> set[tuple[int, str]]:
    """Units with those of their branches that are named; none named: all."""
    return {(i, n) for i in units for n in names_of(core(denoiser.units[i])) if not branches or n in branches}
