"""Balanced feature distillation (Dense2MoE, arXiv 2510.09094): units' features, each weighed against the prediction.

    L = sum_l w_l L_l,  L_l = |f_tea_l - f_stu_l|^2 per element,
    w_l = (|L_distill| / |L_l|) (sum_j ||f_tea_j||_2) / (n ||f_tea_l||_2),  l of n pairs,  L_distill = |v_tea - v_stu|^2

All factors of w_l are detached, and taken over the batch of this rank. So the value of a term is pinned to
L_distill mean_j ||f_j|| / ||f_l|| and only its gradient informs: the raw L_l are in the metrics.

A pair is (student unit, teacher unit). With all units it is the method's L_feature; with the last units of groups its
L_group (`edit.moe.block_groups`). Image and text tokens of a unit are one feature. Specification: methods/dense2moe.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edit.denoiser import Denoiser
from edit.distillation.pairs import Pairs, as_pairs, both, check_pairs
from edit.inputs.limits import check_numbers
from edit.losses import Seen, Term
from edit.objectives import Weight, weight_at

SMALL = 1e-12  # of a feature that is the teacher's: its term is zero


@dataclass
class BalancedFeatureKD(Term):
    """Distance between outputs of units, pinned to the distance of the predictions.

    Args:
        pairs: (student unit, teacher unit), see `edit.distillation.pairs`
        weight: of the term
        text: compare text tokens, too, where units write them
    """

    pairs: Pairs
    weight: Weight = 1.0
    text: bool = True

    needs_teacher = True

    def __post_init__(self):
        check_numbers(self)
        self.pairs = as_pairs("BalancedFeatureKD", self.pairs)
        self.taps, self.teacher_taps = (tuple(p[i] for p in self.pairs) for i in (0, 1))

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> None:
        teacher = check_pairs("BalancedFeatureKD", self.pairs, student, teacher)
        if student.prediction != teacher.prediction:
            raise ValueError(
                f"BalancedFeatureKD: the student predicts {student.prediction}, the teacher {teacher.prediction}: "
                "they cannot be compared"
            )

    def losses(self, seen: Seen) -> dict[str, Tensor]:
        raw, norms = self.compared(seen)
        distill = (seen.output.sample.float() - seen.taught.sample.float()).square().mean()
        w = weights(distill, raw.mean(1), norms)
        return {"balanced_features": weight_at(self.weight, seen.progress) * (w[:, None] * raw).sum(0)}

    def metrics(self, seen: Seen) -> dict[str, Tensor]:
        """The raw distance of each pair, by the student's unit."""
        with torch.no_grad():
            raw = self.compared(seen)[0].mean(1)
        return {f"raw/{unit}": value for (unit, _), value in zip(self.pairs, raw, strict=True)}

    def compared(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """L_l of each sample, and ||f_tea_l||_2: u b and u."""
        raw, norms = [], []
        for pair in self.pairs:
            sides = both(seen, pair)[: 2 if self.text else 1]
            count = sum(s[0].numel() for s, _ in sides)  # elements of a sample
            raw.append(torch.stack([(s - t).square().flatten(1).sum(1) for s, t in sides]).sum(0) / count)
            norms.append(torch.stack([t.square().sum() for _, t in sides]).sum().sqrt())
        return torch.stack(raw), torch.stack(norms)


def weights(distill: Tensor, raw: Tensor, norms: Tensor) -> Tensor:
    """w_l, without a gradient: n.

    Args:
        distill: L_distill, one number
        raw: n, L_l
        norms: n, ||f_tea_l||_2
    """
    distill, raw, norms = distill.detach(), raw.detach(), norms.detach()
    return distill / raw.clamp_min(SMALL) * norms.mean() / norms.clamp_min(SMALL)
