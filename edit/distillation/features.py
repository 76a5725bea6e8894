"""Feature distillation: tokens between units of the student follow those between units of the teacher.

L = sum over pairs and streams of weight x distance / (number of pairs and streams), image and text tokens apart.
Distances differ in what they do about scale: activations of deep units are large, and a few channels larger still.

Sources: FLUX-mini (per block, raw), TinyFusion (arXiv 2412.01199: grouped, masked). Specification:
methods/distillation.md D3.3 a, b, d, e, f; the relative distance with a running denominator is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from edit.denoiser import Denoiser
from edit.distillation.pairs import Pairs, as_pairs, both, check_pairs
from edit.inputs.limits import NotNegative, check_numbers
from edit.losses import Seen, Term
from edit.objectives import Weight, weight_at

NORMS = ("raw", "unit", "layer", "relative")


@dataclass
class FeatureKD(Term):
    """Distance between outputs of units.

    Args:
        pairs: (student unit, teacher unit), see `edit.distillation.pairs`
        weight: of the term; TinyFusion: Ramp(0.01, 0), with norm="raw" and sigma=2
        weights: of each pair, beside it; none given: 1 each; FLUX-mini: 0.1 for the last double unit
        text: weight of text tokens beside image tokens; 0 leaves them out
        norm: "raw": mean (S - T)^2; "unit": |S/|S| - T/|T||^2 per token; "layer": raw after layer norms; "relative":
            raw over the teacher's mean square, a running mean over batches
        sigma: leave out elements further than this many deviations from a sample's mean; None: keep all
        mask: whose outliers: "separate": the student's are zero in the student, the teacher's in the teacher (as
            published), so that where one side alone has one the student is pulled to zero, or keeps its square;
            "intersection": either's are left out of both; "teacher": the teacher's are left out of both
        projector: "linear": a learned map of the student's tokens (after "layer"), needed where widths differ; it
            starts as the identity where they do not
        momentum: of the running mean
    """

    pairs: Pairs
    weight: Weight = 0.5
    weights: tuple[NotNegative, ...] = ()
    text: NotNegative = 1.0
    norm: Literal["raw", "unit", "layer", "relative"] = "relative"
    sigma: float | None = None
    mask: Literal["separate", "intersection", "teacher"] = "separate"
    projector: Literal["none", "linear"] = "none"
    momentum: float = 0.99

    needs_teacher = True

    def __post_init__(self):
        check_numbers(self)
        self.pairs, self.weights = as_pairs("FeatureKD", self.pairs), tuple(self.weights) or (1.0,) * len(self.pairs)
        if len(self.weights) != len(self.pairs):
            raise ValueError(f"FeatureKD: {len(self.weights)} weights for {len(self.pairs)} pairs: one each, or none")
        if self.norm not in NORMS:
            raise ValueError(f"FeatureKD: norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if self.mask not in ("separate", "intersection", "teacher"):
            raise ValueError(f"FeatureKD: mask must be separate, intersection or teacher, got {self.mask!r}")
        if self.projector not in ("none", "linear"):
            raise ValueError(f"FeatureKD: projector must be none or linear, got {self.projector!r}")
        if self.sigma is not None and self.sigma <= 0:
            raise ValueError(f"FeatureKD: sigma must be positive, got {self.sigma}; leave it out to keep all elements")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"FeatureKD: momentum must be in [0, 1), got {self.momentum}")
        self.taps, self.teacher_taps = (tuple(p[i] for p in self.pairs) for i in (0, 1))

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> FeatureState | None:
        teacher = check_pairs("FeatureKD", self.pairs, student, teacher, widths=self.projector == "none")
        mine, theirs = student.facts.width, teacher.facts.width
        maps = [projector(mine, theirs) for _ in self.pairs] if self.projector == "linear" else []
        return FeatureState(maps, len(self.pairs), self.momentum) if maps or self.norm == "relative" else None

    def losses(self, seen: Seen) -> dict[str, Tensor]:
        compared = [
            (j, k, mine, theirs)
            for j, pair in enumerate(self.pairs)
            for k, (mine, theirs) in enumerate(both(seen, pair)[: 2 if self.text else 1])
        ]
        of, streams, students, teachers = (list(v) for v in zip(*compared, strict=True))
        if self.norm == "layer":
            students, teachers = ([F.layer_norm(x, x.shape[-1:]) for x in side] for side in (students, teachers))
        if self.projector == "linear":
            students = seen.own(students, of)
        if self.sigma is not None:
            sides = [self.masked(s, t) for s, t in zip(students, teachers, strict=True)]
            students, teachers = (list(v) for v in zip(*sides, strict=True))
        if self.norm == "unit":
            distances = [unit_distance(s, t) for s, t in zip(students, teachers, strict=True)]
        else:
            distances = [(s - t).square().mean((1, 2)) for s, t in zip(students, teachers, strict=True)]
        if self.norm == "relative":
            scale = seen.own.update([t.square().mean() for t in teachers], of, streams)
            distances = [d / scale[j, k] for d, j, k in zip(distances, of, streams, strict=True)]
        weights = [self.weights[j] * (self.text if k else 1) for j, k in zip(of, streams, strict=True)]
        mean = torch.stack([w * d for w, d in zip(weights, distances, strict=True)]).mean(0)
        return {"feature_kd": weight_at(self.weight, seen.progress) * mean}

    def masked(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        mine, theirs = inliers(student, self.sigma), inliers(teacher, self.sigma)
        if self.mask == "intersection":
            mine = theirs = mine & theirs
        elif self.mask == "teacher":
            mine = theirs
        return student * mine, teacher * theirs


class FeatureState(nn.Module):
    """Parameters and buffers of feature distillation: a projector per pair, the teacher's running mean squares.

    Sharding gathers parameters around `forward` only, so all tokens go through it in one call.
    """

    def __init__(self, projectors: Sequence[nn.Linear], pairs: int, momentum: float):
        super().__init__()
        self.projectors = nn.ModuleList(projectors)
        self.momentum = momentum
        self.register_buffer("mean_square", torch.zeros(pairs, 2))  # image, text; 0: not seen yet

    def forward(self, tokens: list[Tensor], pairs: list[int]) -> list[Tensor]:
        """Project tokens [b n d] of these pairs."""
        maps = [self.projectors[j] for j in pairs]
        return [m(x.to(m.weight.dtype)).float() for m, x in zip(maps, tokens, strict=True)]

    @torch.no_grad()
    def update(self, squares: list[Tensor], pairs: list[int], streams: list[int]) -> Tensor:
        """Take in the mean squares of one batch and return the running ones, pairs x 2."""
        now = torch.zeros_like(self.mean_square, dtype=torch.float32)
        now[pairs, streams] = torch.stack(squares).clamp_min(1e-12)
        if dist.is_available() and dist.is_initialized():  # one state for all ranks: a checkpoint holds one
            dist.all_reduce(now)
            now /= dist.get_world_size()
        before = self.mean_square.float()
        after = torch.where(before > 0, torch.lerp(now, before, self.momentum), now)
        self.mean_square.copy_(after)
        return after


def projector(student: int, teacher: int) -> nn.Linear:
    """Student width -> teacher width; the identity where they are equal."""
    linear = nn.Linear(student, teacher)
    if student == teacher:
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    return linear


def unit_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """2 - 2 cos of the tokens' angles, mean over tokens: b n d -> b."""
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return (student - teacher).square().sum(-1).mean(1)


def inliers(x: Tensor, sigma: float) -> Tensor:
    """Elements within `sigma` deviations of their sample's mean: b n d -> bool."""
    x = x.detach()
    mean, std = x.mean((1, 2), keepdim=True), x.std((1, 2), keepdim=True)
    return (x - mean).abs() < sigma * std
