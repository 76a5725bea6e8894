"""Reflow (rectified flow, arXiv 2209.03003, sec. 2.2): flow matching between a noise and the teacher's sample from it.

As each noise keeps its own image, the paths no longer cross and can be followed in fewer steps, with the teacher's
picture for each seed; a good start for consistency and distribution matching. The published procedure (Chroma: 10
Euler steps, guidance 1.1 to 1.2) solves for a block of pairs and then trains on it with the teacher parked. `Reflow`
solves each batch where it is used, and nothing is stored; `CachedReflow` takes pairs that `python -m data.generate`
made beforehand, and needs no teacher. Specification: methods/distillation.md, D3.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edit.few_step.method import FewStepMethod
from edit.few_step.progressive import time_grid
from edit.inputs.limits import Positive, Steps, check_numbers
from edit.losses import Seen
from edit.objectives import TimeLaw, Uniform
from edit.paths import corrupt, mean, move
from edit.solvers import Grid, Solver


@dataclass(frozen=True)
class Reflow(FewStepMethod):
    """Straighten the teacher's paths. Conditions alone are enough; any sampler that follows the ODE fits.

    Args:
        steps: of the teacher's Euler solve; quality wants 28
        shift: of its times
        echoes: times per pair, each a pass of the student, which share one solve (inferred; 1: none are shared)
        time: law of these times
    """

    needs_data = False
    steps: Steps = 10
    shift: Positive = 1.0
    echoes: Steps = 2
    time: TimeLaw = field(default_factory=Uniform)

    def __post_init__(self):
        check_numbers(self)

    def check(self, solver: Solver) -> None:
        check_followed("Reflow", solver)

    def pairs(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Noise and the teacher's sample from it: b c *sizes each."""
        z = seen.draws.gaussian(0)
        return z, solve(seen, z, self.steps, self.shift)[-1]

    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        return straighten(seen, *self.pairs(seen), self.echoes, self.time)


@dataclass(frozen=True)
class CachedReflow(FewStepMethod):
    """The same with stored pairs: samples of a teacher, and the noise of each, drawn again. Needs no teacher.

    Generated with some guidance, the student learns that guidance; leave label_drop at 0.

    Args:
        echoes: times per pair, each a pass of the student
        time: law of these times
    """

    needs_teacher = False
    echoes: Steps = 2
    time: TimeLaw = field(default_factory=Uniform)

    def __post_init__(self):
        check_numbers(self)

    def check(self, solver: Solver) -> None:
        check_followed("CachedReflow", solver)

    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        return straighten(seen, stored_noise("CachedReflow", seen), seen.x, self.echoes, self.time)


def check_followed(who: str, solver: Solver) -> None:
    """Raises ValueError if the solver does not follow one path, but starts each step from fresh noise."""
    if isinstance(solver, Grid) and solver.renoise:
        raise ValueError(
            f"{who} trains paths that are followed from one noise, the sampler is {solver}: set "
            "sampler.solver.renoise=false, or use edit.solvers.Euler"
        )


def straighten(seen: Seen, z: Tensor, x: Tensor, echoes: Steps, law: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Flow matching between noise and sample, b c *sizes each: the mean over `echoes` times, of streams 1 on."""
    losses = []
    for echo in range(echoes):
        t = law(seen.draws.uniform(1 + echo))
        losses.append(mean((seen.student(corrupt(x, z, t), t, seen.condition) - (z - x)).square()))
    return {"reflow": torch.stack(losses).mean(0)}


def stored_noise(who: str, seen: Seen) -> Tensor:
    """The noise that the data were generated from: b c *sizes. Raises ValueError if the data do not tell."""
    if seen.noise is None:
        raise ValueError(
            f"{who} needs to know the noise of each sample, and this data set does not tell it: set "
            "data.set.trajectories=true, on samples made by python -m data.generate"
        )
    return seen.noise


def solve(seen: Seen, z: Tensor, steps: int, shift: Positive) -> list[Tensor]:
    """The teacher's path from noise by Euler's method: steps + 1 points b c *sizes, from z to data."""
    path, grid = [z], time_grid(steps, shift, z.device)[:, None].expand(-1, len(z))
    for t, end in zip(grid, grid[1:], strict=False):
        path.append(move(path[-1], seen.teacher(path[-1], t, seen.condition), t, end))
    return path
