"""Output distillation: the student imitates the teacher's prediction at the same noisy sample, time and condition.

L = w(t) |v_student - v_teacher|^2 / d, with w = 1 on predictions or t^2 on predicted data. Where both have a learned
variance, it is distilled through the KL of one denoising step with the student's mean detached (TinyFusion,
arXiv 2412.01199). Pseudo-Huber after iCT (arXiv 2310.14189). Specification: methods/distillation.md D3.1; the exact
form of the variance term there is ours: the teacher's step in place of the data's posterior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from edit.denoiser import Denoiser
from edit.inputs.limits import check_numbers
from edit.losses import Seen, Term
from edit.objectives import DDPM, Weight, schedule_tables, weight_at
from edit.stream import Output


@dataclass
class OutputKD(Term):
    """Distance of the predictions.

    Args:
        weight: of the term
        space: quantity to compare: "output", the prediction itself, or "data", the data it implies (t times a velocity)
        loss: "mse", per element, or "huber": sqrt(|difference|^2 + c^2) - c of a whole sample
        c: of "huber"; None: 0.00054 sqrt(d), d elements in a sample (iCT)
        variance: weight of the learned variance, on top of `weight`; it matters where both models have one
        diffusion: the steps that the variance belongs to
    """

    weight: Weight = 1.0
    space: Literal["output", "data"] = "output"
    loss: Literal["mse", "huber"] = "mse"
    c: float | None = None
    variance: Weight = 1.0
    diffusion: DDPM = field(default_factory=DDPM)

    needs_teacher = True

    def __post_init__(self):
        check_numbers(self)
        if self.space not in ("output", "data"):
            raise ValueError(f"OutputKD: space must be output or data, got {self.space!r}")
        if self.loss not in ("mse", "huber"):
            raise ValueError(f"OutputKD: loss must be mse or huber, got {self.loss!r}")
        if self.c is not None and self.c <= 0:
            raise ValueError(f"OutputKD: c must be positive, got {self.c}; leave it out for 0.00054 sqrt(d)")

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> None:
        if teacher is None:
            raise ValueError("OutputKD compares with a teacher and there is none: give one (teacher.path)")
        if student.prediction != teacher.prediction:
            raise ValueError(
                f"OutputKD: the student predicts {student.prediction}, the teacher {teacher.prediction}: "
                "they cannot be compared"
            )
        if self.space == "data" and student.prediction != "velocity":
            raise ValueError(f"OutputKD: space=data compares velocities, this model predicts {student.prediction}")

    def losses(self, seen: Seen) -> dict[str, Tensor]:
        student, teacher = seen.output, seen.taught
        delta = (student.sample.float() - teacher.sample.detach().float()).flatten(1)  # b d
        if self.space == "data":
            delta = seen.t[:, None] * delta
        distance = delta.square().mean(1) if self.loss == "mse" else self.huber(delta)
        weight = weight_at(self.weight, seen.progress)
        losses = {"output_kd": weight * distance}
        if student.variance is not None and teacher.variance is not None:
            weight *= weight_at(self.variance, seen.progress)
            losses["variance_kd"] = weight * step_kl(self.diffusion, student, teacher, seen.t)
        return losses

    def huber(self, delta: Tensor) -> Tensor:
        c = 0.00054 * math.sqrt(delta.shape[1]) if self.c is None else self.c
        square = delta.square().sum(1)
        return square / ((square + c * c).sqrt() + c)  # = sqrt(square + c^2) - c without its cancellation


def step_kl(diffusion: DDPM, student: Output, teacher: Output, t: Tensor) -> Tensor:
    """KL of the teacher's denoising step from the student's, in bits per dimension: [b].

    Its gradient reaches the student's variance alone. The means differ by b / sqrt((1 - b)(1 - abar)) of what the
    noises differ by.
    """
    tables = schedule_tables(diffusion.steps, diffusion.beta_start, diffusion.beta_end, t.device)
    i, shape = diffusion.index(t), (-1, *[1] * (student.sample.ndim - 1))
    signal, spread, log_beta, log_posterior, from_data, _ = (v[i].view(shape) for v in tables)
    scale = from_data * spread / signal  # of the posterior mean, through the data that a noise implies
    gap = scale * (teacher.sample.detach() - student.sample.detach()).float()
    mine, theirs = (
        torch.lerp(log_posterior, log_beta, (v.float() + 1) / 2) for v in (student.variance, teacher.variance.detach())
    )
    kl = 0.5 * (mine - theirs - 1 + (theirs - mine).exp() + gap.square() * (-mine).exp())
    return kl.flatten(1).mean(1) / math.log(2.0)
