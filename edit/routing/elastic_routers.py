"""The routers of E-DiT, one in front of each unit, and rules in their place (see `elastic.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.denoiser import Denoiser

WIDTHS = 4  # of an MLP: 1/4, 1/2, 3/4 and 1 of its hidden channels
EPS = 1e-6
OPEN = 0.7  # p of a fresh router
WHOLE = 2.0  # lead of the whole width over each other in a fresh router's logits: its probability is 0.71

Rule = Callable[[int, Tensor, Tensor | None], Tensor]


class ElasticRouters(nn.ModuleList):
    """One router per unit, and the settings that `Elastic.advance` schedules for all."""

    gate: float
    gate_at_noise: float
    width: float | None  # None: MLPs are run whole while training
    rule: Rule | None

    def __init__(self, routers: Sequence[Router]):
        super().__init__(routers)
        self.rule = None


class Router(nn.Module):
    """Which of its unit a sample needs. A fresh one says: all; without noise, so that it says the same again.

    Args:
        size: d, width of the tokens
        width: of the router
        widths: decide on the MLP, too
    """

    def __init__(self, size: int, width: int, widths: bool):
        super().__init__()
        self.modulation, self.trunk = nn.Linear(size, 2 * size), nn.Linear(size, width)
        for p in (*self.modulation.parameters(), self.trunk.bias):
            nn.init.zeros_(p)
        self.gate, self.width = SmallLinear(width, 1), SmallLinear(width, WIDTHS) if widths else None
        nn.init.constant_(self.gate.bias, math.log(OPEN / (1 - OPEN)))
        if self.width is not None:
            nn.init.constant_(self.width.bias[-1:], WHOLE)

    def forward(self, signal: Tensor, image: Tensor, text: Tensor | None, mask: Tensor | None):
        """p [b] and q [b 4], fp32; q is None where MLPs stay whole.

        Args:
            signal: b d, all that modulates the units
            image: b n d
            text: b l d, where the unit writes it
            mask: b l, bool, text that is no padding; None: all
        """
        dtype = self.trunk.weight.dtype
        shift, scale = self.modulation(F.silu(signal.to(dtype)))[:, None].chunk(2, 2)

        def features(tokens: Tensor) -> Tensor:
            x = torch.addcmul(shift, F.layer_norm(tokens, tokens.shape[2:], eps=EPS), 1 + scale)
            return F.relu(self.trunk(x.to(dtype)))

        total, number = features(image).sum(1, dtype=torch.float32), image.shape[1]
        if text is not None:
            h = features(text)
            h, length = (h, text.shape[1]) if mask is None else (h * mask[..., None], mask.sum(1, keepdim=True))
            total, number = total + h.sum(1, dtype=torch.float32), number + length
        pooled = total / number
        return self.gate(pooled)[:, 0].sigmoid(), None if self.width is None else self.width(pooled).softmax(1)


class SmallLinear(nn.Linear):
    """b c -> b k in fp32, under autocast too: steps of bf16 are 1/256 near the threshold, and the band is 1/67."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1e-3)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return (input[:, None] * self.weight.float()).sum(2) + self.bias.float()


@contextmanager
def forced(denoiser: Denoiser, rule: Rule) -> Iterator[None]:
    """Inside the block a rule decides in place of the routers, in training and in eval mode; they are asked all the
    same, so budgets and costs stay what they are. What routing is worth is measured against such rules:

        with forced(denoiser, lambda i, p, q: torch.full_like(p, 4)): ...              # the dense model
        with forced(denoiser, lambda i, p, q: torch.full_like(p, 4 * (i in kept))): ...  # static pruning
        with forced(denoiser, lambda i, p, q: 4 * (torch.rand_like(p) < rate)): ...      # as much, at random

    Under gradient checkpointing units are run once more in the backward pass, which must then be inside the block, too.

    Args:
        denoiser: with an Elastic edit
        rule: of the unit's number, p [b] and q [b 4] (None where MLPs stay whole): b decisions, 0 closed, else the
            width in quarters

    Raises:
        ValueError: if the denoiser has no Elastic edit
    """
    own = next((own for own in denoiser.edits.values() if isinstance(own, ElasticRouters)), None)
    if own is None:
        raise ValueError(f"this {denoiser.name} has no routers whose decisions could be forced: apply Elastic first")
    before, own.rule = own.rule, rule
    try:
        yield
    finally:
        own.rule = before
