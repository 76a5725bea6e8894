"""Solvers: each integrates a prediction from noise to data, on times of its own.

A solver is written once, as a generator (`Solver.path`): it yields where the model is to be asked, and is sent the
prediction. Whoever drives it decides what that is: `integrate` calls a function, `edit.walk.Walk` waits.

Sources: SiT (arXiv 2401.08740) for the SDE; `diffusers` for the discrete schedulers and the steps of stock pipelines.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from edit.inputs.limits import Count, Limits, Positive, Steps, check_numbers
from edit.objectives import DDPM, Objective, shift_times
from edit.paths import velocity_to_score


class Query(NamedTuple):
    """Where a solver asks for the guided prediction."""

    x: Tensor  # b c *sizes
    t: float  # time, as the model has it
    end: float | None = None  # at which the step ends, for flow maps; None: the velocity at t


Path = Generator[Query, Tensor, Tensor]  # yields queries, is sent predictions, returns data


class Predict(Protocol):
    """The guided prediction at time t; of a flow map, for the step that ends at `end`."""

    def __call__(self, x: Tensor, t: float, end: float | None = None) -> Tensor: ...


LogShift = Annotated[float, Limits(-20, 20)]
Draw = Callable[[int], Tensor]  # step -> fresh standard normal noise, shaped as x


class Solver(ABC):
    """Integrates from noise to data. Subclasses are dataclasses; `evaluations` counts those of one generation."""

    integrates: ClassVar[tuple[str, ...]] = ("velocity",)  # predictions that it integrates
    extras: ClassVar[tuple[str, ...]] = ()  # maps of the trace that follow the prediction as channels
    steps: int

    @property
    def evaluations(self) -> int:
        return self.steps

    def check(self, objective: Objective) -> None:
        """Refuse an objective whose prediction this solver cannot integrate, or that has too few steps.

        Raises:
            ValueError: naming both, and an alternative
        """
        name, predicted = type(self).__name__, objective.prediction
        if predicted not in self.integrates:
            raise ValueError(
                f"{name} integrates a {self.integrates[0]}, but this model predicts a {predicted}: "
                f"use {objective.solvers}"
            )
        if isinstance(objective, DDPM) and self.steps > objective.steps:
            raise ValueError(f"{name}: steps must be at most {objective.steps}, got {self.steps}")

    @abstractmethod
    def times_of(self, objective: Objective, shape: tuple[int, ...]) -> tuple[float, ...]:
        """The time of every evaluation, exactly as the model is asked, then 0: `evaluations` + 1 numbers.

        Args:
            objective: whose times they are; `check` has passed it
            shape: of one sample, on which a dynamic shift depends
        """

    @abstractmethod
    def path(self, x: Tensor, objective: Objective, draw: Draw) -> Path:
        """From noise x to data; `check` has passed the objective. It may change neither x nor a prediction in place."""

    def integrate(self, predict: Predict, x: Tensor, objective: Objective, draw: Draw) -> Tensor:
        """`path` with each prediction from a function."""
        path = self.path(x, objective, draw)
        query = next(path)
        while True:
            prediction = predict(*query)
            try:
                query = path.send(prediction)
            except StopIteration as end:
                return end.value


def times(steps: int, shift: float) -> list[float]:
    """steps + 1 times from 1 (noise) to 0 (data), moved towards noise by `shift`; 1 leaves them evenly spaced."""
    return shift_times(torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu"), shift).tolist()


@dataclass(frozen=True)
class Euler(Solver):
    """x <- x + v dt on the probability-flow ODE; first order. Steps are even before the shift."""

    steps: Steps = 50
    shift: Positive = 1.0

    def __post_init__(self):
        check_numbers(self)

    def times_of(self, objective: Objective, shape: tuple[int, ...]) -> tuple[float, ...]:
        return tuple(times(self.steps, self.shift))

    def path(self, x: Tensor, objective: Objective, draw: Draw) -> Path:
        return _euler(objective.start(x), times(self.steps, self.shift))


def _euler(x: Tensor, ts: list[float]) -> Path:
    for t, t_next in pairwise(ts):
        x = x + (t_next - t) * (yield Query(x, t, t_next))
    return x


@dataclass(frozen=True)
class StockEuler(Solver):
    """Euler's method on the steps of a stock pipeline, which `FlowMatchEulerDiscreteScheduler` spaces.

    These steps differ from `Euler`'s in three ways. The shift may grow with the number of image tokens (FLUX.1-dev,
    Qwen-Image). The scheduler may choose the times (SD3); its last time is its smallest training time instead of
    1/steps: 4 steps at shift 3 end in 0.602, 0.009, 0 where even steps end in 0.75, 0.5, 0. The last step may be fixed
    (Qwen-Image). Families name theirs in `Denoiser.sampler`.

    Args:
        steps: evaluations
        shift: moves times towards noise; ignored with `dynamic`
        dynamic: (log shift at the fewest tokens, log shift at the most tokens, fewest tokens, most tokens); a token is
            2 x 2 latent pixels
        even: times 1, 1 - 1/steps ... 1/steps before the shift; false: the scheduler's own, down to its smallest
        terminal: time at which the last step starts; the others are stretched
    """

    steps: Steps = 28
    shift: Positive = 1.0
    dynamic: tuple[LogShift, LogShift, Count, Count] | None = None
    even: bool = True
    terminal: float | None = None

    def __post_init__(self):
        check_numbers(self)
        if self.dynamic is not None:
            object.__setattr__(self, "dynamic", tuple(self.dynamic))
            if len(self.dynamic) != 4 or not 0 < self.dynamic[2] < self.dynamic[3]:
                raise ValueError(
                    "StockEuler: dynamic is (log shift, log shift, fewest tokens, most tokens), such as "
                    f"(0.5, 1.15, 256, 4096), got {self.dynamic}"
                )
        if self.terminal is not None and not 0 < self.terminal < 1:
            raise ValueError(f"StockEuler: terminal lies between 0 and 1, got {self.terminal}")

    @classmethod
    def of(cls, scheduler: Mapping[str, Any], steps: int, even: bool) -> StockEuler | None:
        """From a scheduler's configuration; None if it spaces its steps in another way."""
        if scheduler.get("_class_name") != FLOW_SCHEDULER:
            return None
        odd = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")
        dynamic = scheduler.get("use_dynamic_shifting")
        if any(scheduler.get(key) for key in odd) or (dynamic and scheduler.get("time_shift_type") == "linear"):
            return None
        ends = (("base_shift", 0.5), ("max_shift", 1.15), ("base_image_seq_len", 256), ("max_image_seq_len", 4096))
        spread = tuple(scheduler.get(key, default) for key, default in ends)
        shift = 1.0 if dynamic else float(scheduler.get("shift") or 1.0)
        return cls(steps, shift, spread if dynamic else None, even, scheduler.get("shift_terminal"))  # type: ignore[arg-type]

    @property
    def scheduler(self) -> dict[str, Any]:
        """Arguments of the `FlowMatchEulerDiscreteScheduler` that spaces these steps."""
        settings: dict[str, Any] = {"shift": self.shift}
        if self.dynamic:
            low, high, few, many = self.dynamic
            settings = {"use_dynamic_shifting": True, "base_shift": low, "max_shift": high}
            settings |= {"base_image_seq_len": few, "max_image_seq_len": many}
        return settings | ({"shift_terminal": self.terminal} if self.terminal is not None else {})

    @property
    def asked(self) -> tuple[float, ...]:
        """The times before the scheduler moves them, from 1, without the end at 0."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        if self.even:
            return tuple(times(self.steps, 1)[:-1])
        last = FlowMatchEulerDiscreteScheduler(**self.scheduler).sigma_min  # moved once already
        return tuple(torch.linspace(1, last, self.steps, dtype=torch.float64, device="cpu").tolist())

    def times(self, shape: tuple[int, ...]) -> list[float]:
        """steps + 1 times from 1 to 0 for samples of this shape."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(**self.scheduler)
        mu = log_shift(self.dynamic, tokens_in(shape)) if self.dynamic else None
        scheduler.set_timesteps(sigmas=list(self.asked), device="cpu", mu=mu)
        return scheduler.sigmas.double().tolist()

    def times_of(self, objective: Objective, shape: tuple[int, ...]) -> tuple[float, ...]:
        return tuple(self.times(shape))

    def path(self, x: Tensor, objective: Objective, draw: Draw) -> Path:
        return _euler(objective.start(x), self.times(tuple(x.shape[1:])))


FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def tokens_in(shape: tuple[int, ...]) -> int:
    """Image tokens of a latent (c, *sizes), of 2 x 2 pixels of a frame each."""
    return math.prod(shape[1:-2]) * (shape[-2] // 2) * (shape[-1] // 2)


def log_shift(dynamic: tuple[float, float, int, int], tokens: int) -> float:
    """mu, linear in the tokens through (fewest, low) and (most, high): (low, high, fewest, most)."""
    low, high, few, many = dynamic
    return low + (high - low) * (tokens - few) / (many - few)


def dynamic_shift(dynamic: tuple[float, float, int, int], tokens: int) -> float:
    """exp(mu)."""
    return math.exp(log_shift(dynamic, tokens))


@dataclass(frozen=True)
class Grid(Solver):
    """A few steps at given times: the solver for students of few-step methods.

    Without `renoise`, Euler steps. With `renoise`, each step goes to data, and the next starts from there with fresh
    noise (consistency models, arXiv 2303.01469, alg. 1). Other predictions are converted to velocities.

    Args:
        times: decreasing, in (0, 1]; the last step leads to 0. Before `shift`
        renoise: start each step but the first from fresh noise
        shift: moves the times towards noise
    """

    integrates: ClassVar = ("velocity", "noise", "mixture")
    times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    renoise: bool = False
    shift: Positive = 1.0

    def __post_init__(self):
        check_numbers(self)
        object.__setattr__(self, "times", tuple(self.times))
        if not self.times or list(self.times) != sorted(set(self.times), reverse=True) or not 0 < self.times[-1]:
            raise ValueError(f"Grid: times must decrease and be above 0, got {list(self.times)}")
        if self.times[0] > 1:
            raise ValueError(f"Grid: times are at most 1, which is pure noise, got {self.times[0]}")

    @property
    def steps(self) -> int:  # type: ignore[override] - here a consequence of `times`
        return len(self.times)

    @property
    def grid(self) -> tuple[float, ...]:
        """The shifted times, and 0."""
        shifted = shift_times(torch.tensor(self.times, dtype=torch.float64, device="cpu"), self.shift)
        return (*shifted.tolist(), 0.0)

    def times_of(self, objective: Objective, shape: tuple[int, ...]) -> tuple[float, ...]:
        return (*(_native(objective, t)[1] for t in self.grid[:-1]), 0.0)

    def path(self, x: Tensor, objective: Objective, draw: Draw) -> Path:
        for k, (t, t_next) in enumerate(pairwise(self.grid)):
            scale, time = _native(objective, t)
            end = 0.0 if self.renoise else t_next
            prediction = yield Query(scale * x, time, end)
            v = objective.velocity(prediction, x, torch.full((len(x),), t, device=x.device))
            x = x + (end - t) * v
            if self.renoise and t_next:
                x = (1 - t_next) * x + t_next * draw(k)
        return x


def _native(objective: Objective, t: float) -> tuple[float, float]:
    """The factor of a point of the linear path at time t in the model's convention, and the time there."""
    scale, time = objective.native(torch.ones(1, device="cpu"), torch.tensor([t], device="cpu"))
    return scale.item(), time.item()


@dataclass(frozen=True)
class Heun(Solver):
    """Trapezoid rule, second order; the last step is Euler's, so 2 steps - 1 evaluations."""

    steps: Steps = 25
    shift: Positive = 1.0

    def __post_init__(self):
        check_numbers(self)

    @property
    def evaluations(self) -> int:
        return 2 * self.steps - 1

    def times_of(self, objective: Objective, shape: tuple[int, ...]) -> tuple[float, ...]:
        first, *others, last = times(self.steps, self.shift)
        return (first, *(t for t in others for _ in range(2)), last)

    def path(self, x: Tensor, objective: Objective, draw: Draw) -> Path:
        x = objective.start(x)
        for t, t_next in pairwise(times(self.steps, self.shift)):
            v = yield Query(x, t)
            ahead = x + (t_next - t) * v
            x = ahead if t_next == 0 else x + (t_next - t) * (v + (yield Query(ahead, t_next))) / 2
        return x


@dataclass(frozen=True)
class EulerMaruyama(Solver):
    """SiT's SDE with diffusion w_t = t: steps - 1 stochastic steps from 1 to `last`, then one noiseless step to 0.

    Source: arXiv 2401.08740.
    """

    steps: Annotated[int, Limits(2, 10_000)] = 250
    last: float = 0.04  # the paper's last-step size

    def __post_init__(self):
        check_numbers(self)
        if not 0 < self.last < 1:
            raise ValueError(f"EulerMaruyama: last must lie between 0 and 1, got {self.last}")

    def times_of(self, objective: Objective, shape: tuple[int, ...]) -> tuple[float, ...]:
        return (*torch.linspace(1, self.last, self.steps, dtype=torch.float64, device="cpu").tolist(), 0.0)

    def path(self, x: Tensor, objective: Objective, draw: Draw) -> Path:
        x = objective.start(x)
        for k, (t, t_next) in enumerate(pairwise(self.times_of(objective, tuple(x.shape[1:])))):
            v = yield Query(x, t)
            at = torch.full((len(x),), t, device=x.device, dtype=x.dtype)
            drift = v - t * velocity_to_score(v, x, at)  # half of w_t^2 = 2 t, times the score
            x = x + (t_next - t) * drift
            if t_next > 0:
                x = x + (2 * t * (t - t_next)) ** 0.5 * objective.start(draw(k))
        return x


@dataclass(frozen=True)
class DDPMSolver(Solver):
    """Ancestral sampling on respaced steps round(i 999 / (steps - 1)), with the learned variance where there is one.

    `diffusers.DDPMScheduler` is not used, as it draws its own noise: an image would depend on its batch. Source: arXiv
    2006.11239.
    """

    integrates: ClassVar = ("noise",)
    steps: Steps = 250

    def __post_init__(self):
        check_numbers(self)

    def indices(self, objective: DDPM) -> Tensor:
        """The steps that are kept, from data to noise: int64."""
        return torch.linspace(0, objective.steps - 1, self.steps, dtype=torch.float64, device="cpu").round().long()

    def times_of(self, objective: Objective, shape: tuple[int, ...]) -> tuple[float, ...]:
        assert isinstance(objective, DDPM)
        return (*((i + 1) / objective.steps for i in reversed(self.indices(objective).tolist())), 0.0)

    def path(self, x: Tensor, objective: Objective, draw: Draw) -> Path:
        assert isinstance(objective, DDPM)
        ts = self.times_of(objective, tuple(x.shape[1:]))
        kept = torch.cumprod(1 - objective.betas(), 0)[self.indices(objective)]
        before = torch.cat((kept.new_ones(1), kept[:-1]))
        betas = 1 - kept / before
        posterior = betas * (1 - before) / (1 - kept)
        log_posterior = torch.cat((posterior[1:2] if self.steps > 1 else betas[:1], posterior[1:])).log()
        for k in reversed(range(self.steps)):
            prediction = yield Query(x, ts[self.steps - 1 - k])
            eps, v = prediction.chunk(2, dim=1) if prediction.shape[1] == 2 * x.shape[1] else (prediction, None)
            alpha, ahead, beta = kept[k].item(), before[k].item(), betas[k].item()
            data = (x - (1 - alpha) ** 0.5 * eps) / alpha**0.5
            mean = (ahead**0.5 * beta * data + (1 - beta) ** 0.5 * (1 - ahead) * x) / (1 - alpha)
            if k == 0:
                return mean
            small, large = log_posterior[k].item(), betas[k].log().item()
            log_variance = x.new_full((), small) if v is None else small + (large - small) * (v + 1) / 2
            x = mean + (0.5 * log_variance).exp() * draw(k)
        return x


class Scheduled(Solver):
    """The steps of a scheduler of `diffusers`."""

    @abstractmethod
    def scheduler(self, objective: Objective) -> Any:
        """A new scheduler, without times."""

    def times_of(self, objective: Objective, shape: tuple[int, ...]) -> tuple[float, ...]:
        scheduler = self.scheduler(objective)
        scheduler.set_timesteps(self.steps, device="cpu")
        if not isinstance(objective, DDPM):
            return tuple(scheduler.sigmas.tolist())
        return (*((float(i) + 1) / objective.steps for i in scheduler.timesteps), 0.0)

    def path(self, x: Tensor, objective: Objective, draw: Draw) -> Path:
        scheduler = self.scheduler(objective)
        scheduler.set_timesteps(self.steps, device=x.device)
        x = objective.start(x)
        for t, timestep in zip(self.times_of(objective, tuple(x.shape[1:])), scheduler.timesteps, strict=False):
            prediction = (yield Query(x, t))[:, : x.shape[1]]
            x = scheduler.step(prediction, timestep, x, return_dict=False)[0]
        return x


@dataclass(frozen=True)
class DDIMSolver(Scheduled):
    """Deterministic DDIM through `diffusers.DDIMScheduler`; data predictions are not clipped.

    Steps 0, 1000/N, 2 * 1000/N ...: spacing `ddimN` of the official DiT. `DDPMSolver` has spacing `N`, which ends at
    step 999. Source: arXiv 2010.02502.
    """

    integrates: ClassVar = ("noise",)
    steps: Steps = 50

    def __post_init__(self):
        check_numbers(self)

    def scheduler(self, objective: Objective) -> Any:
        from diffusers import DDIMScheduler

        assert isinstance(objective, DDPM)
        return DDIMScheduler(
            num_train_timesteps=objective.steps,
            trained_betas=objective.betas().tolist(),
            clip_sample=False,
            set_alpha_to_one=True,
            timestep_spacing="leading",
        )


@dataclass(frozen=True)
class DPMSolver(Scheduled):
    """DPM-Solver++ (multistep) through `diffusers`, for both kinds of prediction (arXiv 2211.01095)."""

    integrates: ClassVar = ("velocity", "noise")
    steps: Steps = 20
    order: int = 2
    shift: Positive = 1.0  # of the flow path; ignored for noise predictions

    def __post_init__(self):
        check_numbers(self)
        if self.order not in (1, 2, 3):
            raise ValueError(f"DPMSolver: order must be 1, 2 or 3, got {self.order}")

    def scheduler(self, objective: Objective) -> Any:
        from diffusers import DPMSolverMultistepScheduler

        if objective.prediction == "velocity":
            return DPMSolverMultistepScheduler(
                solver_order=self.order, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=self.shift
            )
        assert isinstance(objective, DDPM)
        return DPMSolverMultistepScheduler(
            solver_order=self.order,
            num_train_timesteps=objective.steps,
            trained_betas=objective.betas().tolist(),
            timestep_spacing="linspace",
        )
