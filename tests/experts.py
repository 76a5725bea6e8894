"""A small edit that has all hooks of methods with experts: stacked weights in place of a unit's feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edit.denoiser import Denoiser, Edit
from edit.edits import chosen
from edit.groups import Group
from edit.stream import Layout
from edit.unit import core


@dataclass
class Experts(Edit):
    """Each token goes through one of `count` experts, which start as the feed-forward that they replace.

    Args:
        count: E
        units: counted from 0; none given: all
        rate: factor of the experts' learning rate
        apart: sharded by themselves
    """

    count: int = 4
    units: tuple[int, ...] = ()
    rate: float = 0.5
    apart: bool = True

    def __post_init__(self):
        self.units = tuple(self.units)

    def apply(self, denoiser: Denoiser) -> nn.ModuleDict:
        own = nn.ModuleDict()
        for i in chosen("Experts", self.units, denoiser):
            unit = core(denoiser.units[i])
            weight = next(unit.parameters())
            with weight.device:
                stack = Stack(self.count, denoiser.facts.width, unit.anatomy.feed.size).to(weight.dtype)
            own[str(i)] = unit.slots.ffn = stack
        return own

    def initialise(self, denoiser: Denoiser) -> None:
        for i, stack in denoiser.edits[self.name].items():
            into, out = (denoiser.get_submodule(path) for path in layers(denoiser, int(i)))
            with torch.no_grad():
                stack.up.copy_(into.weight[: stack.up.shape[2]].T)  # of a gated one the first half
                stack.down.copy_(out.weight.T)

    def replaces(self, denoiser: Denoiser) -> list[str]:
        return [path for i in denoiser.edits[self.name] for path in layers(denoiser, int(i))]

    def groups(self, denoiser: Denoiser) -> Mapping[str, Group]:
        stacks = {name: Group(self.rate, 2.0, kind="stack") for name in self.named(denoiser, "up", "down")}
        return stacks | {name: Group(decay=0.0) for name in self.named(denoiser, "router.bias")}

    def activated(self, denoiser: Denoiser) -> Mapping[str, float]:
        return dict.fromkeys(self.named(denoiser, "up", "down"), 1 / self.count)

    def shards(self, denoiser: Denoiser) -> list[nn.Module]:
        return list(denoiser.edits[self.name].values()) if self.apart else []

    def named(self, denoiser: Denoiser, *leaves: str) -> list[str]:
        return [f"edits.{self.name}.{i}.{leaf}" for i in denoiser.edits[self.name] for leaf in leaves]


def layers(denoiser: Denoiser, i: int) -> list[str]:
    """The layers into and out of a unit's feed-forward, by their full names."""
    unit = core(denoiser.units[i])
    at = next(name for name, m in denoiser.named_modules() if m is unit)
    return [f"{at}.{unit.anatomy.feed.writers[0][0]}", f"{at}.{unit.anatomy.feed.readers[0][0]}"]


class Stack(nn.Module):
    """The experts of one unit; all are computed, one is taken."""

    def __init__(self, count: int, width: int, hidden: int):
        super().__init__()
        self.router = nn.Linear(width, count)
        self.up, self.down = (
            nn.Parameter(torch.empty(count, width, hidden)),
            nn.Parameter(torch.empty(count, hidden, width)),
        )

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        p = self.router(tokens).softmax(-1)  # b s E
        best = p.amax(-1, keepdim=True)
        each = torch.einsum("bseh,ehd->bsed", torch.einsum("bsd,edh->bseh", tokens, self.up).relu(), self.down)
        return torch.einsum("bsed,bse->bsd", each, p * (p == best))
