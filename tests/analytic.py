"""A world that is known exactly: data N(0, STD^2), whose flow, and so every target of a method, is linear in x."""

import torch
from torch import Tensor
from views import Models

from edit.denoiser import Denoiser
from edit.losses import Draws, Field, Seen
from edit.paths import column
from edit.stream import Condition

STD = 0.5


def spread(t: Tensor) -> Tensor:
    """Standard deviation of x_t."""
    return ((1 - t) ** 2 * STD**2 + t**2).sqrt()


def velocity(x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
    """E[noise - x | x_t]."""
    return column((t - (1 - t) * STD**2) / spread(t) ** 2, x_t) * x_t


def flow(x_t: Tensor, t: Tensor, end: Tensor) -> Tensor:
    """Where the ODE leads."""
    return column(spread(end) / spread(t), x_t) * x_t


def jump(phases: int = 1) -> Field:
    """The velocity whose straight step leads from any time to the end of its phase as the ODE does."""

    def field(x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        end = (((t * phases - 1e-4).ceil() - 1) / phases).clamp_min(0)  # where a phase begins, its own end
        straight = (flow(x_t, t, end) - x_t) / column(torch.where(t > end, end - t, 1.0), x_t)
        return torch.where(column(t > end, x_t), straight, 0.0)

    return field


def given(count: int = 8, shape: tuple[int, ...] = (1, 2, 2), progress: float = 0.0, first: int = 0, **condition):
    """A batch of the samples from number `first` on, with data that depend on these numbers alone."""
    draws = Draws(seed=3, samples=torch.arange(first, first + count), moment=0, shape=shape)
    told = Condition(**condition)
    return Seen(told, told, torch.ones(count), draws, progress, x=STD * draws.gaussian(99))


def average(lam: float, seen: list | None = None) -> Field:
    """The mean velocity of v = lam z from t to `Condition.end`, in closed form; `seen` collects what was asked."""

    def u(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if seen is not None:
            seen.append((t, condition.end))
        length = (t - condition.end).view(-1, 1, 1, 1).double()
        exact = torch.where(length == 0, lam, -torch.expm1(-lam * length) / torch.where(length == 0, 1, length))
        return x * exact.to(x.dtype)

    return u


def roles(student: Field, teacher: Field | None = None, average: Field | None = None) -> Models:
    def nobody(*asked):
        raise AssertionError("a role that this method does not ask")

    return Models(student, nobody, average or nobody, teacher or nobody, nobody, nobody)


def networks(student: Denoiser, teacher: Denoiser) -> Models:
    """The same of two networks, of which no gradient reaches the teacher's."""

    def asked(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with torch.no_grad():
            return teacher(x_t, t, condition).sample

    return roles(lambda x_t, t, condition: student(x_t, t, condition).sample, asked)
