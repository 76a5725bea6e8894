"""The exact predictor of Gaussian data as a denoiser, and generations from it."""

import torch
from torch import Tensor, nn

from edit import noise
from edit.denoiser import Denoiser
from edit.facts import Facts
from edit.predictions import default_objective
from edit.sampling import Sampler
from edit.stream import Condition, Layout, Output, Stream

ALPHA = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


class Gaussian(Denoiser):
    """The exact predictor of data N(mean[label], std^2), in closed form: what a perfectly trained DiT would be."""

    name = "gaussian"

    def __init__(self, std: float = 0.5, predicts: str = "velocity", grid: int = 4, variance: float | None = None):
        self.std, self.predicts, self.grid, self.fixed_variance = std, predicts, grid, variance
        super().__init__(nn.Linear(1, 1), [])
        self.seen: list[tuple[str, int, float]] = []

    @property
    def config(self):
        return {"std": self.std, "predicts": self.predicts, "grid": self.grid, "variance": self.fixed_variance}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    @property
    def facts(self):
        return Facts(width=4, heads=1, classes=11)

    @property
    def prediction(self):
        return self.predicts

    @property
    def sample_shape(self):
        return 4, self.grid, self.grid

    def pack(self, x, t, condition):
        return {"x": x, "t": t, "mean": condition.label.to(x.dtype) / 10}  # label 10: data around 1

    def embed(self, x, t, mean):
        tokens = x.flatten(2).transpose(1, 2)
        return Stream(image=tokens, cond=mean[:, None], time=t[:, None], layout=Layout((1, self.grid, self.grid)))

    def readout(self, stream):
        x = stream.image.transpose(1, 2).unflatten(2, (self.grid, self.grid)).double()
        t, mean = (v.double().view(-1, 1, 1, 1) for v in (stream.time, stream.cond))
        assert stream.step is not None
        self.seen.append((stream.step.branch, stream.step.index, stream.step.sigma))
        if self.predicts == "velocity":
            gain = (t - (1 - t) * self.std**2) / ((1 - t) ** 2 * self.std**2 + t**2)
            out = gain * (x - (1 - t) * mean) - mean
        else:
            alpha = ALPHA[(t * 1000 - 1).round().long()]
            out = (1 - alpha).sqrt() * (x - alpha.sqrt() * mean) / (alpha * self.std**2 + 1 - alpha)
        variance = None if self.fixed_variance is None else torch.full_like(out, self.fixed_variance).float()
        return Output(out.float(), variance, stream.trace)

    def keep(self, indices):
        raise NotImplementedError

    def null(self, condition):
        return Condition(label=torch.zeros_like(condition.label))

    @classmethod
    def to_stock(cls, config, state):
        return dict(config), dict(state)

    @classmethod
    def from_stock(cls, config, state):
        return dict(config), dict(state)


def labels(n: int, label: int = 10) -> Condition:
    return Condition(label=torch.full((n,), label))


def generate(denoiser: Denoiser, solver, n: int = 8, seed: int = 0, **settings) -> Tensor:
    return Sampler(solver, **settings)(denoiser, default_objective(denoiser), labels(n), torch.arange(n), seed=seed)


def start(n: int = 8, seed: int = 0, grid: int = 4) -> Tensor:
    return noise.gaussian(seed, torch.arange(n), noise.NOISE, (4, grid, grid))
