"""EDM (arXiv 2206.00364): preconditioning, loss weight, noise law and Heun's sampler, as in MicroDiT (2407.15811).

    x_sigma = x + sigma n,  D = c_skip x_sigma + c_out F(c_in x_sigma, c_noise),  loss = (1 / c_out^2) (D - x)^2
    c_skip = sigma_d^2 / (sigma^2 + sigma_d^2),  c_out = sigma sigma_d / sqrt(sigma^2 + sigma_d^2)
    c_in = 1 / sqrt(sigma^2 + sigma_d^2),  c_noise = ln(sigma) / 4,  ln(sigma) ~ N(P_mean, P_std^2)

Time is t = sigma / (1 + sigma), so that (1 - t) x_sigma = (1 - t) x + t n is the linear path, and ln(sigma) the logit
of t. With r = sqrt(t^2 + sigma_d^2 (1 - t)^2), u = sigma_d (1 - t) / r and w = t / r, of squares that sum to 1, all of
it is a rotation, without a division by zero at either end:

    c_in x_sigma = u x / sigma_d + w n,  D = sigma_d (u c_in x_sigma + w F),  loss = (F - (w x / sigma_d - u n))^2

A model predicts F, a mixture of data and noise. Its x is c_in x_sigma; c_noise is the backbone's own (`pack`).

Specification: methods/micro-dit.md ("Definition", "Inference procedure").
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from edit.inputs.limits import Positive, Steps, check_numbers
from edit.objectives import LogitNormal, Objective, TimeLaw
from edit.paths import column, mean
from edit.solvers import Draw, Path, Query, Solver
from edit.stream import Output
from edit.subset import covered


@dataclass(frozen=True)
class EDM(Objective):
    """Denoising score matching of a preconditioned network.

    Args:
        sigma_data: sigma_d, the standard deviation of the data
        time: the law of t; of a `LogitNormal`, mean and std are P_mean and P_std: -0.6 and 1.2 at 256 px, 0 and 0.6 at
            512 px
    """

    prediction = "mixture"
    sigma_data: Positive = 0.9
    time: TimeLaw = field(default_factory=lambda: LogitNormal(-0.6, 1.2))

    def __post_init__(self):
        check_numbers(self)

    def turn(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """u and w of times of any shape."""
        data = self.sigma_data * (1 - t)
        r = (t.square() + data.square()).sqrt()
        return data / r, t / r

    def corrupt(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """c_in x_sigma."""
        u, w = self.turn(column(t, x))
        return u / self.sigma_data * x + w * noise

    def native(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        data = self.sigma_data * (1 - column(t, x_t))
        return x_t / (column(t, x_t).square() + data.square()).sqrt(), t

    def denoised(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """D from F at x_t = c_in x_sigma, in fp32: b c *sizes twice, [b] -> b c *sizes."""
        u, w = self.turn(column(t, x_t))
        return self.sigma_data * (u * x_t + w * prediction.float())

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(x_t - D) / t, divided out: on the linear path x_t = (1 - t) x + t n."""
        at, s = column(t, x_t), self.sigma_data
        r2 = at.square() + (s * (1 - at)).square()
        return (at - s**2 * (1 - at)) / r2 * x_t - s / r2.sqrt() * prediction.float()

    def losses(self, output: Output, x: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        u, w = self.turn(column(t, x))
        error = (output.sample.float() - (w * x / self.sigma_data - u * noise)) ** 2
        return {"edm": mean(error, covered(output))}


@dataclass(frozen=True)
class EDMHeun(Solver):
    """Heun's method in sigma, dx / dsigma = (x - D) / sigma (EDM, arXiv 2206.00364, algorithm 1). The last step is
    Euler's, so that there are 2 steps - 1 evaluations.

        sigma_i = (sigma_max^(1/rho) + i / (steps - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,  sigma_steps = 0

    Args:
        steps: of which one evaluates twice, but for the last
        sigma_max: of the first step, which starts from sigma_max times the noise
        sigma_min: of the last step
        rho: the larger, the more steps are near the data
    """

    integrates: ClassVar = ("mixture",)
    steps: Steps = 30
    sigma_max: Positive = 80.0
    sigma_min: Positive = 0.002
    rho: Positive = 7.0

    def __post_init__(self):
        check_numbers(self)
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"EDMHeun: noise falls from sigma_max to sigma_min, got {self.sigma_max} and {self.sigma_min}: "
                "choose sigma_min below sigma_max"
            )

    @property
    def evaluations(self) -> int:
        return 2 * self.steps - 1

    @property
    def sigmas(self) -> tuple[float, ...]:
        """steps + 1 of them, from sigma_max to 0."""
        first, last = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        way = (i / max(1, self.steps - 1) for i in range(self.steps))
        return (*((first + w * (last - first)) ** self.rho for w in way), 0.0)

    def times_of(self, objective: Objective, shape: tuple[int, ...]) -> tuple[float, ...]:
        first, *others, last = (s / (1 + s) for s in self.sigmas)
        return (first, *(t for t in others for _ in range(2)), last)

    def path(self, x: Tensor, objective: Objective, draw: Draw) -> Path:
        assert isinstance(objective, EDM)
        x = self.sigma_max * x  # of the variance-exploding path: x + sigma n
        for sigma, sigma_next in pairwise(self.sigmas):
            slope = yield from self._slope(x, sigma, objective)
            ahead = x + (sigma_next - sigma) * slope
            if sigma_next:
                after = yield from self._slope(ahead, sigma_next, objective)
                ahead = x + (sigma_next - sigma) * (slope + after) / 2
            x = ahead
        return x

    def _slope(self, x: Tensor, sigma: float, objective: EDM) -> Path:
        """(x - D) / sigma at one noise level."""
        t, c_in = sigma / (1 + sigma), (sigma**2 + objective.sigma_data**2) ** -0.5
        prediction = yield Query(c_in * x, t)
        at = torch.full((len(x),), t, device=x.device)
        return (x - objective.denoised(prediction, c_in * x, at)) / sigma
