"""SRA, self-representation alignment (arXiv 2505.02831): a shallow unit follows a deeper one of the model's average.

Representations are better deeper in a diffusion transformer and at less noise. So the moving average, which every run
keeps, teaches the student from unit n at a cleaner time s of the same sample x, noise eps and (dropped) condition y:

    x_t = (1 - t) x + t eps,  s = clamp(t - kappa u, 0, 1) with u ~ U(0, 1),  x_s = (1 - s) x + s eps
    L = L_gen + lambda d(J(h_m(x_t, t, y)), r_n(x_s, s, y))

h_m and r_n are outputs of units, b n d; the head J, D -> 2D -> D with SiLU, stands on the student's side alone. d is
the mean over all elements of the smooth L1 distance (beta 0.05), or 1 - cos. Where times are steps i of T = 1000
(DDPM), the teacher's is clamp(i - floor(kappa T u), 1, T - 1). The average stops behind unit n of L units.

The paper counts blocks from 1, units count from 0 here: SiT-B/2 3 -> 8 is (2, 7), L/2 6 -> 16 is (5, 15), SiT-XL/2
8 -> 20 is (7, 19), DiT-XL/2 8 -> 16 is (7, 15); else m about 0.27 and n 0.57 to 0.71 of the depth.

With dual times (DTS+AS, arXiv 2607.02508: `dual=0.25`, and the edit `edit.alignment.token_times.TokenTimes`) a quarter
of the tokens has a second time t' ~ U(0, 1) of its own. The average sees each group at clamp(t_g - kappa u_g, 0, 1),
u_g independent (inferred). The velocity that is learned does not depend on times; an objective that weighs them
(`snr_cap`) would weigh the second group by the first one's.

Specification: methods/sra.md. The cosine runs over channels in the paper, over tokens in the released code: `axis` has
both. J has no moving average, unlike in the release, where nothing reads it. The release's average runs all blocks.
Other families than DiT and SiT: ours; of two streams the image's is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.alignment.heads import mlp
from edit.alignment.token_times import TokenTimes
from edit.alignment.units import as_units
from edit.denoiser import Denoiser
from edit.facts import check_units
from edit.grid import patches
from edit.inputs.limits import Count, Limits, Natural, NotNegative, Positive, Share, check_numbers
from edit.losses import Seen, Term
from edit.stream import Condition
from edit.structure import grid_of
from edit.subset import marked
from edit.widths import Scale


@dataclass(frozen=True)
class Decay:
    """lambda of an epoch e: `start` until epoch `hold`, then start 0.1^((e - hold) / tenfold). At 512 px 99 and 800.

    Args:
        start: 0.2 of SiT, 0.04 of DiT
        hold: epochs
        tenfold: epochs in which it falls to a tenth
        epoch: optimiser steps; those of ImageNet at 256 images
    """

    start: NotNegative = 0.2
    hold: Natural = 149
    tenfold: Count = 1000
    epoch: Count = 5004

    def __post_init__(self):
        check_numbers(self)

    def __call__(self, step: int) -> float:
        return self.start * 0.1 ** (max(0, step // self.epoch - self.hold) / self.tenfold)


@dataclass
class SRA(Term):
    """Distance of a student's unit to a deeper unit of its average at less noise.

    Args:
        units: m of the student and n of the average, from 0, n at least m
        weight: lambda, a number or a `Decay` with the optimiser step; None: `Decay()` of the paper's smooth L1, 0.5 of
            the released cosine
        offset: kappa, the largest distance of the two times
        distance: "smooth_l1" or "cosine"
        axis: of "cosine": "channels", a cosine for each token, or "tokens", one for each channel
        beta: of "smooth_l1": where it turns from square to linear
        head: False compares the units themselves, which the paper finds worse than no alignment
        dual: share of tokens with a time of their own, 0.25 of DTS+AS; 0: one time for all
    """

    units: Sequence[int]
    weight: NotNegative | Decay | None = None
    offset: Share = 0.2
    distance: Literal["smooth_l1", "cosine"] = "smooth_l1"
    axis: Literal["channels", "tokens"] = "channels"
    beta: Positive = 0.05
    head: bool = True
    dual: Annotated[float, Limits(0, below=1)] = 0.0

    needs_average = True

    def __post_init__(self):
        check_numbers(self)
        self.units = as_units("SRA", self.units)
        if self.distance not in ("smooth_l1", "cosine"):
            raise ValueError(f"SRA: distance must be smooth_l1 or cosine, got {self.distance!r}")
        if self.axis not in ("channels", "tokens"):
            raise ValueError(f"SRA: axis must be channels or tokens, got {self.axis!r}")
        self.taps = (self.units[0],)

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> Head:
        check_units("SRA", self.units, len(student.units), f"this {student.name}")
        if self.dual:
            if student.prediction == "noise":
                raise ValueError(
                    f"SRA: dual times are for velocities, this {student.name} predicts a noise: set dual=0"
                )
            if not any(isinstance(e, TokenTimes) for e in student.applied.values()):
                raise ValueError(
                    f"SRA: dual={self.dual:g}, and this {student.name} is told one time for all tokens: add "
                    "+edits.token_times._target_=edit.alignment.token_times.TokenTimes"
                )
        return Head(student, self.head, grid_of(student) if self.dual else None)

    def mixed(self, seen: Seen) -> tuple[Tensor, Condition]:
        grid = seen.own.grid
        if grid is None:
            return super().mixed(seen)
        scores = patches(seen.draws.gaussian(1), grid)[..., 0]  # b n
        apart = scores.topk(max(1, round(self.dual * scores.shape[1])), 1).indices
        second = seen.draws.uniform(2)
        x_t = torch.where(marked(apart, grid, seen.x.shape[2:]), seen.corrupt(seen.x, seen.noise, second), seen.x_t)
        return x_t, replace(seen.condition, second=second, apart=apart)

    def losses(self, seen: Seen) -> dict[str, Tensor]:
        m, n = self.units
        condition = seen.condition
        s = cleaner(seen.t, seen.draws.uniform(0), self.offset, seen.discrete)
        x_s = seen.corrupt(seen.x, seen.noise, s)
        if condition.second is not None and condition.apart is not None:
            second = cleaner(condition.second, seen.draws.uniform(3), self.offset, seen.discrete)
            there = seen.corrupt(seen.x, seen.noise, second)
            x_s = torch.where(marked(condition.apart, seen.output.grid, seen.x.shape[2:]), there, x_s)
            condition = replace(condition, second=second)
        r = seen.tapped_average(x_s, s, condition, (n,))[f"unit.{n}"].float()
        z = seen.own(seen.output.trace[f"unit.{m}"].float())
        return {"sra": self.strength(seen.step) * self.compare(z, r)}

    def strength(self, step: int) -> float:
        """lambda at an optimiser step."""
        weight = self.weight
        if weight is None:
            weight = 0.5 if self.distance == "cosine" else Decay()
        return weight(step) if isinstance(weight, Decay) else float(weight)

    def compare(self, z: Tensor, r: Tensor) -> Tensor:
        """d of each sample: b n d twice -> b."""
        if self.distance == "cosine":
            return (1 - F.cosine_similarity(z, r, dim=2 if self.axis == "channels" else 1)).mean(1)
        return F.smooth_l1_loss(z, r, beta=self.beta, reduction="none").mean((1, 2))


class Head(nn.Module):
    """J; with dual times, the grid of the tokens."""

    scales: ClassVar = {r"layers\.\d+\.weight": Scale("hidden", "xavier"), "bias": Scale("vector")}

    def __init__(self, student: Denoiser, learned: bool, grid: tuple[int, int, int] | None = None):
        super().__init__()
        d = student.facts.width
        self.layers = mlp(d, 2 * d, d) if learned else nn.Identity()
        self.grid = grid

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)


def cleaner(t: Tensor, u: Tensor, offset: float, discrete: int | None) -> Tensor:
    """The average's times s from the student's: b each.

    Args:
        t: in [0, 1]
        u: uniform numbers in (0, 1)
        offset: kappa
        discrete: T, where times are (i + 1) / T of a step i; None: they are continuous
    """
    if discrete is None:
        return (t - offset * u).clamp(0, 1)
    i = torch.round(t * discrete) - 1
    return ((i - torch.floor(offset * discrete * u)).clamp(1, discrete - 1) + 1) / discrete
