"""Flash Diffusion (arXiv 2406.02347): the teacher's many steps in one, sharpened by two more losses that grow.

From a noised point the student is to reach in one step the point that the teacher reaches in 32; distribution matching
and a least-squares discriminator on the teacher's tokens come in by ramps. The student's own score takes the place of a
critic's. Starts are drawn around four times, first near data, later near noise.
Specification: methods/distillation.md, D3.8.

Ours: the difference of scores is divided by the distance of data predictions (the public code: by a velocity); LPIPS
needs its own weights, so the distance is that of a vision model's hidden states (`feature_distance`), or, without one,
the mean square in latents. Weights of the four stages and the spread around a
time (half a squared step of 32) are those of the published settings for SD3, their ramps made linear; g ~ U(7, 13)
there is `teacher.guidance`. Inferred: units, law of the times at which samples are judged.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from edit.denoiser import Denoiser
from edit.few_step.discriminator import Heads, judge, square_generator, square_real_fake
from edit.few_step.method import FewStepMethod, check_times, decreasing, need_turns
from edit.few_step.progressive import time_grid
from edit.few_step.scores import direction
from edit.few_step.vision import Vision, feature_distance
from edit.inputs.limits import Count, Steps, check_numbers
from edit.losses import Seen
from edit.objectives import Ramp, TimeLaw, Uniform, Weight, part_of, weight_at
from edit.paths import corrupt, mean, move
from edit.solvers import Solver

MODE, JITTER, START, TIME, NOISE, REAL_NOISE = range(6)  # streams of `Draws`
LEAST = 0.02  # time that is left at the start; scores are compared at 0.02 to 0.98


@dataclass(frozen=True)
class Flash(FewStepMethod):
    """Student and heads in turns.

    Args:
        steps: of the teacher's Euler solve
        shift: of their times
        modes: times around which the student starts, decreasing; the sampler's are among them
        stages: probabilities of the modes, each for an equal part of the run
        spread: deviation of a start from its mode; starts are at most 1
        match: weight of distribution matching over the run
        realism: weight of the adversarial loss over the run
        vision: in whose hidden states the distance to the teacher's result is measured; None: in latents
        teacher_taps: units of the teacher that the heads look at
        law: of the times at which samples are matched and judged, moved into [0.02, 0.98]
        hidden: channels inside a head
        every: the student's turn is every n-th step
        together: heads are trained on the student's turns as well
    """

    steps: Steps = 32
    shift: float = 1.0
    modes: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    stages: tuple[tuple[float, ...], ...] = (
        (0.0, 0.0, 0.5, 0.5),
        (0.1, 0.3, 0.3, 0.3),
        (0.25, 0.25, 0.25, 0.25),
        (0.4, 0.2, 0.2, 0.2),
    )
    spread: float = 0.022
    match: Weight = field(default_factory=lambda: Ramp(0.0, 0.7))
    realism: Weight = field(default_factory=lambda: Ramp(0.0, 0.5))
    vision: Vision | None = None
    teacher_taps: tuple[int, ...] = (4, 9, 14, 18, 28, 38, 48)
    law: TimeLaw = field(default_factory=Uniform)
    hidden: Count = 256
    every: Count = 2
    together: bool = False

    def __post_init__(self):
        check_numbers(self)
        object.__setattr__(self, "modes", tuple(self.modes))
        object.__setattr__(self, "teacher_taps", tuple(self.teacher_taps))
        object.__setattr__(self, "stages", tuple(tuple(odds) for odds in self.stages))
        if not decreasing(self.modes):
            raise ValueError(f"Flash: modes are times that decrease and lie in (0, 1], got {list(self.modes)}")
        for odds in self.stages or ((),):
            if len(odds) != len(self.modes) or min(odds) < 0 or abs(sum(odds) - 1) > 1e-6:
                raise ValueError(
                    f"Flash: stages hold a probability for each of the {len(self.modes)} modes, got {list(odds)}"
                )
        if self.steps < 1 or self.shift <= 0 or self.spread < 0:
            raise ValueError(
                f"Flash: steps must be at least 1, shift positive and spread at least 0, got {self.steps}, "
                f"{self.shift}, {self.spread}"
            )
        need_turns(self, "heads")

    @property
    def adversarial(self) -> bool:
        return True

    def check(self, solver: Solver) -> None:
        check_times("Flash", self.modes, solver)

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> Heads:
        if teacher is None:
            raise ValueError("Flash judges by a teacher's tokens and there is none: give one (teacher.path)")
        return Heads.on(teacher, self.teacher_taps, self.hidden)

    def begin(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Noised data where the student starts, and its time: b c *sizes, [b]."""
        odds = self.stages[part_of(seen.progress, len(self.stages))]
        u = seen.draws.uniform(MODE)
        t = torch.full_like(u, self.modes[-1])
        for mode, edge in [*zip(self.modes, accumulate(odds), strict=True)][-2::-1]:
            t = t.masked_fill(u <= edge, mode)
        t = (t + self.spread * torch.special.ndtri(seen.draws.uniform(JITTER))).clamp(LEAST, 1)
        return corrupt(seen.x, seen.draws.gaussian(START), t), t

    def solve(self, seen: Seen, x: Tensor, t: Tensor) -> Tensor:
        """The teacher's sample from x at times t [b], in all its steps: b c *sizes."""
        grid = t * time_grid(self.steps, self.shift, x.device)[:, None]
        for now, end in zip(grid, grid[1:], strict=False):
            x = move(x, seen.teacher(x, now, seen.condition), now, end)
        return x

    def generate(self, seen: Seen, x_t: Tensor, t: Tensor) -> Tensor:
        end = torch.zeros_like(t)
        return move(x_t, seen.student(x_t, t, replace(seen.condition, end=end)), t, end)

    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        condition, (x_t, t) = seen.condition, self.begin(seen)
        target, x = self.solve(seen, x_t, t), self.generate(seen, x_t, t)
        losses = {"distill": self.apart(seen, x, target)}
        tau = self.times(seen)
        x_tau = corrupt(x, seen.draws.gaussian(NOISE), tau)
        if weight := weight_at(self.match, seen.progress):
            with torch.no_grad():
                teacher = seen.teacher(x_tau, tau, condition)
                own = seen.student(x_tau, tau, replace(condition, end=torch.zeros_like(tau)))
                gradient = direction(x, x_tau, tau, teacher, own)
            losses["distribution"] = weight * 0.5 * mean((x - x.detach() + gradient).square())
        if weight := weight_at(self.realism, seen.progress):
            losses["generator"] = weight * square_generator(judge(seen, x_tau, tau, condition))
        return losses

    def critic_losses(self, seen: Seen) -> dict[str, Tensor]:
        with torch.no_grad():
            x = self.generate(seen, *self.begin(seen))
        tau, draws, condition = self.times(seen), seen.draws, seen.condition
        real = judge(seen, corrupt(seen.x, draws.gaussian(REAL_NOISE), tau), tau, condition)
        fake = judge(seen, corrupt(x, draws.gaussian(NOISE), tau), tau, condition)
        return {"heads": square_real_fake(real, fake)}

    def apart(self, seen: Seen, x: Tensor, target: Tensor) -> Tensor:
        """How far a sample is from the teacher's: b c *sizes, b c *sizes -> [b]."""
        if self.vision is None:
            return mean((x - target).square())
        with torch.no_grad():
            wanted = self.vision.see(seen, target)
        return feature_distance(self.vision.see(seen, x), wanted)

    def times(self, seen: Seen) -> Tensor:
        """At which samples are matched and judged: [b]."""
        return LEAST + (1 - 2 * LEAST) * self.law(seen.draws.uniform(TIME))
