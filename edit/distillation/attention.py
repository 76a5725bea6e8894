"""Attention distillation, by the outputs of attention, by its maps, or by relations between tokens.

Output: mean square difference of the attention branches before their gate, for students with another attention
operator (CLEAR, arXiv 2412.16112: every fourth single unit of FLUX, weight 0.5). Maps: cross-entropy between rows of
softmax attention (HASTE, whose teacher is an encoder: weight 0.5, 4 units, 12 heads, all rows). Relation: cosines
between tokens on a pooled grid, which need no equal widths. Specification: methods/distillation.md D3.4.

A whole FLUX map at 1024^2 pixels takes 1 GB per unit and sample, 64 rows of it 28 MB in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from edit.denoiser import Denoiser
from edit.distillation.pairs import Pairs, as_pairs, both, check_pairs
from edit.inputs.limits import Count, Limits, check_numbers
from edit.losses import Seen, Term
from edit.objectives import Weight, weight_at


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
        check_numbers(self)
        self.pairs = as_pairs("AttentionKD", self.pairs)
        self.branches, self.teacher_branches = (tuple(p[i] for p in self.pairs) for i in (0, 1))

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> None:
        check_pairs("AttentionKD", self.pairs, student, teacher)

    def losses(self, seen: Seen) -> dict[str, Tensor]:
        distances = [
            (mine - theirs).square().mean((1, 2))
            for pair in self.pairs
            for mine, theirs in both(seen, pair, ".attention")
        ]
        return {"attention_kd": weight_at(self.weight, seen.progress) * torch.stack(distances).mean(0)}


@dataclass
class MapKD(Term):
    """Cross-entropy of the student's attention maps against the teacher's, mean over pairs, heads and query rows.

    Rows are spread evenly over the joint sequence, text included, and run over all its keys. Heads are matched by
    their number, the first of one with the first of the other.

    Args:
        pairs: (student unit, teacher unit), both with plain softmax attention
        weight: of the term
        rows: queries per map
        heads: how many, from the first; None: all, of which both models then need the same number
    """

    pairs: Pairs
    weight: Weight = 0.5
    rows: Count = 64
    heads: Count | None = None

    needs_teacher = True

    def __post_init__(self):
        check_numbers(self)
        self.pairs = as_pairs("MapKD", self.pairs)
        self.maps, self.teacher_maps = ({p[i]: self.rows for p in self.pairs} for i in (0, 1))

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> None:
        teacher = check_pairs("MapKD", self.pairs, student, teacher, widths=False)
        mine, theirs = student.facts.heads, teacher.facts.heads
        if mine != theirs if self.heads is None else self.heads > min(mine, theirs):
            raise ValueError(
                f"MapKD: the student has {mine} heads and the teacher {theirs}, and {self.heads or 'all'} are to be "
                f"compared: say heads={min(mine, theirs)} or fewer"
            )

    def losses(self, seen: Seen) -> dict[str, Tensor]:
        distances = []
        for s, t in self.pairs:
            mine, theirs = seen.output.trace[f"unit.{s}.maps"], seen.taught.trace[f"unit.{t}.maps"].detach()
            mine, theirs = mine[:, : self.heads], theirs[:, : self.heads]  # b h r s
            if mine.shape != theirs.shape:
                raise ValueError(
                    f"MapKD: unit {s} of the student attends to {mine.shape[-1]} tokens, unit {t} of the teacher to "
                    f"{theirs.shape[-1]}: they need the same patch size, registers and text length"
                )
            distances.append(-(theirs.exp() * mine).sum(-1).mean((1, 2)))
        return {"map_kd": weight_at(self.weight, seen.progress) * torch.stack(distances).mean(0)}


@dataclass
class RelationKD(Term):
    """Mean square difference of the cosines between all image tokens of a pooled grid, mean over pairs.

    The frames of a video are a dimension of the grid like rows and columns: cosines are those within and between
    frames. 16 frames of 16 x 16 tokens have 67 MB of them per sample and pair.

    Args:
        pairs: (student unit, teacher unit)
        weight: of the term
        size: frames, rows and columns of the grid at most; a smaller grid of tokens is not pooled
    """

    pairs: Pairs
    weight: Weight = 0.5
    size: Annotated[int, Limits(1, 1024)] = 16

    needs_teacher = True

    def __post_init__(self):
        check_numbers(self)
        self.pairs = as_pairs("RelationKD", self.pairs)
        self.taps, self.teacher_taps = (tuple(p[i] for p in self.pairs) for i in (0, 1))

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> None:
        check_pairs("RelationKD", self.pairs, student, teacher, widths=False)

    def losses(self, seen: Seen) -> dict[str, Tensor]:
        assert seen.output.grid is not None, "every forward tells it"
        distances = []
        for pair in self.pairs:
            mine, theirs = (cosines(x, seen.output.grid, self.size) for x in both(seen, pair)[0])
            distances.append((mine - theirs).square().mean((1, 2)))
        return {"relation_kd": weight_at(self.weight, seen.progress) * torch.stack(distances).mean(0)}


def cosines(tokens: Tensor, grid: tuple[int, int, int], size: int) -> Tensor:
    """Cosines between tokens of a grid, pooled to at most `size` frames, rows and columns: b n d -> b m m, m <= size^3.

    Raises:
        ValueError: if the tokens are no such grid
    """
    frames, rows, columns = grid
    if tokens.shape[1] != frames * rows * columns:
        raise ValueError(
            f"RelationKD: {tokens.shape[1]} image tokens are no grid of {frames} x {rows} x {columns}: compare units "
            "that have all of them"
        )
    maps = tokens.transpose(1, 2).unflatten(2, grid)  # b d f y x
    pooled = F.adaptive_avg_pool2d(maps.flatten(1, 2), (min(size, rows), min(size, columns)))  # each frame by itself
    pooled = pooled.unflatten(1, (-1, frames))
    if frames > size:
        pooled = F.adaptive_avg_pool3d(pooled, (size, *pooled.shape[-2:]))
    unit = F.normalize(pooled.flatten(2), dim=1)  # b d m
    return unit.transpose(1, 2) @ unit
