"""Progressive distillation (arXiv 2202.00512): one step of the student equals two steps of its teacher.

The student of one run is the teacher of the next: 32, 16, 8, 4 steps, each a run of its own (`before`). Guidance is
distilled in the first run; later teachers are unguided. In the paper's coordinates a step is DDIM's; in those of the
linear path, where DDIM is Euler's method, the target is the mean of the teacher's two velocities, weighted by the
lengths of its steps. As in the paper, the student should not predict noise: at pure noise that says nothing about the
data, and training is unstable. Specification: methods/distillation.md, D3.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edit.few_step.method import FewStepMethod
from edit.inputs.limits import Positive, Steps, check_numbers
from edit.losses import Seen
from edit.objectives import shift_times
from edit.paths import column, corrupt, mean, move
from edit.solvers import Euler, Grid, Solver, times


@dataclass(frozen=True)
class Progressive(FewStepMethod):
    """Halve the number of steps.

    Args:
        steps: of the student; the teacher takes two for each
        shift: of the times, the sampler's own
        weighting: "none": the error in velocity counts alike at all times; "snr": the paper's max(SNR, 1) times the
            error in the data, which, an error in data being t times one in velocity, is max((1 - t)^2, t^2)
    """

    steps: Steps = 16
    shift: Positive = 1.0
    weighting: Literal["none", "snr"] = "none"

    def __post_init__(self):
        check_numbers(self)
        if self.weighting not in ("none", "snr"):
            raise ValueError(f"Progressive: weighting must be none or snr, got {self.weighting!r}")

    def check(self, solver: Solver) -> None:
        check_steps("Progressive", self.steps, self.shift, solver)

    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        draws, condition = seen.draws, seen.condition
        grid = time_grid(2 * self.steps, self.shift, seen.x.device)
        k = 2 * (draws.uniform(0) * self.steps).long()  # where the student's step begins
        t, middle, end = grid[k], grid[k + 1], grid[k + 2]
        x_t = corrupt(seen.x, draws.gaussian(1), t)
        x = move(x_t, seen.teacher(x_t, t, condition), t, middle)
        x = move(x, seen.teacher(x, middle, condition), middle, end)
        target = (x - x_t) / column(end - t, x)
        loss = mean((seen.student(x_t, t, condition) - target).square())
        return {"progressive": loss if self.weighting == "none" else torch.maximum(t, 1 - t).square() * loss}


def time_grid(steps: int, shift: Positive, device: torch.device) -> Tensor:
    """The times of `edit.solvers.times`, fp32, [steps + 1]: made where they are used, as a copy would block a step."""
    return shift_times(torch.linspace(1, 0, steps + 1, device=device), shift)


def check_steps(who: str, steps: int, shift: Positive, solver: Solver) -> None:
    """Refuse a solver that does not make exactly these straight steps.

    Raises:
        ValueError: naming both, and an alternative
    """
    wanted, found = times(steps, shift), []
    if isinstance(solver, Euler):
        found = times(solver.steps, solver.shift)
    elif isinstance(solver, Grid) and not solver.renoise:
        found = list(solver.grid)
    if len(found) != len(wanted) or any(abs(a - b) > 1e-4 for a, b in zip(found, wanted, strict=True)):
        raise ValueError(
            f"{who} trains {steps} straight steps with shift {shift:g}, the sampler is {solver}: set sampler.solver to "
            f"edit.solvers.Euler with steps={steps} and shift={shift:g}, or, for a model that predicts noise, to "
            "edit.solvers.Grid with the same times"
        )
