"""The hidden channels of a dense feed-forward, divided among a shared expert and routed ones (Dense2MoE).

Specification: methods/dense2moe.md, "Taylor expert initialisation".
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from edit.denoiser import Denoiser
from edit.moe.experts import MoE
from edit.moe.feeds import Dense
from edit.unit import core


def deal(
    scores: Tensor, shared: int, experts: int, how: str, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Which channels are shared, and which each expert has.

    Args:
        scores: h, importance
        shared: number of the most important ones, which are shared
        experts: among which the others are divided
        how: "snake", "contiguous" or "random", as of `edit.moe.dense2moe.Dense2MoE`
        generator: of "random"

    Returns:
        The numbers of channels: shared, and experts x channels of one.
    """
    order = scores.argsort(descending=True, stable=True)
    first, rest = order[:shared], order[shared:]
    if how == "contiguous":
        return first, rest.view(experts, -1)
    if how == "random":
        return first, rest[torch.randperm(len(rest), generator=generator, device="cpu")].view(experts, -1)
    rounds = rest.view(-1, experts).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return first, rounds.T.contiguous()


def united(moe: MoE) -> Dense:
    """The dense feed-forward that a layer was made of, its channels in the order of shared expert and experts."""
    shared, experts, parts = moe.shared, moe.experts, 1 + moe.experts.gated
    assert shared is not None

    def rows(always: Tensor, routed: Tensor) -> Tensor:
        pieces = zip(always.chunk(parts), routed.chunk(parts, 1), strict=True)
        return torch.cat([torch.cat((a, r.flatten(0, 1))) for a, r in pieces])

    into = rows(shared.into.weight.detach(), experts.into.detach())
    bias = None if experts.into_bias is None else rows(shared.into.bias.detach(), experts.into_bias.detach())
    out = torch.cat((shared.out.weight.detach(), experts.out.detach().movedim(0, 1).flatten(1)), 1)
    return Dense(into, bias, out, None if shared.out.bias is None else shared.out.bias.detach().clone())


def magnitude(whole: Dense, gated: bool) -> Tensor:
    """|row into it, its bias included| |column out of it| of each channel, as width pruning ranks them: h, on the CPU.

    Args:
        whole: of h channels
        gated: whether half of the rows are gates
    """
    size = whole.out.shape[1]
    rows = torch.cat([p.view(1 + gated, size, -1) for p in (whole.into, whole.into_bias) if p is not None], 2)
    return (rows.float().square().sum((0, 2)).sqrt() * whole.out.float().norm(dim=0)).cpu()


def names_inside(denoiser: Denoiser, units: Iterable[int]) -> tuple[str, ...]:
    """Beginnings of the full names of the parameters of some units, and of what edits have put in their slots."""
    wanted = {id(m) for i in units for unit in [core(denoiser.units[i])] for m in (unit, *unit.filled.values())}
    return tuple(f"{name}." for name, module in denoiser.named_modules() if id(module) in wanted)
