"""Latent adversarial diffusion distillation (LADD, arXiv 2403.12015): few steps whose results look like the teacher's.

The student takes latents from one of a few times to data; its samples and real latents are noised again and scored by
heads on the frozen teacher's tokens. Real latents should be the teacher's own guided samples (`data.generate`);
photographs need ADD's distance to the teacher (2311.17042), which `distill` adds. Specification:
methods/distillation.md, D3.7.

Inferred: the seven units of FLUX.1; fakes and reals are judged at one time per sample with noises of their own; both
turns draw the student's times by the same law; alpha_t of ADD's weight is 1 - t on our path; `warm` is given as a part
of the run (500 of 10 000 iterations). The published approximation of R1 perturbs clean latents; here they are noised
first, so that heads are smooth where they judge.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from edit.denoiser import Denoiser
from edit.few_step.discriminator import (
    Heads,
    approximate_r1,
    hinge_generator,
    hinge_real_fake,
    judge,
    softplus_generator,
    softplus_real_fake,
)
from edit.few_step.method import FewStepMethod, decreasing, need_turns
from edit.inputs.limits import Count, check_numbers
from edit.losses import Seen
from edit.objectives import LogitNormal, TimeLaw
from edit.paths import corrupt, mean, move
from edit.solvers import Euler, Grid, Solver, times

LOSSES = {"hinge": (hinge_real_fake, hinge_generator), "softplus": (softplus_real_fake, softplus_generator)}


@dataclass(frozen=True)
class LADD(FewStepMethod):
    """Student and heads in turns.

    Args:
        teacher_taps: units of the teacher that are judged by, counted from 0, negative ones from the end
        times: that the student starts from, decreasing; the sampler's are among them
        p: probability of each
        first: the same during the first part of the run
        warm: that part, in [0, 1]
        law: of the times at which latents are judged
        loss: "hinge", or "softplus" as in FastGen
        distill: weight of ADD's distance to the teacher's prediction, (1 - t) |x - x_teacher|^2 / d; 2.5 there
        r1: weight of the approximate gradient penalty on reals; FastGen: 0.1
        r1_noise: standard deviation of the added noise
        hidden: channels inside a head
        kernel: of the heads, in tokens; 1: each token is judged by itself
        every: the student's turn is every n-th step
        together: heads are trained on the student's turns as well
    """

    teacher_taps: tuple[int, ...] = (4, 9, 14, 18, 28, 38, 48)
    times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    p: tuple[float, ...] = (0.7, 0.1, 0.1, 0.1)
    first: tuple[float, ...] = (0.0, 0.0, 0.5, 0.5)
    warm: float = 0.05
    law: TimeLaw = field(default_factory=lambda: LogitNormal(1.0, 1.0))
    loss: Literal["hinge", "softplus"] = "hinge"
    distill: float = 0.0
    r1: float = 0.0
    r1_noise: float = 0.1
    hidden: Count = 256
    kernel: Count = 3
    every: Count = 2
    together: bool = False

    def __post_init__(self):
        check_numbers(self)
        for name in ("teacher_taps", "times", "p", "first"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not decreasing(self.times):
            raise ValueError(f"LADD: times must decrease and lie in (0, 1], got {list(self.times)}")
        for name, odds in (("p", self.p), ("first", self.first)):
            if len(odds) != len(self.times) or min(odds) < 0 or abs(sum(odds) - 1) > 1e-6:
                raise ValueError(
                    f"LADD: {name} holds a probability for each of the {len(self.times)} times, got {list(odds)}"
                )
        if not 0 <= self.warm <= 1:
            raise ValueError(f"LADD: warm is a part of the run, in [0, 1], got {self.warm}")
        if self.loss not in LOSSES:
            raise ValueError(f"LADD: loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if min(self.distill, self.r1, self.r1_noise) < 0:
            raise ValueError("LADD: distill, r1 and r1_noise must be at least 0")
        need_turns(self, "heads")

    @property
    def adversarial(self) -> bool:
        return True

    def check(self, solver: Solver) -> None:
        grid = solver.grid if isinstance(solver, Grid) else ()
        grid = times(solver.steps, solver.shift) if isinstance(solver, Euler) else grid
        if not grid or any(min(abs(t - known) for known in self.times) > 1e-3 for t in grid[:-1]):
            raise ValueError(
                f"LADD trains steps from the times {list(self.times)}, the sampler is {solver}: set sampler.solver to "
                "edit.solvers.Grid with times among these"
            )

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> Heads:
        if teacher is None:
            raise ValueError("LADD judges by a teacher's tokens and there is none: give one (teacher.path)")
        return Heads.on(teacher, self.teacher_taps, self.hidden, self.kernel)

    def generate(self, seen: Seen) -> Tensor:
        """The student's sample from data noised to one of its times, in one step: b c *sizes."""
        odds = self.first if seen.progress < self.warm else self.p
        u = seen.draws.uniform(0)
        t = torch.full_like(u, self.times[-1])
        for time, edge in [*zip(self.times, accumulate(odds), strict=True)][-2::-1]:
            t = t.masked_fill(u <= edge, time)  # scalars alone: a table would be copied from the host in each step
        x_t, end = corrupt(seen.x, seen.draws.gaussian(1), t), torch.zeros_like(t)
        return move(x_t, seen.student(x_t, t, replace(seen.condition, end=end)), t, end)

    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        draws, condition = seen.draws, seen.condition
        fake, t = self.generate(seen), self.law(draws.uniform(2))
        losses = {"generator": LOSSES[self.loss][1](judge(seen, corrupt(fake, draws.gaussian(3), t), t, condition))}
        if self.distill:
            t = draws.uniform(4)
            x_t = corrupt(fake.detach(), draws.gaussian(5), t)
            target = move(x_t, seen.teacher(x_t, t, condition), t, torch.zeros_like(t))
            losses["distill"] = self.distill * (1 - t) * mean((fake - target).square())
        return losses

    def critic_losses(self, seen: Seen) -> dict[str, Tensor]:
        draws, condition = seen.draws, seen.condition
        with torch.no_grad():
            fake = self.generate(seen)
        t = self.law(draws.uniform(2))
        x_t = corrupt(seen.x, draws.gaussian(6), t)
        real = judge(seen, x_t, t, condition)
        losses = {"heads": LOSSES[self.loss][0](real, judge(seen, corrupt(fake, draws.gaussian(3), t), t, condition))}
        if self.r1:
            near = judge(seen, x_t + self.r1_noise * draws.gaussian(7), t, condition)
            losses["r1"] = self.r1 * approximate_r1(real, near)
        return losses
