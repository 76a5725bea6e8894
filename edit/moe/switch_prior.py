"""The prior of Switch-DiT and its matching to what gates choose (see `switch_dit.py`, where the equations are)."""

from __future__ import annotations

import torch
from torch import Tensor

from edit import noise

TIMES = 1000  # N
EXPONENT = 4  # of the window's start
EPS = 1e-6  # inside of logarithms


def top(p: Tensor, k: int) -> Tensor:
    """The k largest of the last axis, zeros elsewhere; a gradient reaches the former."""
    values, places = p.topk(k, -1)
    return torch.zeros_like(p).scatter(-1, places, values)


def shared(chosen: Tensor, k: int, apart: int) -> Tensor:
    """The part of its k experts that a time shares with the time `apart` bins away, mean over times and units.

    Args:
        chosen: n u m, 1 where active
    """
    return (chosen[:-apart] * chosen[apart:]).sum(-1).mean() / k


def starts(n: Tensor, units: int, experts: int, active: int) -> Tensor:
    """s(n), the first column of each time's window: int64, shaped as n. In float64: a tie would be another window."""
    return ((n.double() / (TIMES - 1)) ** EXPONENT * (units * (experts - active))).round().long()


def window(n: Tensor, columns: Tensor, units: int, experts: int, active: int) -> Tensor:
    """Pi of times n [b] at some columns [c]: b c, bool."""
    place = columns - starts(n, units, experts, active)[:, None]
    return (place >= 0) & (place < units * active)


def matching(cost: Tensor, seed: int, step: int) -> Tensor:
    """sigma: the column of the prior for each column of the gates, at the least sum of costs: c, int64, on the CPU.

    Both sides are permuted at random first, which settles ties.

    Args:
        cost: c c, of each column of the gates with each of the prior
        seed, step: of the permutations
    """
    from scipy.optimize import linear_sum_assignment

    drawn = noise.hashes(seed, torch.tensor([step], device="cpu"), noise.SHUFFLED, 2 * len(cost))
    rows, columns = (half.argsort() for half in drawn[0].chunk(2))
    found, places = map(torch.as_tensor, linear_sum_assignment(cost.cpu()[rows][:, columns].numpy()))
    sigma = torch.empty_like(rows)
    sigma[rows[found]] = columns[places]
    return sigma


def divergence(u: Tensor, v: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions along the last axis, in nats: b c, b c -> b, in [0, ln 2]."""
    u, v = u.float(), v.float()
    z = ((u + v) / 2 + EPS).log()
    return 0.5 * (u * ((u + EPS).log() - z) + v * ((v + EPS).log() - z)).sum(-1)
