"""Layers of a Kolmogorov-Arnold network: a learned function of one variable on every edge.

With B_m the M = G + p basis functions of cubic splines (p = 3) on G = 5 even intervals of [-3, 3], continued by p knots
on both sides,

    y_o = sum_i [ W_oi SiLU(x_i) + g_oi sum_m c_oim B_m(x_i) ]

Even knots make every B_m one function, moved: there is no recursion and no buffer. Initial values are those of LESA
(arXiv 2602.20497).

Specification: methods/lesa.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INTERVALS, DEGREE, REACH = 5, 3, 3.0  # G, p and the end of the grid
STEP = 2 * REACH / INTERVALS  # between knots
BASES = INTERVALS + DEGREE
NOISE = 0.02  # of initial splines, times G


def bases(x: Tensor) -> Tensor:
    """The basis functions at x: ... -> ... M. They sum to 1 on [-3, 3] and are 0 beyond 6.6."""
    middle = torch.arange(BASES, dtype=x.dtype, device=x.device) - (BASES - 1) / 2
    far = (x[..., None] / STEP - middle).abs()  # from the middle of each, in steps
    return (F.relu(2 - far) ** 3 - 4 * F.relu(1 - far) ** 3) / 6


class KanLayer(nn.Module):
    """One layer, of 10 parameters for each edge.

    Args:
        inputs, outputs: numbers of values
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.base = nn.Parameter(torch.empty(outputs, inputs))  # W
        self.scale = nn.Parameter(torch.empty(outputs, inputs))  # g
        self.spline = nn.Parameter(torch.empty(outputs, inputs, BASES))  # c
        if not self.base.is_meta:
            self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Initial values: splines are the shortest through noise at the knots inside the grid."""
        outputs, inputs = self.base.shape
        nn.init.uniform_(self.base, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))
        nn.init.uniform_(self.scale, -math.sqrt(5 / inputs), math.sqrt(5 / inputs))
        knots = torch.linspace(-REACH, REACH, INTERVALS + 1, device=self.base.device)
        noise = (torch.rand(outputs, inputs, len(knots), device=self.base.device) - 0.5) * NOISE / INTERVALS
        self.spline.copy_(noise @ torch.linalg.pinv(bases(knots)).T)

    def zero(self) -> None:
        """Give 0 whatever comes in; the next update ends that."""
        nn.init.zeros_(self.base)
        nn.init.zeros_(self.spline)

    def forward(self, x: Tensor) -> Tensor:  # ... i -> ... o
        weight = (self.scale[..., None] * self.spline).flatten(1)
        return F.linear(F.silu(x), self.base) + F.linear(bases(x).flatten(-2), weight)


class Kan(nn.Sequential):
    """Layers of these sizes, one after the other: ... sizes[0] -> ... sizes[-1]."""

    def __init__(self, sizes: Sequence[int]):
        super().__init__(*(KanLayer(a, b) for a, b in pairwise(sizes)))
