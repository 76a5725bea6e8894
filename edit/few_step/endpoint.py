"""Endpoint distillation: from noise in one step to the endpoint of the teacher's ODE.

The student's prediction of the data is compared with the end of the teacher's path that starts from the same noise, or,
for more steps, at points of that path; 1/2 |x - x_T|^2 / d. The mean over the ends of one point blurs if the teacher's
paths bend much, so one or two steps look soft: this is the warm-up of one-step distribution matching
(`edit.few_step.distribution_matching`), which needs a student that can take single steps.
Published runs (FastGen, FastVideo) store the paths, at the times 1, 0.937, 0.833, 0.624, which are quarters with shift
5, and train at lr 7e-5 for 10,000 steps: that is `CachedEndpoint`. `Endpoint` solves each path where it is used.
Specification: methods/distillation.md, D3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edit.few_step.method import FewStepMethod
from edit.few_step.progressive import time_grid
from edit.few_step.reflow import solve, stored_noise
from edit.inputs.limits import Positive, Steps, check_numbers
from edit.losses import Seen
from edit.paths import mean, move
from edit.solvers import Euler, Grid, Solver, times


@dataclass(frozen=True)
class Endpoint(FewStepMethod):
    """Regress the ends of the teacher's paths. Conditions alone are enough.

    Args:
        steps: of the teacher's Euler solve, divisible by `starts`; quality wants 28
        starts: times of the student, each `steps` / `starts` steps of the solve after the last; one of them is drawn
            for each sample. 1: from noise alone
        shift: of the times
    """

    needs_data = False
    steps: Steps = 10
    starts: Steps = 1
    shift: Positive = 1.0

    def __post_init__(self):
        check_numbers(self)
        if self.steps % self.starts:
            raise ValueError(f"Endpoint: steps must be a multiple of starts, got {self.steps} and {self.starts}")

    def check(self, solver: Solver) -> None:
        check_starts("Endpoint", self.starts, self.shift, solver)

    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        path = solve(seen, seen.draws.gaussian(0), self.steps, self.shift)
        states = torch.stack(path[: -1 : self.steps // self.starts], 1)
        at = time_grid(self.starts, self.shift, states.device)[:-1].expand(seen.count, -1)
        return regress(seen, states, at, path[-1])


@dataclass(frozen=True)
class CachedEndpoint(FewStepMethod):
    """The same with stored paths (`python -m data.generate points=...`). Needs no teacher.

    Generated with some guidance, the student learns that guidance; leave label_drop at 0.

    Args:
        starts: times of the student, evenly among the noise and the states that are stored beside each sample: 1 with
            points=0, divides points + 1 in any case
        shift: of the times that the paths were generated at
    """

    needs_teacher = False
    starts: Steps = 1
    shift: Positive = 1.0

    def __post_init__(self):
        check_numbers(self)

    def check(self, solver: Solver) -> None:
        check_starts("CachedEndpoint", self.starts, self.shift, solver)

    def check_stored(self, stored: Sequence[float]) -> None:
        found, wanted = [1.0, *stored][:: self.apart(1 + len(stored))], times(self.starts, self.shift)
        if any(abs(a - b) > 1e-4 for a, b in zip(found, wanted, strict=False)):
            raise ValueError(
                f"CachedEndpoint trains steps to data from the times {[round(t, 4) for t in wanted[:-1]]}, the stored "
                f"paths have {[round(t, 4) for t in found]}: set matching.shift to the shift they were generated with"
            )

    def apart(self, states: int) -> int:
        """Which of the states of a path, noise included, are starts: every n-th."""
        every, left = divmod(states, self.starts)
        if left:
            raise ValueError(
                f"CachedEndpoint: starts={self.starts} does not divide the noise and the {states - 1} states that "
                f"are stored of each path: generate with points={self.starts - 1}, or change starts"
            )
        return every

    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        z = stored_noise("CachedEndpoint", seen)
        states = torch.cat((z[:, None], seen.trajectory), 1)
        at = torch.cat((torch.ones_like(seen.scale)[:, None], seen.times), 1)
        every = self.apart(at.shape[1])
        return regress(seen, states[:, ::every], at[:, ::every], seen.x)


def check_starts(who: str, starts: Steps, shift: Positive, solver: Solver) -> None:
    """Refuse a solver that does not step to data from these times.

    Raises:
        ValueError: naming both, and an alternative
    """
    wanted, found = times(starts, shift), ()
    if isinstance(solver, Grid) and (solver.renoise or solver.steps == 1):
        found = solver.grid
    elif isinstance(solver, Euler) and solver.steps == 1:
        found = (1.0, 0.0)
    if len(found) != len(wanted) or any(abs(a - b) > 1e-4 for a, b in zip(found, wanted, strict=True)):
        raise ValueError(
            f"{who} trains steps to data from the times {[round(t, 4) for t in wanted[:-1]]}, the sampler is "
            f"{solver}: set sampler.solver to edit.solvers.Grid with these times and renoise=true"
        )


def regress(seen: Seen, states: Tensor, at: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The loss of one step to data from one of the states, drawn for each sample by stream 1.

    Args:
        seen: of the method
        states: b k c *sizes, on the teacher's paths
        at: b k, their times
        x: b c *sizes, where the paths end
    """
    k = (seen.draws.uniform(1) * at.shape[1]).long()
    one = torch.arange(len(k), device=k.device)
    x_t, t = states[one, k], at[one, k]
    end = torch.zeros_like(t)
    found = move(x_t, seen.student(x_t, t, replace(seen.condition, end=end)), t, end)
    return {"endpoint": 0.5 * mean((found - x).square())}
