"""Depth pruning without learning: keep evenly spaced, random or listed units.

The naive alternatives that learned depth pruning (TinyFusion, arXiv 2412.01199) is measured against. Dropped units are
gone: the pruned model is a plain shallower model of its family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from edit.denoiser import Denoiser, Edit
from edit.inputs.limits import Seed, check_numbers
from edit.pruning.tinyfusion import Gated


@dataclass
class DepthPruning(Edit):
    """Drop whole units.

    Args:
        ratio: share of the units to drop, in [0, 1); at least one unit stays
        pattern: "uniform" keeps the first, the last and evenly spaced units between, "random" draws them from `seed`,
            "listed" keeps exactly `units`
        units: for "listed", positions to keep, increasing
    """

    ratio: float = 0.5
    pattern: Literal["uniform", "random", "listed"] = "uniform"
    seed: Seed = 0
    units: tuple[int, ...] = ()

    def __post_init__(self):
        check_numbers(self)
        self.units = tuple(self.units)
        if self.pattern not in ("uniform", "random", "listed"):
            raise ValueError(f"DepthPruning: pattern must be uniform, random or listed, got {self.pattern!r}")
        if not 0 <= self.ratio < 1:
            raise ValueError(f"DepthPruning: ratio is the share to drop, in [0, 1), got {self.ratio}")
        if (self.pattern == "listed") != bool(self.units):
            raise ValueError('DepthPruning: give `units` exactly when pattern is "listed"')
        if list(self.units) != sorted(set(self.units)):
            raise ValueError(f"DepthPruning: units must be increasing without repeats, got {self.units}")

    def kept(self, depth: int) -> list[int]:
        """Positions that stay of `depth` units."""
        if self.pattern == "listed":
            return list(self.units)
        count = max(1, round(depth * (1 - self.ratio)))
        if self.pattern == "random":
            order = torch.randperm(depth, generator=torch.Generator().manual_seed(self.seed), device="cpu")
            return sorted(order[:count].tolist())
        return torch.linspace(0, depth - 1, count, dtype=torch.float64, device="cpu").round().long().tolist()

    def apply(self, denoiser: Denoiser) -> None:
        if any(isinstance(u, Gated) for u in denoiser.units):
            raise ValueError("DepthPruning: a search over these units is under way: fold it, or prune before it")
        denoiser.keep(self.kept(len(denoiser.units)))

    def fold(self, denoiser: Denoiser) -> None:
        """Nothing to do: the units are gone already."""
