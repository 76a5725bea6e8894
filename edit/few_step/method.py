"""Few-step distillation: what a method is given, what it gives back.

Every method is an instance of: states it looks at (noised data, its own rollout, a trajectory of the teacher) x targets
(the teacher's trajectory, itself at another time, a difference of scores, a discriminator). Each is one file beside
this one. All speak of velocities on the linear path x_t = (1 - t) x + t noise, t in [0, 1], 1 = noise; models that
predict noise are seen as velocities by `edit.objectives.Objective.velocity`. Specification: methods/distillation.md,
D3.5 to D3.10.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from edit import noise
from edit.denoiser import Condition, Denoiser, Output
from edit.sampling import Grid, Solver

if TYPE_CHECKING:
    from edit.few_step.vision import Vision

Field = Callable[[Tensor, Tensor, Condition], Tensor]  # (x_t, t, condition) -> velocity in fp32, shaped as x_t
Features = Callable[[Tensor, Tensor, Condition], Mapping[str, Tensor]]  # the same -> taps as "unit.<index>"


@dataclass(frozen=True)
class Draws:
    """All that is random in one step: pure functions of (seed, sample), or, where ranks must agree, of (seed, step).

    Streams are small numbers of the method's own, one for each use.
    """

    seed: int
    samples: Tensor  # b int64, numbers of the samples in the run
    moment: int  # number of the micro-batch, the same on all ranks
    shape: tuple[int, ...]  # of one sample

    def uniform(self, stream: int) -> Tensor:
        """One number in (0, 1) per sample: [b]."""
        return noise.uniform(self.seed, self.samples, noise.MATCHING + stream)

    def gaussian(self, stream: int) -> Tensor:
        """Standard normal noise: b c y x."""
        return noise.gaussian(self.seed, self.samples, noise.MATCHING + stream, self.shape)

    def shared(self, stream: int) -> float:
        """One number in (0, 1), the same on every rank: what decides how many times a model is called."""
        moment = torch.tensor([self.moment], device="cpu")
        return noise.uniform(self.seed, moment, noise.MATCHING + noise.SHARED + stream).item()


@dataclass(frozen=True)
class Given:
    """One batch, as a method sees it."""

    condition: Condition  # what student and critic are told
    null: Condition  # its unconditional counterpart
    scale: Tensor  # b, guidance that the teacher is asked at
    draws: Draws
    progress: float  # part of the run that is done, for schedules
    x: Tensor | None = None  # b c y x, data; None where there are conditions only
    # how a teacher generated x, where the data tell: from which noise, and which states lay between, None elsewhere
    noise: Tensor | None = None  # b c y x
    trajectory: Tensor | None = None  # b k c y x, from noise to data, without either; k may be 0
    times: Tensor | None = None  # b k, of the trajectory

    @property
    def count(self) -> int:
        return len(self.scale)


@dataclass(frozen=True)
class Roles:
    """The models of a run as velocity fields. Each is called as (x_t, t, condition)."""

    student: Field  # with a graph, unless called under no_grad
    output: Callable[[Tensor, Tensor, Condition], Output]  # the same with its trace
    average: Field  # its moving average, without a graph
    teacher: Field  # frozen, guided by `Given.scale`, without a graph; refuses to be called where there is none
    features: Features  # frozen; taps of the teacher (`teacher_taps`); gradients reach x_t, not the weights
    critic: Field  # learns the student's distribution; likewise
    own: nn.Module | None = None  # what `Matching.build` returned
    # of a method with `vision`; both are frozen, and gradients reach what they are given
    decode: Callable[[Tensor], Tensor] | None = None  # samples b c y x, or crops of them -> pixels b 3 y x in [-1, 1]
    look: Callable[[Tensor], Mapping[str, Tensor]] | None = None  # pixels -> hidden states as "unit.<layer>", b n d


class Matching(ABC):
    """One few-step method. Subclasses are dataclasses whose defaults are the paper's.

    A step is the student's turn, the critic's, or both (`turns`). What is returned on a turn is minimised over the
    parameters of that role alone: detach what belongs to the other one.
    """

    needs_teacher: bool = True
    needs_data: bool = True
    has_critic: ClassVar[bool] = False  # a second model of the teacher's or student's structure
    teacher_taps: tuple[int, ...] = ()  # of `Roles.features`; negative ones count from the end
    vision: Vision | None = None  # the model that looks at decoded samples
    every: int = 1  # the student's turn is every n-th step; the others are the critic's
    together: bool = False  # the critic is trained on the student's turns as well

    def check(self, solver: Solver) -> None:  # noqa: B027 - many can be sampled in many ways
        """Refuse a solver that does not sample the way this method trains.

        Raises:
            ValueError: naming both, and what to use instead
        """

    def check_stored(self, stored: Sequence[float]) -> None:  # noqa: B027 - few look at stored paths
        """Refuse paths that were stored at other times than this method trains at.

        Args:
            stored: of the states between noise and data, decreasing

        Raises:
            ValueError: naming both
        """

    def build(self, student: Denoiser, teacher: Denoiser | None) -> nn.Module | None:
        """Parameters of the method itself: a discriminator's heads, a learned weight. They are trained (`judges`) and
        saved with the run, not with the artifact. May be called on the meta device.

        Raises:
            ValueError: if the method does not fit the two models
        """
        return None

    def judges(self, own: nn.Module) -> list[nn.Parameter]:
        """Of what `build` returned, the parameters of the critic's turns; the rest are of the student's."""
        return list(own.parameters()) if self.adversarial else []

    def turns(self, step: int) -> tuple[bool, bool]:
        """Whether optimiser step `step` is the student's turn, and whether it is the critic's."""
        mine = step % self.every == 0
        return mine, self.adversarial and (self.together or not mine)

    @property
    def adversarial(self) -> bool:
        """Whether there are critic's turns at all."""
        return self.has_critic

    @abstractmethod
    def student_losses(self, roles: Roles, given: Given) -> dict[str, Tensor]:
        """Named, already weighted losses of the student, one number per sample [b]."""

    def critic_losses(self, roles: Roles, given: Given) -> dict[str, Tensor]:
        """The same of critic and heads."""
        raise NotImplementedError(f"{type(self).__name__} has no critic")


# ---- what several methods share --------------------------------------------------------------------------------------


def need_turns(method: Matching, role: str) -> None:
    """Raises ValueError if every step is the student's alone, so that its opponent would never learn."""
    if method.every < 2 and not method.together:
        raise ValueError(
            f"{type(method).__name__}: every={method.every} leaves the {role} no turn: set every to 2 or more, or "
            "together=true"
        )


def check_times(name: str, known: Sequence[float], solver: Solver) -> None:
    """Raises ValueError unless the sampler steps to data, from times that a method trains alone."""
    steps = solver.grid[:-1] if isinstance(solver, Grid) and (solver.renoise or solver.steps == 1) else ()
    if not steps or any(min(abs(t - own) for own in known) > 1e-3 for t in steps):
        raise ValueError(
            f"{name} trains steps to data from the times {list(known)}, the sampler is {solver}: choose sampler=grid "
            "with renoise=true and times among these"
        )


def decreasing(times: Sequence[float]) -> bool:
    """Whether these are times to step from: one or more, decreasing, in (0, 1]."""
    return bool(times) and list(times) == sorted(set(times), reverse=True) and 0 < times[-1] <= times[0] <= 1


def column(t: Tensor, x: Tensor) -> Tensor:
    """One number per sample, to be multiplied with x: [b] -> b 1 1 1."""
    return t.view(-1, *[1] * (x.ndim - 1))


def mean(x: Tensor) -> Tensor:
    """Of each sample: b ... -> [b]."""
    return x.flatten(1).mean(1)


def pseudo_huber(delta: Tensor, c: float) -> Tensor:
    """Mean over elements of sqrt(delta^2 + c^2) - c, without its cancellation: b ... -> [b]."""
    square = delta.square()
    return mean(square / ((square + c * c).sqrt() + c))


def move(x: Tensor, v: Tensor, t: Tensor, end: Tensor) -> Tensor:
    """One Euler step along a velocity, which is a step of DDIM in these coordinates: x_t, v, t, end -> x_end."""
    return x + column(end - t, x) * v


def corrupt(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t eps, times [b]."""
    return torch.lerp(x, eps, column(t, x))
