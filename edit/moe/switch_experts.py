"""Gates and linear experts of Switch-DiT, and the matching of the experts to the prior (see `switch_dit.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.denoiser import Denoiser
from edit.moe.switch_prior import TIMES, matching, shared, top, window
from edit.routing.dydit_routers import Logits
from edit.widths import Scale

FAR = TIMES // 2  # between times whose experts should differ


class SwitchExperts(nn.Module):
    """Gates, in fp32, and experts of all units; the matching, which changes in training forwards that `begin` tells to.

    Args:
        denoiser: whose embedded times the gates read
        width: d
        experts, active: M and k
        seed: of permutations
    """

    scales: ClassVar = {r"router\.weight": Scale("output", "fan_in"), "bias": Scale("vector")}
    sigma: Tensor  # L M, int64: the prior's column for each expert, unit by unit
    steps: Tensor  # int64: training steps so far
    agreement: Tensor  # 2: of the choices at times that are near and far, at the latest matching

    def __init__(self, denoiser: Denoiser, width: int, experts: int, active: int, seed: int):
        super().__init__()
        self.size, self.active, self.seed = (len(denoiser.units), experts), active, seed
        units = self.size[0]
        self.router = Logits(width, units * experts)
        for part in self.router.weight.detach().view(units, experts, width):
            nn.init.xavier_uniform_(part)
        nn.init.zeros_(self.router.bias)
        self.experts = nn.ModuleList(Experts(denoiser.facts.width, experts) for _ in range(units))
        self.register_buffer("sigma", torch.arange(units * experts))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("agreement", torch.zeros(2))
        self.embed_times: Callable[[Tensor], Tensor] = denoiser.embed_times  # a copy of the denoiser has its own
        self.indexed = denoiser.prediction == "noise"  # over 1000 steps, of which step n lies at t = (n + 1) / 1000
        self.due, self.done, self.progress = False, None, None
        self.register_load_state_dict_post_hook(forget)

    def gates(self, time: Tensor) -> Tensor:
        """p: b d -> b u m."""
        return self.router(F.silu(time.float())).unflatten(1, self.size).softmax(2)

    @torch.no_grad()
    def table(self) -> Tensor:
        """p at all times, flows' in the middle of their bins: 1000 u m."""
        n = torch.arange(TIMES, device=self.sigma.device)
        return self.gates(self.embed_times((n + (1.0 if self.indexed else 0.5)) / TIMES))

    def bins(self, t: Tensor) -> Tensor:
        """n of times in [0, 1]: b, int64, 0 is next to clean data."""
        n = TIMES * t.float()
        return ((n - 1).round() if self.indexed else n.floor()).long().clamp(0, TIMES - 1)

    def prior(self, t: Tensor) -> Tensor:
        """Pi of these times at the columns that the experts are matched to, of sum 1: b (u m)."""
        return window(self.bins(t), self.sigma, *self.size, self.active).float() / (self.size[0] * self.active)

    # ---- the matching ---------------------------------------------------------------------------------------------

    def begin(self, progress: float, every: int) -> None:
        """A training step begins, or another micro-batch of it: now and then the next forward is to match."""
        if progress == self.progress:
            return
        if self.done is None:
            self.done = int(self.steps)  # waits for the device, once in a run
        self.progress, self.due = progress, self.due or self.done % every == 0
        self.done += 1
        self.steps += 1

    @torch.no_grad()
    def match(self) -> None:
        """Match the prior's columns to the present choices. The host waits for L M x L M costs."""
        chosen = (top(self.table(), self.active) > 0).double()  # autocast, which would round counts, leaves float64
        q, n = chosen.flatten(1), torch.arange(TIMES, device=chosen.device)
        pi = window(n, torch.arange(q.shape[1], device=q.device), *self.size, self.active).double()
        cost = q.sum(0)[:, None] + pi.sum(0) - 2 * q.T @ pi  # of 0 and 1: |q - pi| = q + pi - 2 q pi
        self.sigma.copy_(matching(cost, self.seed, self.done or 0))
        self.agreement.copy_(torch.stack([shared(chosen, self.active, apart) for apart in (1, FAR)]))
        self.due = False


def forget(own: SwitchExperts, *keys: Any) -> None:
    """After weights are loaded: the number of steps is read again."""
    own.due, own.done, own.progress = False, None, None


class Experts(nn.Module):
    """The M experts of one unit: x A_m + a_m of each sample's merged expert, zero at first.

    Args:
        width: d
        count: M
    """

    scales: ClassVar = {"weight": Scale("hidden", "zero", stack=True), "bias": Scale("vector", stack=True)}

    def __init__(self, width: int, count: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, width, width))  # m d d: from, to
        self.bias = nn.Parameter(torch.zeros(count, width))

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """b n d -> b n d.

        Args:
            x: tokens, as they are between units
            gates: b m, or 1 m for all samples alike; zeros at experts that are not active
        """
        m, d, _ = self.weight.shape
        if len(gates) > 1 and d > 8 * m * x.shape[1]:  # at 8 both ways take equally long, forward and backward, on CPUs
            return self.stacked(x, gates)
        return self.merged(x, gates)

    def merged(self, x: Tensor, gates: Tensor) -> Tensor:
        """One matrix for each sample, or one for all: d^2 products for a token."""
        g = gates.to(self.weight.dtype)
        matrix, bias = (g @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:]), g @ self.bias
        x = x.to(matrix.dtype)
        return x @ matrix[0] + bias[0] if len(g) == 1 else torch.baddbmm(bias[:, None], x, matrix)

    def stacked(self, x: Tensor, gates: Tensor) -> Tensor:
        """All experts in one product of the weighted tokens, b n (m d): M d^2 products for a token."""
        g = gates.to(self.weight.dtype)
        x = (x.to(g.dtype)[:, :, None] * g[:, None, :, None]).flatten(2)
        return x @ self.weight.flatten(0, 1) + (g @ self.bias)[:, None]
