"""Low-rank modulation: each unit's layer from the conditioning to shifts, scales and gates becomes two narrow ones.

    W c + b  ->  U (V c) + b,  U V the best approximation of rank r to W (truncated SVD)

In FLUX.1-dev these layers hold 3.23 B of 11.9 B parameters, 342 d^2; at rank r they hold (k + 1) r d each, for k
vectors of width d. One of three treatments of modulation that Dense2MoE (arXiv 2510.09094) leaves open: dense, shared
(`edit.pruning.modulation`) or factorised. Specification: methods/dense2moe.md, "Active-parameter audit".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edit.denoiser import Denoiser, Edit
from edit.inputs.limits import Count, check_numbers
from edit.unit import core


@dataclass
class ModulationRank(Edit):
    """Factorise the modulation of all units. The readout's stays dense. On FLUX.1-dev, the SVDs take minutes.

    Args:
        rank: r, at most the width d, where nothing is lost and nothing is saved
    """

    rank: Count = 64

    excludes = ("ModulationApproximator", "ModulationRank")

    def __post_init__(self):
        check_numbers(self)

    def apply(self, denoiser: Denoiser) -> None:
        found = list(modulations(denoiser))
        if not found:
            raise ValueError(
                f"ModulationRank: the units of this {denoiser.name} have no linear modulation: leave it out"
            )
        if (width := min(layer.in_features for *_, layer in found)) < self.rank:
            raise ValueError(
                f"ModulationRank: rank {self.rank} is above the width {width} of this {denoiser.name}: lower it"
            )
        for owner, name, layer in found:
            setattr(owner, name, factorised(layer, self.rank))

    def stock_key(self, key: str) -> str | None:
        return None if new(key) else key

    def owns(self, name: str) -> bool:
        return new(name)


def new(name: str) -> bool:
    """Whether a parameter is one of a factorised layer."""
    return name.rpartition(".")[0].endswith((".rank_in", ".rank_out"))


def modulations(denoiser: Denoiser) -> list[tuple[Any, str, nn.Linear]]:
    """Owner, name and layer of each modulation inside a unit."""
    found = []
    for unit in denoiser.units:
        for path, layer in core(unit).named_modules():
            if type(layer) is nn.Linear and any(part in f"{path}." for part in denoiser.facts.modulation):
                owner, _, name = path.rpartition(".")
                found.append((core(unit).get_submodule(owner), name, layer))
    return found


class Factorised(nn.Module):
    """U (V c) + b: ... d -> ... k d."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        with layer.weight.device:
            self.rank_in = nn.Linear(layer.in_features, rank, bias=False, dtype=layer.weight.dtype)
            self.rank_out = nn.Linear(rank, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)

    def forward(self, cond: Tensor) -> Tensor:
        return self.rank_out(self.rank_in(cond))


@torch.no_grad()
def factorised(layer: nn.Linear, rank: int) -> Factorised:
    """Two layers in place of one, with the square root of each singular value in both."""
    made = Factorised(layer, rank)
    if layer.weight.is_meta:
        return made
    u, s, v = torch.linalg.svd(layer.weight.float(), full_matrices=False)
    root = s[:rank].sqrt()
    made.rank_out.weight.copy_(u[:, :rank] * root)
    made.rank_in.weight.copy_(root[:, None] * v[:rank])
    if layer.bias is not None:
        made.rank_out.bias.copy_(layer.bias)
    return made
