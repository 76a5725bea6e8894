"""Attention distillation, by what attention puts out or by how tokens relate to each other.

Output: mean square difference of the attention branches before their gate, for students with another attention
operator (CLEAR, arXiv 2412.16112: every fourth single unit of FLUX, weight 0.5). Relation: cosines between tokens on a
pooled grid, which need no equal widths. Specification: methods/distillation.md D3.4.

Maps themselves are not compared: no kernel returns them, and a FLUX map at 1024^2 pixels takes 1 GB per unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edit.denoiser import Denoiser
from edit.distillation.pairs import Pairs, as_pairs, both, check_pairs
from edit.objectives import Pass, Term, Weight, weight_at


@dataclass
class AttentionKD(Term):
    """Distance of attention branches, image and text tokens apart, mean over pairs and streams.

    Args:
        pairs: (student unit, teacher unit), see `edit.distillation.pairs`
        weight: of the term
    """

    pairs: Pairs
    weight: Weight = 0.5

    needs_teacher = True

    def __post_init__(self):
        self.pairs = as_pairs("AttentionKD", self.pairs)
        self.branches, self.teacher_branches = (tuple(p[i] for p in self.pairs) for i in (0, 1))

    def build(self, denoiser: Denoiser, teacher: Denoiser | None = None) -> None:
        check_pairs("AttentionKD", self.pairs, denoiser, teacher)

    def losses(self, seen: Pass, own: None = None) -> dict[str, Tensor]:
        distances = [
            (mine - theirs).square().mean((1, 2))
            for pair in self.pairs
            for mine, theirs in both(seen, pair, ".attention")
        ]
        return {"attention_kd": weight_at(self.weight, seen.progress) * torch.stack(distances).mean(0)}


@dataclass
class RelationKD(Term):
    """Mean square difference of the cosines between all image tokens of a pooled grid, mean over pairs.

    Args:
        pairs: (student unit, teacher unit)
        weight: of the term
        size: rows and columns of the grid at most; a smaller grid of tokens is not pooled
    """

    pairs: Pairs
    weight: Weight = 0.5
    size: int = 16

    needs_teacher = True

    def __post_init__(self):
        self.pairs = as_pairs("RelationKD", self.pairs)
        if self.size < 1:
            raise ValueError(f"RelationKD: size is rows and columns of a grid, at least 1, got {self.size}")
        self.taps, self.teacher_taps = (tuple(p[i] for p in self.pairs) for i in (0, 1))

    def build(self, denoiser: Denoiser, teacher: Denoiser | None = None) -> None:
        check_pairs("RelationKD", self.pairs, denoiser, teacher, widths=False)

    def losses(self, seen: Pass, own: None = None) -> dict[str, Tensor]:
        rows, columns = seen.batch["x_t"].shape[-2:]
        distances = []
        for pair in self.pairs:
            mine, theirs = (cosines(x, rows / columns, self.size) for x in both(seen, pair)[0])
            distances.append((mine - theirs).square().mean((1, 2)))
        return {"relation_kd": weight_at(self.weight, seen.progress) * torch.stack(distances).mean(0)}


def cosines(tokens: Tensor, aspect: float, size: int) -> Tensor:
    """Cosines between tokens of a grid, pooled to at most `size` rows and columns: b n d -> b m m, m <= size^2.

    Raises:
        ValueError: if the tokens make no grid of this aspect (rows / columns)
    """
    n = tokens.shape[1]
    rows = max(1, round((n * aspect) ** 0.5))
    if n % rows:
        raise ValueError(f"RelationKD: {n} image tokens make no grid with {aspect:g} times as many rows as columns")
    grid = tokens.transpose(1, 2).unflatten(2, (rows, n // rows))  # b d y x
    pooled = F.adaptive_avg_pool2d(grid, (min(size, rows), min(size, n // rows)))
    unit = F.normalize(pooled.flatten(2), dim=1)  # b d m
    return unit.transpose(1, 2) @ unit
