"""Discrete consistency models: two neighbours on a path are led to the same end, each in one step.

Sources: consistency distillation (arXiv 2303.01469) and latent consistency models (2310.04378): `Consistency`;
phased consistency models (2405.18407): `PhasedConsistency`; truncated consistency models (2410.14895):
`TruncatedConsistency`. Specification: methods/distillation.md, D3.6.

From t to an end e the prediction is f(x_t, t -> e) = x_t + (e - t) v(x_t, t), which is x_t itself at t = e: boundaries
hold by construction. The pseudo-Huber distance is taken element by element and averaged, as the published code of LCM
and PCM has it, and their c of 1e-3 means that. Guidance is the teacher's: `Seen.scale`, drawn from teacher.guidance in
our convention, one more than the w that both papers write; PCM's code ignores the range it is given, here it counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edit.denoiser import Denoiser
from edit.few_step.discriminator import Heads, hinge_generator, hinge_real_fake, judge
from edit.few_step.method import FewStepMethod, pseudo_huber
from edit.few_step.progressive import check_steps, time_grid
from edit.inputs.limits import Count, Positive, Steps, check_numbers
from edit.losses import Field, Seen
from edit.objectives import part_of
from edit.paths import column, corrupt, move
from edit.solvers import Grid, Solver, times


@dataclass(frozen=True)
class Consistency(FewStepMethod):
    """CD and LCM: every point of a path leads to its data.

    Args:
        steps: of the grid that the teacher steps along; 50 of 1000 are LCM's 20 skipped
        shift: of the grid's times
        average: the target is predicted by the moving average (CD), or by the student itself without a graph (LCM as a
            LoRA). The average is `ema`'s, whose decay must then be about 0.95 to 0.99: one of 0.9999, right for images
            alone, freezes the target where the student began
        scaling: s of LCM's boundary scalings c_skip x_t + c_out f with c_skip = 1 / (1 + r^2),
            c_out = r / sqrt(1 + r^2), r = s 1000 t / 0.5; None: none, as f needs none. Generation leaves them out:
            at s = 10 they change a sample by less than 1e-5 of its size where t is at least 0.02
        c: of the pseudo-Huber distance
    """

    steps: Steps = 50
    shift: Positive = 1.0
    average: bool = True
    scaling: float | None = 10.0
    c: Positive = 1e-3

    def __post_init__(self):
        check_numbers(self)
        if self.scaling is not None and self.scaling < 1:
            raise ValueError(
                f"Consistency: scaling must be at least 1, got {self.scaling:g}: below, generation, which leaves it "
                "out, would differ from training; null is none"
            )

    def check(self, solver: Solver) -> None:
        _check_renoised("Consistency", solver)

    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        def data(field: Field, x: Tensor, t: Tensor) -> Tensor:
            found = move(x, field(x, t, seen.condition), t, torch.zeros_like(t))
            if self.scaling is None:
                return found
            r = 1000 * self.scaling * t / 0.5
            return column(1 / (1 + r * r), x) * x + column(r / (1 + r * r).sqrt(), x) * found

        grid = time_grid(self.steps, self.shift, seen.x.device)
        k, x_t, x_next = _teacher_step(seen, grid)
        with torch.no_grad():
            target = data(seen.average if self.average else seen.student, x_next, grid[k + 1])
        return {"consistency": pseudo_huber(data(seen.student, x_t, grid[k]) - target, self.c)}


@dataclass(frozen=True)
class PhasedConsistency(FewStepMethod):
    """PCM: [0, 1] is cut into phases, and a point leads to the end of its own, where the next one begins.

    Generation is a straight step per phase, without fresh noise. The target is predicted by the student itself without
    a graph. With `taps` heads on the frozen teacher's tokens judge the ends as well, noised anew to a time within their
    phase: the target's are real, the student's fake, and the heads learn on every step that is not the student's.
    Inferred: that time is continuous and uniform; reals and fakes have noises of their own; the heads are LADD's.

    Args:
        phases: how many, in equal parts of the grid; several numbers share the run equally in this order, and the last
            is what is sampled
        steps: of the grid that the teacher steps along, divisible by each number of phases
        shift: of the grid's times
        c: of the pseudo-Huber distance
        taps: units of the teacher that heads look at, negative ones from the end; none: without a discriminator
        adversarial_weight: of -D(student's end) beside the distance
        every: the student's turn is every n-th step; without `taps` every step is its turn, and this is 1
    """

    phases: tuple[Count, ...] = (4,)
    steps: Steps = 100
    shift: Positive = 1.0
    c: Positive = 1e-3
    taps: tuple[int, ...] = ()
    adversarial_weight: float = 0.1
    every: Count = 2

    def __post_init__(self):
        check_numbers(self)
        object.__setattr__(self, "phases", tuple(self.phases))
        object.__setattr__(self, "taps", tuple(self.taps))
        if not self.phases or any(m < 1 or self.steps % m for m in self.phases):
            raise ValueError(
                f"PhasedConsistency: phases are numbers that divide the {self.steps} steps, got {list(self.phases)}"
            )
        if self.adversarial_weight < 0:
            raise ValueError(
                f"PhasedConsistency: adversarial_weight must be at least 0, got {self.adversarial_weight:g}"
            )
        if self.taps and self.every < 2:
            raise ValueError(f"PhasedConsistency: every={self.every} leaves the heads no turn: set every to 2 or more")
        if not self.taps:
            object.__setattr__(self, "every", 1)

    @property
    def adversarial(self) -> bool:
        return bool(self.taps)

    @property
    def teacher_taps(self) -> tuple[int, ...]:  # type: ignore[override] - here a consequence of `taps`
        return self.taps

    def check(self, solver: Solver) -> None:
        check_steps("PhasedConsistency", self.phases[-1], self.shift, solver)

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> Heads | None:
        if not self.taps:
            return None
        assert teacher is not None, "this method needs a teacher"
        return Heads.on(teacher, self.taps)

    def predictions(self, seen: Seen) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The student's point at the end of a phase (with a graph), where it should be, and the times [b] at which that
        phase starts and ends. All belong to `Seen.x` noised to a random time of the grid.
        """
        condition, grid = seen.condition, time_grid(self.steps, self.shift, seen.x.device)
        length = self.steps // self.phases[part_of(seen.progress, len(self.phases))]
        k, x_t, x_next = _teacher_step(seen, grid)
        t, after, start, end = grid[k], grid[k + 1], grid[k // length * length], grid[(k // length + 1) * length]
        with torch.no_grad():
            target = move(x_next, seen.student(x_next, after, condition), after, end)
        return move(x_t, seen.student(x_t, t, condition), t, end), target, start, end

    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        prediction, target, start, end = self.predictions(seen)
        losses = {"phased": pseudo_huber(prediction - target, self.c)}
        if self.taps:
            logits = self.verdict(seen, prediction, start, end, 3)
            losses["generator"] = self.adversarial_weight * hinge_generator(logits)
        return losses

    def critic_losses(self, seen: Seen) -> dict[str, Tensor]:
        with torch.no_grad():
            fake, real, start, end = self.predictions(seen)
        real, fake = (self.verdict(seen, x, start, end, stream) for x, stream in ((real, 4), (fake, 3)))
        return {"heads": hinge_real_fake(real, fake)}

    def verdict(self, seen: Seen, x_e: Tensor, start: Tensor, end: Tensor, stream: int) -> Tensor:
        """Logits b k of points at the end of a phase, noised to a time within it that is one for real and fake."""
        t = torch.lerp(end, start, seen.draws.uniform(2))
        x_t = corrupt(x_e, seen.draws.gaussian(stream), (t - end) / (1 - end))
        return judge(seen, x_t, t, seen.condition)


@dataclass(frozen=True)
class TruncatedConsistency(FewStepMethod):
    """TCM's second stage: a consistency model gives up the times near data and gets better at the others.

    The teacher is the model of the first stage, frozen, which is where the student starts, too: at times up to `until`
    its data are the target, above them the student's own at the neighbouring time. Neighbours are one sample with one
    noise (consistency training), so what is learned is the path of the data: where the first stage distilled guidance,
    train on samples of its guided teacher. Inferred, as published configurations are EDM's: the grid instead of
    continuous times, the share of the boundary, the student itself as target.

    Args:
        until: time up to which the first stage is kept; 0.5 is the paper's noise of 1
        share: of the samples that are drawn at the boundary, without which the student may collapse to a constant
        steps: of the grid
        shift: of the grid's times
        c: of the pseudo-Huber distance
    """

    until: float = 0.5
    share: float = 0.25
    steps: Steps = 50
    shift: Positive = 1.0
    c: Positive = 1e-3

    def __post_init__(self):
        check_numbers(self)
        for name, value in (("until", self.until), ("share", self.share)):
            if not 0 < value < 1:
                raise ValueError(f"TruncatedConsistency: {name} must lie between 0 and 1, got {value}")

    def check(self, solver: Solver) -> None:
        grid = _check_renoised("TruncatedConsistency", solver)
        if grid[-2] <= self.until:
            raise ValueError(
                f"TruncatedConsistency keeps nothing at times up to {self.until:g}, the sampler asks at {grid[-2]:g}: "
                "leave such times out of sampler.solver.times"
            )

    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        def data(field: Field, x: Tensor, t: Tensor) -> Tensor:
            return move(x, field(x, t, seen.condition), t, torch.zeros_like(t))

        draws, grid = seen.draws, time_grid(self.steps, self.shift, seen.x.device)
        inside = sum(t > self.until for t in times(self.steps, self.shift)[:-1])  # grid times that are trained
        k = (draws.uniform(0) * inside).long()
        k = k.masked_fill(draws.uniform(2) < self.share, inside - 1)
        t, after, eps = grid[k], grid[k + 1], draws.gaussian(1)
        x_t, x_next = corrupt(seen.x, eps, t), corrupt(seen.x, eps, after)
        with torch.no_grad():
            kept, own = data(seen.teacher, x_next, after), data(seen.student, x_next, after)
            target = torch.where(column(k == inside - 1, own), kept, own)
        return {"truncated": pseudo_huber(data(seen.student, x_t, t) - target, self.c)}


# ---- shared ----------------------------------------------------------------------------------------------------------


def _teacher_step(seen: Seen, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Data noised to a random time grid[k], and where the teacher's step to grid[k + 1] leads: k [b], x_t, x_next."""
    k = (seen.draws.uniform(0) * (len(grid) - 1)).long()
    t = grid[k]
    x_t = corrupt(seen.x, seen.draws.gaussian(1), t)
    return k, x_t, move(x_t, seen.teacher(x_t, t, seen.condition), t, grid[k + 1])


def _check_renoised(who: str, solver: Solver) -> tuple[float, ...]:
    """The times of the sampler of consistency models."""
    if not isinstance(solver, Grid) or not solver.renoise:
        raise ValueError(
            f"{who} leads to data from any time, the sampler is {solver}: set sampler.solver to edit.solvers.Grid "
            "with renoise=true, for instance times=[1.0, 0.5]"
        )
    return solver.grid
