"""Losses: what every loss declares before a run, and the one object that it sees in each step.

A `Loss` is a `Term` beside the objective's losses (features, alignment), or a whole few-step method
(`edit.few_step.method`). Both see a `Seen`: the batch, random draws, and the models of the run as callables.

Velocities are those of the linear path x_t = (1 - t) x + t noise (`edit.paths`), t in [0, 1], 1 = noise;
`edit.objectives.Objective.velocity` converts predictions of noise.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from edit import noise
from edit.denoiser import Denoiser
from edit.stream import Condition, Output

Field = Callable[[Tensor, Tensor, Condition], Tensor]  # (x_t, t, condition) -> velocity in fp32, shaped as x_t


class Predictor(Protocol):
    """A model of the run: its velocity in fp32, with taps "unit.<index>" in the trace."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition, taps: Collection[int] = ()) -> Output: ...


class Tapped(Protocol):
    """A model of the run without a graph, no further than the last tap: tokens b n d of units as "unit.<index>".

    Samples and times are in the objective's own convention, as `Seen.x_t` and `Seen.t`; a teacher is not guided.
    """

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition, taps: Collection[int]) -> Mapping[str, Tensor]: ...


# ---- random numbers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step: pure functions of (seed, sample), or, where ranks must agree, of (seed, step).

    A stream is a small number that the loss chooses, one for each use.
    """

    seed: int
    samples: Tensor  # b int64, numbers of the samples in the run
    moment: int  # number of the micro-batch, the same on all ranks
    shape: tuple[int, ...]  # of one sample
    first: int = noise.MATCHING  # stream 0

    def uniform(self, stream: int) -> Tensor:
        """One number in (0, 1) per sample: [b]."""
        return noise.uniform(self.seed, self.samples, self.first + stream)

    def gaussian(self, stream: int) -> Tensor:
        """Standard normal noise: b *shape."""
        return noise.gaussian(self.seed, self.samples, self.first + stream, self.shape)

    def shared(self, stream: int) -> float:
        """One number in (0, 1), the same on every rank, for decisions about the number of calls."""
        moment = torch.tensor([self.moment], device="cpu")
        return noise.uniform(self.seed, moment, self.first + noise.SHARED + stream).item()

    def of(self, name: str) -> Draws:
        """Those of the term of this name, independent of every other's."""
        return replace(self, first=noise.TERMS + (zlib.crc32(name.encode()) << 10))


# ---- what a loss sees -----------------------------------------------------------------------------------------------


def absent(*asked: Any, **named: Any) -> NoReturn:
    """Stands in for a model that the run does not have."""
    raise ValueError("a loss asks a model that this run does not have: a loss that needs a teacher or critic says so")


@dataclass(frozen=True)
class Seen:
    """One batch and the models of the run. Models take (x_t, t, condition) at any time and input.

    Fields of the second part are those of the one forward that every step of diffusion training makes; few-step
    methods, which ask for their own, find None there.
    """

    condition: Condition  # of the trained models, after label drop
    null: Condition  # its unconditional counterpart; the condition itself without label drop and teacher
    scale: Tensor  # b, guidance scale of the teacher
    draws: Draws
    progress: float = 0.0  # fraction of the run that is done, for schedules
    x: Tensor | None = None  # b c *sizes, data; None if there are only conditions
    noise: Tensor | None = None  # b c *sizes: in x_t; or that the teacher's path to x began with, where the data has it
    trajectory: Tensor | None = None  # b k c *sizes, the path from noise to data, without either; k may be 0
    times: Tensor | None = None  # b k, of the trajectory
    step: int = 0  # optimiser steps that are done
    whole: Condition | None = None  # the condition before label drop
    batch: Mapping[str, Tensor] = field(default_factory=dict)  # all that the data set gives

    data_loss: Tensor | None = None  # b, the objective's own losses of this forward, weighted; None: they weigh nothing
    output: Output | None = None  # of the trained model at x_t, with the term's taps, branches and maps in its trace
    taught: Output | None = None  # of the teacher at the same x_t, t and condition, guided; None: no term needs it
    x_t: Tensor | None = None  # b c *sizes, in the objective's own convention
    t: Tensor | None = None  # b, times in [0, 1]
    corrupt: Callable[[Tensor, Tensor, Tensor], Tensor] = absent  # (x, noise, t) -> x_t, in the same convention
    discrete: int | None = None  # of the objective's times: `edit.objectives.Objective.discrete`

    # ---- models; those of frozen weights give no gradient to them
    student: Field = absent  # with a graph, except under no_grad
    predict: Predictor = absent  # the student with its trace
    average: Field = absent  # its moving average, without a graph
    averaged: Predictor = absent  # the average with its trace, without a graph
    tapped_average: Tapped = absent
    teacher: Field = absent  # frozen, guided by `scale`, without a graph
    tapped_teacher: Tapped = absent
    # the teacher unguided, with `teacher_taps` in its trace; gradients reach x_t
    features: Callable[[Tensor, Tensor, Condition], Output] = absent
    # (a number, unit of the student) -> its gradient to the unit's trained weights as one vector, the mean over ranks
    gradient: Callable[[Tensor, int], Tensor] = absent
    critic: Field = absent  # learns the student's distribution; with a graph, except under no_grad
    own: Any = None  # the module that `Loss.build` returned
    frozen: Mapping[str, nn.Module] = field(default_factory=dict)  # of `Loss.frozen`; gradients reach their inputs
    decode: Callable[[Tensor], Tensor] = absent  # samples b c *sizes, or crops -> pixels b 3 *sizes in [-1, 1]

    @property
    def count(self) -> int:
        return len(self.scale)


# ---- what a loss declares -------------------------------------------------------------------------------------------


class Frozen(ABC):
    """A frozen model that a loss looks with, as data: a vision encoder, a reward. A dataclass; no checkpoint has it."""

    @abstractmethod
    def load(self) -> nn.Module:
        """The model with its weights, without gradients, in eval mode.

        Raises:
            FileNotFoundError, ValueError: if it cannot be had
        """

    @abstractmethod
    def structure(self) -> nn.Module:
        """The same without weights, on the meta device; raises likewise."""

    def check(self, shapes: Sequence[tuple[int, ...]]) -> None:  # noqa: B027 - most take every sample
        """Refuse samples of these shapes, (c, *sizes) each, with a ValueError."""


class Loss(ABC):  # noqa: B024 - what is abstract, its two kinds say
    """The declarations of every loss. Subclasses are dataclasses whose defaults are the paper's."""

    needs_teacher: bool = False
    teacher_taps: tuple[int, ...] = ()  # in `Seen.taught` and `Seen.features`; negative ones count from the end
    decodes: bool = False  # asks `Seen.decode`

    @property
    def frozen(self) -> Mapping[str, Frozen]:
        """Frozen models, found again by these names in `Seen.frozen`; equal ones of several losses are loaded once."""
        return {}

    def check_data(self, data: Any, pixels: Sequence[tuple[int, ...]]) -> None:  # noqa: B027 - most take any
        """Refuse a data set that the loss cannot be trained on, with a ValueError.

        Args:
            data: the data set
            pixels: shapes (3, *sizes) of decoded samples; none where the loss does not decode
        """

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> nn.Module | None:
        """The loss's own parameters (a projector, heads): trained, and saved with the run but not with the artifact.

        May be called on the meta device.

        Raises:
            ValueError: if the loss does not fit the two models
        """
        return None


class Term(Loss):
    """A loss beside the objective's, on tapped tokens, branches or maps of one forward, or on models asked again.

    Units are counted from 0.
    """

    taps: tuple[int, ...] = ()  # units whose tokens arrive in `Seen.output` as "unit.<index>"
    branches: tuple[int, ...] = ()  # units whose branches arrive as "unit.<index>.attention" and "unit.<index>.feed"
    maps: Mapping[int, int] = MappingProxyType({})  # units whose attention maps arrive as "unit.<index>.maps": rows
    reads_taught: bool = True  # with `needs_teacher`: `Seen.taught`; else the teacher answers when the term asks it
    needs_average: bool = False  # asks the moving average for something else than the student would say
    teacher_branches: tuple[int, ...] = ()  # the same of the teacher, in `Seen.taught`
    teacher_maps: Mapping[int, int] = MappingProxyType({})
    ends: int | None = None  # optimiser step from which it is gone for good, with all that it alone needed; None: never
    stops: bool = False  # may be `over` before that
    reads: Mapping[str, tuple[int, ...]] = MappingProxyType({})  # what it reads of the batch: shapes of one sample
    drops: float = 0.0  # share of the image tokens that `mixed` hides from units (`Condition.kept`), below 1
    drops_until: float = 1.0  # the fraction of the run until which it does
    subsets: bool = False  # scores such an output, too: its tokens are those of `Output.kept`

    def forced(self, progress: float) -> tuple[Mapping[int, int], float]:
        """Student units with the teacher unit whose output they take as input, and the fraction of the samples."""
        return {}, 0.0

    def mixed(self, seen: Seen) -> tuple[Tensor, Condition]:
        """The noisy sample and condition of the step's forward, before which this is called: another, for one, in which
        tokens have several times."""
        assert seen.x_t is not None
        return seen.x_t, seen.condition

    @abstractmethod
    def losses(self, seen: Seen) -> dict[str, Tensor]:
        """Named, already weighted loss terms, one number per sample [b]."""

    def over(self, seen: Seen) -> bool:
        """Whether it is to be gone from the next optimiser step on, as after `ends`; asked where it `stops`.

        Asked after `losses`, and all ranks must answer alike. What it remembers between steps is in buffers of its own
        module; that it is gone, the checkpoint knows.
        """
        return False

    def metrics(self, seen: Seen) -> dict[str, Tensor]:
        """Numbers to log beside the losses: distances before they were weighted."""
        return {}


def teaches(terms: Iterable[Term]) -> bool:
    """Whether a run's teacher predicts in each step, for `Seen.taught`: unless all that need it ask for themselves."""
    needy = [term for term in terms if term.needs_teacher]
    return not needy or any(term.reads_taught for term in needy)


def wanted(terms: Iterable[Term], teacher: bool = False) -> tuple[tuple[int, ...], tuple[int, ...], dict[int, int]]:
    """The taps, branches and maps that all terms need, as arguments of `Denoiser.forward`.

    Args:
        terms: of a run
        teacher: of the teacher's forward, not the trained model's

    Raises:
        ValueError: if two terms want different numbers of rows of one unit's attention map
    """
    taps, branches, maps = set(), set(), {}
    for term in terms:
        taps.update(term.teacher_taps if teacher else term.taps)
        branches.update(term.teacher_branches if teacher else term.branches)
        for unit, rows in (term.teacher_maps if teacher else term.maps).items():
            if maps.setdefault(unit, rows) != rows:
                raise ValueError(
                    f"terms want {maps[unit]} and {rows} rows of unit {unit}'s attention map: give them one number"
                )
    return tuple(sorted(taps)), tuple(sorted(branches)), maps
