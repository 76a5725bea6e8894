"""Pieces of the methods that compare the teacher's score with a critic's: the student's own path, and the distance of
two predictions of data (methods/distillation.md, D3.8 and D3.9).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from edit.losses import Seen
from edit.paths import column, corrupt, mean, move
from edit.solvers import Grid, Solver

START, FRESH = 0, 10  # streams of `Draws`: first noise; FRESH + k: the rollout's k-th step


def rollout(seen: Seen, times: tuple[float, ...], renoise: bool) -> Tensor:
    """The sampler's state at the last of these times, from noise at the first: b c *sizes, without a graph."""
    draws, x = seen.draws, seen.draws.gaussian(START)
    with torch.no_grad():
        for j, (here, there) in enumerate(zip(times, times[1:], strict=False)):
            t, end = torch.full_like(seen.scale, here), torch.full_like(seen.scale, there)
            target = torch.zeros_like(t) if renoise else end
            x = move(x, seen.student(x, t, replace(seen.condition, end=target)), t, target)
            if renoise:
                x = corrupt(x, draws.gaussian(FRESH + j), end)
    return x


def direction(x: Tensor, x_tau: Tensor, tau: Tensor, teacher: Tensor, critic: Tensor) -> Tensor:
    """Difference between the data predictions of teacher and critic at x_tau, over the teacher's mean distance to x.

    Args:
        x: b c *sizes, the student's sample
        x_tau: the same, noised
        tau: b
        teacher: velocity at x_tau, guided
        critic: velocity at x_tau
    """
    return column(tau, x) * (teacher - critic) / column(data_distance(x, x_tau, tau, teacher), x)


def data_distance(x: Tensor, x_tau: Tensor, tau: Tensor, teacher: Tensor) -> Tensor:
    """Mean |x - x_teacher| of each sample, which differences of scores are divided by: [b]."""
    return mean((x - (x_tau - column(tau, x) * teacher)).abs()) + 1e-6


def capped(error: Tensor, tau: Tensor, cap: float) -> Tensor:
    """Squared error of the data that a velocity implies, tau times its own error, times min(SNR, cap): b ... -> [b].

    SNR is ((1 - tau) / tau)^2, so that an error d of predicted noise, d / (1 - tau) of the velocity, counts d^2.
    """
    return ((1 - tau) / tau).square().clamp(max=cap) * mean((column(tau, error) * error).square())


def check_grid(name: str, own: Grid, solver: Solver) -> None:
    """Raises ValueError unless the sampler's steps are those a method trains."""
    if solver != own:
        raise ValueError(
            f"{name} trains the steps of {own}, the sampler is {solver}: choose sampler=grid and give both the same "
            "times, shift and renoise"
        )
