"""The linear path x_t = (1 - t) x + t noise and its arithmetic: times t in [0, 1], [b]; 0 = data, 1 = noise.

On this path the velocity is v = noise - x. It imports torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def column(t: Tensor, x: Tensor) -> Tensor:
    """One number per sample, shaped to be multiplied with x: [b] -> b 1 1 1."""
    return t.view(-1, *[1] * (x.ndim - 1))


def mean(x: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean over each sample: b ... -> [b].

    Args:
        x: any elements of samples
        where: bool, broadcast over x: elements that count, at least one in each sample; None: all
    """
    if where is None:
        return x.flatten(1).mean(1)
    where = where.expand_as(x)
    return torch.where(where, x, 0).flatten(1).sum(1) / where.flatten(1).sum(1)


def corrupt(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t noise."""
    return torch.lerp(x, noise, column(t, x))


def move(x: Tensor, v: Tensor, t: Tensor, end: Tensor) -> Tensor:
    """One Euler step along a velocity, which is a step of DDIM in these coordinates: x_t, v, t, end -> x_end."""
    return x + column(end - t, x) * v


def velocity_to_data(v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    return x_t - column(t, x_t) * v


def velocity_to_noise(v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    return x_t + (1 - column(t, x_t)) * v


def velocity_to_score(v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Gradient of log p_t; undefined at t = 0."""
    return -velocity_to_noise(v, x_t, t) / column(t, x_t)


def noise_to_velocity(eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Undefined at t = 1, where x_t is the noise itself."""
    return (eps - x_t) / (1 - column(t, x_t))
