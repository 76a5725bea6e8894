"""Contiguous-layer distillation (PPCL): a unit that replaces an interval of the teacher's units, fed by the teacher.

The student's unit gets the teacher's tokens before the interval and is compared with those after it, so intervals train
apart from each other and any subset of them can be plugged in. Directions are compared, as published; a small weight on
magnitudes keeps errors of scale out of later units (ours). Source: arXiv 2511.16156. Specification:
methods/distillation.md D3.3 c, g.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edit.denoiser import Denoiser
from edit.distillation.features import unit_distance
from edit.distillation.pairs import Pairs, as_intervals, both, check_pairs, collapsed
from edit.inputs.limits import NotNegative, check_numbers
from edit.losses import Seen, Term
from edit.objectives import Ramp, Weight, weight_at


@dataclass
class IntervalKD(Term):
    """Distance at the ends of intervals, for a student made by `Collapse` with the same intervals.

    Args:
        intervals: first and last teacher unit of each
        weight: of the term, the mean over intervals of the sum over image and text
        forcing: share of the samples whose intervals are fed by the teacher; 1: always, as published. What is left runs
            free, so a ramp leads over to feature distillation
        magnitude: weight of (|S| / |T| - 1)^2 beside the distance of directions; 0 as published
    """

    intervals: Pairs
    weight: Weight = 1.0
    forcing: Weight = Ramp(1.0, 0.0, until=0.3)
    magnitude: NotNegative = 0.1

    needs_teacher = True

    def __post_init__(self):
        check_numbers(self)
        self.intervals = as_intervals("IntervalKD", self.intervals)
        units = {end: unit for unit, end in collapsed(self.intervals, self.intervals[-1][1] + 1)}
        self.pairs = tuple((units[last], last) for _, last in self.intervals)
        # the first unit needs no teacher: both models start from the same embedded sample
        self.sources = {units[last]: first - 1 for first, last in self.intervals if first}
        self.taps = tuple(s for s, _ in self.pairs)
        self.teacher_taps = tuple(sorted({t for _, t in self.pairs} | set(self.sources.values())))

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> None:
        teacher = check_pairs("IntervalKD", self.pairs, student, teacher)
        wanted = len(collapsed(self.intervals, len(teacher.units)))
        if len(student.units) != wanted:
            raise ValueError(
                f"IntervalKD: collapsing these intervals of {len(teacher.units)} teacher units leaves {wanted}, the "
                f"student has {len(student.units)}: apply Collapse with the same intervals"
            )

    def forced(self, progress: float) -> tuple[Mapping[int, int], float]:
        return self.sources, weight_at(self.forcing, progress)

    def losses(self, seen: Seen) -> dict[str, Tensor]:
        compared = [tokens for pair in self.pairs for tokens in both(seen, pair)]
        distances = torch.stack([unit_distance(s, t) + self.magnitude * magnitude(s, t) for s, t in compared])
        return {"interval_kd": weight_at(self.weight, seen.progress) / len(self.pairs) * distances.sum(0)}


def magnitude(student: Tensor, teacher: Tensor) -> Tensor:
    """(|S| / |T| - 1)^2, mean over tokens: b n d -> b."""
    return (student.norm(dim=-1) / teacher.norm(dim=-1).clamp_min(1e-12) - 1).square().mean(1)
