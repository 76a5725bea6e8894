"""EDM's sampler (arXiv 2206.00364), for models of the objective `EDM`, as MicroDiT (2407.15811) uses it.

Specification: methods/micro-dit.md ("Inference procedure").
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from edit.inputs.limits import Positive, Steps, check_numbers
from edit.objectives import EDM, Objective
from edit.solvers import Draw, Path, Query, Solver


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
