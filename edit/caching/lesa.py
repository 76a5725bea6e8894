"""LESA: where the units do not run, the last hidden state is its newest value, moved along a learned direction.

LESA (arXiv 2602.20497). Of T evaluations at the noise levels tau_0 > tau_1 > ... > tau_T = 0, s is computed if

    s < E,   s = 3,   or   s = E - 1 + k N,   k = 1, 2, ...

Else the tokens behind the last unit are predicted from those of the evaluations before, computed or not, by the expert
of the stage in which tau_s lies (`edit.caching.lesa_predictor`). The output layer runs at every evaluation. The
expert's network sees times alone, so its step size is one number for each evaluation: trained for one schedule, it
becomes a table (`BakedLESA`), and no network is left. Of a sample a x + b noise, tau = b / (a + b): models of noise
have their stages where flows have them.

Two further sites include the output's modulation in the value: "post_norm", behind the last norm, and "velocity",
behind the output layer, so that nothing runs. Weights of one site are of no use at another.

It is trained by `edit.caching.lesa_training`.

Specification: methods/lesa.md.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from edit.caching.engine import Scheduled
from edit.caching.lesa_predictor import RING, Mixed, Predictors, Table
from edit.caching.spans import End, SpanCached
from edit.denoiser import Denoiser
from edit.edits import rebuild
from edit.inputs.limits import Count, Limits, Natural, Steps, check_numbers
from edit.objectives import Objective
from edit.sampling import Sampler
from edit.solvers import Solver
from edit.stream import Step
from edit.walk import cut

Site = Literal["last_hidden", "post_norm", "velocity"]
SITES: dict[str, End] = {"last_hidden": "units", "post_norm": "norm", "velocity": "output"}


def full(index: int, interval: int, first: int, forced: int | None) -> bool:
    """Whether evaluation `index` is computed."""
    return index < first or index == forced or (index - first + 1) % interval == 0


@dataclass(frozen=True)
class Schedule:
    """The times of a generation's evaluations, as solver and objective tell them.

    Args:
        solver: of the sampler
        objective: of the model
        shape: of one sample, where the solver's times depend on it
    """

    solver: Solver
    objective: Objective
    shape: tuple[int, ...] = ()

    @property
    def times(self) -> tuple[float, ...]:
        """Of each evaluation, then 0."""
        return self.solver.times_of(self.objective, tuple(self.shape))

    @property
    def levels(self) -> tuple[float, ...]:
        """Of noise at these times, tau."""
        return tuple(map(self.objective.level, self.times))


@dataclass
class Learned(SpanCached):
    """A cache with a predictor, be it a network or a table; fields as of `LESA`."""

    excludes = (*SpanCached.excludes, "MixtureHead")  # a head on tokens behind the last unit, which sites pass by

    interval: Count = 7
    first: Count = 3
    forced: Natural | None = 3
    steps: Steps = 50
    schedule: Schedule | None = None
    boundaries: tuple[float, ...] = (0.9, 0.5)
    windows: tuple[int, ...] = (4, 8, 8)
    guided: bool = True
    site: Site = "last_hidden"

    def __post_init__(self):
        check_numbers(self)
        who = type(self).__name__
        self.boundaries, self.windows = tuple(self.boundaries), tuple(self.windows)
        if self.site not in SITES:
            raise ValueError(f"{who}: site is one of {', '.join(SITES)}, got {self.site!r}")
        if list(self.boundaries) != sorted(set(self.boundaries), reverse=True):
            raise ValueError(f"{who}: boundaries fall from stage to stage, got {list(self.boundaries)}")
        if len(self.windows) != len(self.boundaries) + 1 or not all(1 <= k <= RING for k in self.windows):
            raise ValueError(
                f"{who}: windows has 1 to {RING} evaluations for each of the {len(self.boundaries) + 1} stages between "
                f"boundaries, got {list(self.windows)}"
            )
        if self.schedule is not None and (count := len(self.schedule.times) - 1) != self.steps:
            raise ValueError(f"{who}: steps is {self.steps}, and schedule has {count} evaluations: give one number")

    @abstractmethod
    def weights(self) -> nn.Module:
        """The module with what was learned."""

    def computed(self, index: int) -> bool:
        return full(index, self.interval, self.first, self.forced)

    def stage(self, level: float) -> int:
        """Of an evaluation at a noise level."""
        return sum(level <= b for b in self.boundaries)

    def at(self, step: Step) -> Step:
        return step

    def kind(self, step: Step) -> tuple[int, int]:
        return self.stage(step.level), min(step.index, RING)

    def check(self, sampler: Any, times: tuple[float, ...]) -> None:
        super().check(sampler, times)
        who = f"{self.name} ({type(self).__name__})"
        if len(times) - 1 != self.steps:
            raise ValueError(
                f"{who} is of generations of {self.steps} evaluations, and this sampler has {len(times) - 1}: sample "
                "in as many, or train another"
            )
        mine = times if self.schedule is None else self.schedule.times
        if any(abs(a - b) > 1e-6 for a, b in zip(mine, times, strict=True)):
            raise ValueError(
                f"{who} is of evaluations at the times {cut(mine)}, and this sampler's are {cut(times)}: "
                "choose the same solver and shift, or train another"
            )
        if sampler.perturbation:
            raise ValueError(f"{who} has no weights for the branch 'perturbed': set the sampler's perturbation to 0")
        if sampler.guidance != 1 and not self.guided:
            raise ValueError(
                f"{who} has weights for cond alone, and this sampler guides at {sampler.guidance:g}: sample at "
                "guidance 1, or train another with guided=true"
            )
        if sampler.guidance != 1 and tuple(sampler.interval) != (0.0, 1.0):
            raise ValueError(
                f"{who} needs one history from the first evaluation to the last, and this sampler guides in "
                f"{sampler.interval} alone: guide at all times, or not at all"
            )

    def apply(self, denoiser: Denoiser) -> nn.Module:
        """Stand around the units, with weights."""
        if self.schedule is not None and (mine := self.schedule.objective.prediction) != denoiser.prediction:
            raise ValueError(
                f"{type(self).__name__}: its schedule is of a model of the {mine}, and this {denoiser.name} predicts "
                f"the {denoiser.prediction}: take the predictor of this model, or train another"
            )
        own = self.weights()
        gate = Scheduled(lambda step: self.computed(step.index))
        self.cache(denoiser, gate, Mixed(self, own), "hidden", end=SITES[self.site])
        return own


@dataclass
class LESA(Learned):
    """A cache that learns to look ahead, and becomes a table when training is over.

    Args:
        interval: N, in evaluations; 1 computes all
        first: E, evaluations at the beginning that are all computed
        forced: one more evaluation that is computed; none: none
        steps: T, evaluations of a generation
        schedule: that it is for; none: any of T evaluations, and no table is made
        boundaries: noise levels above which the stages lie, but for the last; 0.9 and 0.4 for Qwen-Image
        windows: K of each stage, at most 8
        guided: weights of their own for cond and uncond; false: for cond alone
        site: of what is predicted: "last_hidden", tokens behind the last unit; "post_norm", behind the last norm;
            "velocity", behind the output layer
        network: of alpha: a KAN, or, as an ablation, a perceptron
        hidden: width of its two hidden layers
        init: "reference", the release's, or "reuse": alpha is 0, and what is predicted is the newest value
        start: a run or artifact with such an edit of the same name, whose weights are taken over; none: of nowhere
    """

    network: Literal["kan", "mlp"] = "kan"
    hidden: Annotated[int, Limits(1, 65_536)] = 256
    init: Literal["reference", "reuse"] = "reference"
    start: str | None = None

    def weights(self) -> Predictors:
        return Predictors(self)

    def trainable(self, name: str) -> bool:
        return name.startswith("edits.")

    def initialise(self, denoiser: Denoiser) -> None:
        if self.start is not None:
            denoiser.edits[self.name].load_state_dict(weights_of(self.start, self, denoiser))

    def compact(self, own: nn.Module | None) -> tuple[BakedLESA, nn.Module] | None:
        assert isinstance(own, Predictors)
        if self.schedule is None:
            return None
        left = BakedLESA(**{f.name: getattr(self, f.name) for f in fields(BakedLESA)})
        baked = left.weights()
        with torch.no_grad():
            found = (*own.mixtures(), own.alphas(self.schedule.levels))
            for buffer, value in zip((baked.mix, baked.bias, baked.table), found, strict=True):
                buffer.copy_(value)
        return left, baked


@dataclass
class BakedLESA(Learned):
    """What is left of a trained `LESA`: weights of the history and a table of step sizes. It is no longer trained.

    Args:
        interval, first, forced, steps, schedule, boundaries, windows, guided, site: as of `LESA`
    """

    def weights(self) -> Table:
        return Table(self)


def weights_of(path: str, edit: LESA, denoiser: Denoiser) -> Mapping[str, Tensor]:
    """The weights of the edit of this name in the run or artifact at a path, for this edit of this denoiser.

    Raises:
        ValueError: if there is none, or it is of another model, or predicts other evaluations or in another way
    """
    from safetensors.torch import load_file

    from edit.artifacts.checkpoint import skeleton
    from edit.artifacts.description import read_description
    from edit.artifacts.location import find
    from edit.artifacts.reference import home
    from edit.artifacts.weights import OWN, first_difference

    folder, who = find(path), f"{edit.name} (LESA): start={path}"
    other, told = skeleton(path).applied.get(edit.name), read_description(folder)
    if not isinstance(other, LESA):
        there = "a table" if isinstance(other, BakedLESA) else "none"
        raise ValueError(f"{who} has {there} under this name: give the run of its first stage")
    same = [f.name for f in fields(LESA) if f.name not in ("schedule", "init", "start")]
    if odd := next((name for name in same if getattr(other, name) != getattr(edit, name)), None):
        raise ValueError(
            f"{who} has {odd}={getattr(other, odd)}, and this one {getattr(edit, odd)}: train both stages alike"
        )
    theirs = rebuild(told["sampler"], kind=Sampler).solver
    if edit.schedule is not None and theirs != edit.schedule.solver:
        mine = edit.schedule.solver
        raise ValueError(f"{who} was trained with {theirs}, and this one is for {mine}: train both with one solver")
    if weight := first_difference(denoiser, home(folder, told)):
        raise ValueError(
            f"{who} was trained for another model, as its {weight} tells: train both stages for the same init"
        )
    head = f"edits.{edit.name}."
    return {k.removeprefix(head): v for k, v in load_file(folder / OWN).items() if k.startswith(head)}
