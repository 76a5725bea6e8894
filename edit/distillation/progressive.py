"""Progressive distillation (arXiv 2202.00512): one step of the student does what two steps of its teacher do.

The student of one run is the teacher of the next: 32, 16, 8, 4 steps, each a run of its own (`before`). Guidance is
distilled in the first one; its successors ask their teacher without. In the paper's coordinates a step is DDIM's; in
those of the linear path, where DDIM is Euler's method, the target is the mean of the teacher's two velocities, weighted
by the lengths of its steps. Specification: methods/distillation.md, D3.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edit.distillation.matching import Given, Matching, Roles, column, corrupt, mean, move
from edit.sampling import Euler, Solver, times


@dataclass(frozen=True)
class Progressive(Matching):
    """Halve the number of steps.

    Args:
        steps: of the student; the teacher takes two for each
        shift: of the times, the sampler's own
    """

    steps: int = 16
    shift: float = 1.0

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"Progressive: steps must be at least 1, got {self.steps}")

    def check(self, solver: Solver) -> None:
        if not isinstance(solver, Euler) or (solver.steps, solver.shift) != (self.steps, self.shift):
            raise ValueError(
                f"Progressive trains {self.steps} Euler steps with shift {self.shift:g}, the sampler is {solver}: "
                f"set sampler.solver.steps={self.steps} sampler.solver.shift={self.shift:g}"
            )

    def student_losses(self, roles: Roles, given: Given) -> dict[str, Tensor]:
        draws, condition = given.draws, given.condition
        grid = torch.tensor(times(2 * self.steps, self.shift), device=given.x.device, dtype=torch.float32)
        k = 2 * (draws.uniform(0) * self.steps).long()  # where the student's step begins
        t, middle, end = grid[k], grid[k + 1], grid[k + 2]
        x_t = corrupt(given.x, draws.gaussian(1), t)
        x = move(x_t, roles.teacher(x_t, t, condition), t, middle)
        x = move(x, roles.teacher(x, middle, condition), middle, end)
        target = (x - x_t) / column(end - t, x)
        return {"progressive": mean((roles.student(x_t, t, condition) - target).square())}
