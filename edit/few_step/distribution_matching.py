"""Distribution matching: the student's samples move along the difference of two scores, the teacher's and that of a
critic that learns the student's distribution (DMD, arXiv 2311.18828; DMD2, 2405.14867).

Starting points are the sampler's states: the student runs over the solver's grid up to a step that all ranks share, and
only that step has a graph. Two additions make training stable for large flow models (SenseFlow, 2506.00523): the critic
follows the student (`critic.follow`), and the teacher guides the student inside each segment of the grid. With a
discriminator on the teacher's features come DMD2's adversarial loss and the weights of f-distill (2502.15681).
Specification: methods/distillation.md, D3.8. Ours: one draw for a whole batch decides on the rollout, so that half of
the steps need none; the critic's times follow the same law without its margins; fakes are scored at the states where
the scores are compared, which takes two calls of the teacher at one point: guided for its score, then for the features
of its condition, through which gradients flow. SenseFlow's discriminator reads decoded images instead (`vision`);
`edit.few_step.combined` adds others.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from edit.denoiser import Denoiser
from edit.few_step.discriminator import (
    Heads,
    hinge_generator,
    hinge_real_fake,
    judge,
    softplus_generator,
    softplus_real_fake,
)
from edit.few_step.divergence import DIVERGENCES, Divergence, WeighedHeads
from edit.few_step.method import FewStepMethod, need_turns, pseudo_huber
from edit.few_step.scores import START, capped, check_grid, direction, rollout
from edit.few_step.vision import Vision, late
from edit.inputs.limits import Count, NotNegative, Positive, check_numbers
from edit.losses import Seen
from edit.objectives import TimeLaw, Uniform
from edit.paths import column, corrupt, mean, move
from edit.solvers import Grid, Solver

# streams of `Draws` beside those of the rollout: which step, rollout or data, ISG's time
STEP, SOURCE, MIDDLE = 1, 2, 3
TIME, NOISE, CRITIC_TIME, CRITIC_NOISE, REAL_NOISE = 4, 5, 6, 7, 8


@dataclass(frozen=True)
class DistributionMatching(FewStepMethod):
    """Match the distribution of the student's samples with the guided teacher's.

    Args:
        grid: times of the student's steps, the sampler's own before `shift`. A student of one step, (1.0,), is to start
            from one that has learned the teacher's ends from noise, by `edit.few_step.endpoint`
        shift: of these times, likewise
        renoise: the sampler's: each step starts from fresh noise, or goes on where the last one ended
        times: law of the times at which scores are compared
        low: these times are moved into [low, high]
        high: likewise
        simulate: probability that a batch starts from the student's own rollout instead of noised data; 1 needs no data
        segment: weight of the intra-segment guidance; SenseFlow: 1
        charbonnier: scale c of its distance sqrt(difference^2 + c^2) - c, per element; None: squared, as in the paper
        every: the student's turn is every n-th step, the critic's are the others; DMD2: every=5 together=true
        together: the critic is trained on the student's turns as well; the rollout and the student's step are then made
            twice on the same numbers, with a graph and without
        critic_weight: quantity of the critic's squared error: "velocity", as it is, or "data", those that the velocity
            implies, times min(SNR, cap): for models that predict noise, FLUX in FastGen (there without the factor)
        cap: of the signal-to-noise ratio there
        taps: units of the teacher whose tokens discriminator heads look at; none: no discriminator. DMD2 uses the
            middle, in FLUX 28
        realism: weight of the adversarial loss; 5e-3 for SDXL, 0.03 for FLUX
        judgement: weight of the discriminator's loss beside the critic's
        vision: SenseFlow's discriminator, heads on a frozen vision model by the hinge loss, in place of `taps`. The
            student's is weighted by 2 (1 - t)^2, t being the time that its step begins at
        divergence: which one is minimised; all but reverse_kl need `taps`
        ratio: density ratios are clipped to [1 / ratio, ratio]
    """

    grid: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    shift: float = 1.0
    renoise: bool = True
    times: TimeLaw = field(default_factory=Uniform)
    low: float = 0.02
    high: float = 0.98
    simulate: float = 0.5
    segment: NotNegative = 0.0
    charbonnier: Positive | None = 1e-3
    every: Count = 5
    together: bool = False
    critic_weight: Literal["velocity", "data"] = "velocity"
    cap: float = 5.0
    taps: tuple[int, ...] = ()
    realism: NotNegative = 0.03
    judgement: NotNegative = 1e-2
    vision: Vision | None = None
    divergence: Divergence = "reverse_kl"
    ratio: float = 10.0

    has_critic: ClassVar[bool] = True
    margin: ClassVar[float] = 0.02  # of the teacher's part of a segment to its ends

    def __post_init__(self):
        check_numbers(self)
        object.__setattr__(self, "grid", tuple(self.grid))
        object.__setattr__(self, "taps", tuple(self.taps))
        ts = self.solver.grid
        if not 0 < self.low <= self.high < 1:
            raise ValueError(f"DistributionMatching: 0 < low <= high < 1 are times, got {self.low}, {self.high}")
        if not 0 <= self.simulate <= 1:
            raise ValueError(f"DistributionMatching: simulate is a probability, got {self.simulate}")
        need_turns(self, "critic")
        if self.segment and min(t - end for t, end in zip(ts, ts[1:], strict=False)) <= 2 * self.margin:
            raise ValueError(
                f"DistributionMatching: segments must be longer than {2 * self.margin} for a teacher's step inside "
                f"them, got times {[round(t, 4) for t in ts]}: take fewer, or segment=0"
            )
        if self.critic_weight not in ("velocity", "data") or self.cap <= 0:
            raise ValueError(
                "DistributionMatching: critic_weight must be velocity or data and cap positive, got "
                f"{self.critic_weight!r}, {self.cap}"
            )
        if self.divergence not in DIVERGENCES:
            known = ", ".join(DIVERGENCES)
            raise ValueError(f"DistributionMatching: divergence must be one of {known}, got {self.divergence!r}")
        if self.divergence != "reverse_kl" and not self.taps:
            raise ValueError(
                f"DistributionMatching: divergence={self.divergence} needs a discriminator's density ratios: name "
                "teacher units in taps, or use reverse_kl"
            )
        if self.taps and self.vision is not None:
            raise ValueError(
                f"DistributionMatching: taps={list(self.taps)} and vision are two discriminators: leave one of them out"
            )
        if self.ratio <= 1:
            raise ValueError(f"DistributionMatching: ratio must be above 1, got {self.ratio}")

    @property
    def solver(self) -> Grid:
        return Grid(self.grid, self.renoise, self.shift)

    @property
    def needs_data(self) -> bool:  # type: ignore[override] - here a consequence
        return self.simulate < 1 or bool(self.taps) or self.vision is not None

    @property
    def teacher_taps(self) -> tuple[int, ...]:  # type: ignore[override] - likewise
        return self.taps

    def check(self, solver: Solver) -> None:
        check_grid("DistributionMatching", self.solver, solver)

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> WeighedHeads | Heads | None:
        if self.segment and any(e.leads for e in student.applied.values()):
            raise ValueError(
                "DistributionMatching: segment guides velocities, this student is a flow map: set segment=0, or leave "
                "out the edit"
            )
        if student.prediction == "noise" and self.critic_weight == "velocity":
            raise ValueError(
                f"DistributionMatching: this {student.name} predicts noise, whose error counts up to 25 000 times in a "
                "velocity near pure noise: set critic_weight=data"
            )
        if self.vision is not None:
            return self.vision.heads(student)
        if not self.taps:
            return None
        assert teacher is not None, "this method needs a teacher"
        return WeighedHeads(Heads.on(teacher, self.taps))

    # ---- losses ---------------------------------------------------------------------------------------------------

    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        draws, condition = seen.draws, seen.condition
        x_t, t, end = self.begin(seen)
        v = seen.student(x_t, t, replace(condition, end=torch.zeros_like(t)))
        x = x_t - column(t, x_t) * v
        tau = self.low + (self.high - self.low) * self.times(draws.uniform(TIME))
        x_tau = corrupt(x, draws.gaussian(NOISE), tau)
        with torch.no_grad():
            teacher, critic = seen.teacher(x_tau, tau, condition), seen.critic(x_tau, tau, condition)
            gradient = direction(x, x_tau, tau, teacher, critic)
        losses = {}
        if self.taps:
            logits = judge(seen, x_tau, tau, condition)
            losses["realism"] = self.realism * softplus_generator(logits)
            gradient = column(self.weight(logits.detach(), tau, cast(WeighedHeads, seen.own)), x) * gradient
        # written with x - x, so that the gradient is exact: in x - (x - gradient) its last digits would be lost
        losses["distribution"] = 0.5 * mean((x - x.detach() + gradient).square())
        if self.vision is not None:
            losses["vision"] = late(t) * hinge_generator(self.vision.judge(seen, x))
        if self.segment:
            losses["segment"] = self.segment * self.inside(seen, x_t, v, t, end)
        return losses

    def critic_losses(self, seen: Seen) -> dict[str, Tensor]:
        draws, condition = seen.draws, seen.condition
        with torch.no_grad():
            x_t, t, _ = self.begin(seen)
            end = torch.zeros_like(t)
            x = move(x_t, seen.student(x_t, t, replace(condition, end=end)), t, end)
        tau, eps = self.times(draws.uniform(CRITIC_TIME)), draws.gaussian(CRITIC_NOISE)
        x_tau = corrupt(x, eps, tau)
        error = seen.critic(x_tau, tau, condition) - (eps - x)
        on_data = self.critic_weight == "data"
        losses = {self.critic_weight: capped(error, tau, self.cap) if on_data else mean(error.square())}
        if self.taps:
            real = judge(seen, corrupt(seen.x, draws.gaussian(REAL_NOISE), tau), tau, condition)
            losses["judgement"] = self.judgement * softplus_real_fake(real, judge(seen, x_tau, tau, condition))
        if self.vision is not None:
            real, fake = (self.vision.judge(seen, sample) for sample in (seen.x, x))
            losses["judgement"] = self.judgement * hinge_real_fake(real, fake)
        return losses

    # ---- parts ----------------------------------------------------------------------------------------------------

    def begin(self, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
        """Where the student's step begins, its time and that of the next: x_t b c *sizes, t [b], end [b]."""
        draws, ts = seen.draws, self.solver.grid
        k = int(draws.shared(STEP) * len(self.grid))
        t, end = (torch.full_like(seen.scale, ts[j]) for j in (k, k + 1))
        if draws.shared(SOURCE) < self.simulate:
            return rollout(seen, ts[: k + 1], self.renoise), t, end
        return corrupt(seen.x, draws.gaussian(START), t), t, end

    def inside(self, seen: Seen, x_t: Tensor, v: Tensor, t: Tensor, end: Tensor) -> Tensor:
        """Intra-segment guidance: one step of the student against a step of the teacher and one of its own: [b]."""
        low, high = end + self.margin, t - self.margin
        middle = low + (high - low) * seen.draws.uniform(MIDDLE)
        with torch.no_grad():
            x = move(x_t, seen.teacher(x_t, t, seen.condition), t, middle)
            x = move(x, seen.student(x, middle, replace(seen.condition, end=end)), middle, end)
        delta = move(x_t, v, t, end) - x
        return mean(delta.square()) if self.charbonnier is None else pseudo_huber(delta, self.charbonnier)

    def weight(self, logits: Tensor, tau: Tensor, judge: WeighedHeads) -> Tensor:
        """f-distill's, with mean 1 at each noise level: logits b k -> [b]."""
        if self.divergence == "reverse_kl":
            return torch.ones_like(tau)
        r = logits.mean(1).exp().clamp(1 / self.ratio, self.ratio)
        return judge.normalised(DIVERGENCES[self.divergence](r), tau)
