"""Training targets: which quantity a denoiser predicts, at which times, with which weights, and additional terms.

One time convention everywhere: t in [0, 1], 0 = data, 1 = noise. Conversions between predictions are in `edit.paths`;
a network's own convention (SiT's reversed time, DDPM's integer steps) is the backbone's `pack`.

Sources: SiT (arXiv 2401.08740), DiT (2212.09748), improved DDPM (2102.09672), SD3 (2403.03206),
LightningDiT (2501.01423).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from edit.facts import Prediction
from edit.inputs.limits import Count, Inside, Limits, NotNegative, Positive, check_numbers
from edit.paths import column, corrupt, mean, noise_to_velocity
from edit.stream import Output
from edit.subset import covered

# ---- times: maps of a uniform number in (0, 1), so that a sample's time depends on its number alone -----------------


@dataclass(frozen=True)
class Uniform:
    """t ~ U(0, 1): DiT and SiT."""

    def __call__(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class LogitNormal:
    """logit(t) ~ N(mean, std): SD3 and LightningDiT with (0, 1)."""

    mean: float = 0.0
    std: Positive = 1.0

    def __post_init__(self):
        check_numbers(self)

    def __call__(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u.double())).to(u.dtype)


@dataclass(frozen=True)
class Shifted:
    """Another law moved towards noise: t <- s t / (1 + (s - 1) t), for long token sequences (SD3, eq. 23)."""

    law: Uniform | LogitNormal = field(default_factory=Uniform)
    shift: Positive = 3.0

    def __post_init__(self):
        check_numbers(self)

    def __call__(self, u: Tensor) -> Tensor:
        return shift_times(self.law(u), self.shift)


TimeLaw = Uniform | LogitNormal | Shifted


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Move times towards noise; 0 and 1 stay where they are, the order is kept."""
    return shift * t / (1 + (shift - 1) * t)


# ---- objectives -----------------------------------------------------------------------------------------------------


class Objective(ABC):
    """One way to corrupt data and to score a prediction. Subclasses are dataclasses."""

    prediction: ClassVar[Prediction]
    solvers: ClassVar[str] = "one that integrates that"  # in words: what helps where another was chosen
    time: TimeLaw

    def times(self, u: Tensor) -> Tensor:
        """Training times from uniform numbers in (0, 1): [b] -> [b]."""
        return self.time(u)

    @property
    def discrete(self) -> int | None:
        """How many times there are, i + 1 over this number for i from 0; None: every time in [0, 1] is one."""
        return None

    def level(self, t: float) -> float:
        """The noise level s / (a + s) at a time, where x_t = a x + s noise: in [0, 1], 1 = pure noise."""
        return t

    def start(self, noise: Tensor) -> Tensor:
        """Noise as it is at this objective's own time 1, where solvers of its own times begin: b c *sizes."""
        return noise

    @abstractmethod
    def corrupt(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noisy sample at times t [b]: b c *sizes -> the same."""

    @abstractmethod
    def native(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """A point of the linear path, x_t = (1 - t) x + t noise, in the model's convention: noisy sample, times [b]."""

    @abstractmethod
    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The prediction at `native(x_t, t)` as a velocity of the linear path, in fp32."""

    @abstractmethod
    def losses(self, output: Output, x: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Named loss terms, each one number per sample [b]; their sum is minimised. Of an output of some tokens alone
        (`Output.kept`), the mean over their elements."""


@dataclass(frozen=True)
class FlowMatching(Objective):
    """Linear interpolant, velocity prediction: x_t = (1 - t) x + t noise, v = noise - x."""

    prediction = "velocity"
    solvers = "Euler, Heun or EulerMaruyama"
    time: TimeLaw = field(default_factory=Uniform)
    weighting: Literal["none", "snr_cap"] = "none"
    cap: Positive = 5.0  # of "snr_cap": min-SNR-gamma, written for velocities: min(snr, cap) / (snr + 1)
    cosine: NotNegative = 0.0  # weight of LightningDiT's 1 - cos(prediction, v) over channels; 1 there

    def __post_init__(self):
        check_numbers(self)
        if self.weighting not in ("none", "snr_cap"):
            raise ValueError(f"FlowMatching: weighting must be none or snr_cap, got {self.weighting!r}")

    def corrupt(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return corrupt(x, noise, t)

    def native(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x_t, t

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return prediction.float()

    def losses(self, output: Output, x: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        v, prediction, where = noise - x, output.sample.float(), covered(output)
        losses = {"flow": self.weight(t) * mean((prediction - v) ** 2, where)}
        if self.cosine:
            apart = 1 - F.cosine_similarity(prediction, v, dim=1)[:, None]
            losses["cosine"] = self.cosine * mean(apart, where)
        return losses

    def weight(self, t: Tensor) -> Tensor:
        if self.weighting == "none":
            return torch.ones_like(t)
        snr = ((1 - t) / t) ** 2
        return snr.clamp(max=self.cap) / (snr + 1)


@dataclass(frozen=True)
class RescaledFlow(FlowMatching):
    """Flow matching with louder noise, for many pixels (LLSA, arXiv 2512.16615): x_t = (1 - t) x + t s noise, v = s
    noise - x, and sampling begins at s noise.

    Neighbouring pixels of a large image are alike, so that noise of unit variance hides less of it. On the linear path
    the same point lies at time tau = t s / (1 - t + t s), divided by c = 1 - t + t s; with r = s (1 - tau) + tau,

        t = tau / r,   c = s / r,   noise - x = ((1 - s) x_tau + v) / r

    Args:
        scale: s, n / 64 for images of n x n pixels above 64
    """

    scale: Positive = 1.0

    def start(self, noise: Tensor) -> Tensor:
        return self.scale * noise

    def level(self, t: float) -> float:
        return t * self.scale / (1 - t + t * self.scale)

    def corrupt(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return corrupt(x, self.scale * noise, t)

    def native(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        r = self.scale * (1 - t) + t
        return column(self.scale / r, x_t) * x_t, t / r

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        r = self.scale * (1 - t) + t
        return ((1 - self.scale) * x_t + prediction.float()) / column(r, x_t)

    def losses(self, output: Output, x: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        return super().losses(output, x, self.scale * noise, x_t, t)

    def weight(self, t: Tensor) -> Tensor:
        return super().weight(t * self.scale / (1 - t + t * self.scale))  # by the ratio of data and noise


@dataclass(frozen=True)
class DDPM(Objective):
    """Noise prediction over 1000 discrete steps, with the variance learned through the variational bound.

    Index i in 0..999 stands at t = (i + 1) / 1000. The bound's gradient reaches the variance only: the predicted noise
    enters it detached, unscaled and without clipping the predicted data (DiT's training code).
    """

    prediction = "noise"
    solvers = "DDPMSolver or DDIMSolver"
    time: TimeLaw = field(default_factory=Uniform)
    steps: Annotated[int, Limits(2, 10_000)] = 1000
    beta_start: Inside = 1e-4
    beta_end: Inside = 0.02
    bound: NotNegative = 1.0  # weight of the variational term, where the model has a variance output

    def __post_init__(self):
        check_numbers(self)

    @property
    def discrete(self) -> int:
        return self.steps

    def betas(self) -> Tensor:
        return linear_betas(self.steps, self.beta_start, self.beta_end)

    def index(self, t: Tensor) -> Tensor:
        """The discrete step of a time, 0 .. steps - 1."""
        # (i + 1) / steps in float32 may come back as a hair more than i + 1, which must not be the next step
        return (t * self.steps - 1e-3).ceil().long().sub_(1).clamp_(0, self.steps - 1)

    def level(self, t: float) -> float:
        i = math.ceil(t * self.steps - 1e-3) - 1  # as `index`
        levels = linear_levels(self.steps, self.beta_start, self.beta_end)
        return 0.0 if t <= 0 else levels[min(max(i, 0), self.steps - 1)]

    def corrupt(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, spread, *_ = (column(v[self.index(t)], x).to(x.dtype) for v in self._tables(x.device))
        return signal * x + spread * noise

    def times(self, u: Tensor) -> Tensor:
        return (self.index(self.time(u)) + 1) / self.steps

    def native(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest index; i lies at time s / (a + s) of the linear path, where x_i = a x + s noise."""
        i, scale, _ = self._on_line(t)
        return column(scale, x_t) * x_t, (i + 1) / self.steps

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return noise_to_velocity(prediction.float(), x_t, self._on_line(t)[2])

    def _on_line(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest index, its scale a + s, and its time on the linear path, below 1."""
        signal, spread, *_ = self._tables(t.device)
        line = spread / (signal + spread)
        after = torch.searchsorted(line, t.contiguous()).clamp(1, self.steps - 1)
        i = after - ((t - line[after - 1]) < (line[after] - t)).long()
        return i, (signal + spread)[i], line[i]

    def losses(self, output: Output, x: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        eps, where = output.sample.float(), covered(output)
        losses = {"noise": mean((eps - noise) ** 2, where)}
        if output.variance is not None:
            bits = self.variational(eps.detach(), output.variance.float(), x, x_t, t, where)
            losses["bound"] = self.bound * bits
        return losses

    def variational(
        self, eps: Tensor, v: Tensor, x: Tensor, x_t: Tensor, t: Tensor, where: Tensor | None = None
    ) -> Tensor:
        """Bits per dimension of q(x_{i-1} | x_i, x) against the model's step, mean over elements `where` that is: [b].

        log variance = u log beta_i + (1 - u) log beta~_i with u = (v + 1) / 2, not clamped; at i = 0 the likelihood of
        the 8-bit data under the discretised Gaussian.
        """
        i = self.index(t)
        tables = (column(v_[i], x) for v_ in self._tables(x.device))
        signal, spread, log_beta, log_posterior, from_data, from_noisy = tables
        x_hat = (x_t - spread * eps) / signal
        expected, expected_hat = from_data * x + from_noisy * x_t, from_data * x_hat + from_noisy * x_t
        log_var = torch.lerp(log_posterior, log_beta, (v + 1) / 2)
        kl = 0.5 * (log_var - log_posterior - 1 + (log_posterior - log_var).exp())
        kl = kl + 0.5 * (expected - expected_hat) ** 2 * (-log_var).exp()
        bits = torch.where(column(i == 0, x), discretised_nll(x, expected_hat, log_var), kl)
        return mean(bits, where) / math.log(2.0)

    def _tables(self, device: torch.device) -> tuple[Tensor, ...]:
        return schedule_tables(self.steps, self.beta_start, self.beta_end, device)


@dataclass(frozen=True)
class EDM(Objective):
    """EDM (arXiv 2206.00364): preconditioned denoising, as in MicroDiT (2407.15811). The model predicts F.

        x_sigma = x + sigma n,  D = c_skip x_sigma + c_out F(c_in x_sigma, c_noise),  loss = (1 / c_out^2) (D - x)^2
        c_skip = sigma_d^2 / (sigma^2 + sigma_d^2),  c_out = sigma sigma_d / sqrt(sigma^2 + sigma_d^2)
        c_in = 1 / sqrt(sigma^2 + sigma_d^2),  c_noise = ln(sigma) / 4,  ln(sigma) ~ N(P_mean, P_std^2)

    Time is t = sigma / (1 + sigma), so that (1 - t) x_sigma = (1 - t) x + t n is the linear path, and ln(sigma) the
    logit of t. With r = sqrt(t^2 + sigma_d^2 (1 - t)^2), u = sigma_d (1 - t) / r and w = t / r, of squares that sum to
    1, all of it is a rotation, without a division by zero at either end:

        c_in x_sigma = u x / sigma_d + w n,  D = sigma_d (u c_in x_sigma + w F),  loss = (F - (w x / sigma_d - u n))^2

    A model's x is c_in x_sigma; c_noise is the backbone's own (`pack`). Specification: methods/micro-dit.md.

    Args:
        sigma_data: sigma_d, the standard deviation of the data
        time: the law of t; of a `LogitNormal`, mean and std are P_mean and P_std: -0.6 and 1.2 at 256 px, 0 and 0.6 at
            512 px
    """

    prediction = "mixture"
    solvers = "edit.edm.EDMHeun (sampler=edm_heun)"
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


# ---- tables of DDPM -------------------------------------------------------------------------------------------------


def linear_betas(steps: int, start: float, end: float) -> Tensor:
    """Variances added by each of DDPM's steps: [steps], float64 on the CPU."""
    return torch.linspace(start, end, steps, dtype=torch.float64, device="cpu")


@lru_cache(maxsize=8)
def linear_levels(steps: int, start: float, end: float) -> tuple[float, ...]:
    """s / (a + s) of each of DDPM's steps."""
    kept = torch.cumprod(1 - linear_betas(steps, start, end), 0)
    return tuple(((1 - kept).sqrt() / (kept.sqrt() + (1 - kept).sqrt())).tolist())


@lru_cache(maxsize=8)  # called several times a step: each copy to a GPU would block
@torch.inference_mode(False)  # a sampler may fill the cache before training reads it
def schedule_tables(steps: int, start: float, end: float, device: torch.device) -> tuple[Tensor, ...]:
    """Scales of data and noise, log beta, log posterior variance, the posterior mean's coefficients: [steps] each.

    Differences are taken in float64 before the cast: 1 - alpha-bar is as small as 1e-4. Do not write to them.
    """
    betas = linear_betas(steps, start, end)
    alpha = torch.cumprod(1 - betas, 0)
    before = F.pad(alpha[:-1], (1, 0), value=1.0)
    posterior = betas * (1 - before) / (1 - alpha)
    posterior = torch.cat((posterior[1:2], posterior[1:]))  # zero at index 0: its log takes index 1
    from_data = before.sqrt() * betas / (1 - alpha)
    from_noisy = (1 - betas).sqrt() * (1 - before) / (1 - alpha)
    tables = (alpha.sqrt(), (1 - alpha).sqrt(), betas.log(), posterior.log(), from_data, from_noisy)
    return tuple(v.to(device, torch.float32) for v in tables)


def discretised_nll(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """-log probability (nats, elementwise) of data in [-1, 1] quantised to 256 levels under a Gaussian.

    The official DiT code approximates the normal distribution function by a tanh; this one is exact. In training the
    two differ by less than 1.5e-4 per sample.
    """
    scale = (-0.5 * log_var).exp()
    above, below = torch.special.ndtr((x - mean + 1 / 255) * scale), torch.special.ndtr((x - mean - 1 / 255) * scale)
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return -mass.clamp_min(1e-12).log()


# ---- weights of losses ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ramp:
    """A weight that goes linearly from `start` to `end` between the fractions `begin` and `until` of the run.

    With `levels` it takes that many values for equal times, the last of them `end`: one per epoch, for one.
    """

    start: NotNegative
    end: NotNegative = 0.0
    begin: float = 0.0
    until: float = 1.0
    levels: Count | None = None

    def __post_init__(self):
        check_numbers(self)
        if not 0 <= self.begin < self.until <= 1:
            raise ValueError(f"Ramp: 0 <= begin < until <= 1 are parts of the run, got {self.begin}, {self.until}")

    def __call__(self, progress: float) -> float:
        way = min(1.0, max(0.0, (progress - self.begin) / (self.until - self.begin)))
        if self.levels is not None:  # one level: `start`
            way = part_of(way, self.levels) / max(1, self.levels - 1)
        return self.start + (self.end - self.start) * way


Weight = NotNegative | Ramp


def part_of(progress: float, count: int) -> int:
    """Which of `count` equal parts of the run is under way, counted from 0."""
    return min(int(progress * count), count - 1)


def weight_at(weight: Weight, progress: float) -> float:
    return weight(progress) if isinstance(weight, Ramp) else float(weight)
