"""MeanFlow (arXiv 2505.13447): the student learns the mean velocity between any two times from an identity alone.

u = v - (t - r) du/dt, with du/dt = v d_z u + d_t u along the way; the right side is the target, without a graph.
Defaults are the paper's on ImageNet. As a distillation method v is the velocity of a guided teacher, and guidance costs
nothing in the student; with `target=data` it is that of a sample, noise - x, and the method needs no teacher.
Specification: methods/distillation.md, D3.6.

Ours: derivatives are finite differences unless asked otherwise; samples whose condition was dropped are guided
like any other, which moves no fixed point (the paper gives them v). With p = 1 the loss reads about 1 at all times: the
weight divides it by itself, so watch the samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from edit.denoiser import Denoiser
from edit.few_step.flow_map import How, check_difference, check_solver, mean_velocity, need_interval
from edit.few_step.method import FewStepMethod
from edit.inputs.limits import Inside, Share, check_numbers
from edit.losses import Seen
from edit.objectives import LogitNormal, TimeLaw
from edit.paths import column, corrupt
from edit.solvers import Solver


@dataclass(frozen=True)
class MeanFlow(FewStepMethod):
    """Needs `edit.few_step.flow_map.IntervalInput` on the student.

    Args:
        target: where v is from
        apart: probability of r < t; at r = t the loss is flow matching. 0.75 on CIFAR
        time: law of both times, the later of which is t; mean -2, std 2 on CIFAR
        p: samples are weighed by 1 / (loss + c)^p; 0.75 on CIFAR, 0 is no weight
        c: likewise
        omega: guidance in the target of `target=data`: v becomes omega v + (1 - omega - kappa) u_null + kappa u_cond,
            an effective scale of omega / (1 - kappa). u_null is what the student has learned under `label_drop`, which
            must be above 0; with a teacher in the run (another part's) nothing notices where it is 0. 0.2 with kappa
            0.92 for their XL. `target=teacher` has the guidance of its teacher and refuses this one
        kappa: likewise
        interval: times t at which the target is guided; 0 to 0.75 for their XL
        how: derivatives, see `edit.few_step.flow_map.derivative`; their calls are fp32 whatever the precision of
            training, and cost accordingly
        step: likewise; 1e-3 in FastGen follows the ripple of time embeddings
    """

    target: Literal["teacher", "data"] = "teacher"
    apart: float = 0.25
    time: TimeLaw = field(default_factory=lambda: LogitNormal(-0.4, 1.0))
    p: float = 1.0
    c: float = 1e-3
    omega: float = 1.0
    kappa: float = 0.0
    interval: tuple[Share, Share] = (0.0, 1.0)
    how: How = "difference"
    step: Inside = 1e-2

    def __post_init__(self):
        check_numbers(self)
        object.__setattr__(self, "interval", tuple(self.interval))
        check_difference("MeanFlow", self.how, self.step)
        if self.target not in ("teacher", "data"):
            raise ValueError(f"MeanFlow: target must be teacher or data, got {self.target!r}")
        if not 0 <= self.apart <= 1:
            raise ValueError(f"MeanFlow: apart is a probability, got {self.apart}")
        if self.c <= 0 or self.p < 0:
            raise ValueError(f"MeanFlow: c must be positive and p not negative, got {self.c} and {self.p}")
        if self.kappa >= 1 or self.omega <= 0:
            raise ValueError(f"MeanFlow: omega must be above 0 and kappa below 1, got {self.omega} and {self.kappa}")
        if self.target == "teacher" and self.guided:
            raise ValueError("MeanFlow: a teacher is guided by teacher.guidance: leave out omega and kappa")

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override] - here a consequence of `target`
        return self.target == "teacher"

    @property
    def guided(self) -> bool:
        return (self.omega, self.kappa) != (1, 0)

    def check(self, solver: Solver) -> None:
        check_solver("MeanFlow", solver)

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> nn.Module | None:
        need_interval("MeanFlow", student)
        return None

    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        draws = seen.draws
        t, r = self.time(draws.uniform(0)), self.time(draws.uniform(1))
        t, r = torch.maximum(t, r), torch.minimum(t, r)
        r = torch.where(draws.uniform(2) < self.apart, r, t)
        assert seen.x is not None
        eps = draws.gaussian(3)
        x_t = corrupt(seen.x, eps, t)
        if self.target == "teacher":
            v = seen.teacher(x_t, t, seen.condition)
        else:
            v = self.guide(eps - seen.x, x_t, t, seen)
        condition = replace(seen.condition, end=r)
        target = mean_velocity(seen.student, x_t, t, v, condition, self.how, self.step)
        square = (seen.student(x_t, t, condition) - target).flatten(1).square().sum(1)
        return {"mean_flow": square / (square.detach() + self.c) ** self.p}

    @torch.no_grad()
    def guide(self, v: Tensor, x_t: Tensor, t: Tensor, seen: Seen) -> Tensor:
        """The velocity of a sample, guided by the student itself: b c *sizes."""
        if not self.guided:
            return v
        if seen.null is seen.condition:
            raise ValueError("MeanFlow: guidance in the target needs an unconditional student: set label_drop=0.1")
        out = self.omega * v
        out += (1 - self.omega - self.kappa) * seen.student(x_t, t, replace(seen.null, end=t))
        if self.kappa:
            out += self.kappa * seen.student(x_t, t, replace(seen.condition, end=t))
        low, high = self.interval
        return torch.where(column((low <= t) & (t <= high), v), out, v)
