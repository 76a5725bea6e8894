"""A flow map by central differences: steps of any length, without forward-mode differentiation.

The student is evaluated a little ahead and a little behind on the path, (z + d v, t + d) and (z - d v, t - d), both for
the same end r; their difference over 2 d is du/dt in u = v - (t - r) du/dt. Half of the samples are diffusion (r = t),
a quarter consistency (r = 0), the rest between. Source: the flow-map stage of AnyFlow in FastVideo (lr 5e-5 for 6000
steps). Specification: methods/distillation.md, D3.6.

Inferred, as the source gives the mixture and "central difference" alone: that the way is followed with the target's
velocity v, that v is a guided teacher's (`target=data` is a sample's own), uniform times, and d = 0.01, which stands
above the rounding of bf16.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from edit.denoiser import Denoiser
from edit.few_step.flow_map import check_difference, check_solver, mean_velocity, need_interval
from edit.few_step.method import FewStepMethod
from edit.inputs.limits import Inside, check_numbers
from edit.losses import Seen
from edit.objectives import TimeLaw, Uniform
from edit.paths import corrupt, mean
from edit.solvers import Solver


@dataclass(frozen=True)
class Shortcut(FewStepMethod):
    """Needs `edit.few_step.flow_map.IntervalInput` on the student.

    Args:
        target: where v is from
        diffusion: share of the samples with r = t
        consistency: share of the samples with r = 0
        time: law of t and, for what is left, of r: the later of two is t
        step: d; both calls are fp32 whatever the precision of training
    """

    target: Literal["teacher", "data"] = "teacher"
    diffusion: float = 0.5
    consistency: float = 0.25
    time: TimeLaw = field(default_factory=Uniform)
    step: Inside = 1e-2

    def __post_init__(self):
        check_numbers(self)
        check_difference("Shortcut", "difference", self.step)
        if self.target not in ("teacher", "data"):
            raise ValueError(f"Shortcut: target must be teacher or data, got {self.target!r}")
        if min(self.diffusion, self.consistency) < 0 or self.diffusion + self.consistency > 1:
            shares = f"{self.diffusion} and {self.consistency}"
            raise ValueError(f"Shortcut: diffusion and consistency are shares of one whole, got {shares}")

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override] - here a consequence of `target`
        return self.target == "teacher"

    def check(self, solver: Solver) -> None:
        check_solver("Shortcut", solver)

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> nn.Module | None:
        need_interval("Shortcut", student)
        return None

    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        draws = seen.draws
        kind, t, r = draws.uniform(0), self.time(draws.uniform(1)), self.time(draws.uniform(2))
        between = kind >= self.diffusion + self.consistency
        t, r = torch.where(between, torch.maximum(t, r), t), torch.minimum(t, r).masked_fill(~between, 0)
        r = torch.where(kind < self.diffusion, t, r)
        assert seen.x is not None
        eps = draws.gaussian(3)
        x_t = corrupt(seen.x, eps, t)
        v = seen.teacher(x_t, t, seen.condition) if self.target == "teacher" else eps - seen.x
        condition = replace(seen.condition, end=r)
        target = mean_velocity(seen.student, x_t, t, v, condition, "difference", self.step)
        return {"shortcut": mean((seen.student(x_t, t, condition) - target).square())}
