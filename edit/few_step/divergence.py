"""Which divergence distribution matching minimises: its gradient is weighted by a function of the density ratio r of
teacher over student, which a discriminator knows as exp(logit) (f-distill, arXiv 2502.15681, table 1).

Weights are divided by a running mean at each noise level, so that a divergence changes which samples count and not how
much a noise level does. Number of levels, momentum and the range of r are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edit.few_step.discriminator import Heads

Divergence = Literal[
    "reverse_kl", "forward_kl", "jensen_shannon", "softened_reverse_kl", "neyman", "hellinger", "jeffreys"
]
WEIGHTS: tuple[Callable[[Tensor], Tensor], ...] = (  # in this order
    torch.ones_like,
    lambda r: r,
    lambda r: r / (1 + r),
    lambda r: 1 / (1 + r),
    lambda r: 1 / r,
    torch.sqrt,
    lambda r: 1 + r,
)
DIVERGENCES: Mapping[str, Callable[[Tensor], Tensor]] = dict(zip(get_args(Divergence), WEIGHTS, strict=True))


class WeighedHeads(nn.Module):
    """A discriminator that knows how large the weights of its density ratios have been, by noise level."""

    def __init__(self, heads: Heads, levels: int = 10, momentum: float = 0.99):
        super().__init__()
        self.heads, self.momentum = heads, momentum
        self.register_buffer("mean_weight", torch.zeros(levels))  # 0: not seen yet

    def forward(self, features: Mapping[str, Tensor], t: Tensor, pooled: Tensor | None, size: Sequence[int]) -> Tensor:
        """As of `Heads`."""
        return self.heads(features, t, pooled, size)

    @torch.no_grad()
    def normalised(self, weight: Tensor, t: Tensor) -> Tensor:
        """Weights over their running mean at times like t, which takes them in: [b], [b] -> [b]."""
        before = self.mean_weight.float()
        level = (t * len(before)).long().clamp(max=len(before) - 1)
        seen = torch.zeros(2, len(before), device=t.device)
        seen.index_add_(1, level, torch.stack((weight.float(), torch.ones_like(t))))
        if dist.is_available() and dist.is_initialized():  # one state for all ranks: a checkpoint holds one
            dist.all_reduce(seen)
        now = seen[0] / seen[1].clamp_min(1)
        after = torch.where(before > 0, torch.lerp(now, before, self.momentum), now)
        after = torch.where(seen[1] > 0, after, before)
        self.mean_weight.copy_(after)
        return weight / after[level]
