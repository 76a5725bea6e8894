"""Adversarial diffusion distillation (ADD, arXiv 2311.17042): few steps whose decoded images a frozen DINOv2 takes for
real ones, and which stay near the teacher.

The student takes latents from one of a few times to data; its samples are decoded and scored beside real data, and
noised again to be compared with the teacher's prediction there. Specification: methods/distillation.md, D3.7.

Inferred: the four times are equally likely; alpha_t of the distance's weight is 1 - t on our path. As published, R1 is
taken with respect to the inputs of the heads, not to pixels; here without second derivatives, by a small step in a
random direction (`discriminator.approximate_r1`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edit.denoiser import Denoiser
from edit.few_step.discriminator import Heads, approximate_r1, hinge_generator, hinge_real_fake
from edit.few_step.method import FewStepMethod, check_times, decreasing, need_turns
from edit.few_step.vision import Vision
from edit.inputs.limits import Count, check_numbers
from edit.losses import Seen
from edit.paths import corrupt, mean, move
from edit.solvers import Solver

START, NOISE, AGAIN, AGAIN_NOISE, NEAR = 0, 1, 2, 3, 10  # streams of `Draws`; NEAR + k: R1's step in the k-th layer


@dataclass(frozen=True)
class ADD(FewStepMethod):
    """Student and heads in turns.

    Args:
        vision: the model under the heads
        times: that the student starts from, decreasing; the sampler's are among them
        distill: weight of the distance to the teacher's prediction, (1 - t) |x - x_teacher|^2 / d
        r1: weight of the squared gradient of logits of reals
        r1_noise: deviation of the step that measures it, in hidden states
        every: the student's turn is every n-th step
        together: heads are trained on the student's turns as well
    """

    vision: Vision | None = None
    times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    distill: float = 2.5
    r1: float = 1e-5
    r1_noise: float = 0.1
    every: Count = 2
    together: bool = False

    def __post_init__(self):
        check_numbers(self)
        object.__setattr__(self, "times", tuple(self.times))
        if self.vision is None:
            raise ValueError("ADD judges images by a vision model and there is none: give its folder as vision.path")
        if not decreasing(self.times):
            raise ValueError(f"ADD: times must decrease and lie in (0, 1], got {list(self.times)}")
        if min(self.distill, self.r1) < 0 or self.r1_noise <= 0:
            raise ValueError(
                f"ADD: distill and r1 must be at least 0 and r1_noise positive, got {self.distill}, {self.r1}, "
                f"{self.r1_noise}"
            )
        need_turns(self, "heads")

    @property
    def adversarial(self) -> bool:
        return True

    def check(self, solver: Solver) -> None:
        check_times("ADD", self.times, solver)

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> Heads:
        return self.looks.heads(student)

    @property
    def looks(self) -> Vision:
        assert self.vision is not None, "refused before"
        return self.vision

    def generate(self, seen: Seen) -> Tensor:
        """The student's sample from data noised to one of its times, in one step: b c *sizes."""
        place = seen.draws.uniform(START) * len(self.times)
        t = torch.full_like(place, self.times[0])
        for k, time in enumerate(self.times):  # scalars alone: a table would be copied from the host in each step
            t = t.masked_fill(place >= k, time)
        x_t, end = corrupt(seen.x, seen.draws.gaussian(NOISE), t), torch.zeros_like(t)
        return move(x_t, seen.student(x_t, t, replace(seen.condition, end=end)), t, end)

    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        fake = self.generate(seen)
        losses = {"generator": hinge_generator(self.looks.judge(seen, fake))}
        if self.distill:
            t = seen.draws.uniform(AGAIN)
            x_t = corrupt(fake.detach(), seen.draws.gaussian(AGAIN_NOISE), t)
            target = move(x_t, seen.teacher(x_t, t, seen.condition), t, torch.zeros_like(t))
            losses["distill"] = self.distill * (1 - t) * mean((fake - target).square())
        return losses

    def critic_losses(self, seen: Seen) -> dict[str, Tensor]:
        with torch.no_grad():
            found, imagined = (self.looks.see(seen, x) for x in (seen.x, self.generate(seen)))
        real = self.looks.score(seen, found)
        losses = {"heads": hinge_real_fake(real, self.looks.score(seen, imagined))}
        if self.r1:
            near = {
                name: v + self.r1_noise * replace(seen.draws, shape=tuple(v.shape[1:])).gaussian(NEAR + k)
                for k, (name, v) in enumerate(found.items())
            }
            penalty = approximate_r1(real, self.looks.score(seen, near))
            losses["r1"] = self.r1 / self.r1_noise**2 * penalty
        return losses
