"""Continuous-time consistency (sCM and sCD, arXiv 2410.11081) of a flow model: every step goes all the way to data.

Seen on the circle x = cos(tau) x_0 + sin(tau) sigma eps (TrigFlow), a flow model is a consistency model by a change of
variables, its weights as they are (SANA-Sprint, arXiv 2503.09641): f(x, tau) = cos(tau) x - sin(tau) sigma F is the
data x_t - t v that the flow model implies. The loss moves F along the tangent of f, which is to vanish on the way of
the teacher (`target=teacher`, sCD) or of a sample (`target=data`, sCM). Specification: methods/distillation.md, D0 and
D3.6, after FastGen; SANA-Sprint's adversarial term is a method of its own.

Ours: the warm-up of the tangent is a part of the run (10,000 steps there), derivatives are finite differences unless
asked otherwise, and the learned weight u is linear in sines and cosines of tau (random frequencies there).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from edit.denoiser import Denoiser
from edit.few_step.flow_map import How, check_difference, derivative
from edit.few_step.method import FewStepMethod
from edit.inputs.limits import Inside, check_numbers
from edit.losses import Seen
from edit.objectives import LogitNormal, TimeLaw
from edit.paths import column, corrupt, mean
from edit.solvers import Euler, Grid, Solver


def to_trig(x_t: Tensor, t: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """A point of the linear path on the circle: x_t, t -> x, tau in [0, pi / 2]."""
    radius = ((1 - t) ** 2 * sigma**2 + t**2).sqrt()
    return x_t * column(sigma / radius, x_t), torch.atan2(t, (1 - t) * sigma)


def from_trig(x: Tensor, tau: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """The inverse: x, tau -> x_t, t."""
    scale = 1 / (tau.cos() + sigma * tau.sin())
    return column(scale, x) * x, sigma * tau.sin() * scale


def trig_velocity(v: Tensor, x_t: Tensor, t: Tensor, sigma: float) -> Tensor:
    """F = (cos sigma eps - sin x_0) / sigma, of the noise and data that a velocity of the linear path implies."""
    tau = torch.atan2(t, (1 - t) * sigma)
    cos, sin, t = (column(a, x_t) for a in (tau.cos(), tau.sin(), t))
    return cos * (x_t + (1 - t) * v) - sin / sigma * (x_t - t * v)


class LossWeight(nn.Module):
    """u(tau), the logarithm of how large the loss is there; 0 at first."""

    def __init__(self, waves: int = 16):
        super().__init__()
        self.waves = waves
        self.linear = nn.Linear(2 * waves, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tau: Tensor) -> Tensor:  # b -> b
        angle = tau[:, None] * torch.arange(1, self.waves + 1, device=tau.device)
        return self.linear(torch.cat((angle.cos(), angle.sin()), dim=1))[:, 0].float()


@dataclass(frozen=True)
class SCM(FewStepMethod):
    """Continuous-time consistency training or distillation.

    Args:
        target: of whose way f is to be constant
        time: law of t; logit(t) here is log(sigma tan tau), normal in the paper
        sigma: standard deviation of the data
        warmup: part of the run in which the tangent's unstable half is faded in
        c: tangents are normalised to g / (|g| + c), |g| over a sample
        how: derivatives, see `edit.few_step.flow_map.derivative`; their calls are fp32 whatever the precision of
            training, and cost accordingly
        step: likewise; 1e-3 in FastGen follows the ripple of time embeddings
    """

    target: Literal["teacher", "data"] = "teacher"
    time: TimeLaw = field(default_factory=lambda: LogitNormal(-1.0, 1.4))
    sigma: float = 0.5
    warmup: float = 0.1
    c: float = 0.1
    how: How = "difference"
    step: Inside = 1e-2

    def __post_init__(self):
        check_numbers(self)
        check_difference("SCM", self.how, self.step)
        if self.target not in ("teacher", "data"):
            raise ValueError(f"SCM: target must be teacher or data, got {self.target!r}")
        if min(self.sigma, self.c) <= 0:
            raise ValueError(f"SCM: sigma and c must be positive, got {self.sigma} and {self.c}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"SCM: warmup is a part of the run, 0 to 1, got {self.warmup}")

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override] - here a consequence of `target`
        return self.target == "teacher"

    def check(self, solver: Solver) -> None:
        if not isinstance(solver, (Euler, Grid)) or (solver.steps > 1 and not getattr(solver, "renoise", False)):
            raise ValueError(
                f"SCM trains steps that all lead to data, the sampler is {solver}: use sampler=grid "
                "'sampler.solver.times=[1.0,0.5]' sampler.solver.renoise=true"
            )

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> nn.Module:
        if student.prediction != "velocity":
            raise ValueError(
                f"SCM differentiates by time, which is discrete where noise is predicted, as by this {student.name}: "
                "use a flow model, or a method with a grid of its own"
            )
        return LossWeight()

    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        draws, sigma = seen.draws, self.sigma
        assert seen.x is not None
        t, eps = self.time(draws.uniform(0)), draws.gaussian(1)
        x_t = corrupt(seen.x, eps, t)
        x, tau = to_trig(x_t, t, sigma)
        both = tau.cos() * tau.sin()
        cos, sin, cos_sin = (column(a, x) for a in (tau.cos(), tau.sin(), both))

        def asked(x: Tensor, tau: Tensor) -> Tensor:
            x_t, t = from_trig(x, tau, sigma)
            return trig_velocity(seen.student(x_t, t, seen.condition), x_t, t, sigma)

        if self.target == "teacher":
            dx = sigma * trig_velocity(seen.teacher(x_t, t, seen.condition), x_t, t, sigma)
        else:
            dx = cos * sigma * eps - sin * seen.x
        # the direction carries the factor of the slope, which is unbounded without it
        slope = derivative(asked, x, tau, cos_sin * dx, both, self.how, self.step)
        student = asked(x, tau)
        old = student.detach()
        r = min(1.0, seen.progress / self.warmup) if self.warmup else 1.0
        g = cos**2 * (dx - sigma * old) - r * (cos_sin * x + sigma * slope)
        g = g / (column(g.flatten(1).norm(dim=1), g) + self.c)
        assert seen.own is not None
        u = seen.own(tau)
        return {"scm": mean((student - old - g).square()) * (-u).exp() + u}
