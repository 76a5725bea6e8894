"""Endpoint distillation: from noise straight to what the teacher's ODE makes of it.

The student's prediction of the data is compared with the end of the teacher's path that starts from the same noise, or,
for more steps, at points of that path; 1/2 |x - x_T|^2 / d. The mean over what one point may lead to blurs where the
teacher's paths bend much, so one or two steps look soft: this is the warm-up of distribution matching in one step
(`edit.distillation.distribution_matching`), which starts from a student that does not yet know single steps otherwise.
Published runs (FastGen, FastVideo) store the paths, lr 7e-5 for 10,000 steps; here each is solved where it is used.
Specification: methods/distillation.md, D3.1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edit.distillation.matching import Given, Matching, Roles, mean, move
from edit.distillation.progressive import time_grid
from edit.distillation.reflow import solve
from edit.sampling import Euler, Grid, Solver, times


@dataclass(frozen=True)
class Endpoint(Matching):
    """Regress the ends of the teacher's paths. Conditions alone are enough.

    Args:
        steps: of the teacher's Euler solve, divisible by `starts`; quality wants 28
        starts: times of the student, each `steps` / `starts` steps of the solve after the last; one of them is drawn
            for each sample. 1: from noise alone
        shift: of the times
    """

    needs_data = False
    steps: int = 10
    starts: int = 1
    shift: float = 1.0

    def __post_init__(self):
        if self.starts < 1 or self.steps < 1 or self.steps % self.starts:
            raise ValueError(
                f"Endpoint: steps must be a multiple of starts, both at least 1, got {self.steps} and {self.starts}"
            )
        if self.shift <= 0:
            raise ValueError(f"Endpoint: shift must be positive, got {self.shift}; 1 leaves times unchanged")

    def check(self, solver: Solver) -> None:
        wanted, found = times(self.starts, self.shift), ()
        if isinstance(solver, Grid) and (solver.renoise or solver.steps == 1):
            found = solver.grid
        elif isinstance(solver, Euler) and solver.steps == 1:
            found = (1.0, 0.0)
        if len(found) != len(wanted) or any(abs(a - b) > 1e-4 for a, b in zip(found, wanted, strict=True)):
            raise ValueError(
                f"Endpoint trains steps to data from the times {[round(t, 4) for t in wanted[:-1]]}, the sampler is "
                f"{solver}: set sampler.solver to edit.sampling.Grid with these times and renoise=true"
            )

    def student_losses(self, roles: Roles, given: Given) -> dict[str, Tensor]:
        draws, condition = given.draws, given.condition
        path = solve(roles, given, draws.gaussian(0), self.steps, self.shift)
        every = self.steps // self.starts
        k = (draws.uniform(1) * self.starts).long()
        x_t = torch.stack(path[:-1:every])[k, torch.arange(len(k), device=k.device)]
        t = time_grid(self.starts, self.shift, k.device)[k]
        end = torch.zeros_like(t)
        x = move(x_t, roles.student(x_t, t, replace(condition, end=end)), t, end)
        return {"endpoint": 0.5 * mean((x - path[-1]).square())}
