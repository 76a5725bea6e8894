"""The inputs of a few-step method: random draws, one batch, and the models of a run as velocity fields.

Velocities are those of the linear path x_t = (1 - t) x + t noise (`edit.paths`), t in [0, 1], 1 = noise;
`edit.objectives.Objective.velocity` converts predictions of noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edit import noise
from edit.stream import Condition, Output

Field = Callable[[Tensor, Tensor, Condition], Tensor]  # (x_t, t, condition) -> velocity in fp32, shaped as x_t
Features = Callable[[Tensor, Tensor, Condition], Output]  # the same -> taps "unit.<index>" in its trace, grid


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step: pure functions of (seed, sample), or, where ranks must agree, of (seed, step).

    A stream is a small number that the method chooses, one for each use.
    """

    seed: int
    samples: Tensor  # b int64, numbers of the samples in the run
    moment: int  # number of the micro-batch, the same on all ranks
    shape: tuple[int, ...]  # of one sample

    def uniform(self, stream: int) -> Tensor:
        """One number in (0, 1) per sample: [b]."""
        return noise.uniform(self.seed, self.samples, noise.MATCHING + stream)

    def gaussian(self, stream: int) -> Tensor:
        """Standard normal noise: b *shape."""
        return noise.gaussian(self.seed, self.samples, noise.MATCHING + stream, self.shape)

    def shared(self, stream: int) -> float:
        """One number in (0, 1), the same on every rank, for decisions about the number of calls."""
        moment = torch.tensor([self.moment], device="cpu")
        return noise.uniform(self.seed, moment, noise.MATCHING + noise.SHARED + stream).item()


@dataclass(frozen=True)
class Given:
    """One batch."""

    condition: Condition  # of student and critic
    null: Condition  # its unconditional counterpart
    scale: Tensor  # b, guidance scale of the teacher
    draws: Draws
    progress: float  # fraction of the run that is done, for schedules
    x: Tensor | None = None  # b c *sizes, data; None if there are only conditions
    # the teacher's path to x, where the data set has it; else None
    noise: Tensor | None = None  # b c *sizes
    trajectory: Tensor | None = None  # b k c *sizes, from noise to data, without either; k may be 0
    times: Tensor | None = None  # b k, of the trajectory

    @property
    def count(self) -> int:
        return len(self.scale)


@dataclass(frozen=True)
class Roles:
    """The models of a run as velocity fields. Each is called as (x_t, t, condition)."""

    student: Field  # with a graph, except under no_grad
    output: Callable[[Tensor, Tensor, Condition], Output]  # the student with its trace
    average: Field  # its moving average, without a graph
    teacher: Field  # frozen, guided by `Given.scale`, without a graph; a call raises if there is no teacher
    features: Features  # frozen; taps of the teacher (`teacher_taps`); gradients reach x_t, not the weights
    critic: Field  # learns the student's distribution; with a graph, except under no_grad
    own: nn.Module | None = None  # returned by `FewStepMethod.build`
    # of a method with `vision`; both are frozen, and gradients reach their inputs
    decode: Callable[[Tensor], Tensor] | None = None  # samples b c *sizes, or crops -> pixels b 3 *sizes in [-1, 1]
    look: Callable[[Tensor], Mapping[str, Tensor]] | None = None  # images b 3 y x -> states "unit.<layer>", b n d
