"""Self-Transcendence (arXiv 2601.07773): a short first run teaches a shallow unit by the clean latent, and its guided
features teach a shallow unit of a fresh model. No external encoder.

Stage 1, `VAEWarmUp`: a head on unit a must itself solve the denoising problem, v = eps - x at x_t = (1 - t) x + t eps:

    L = ||v' - v||^2 + lambda_1 w(t) ||v'_a - v||^2,  w(t) = 1 for t in [0.4, 0.7], else 0

As x' = x_t - t v', that is alignment with the clean latent, up to t^2. Models of noise predict eps, the same way.

Stage 2, `SelfTranscendence`: F, the first model's unit n, frozen, sees the student's x_t and t with the undropped
condition y and without one, in one batch of 2B, and stops there. f_g is regressed raw, without any normalisation:

    f_g = f_u + omega (f_c - f_u),  f_c = F(x_t, t, y),  f_u = F(x_t, t, null)
    L = ||v' - v||^2 + lambda_2 w(t) mean (MLP(h_m) - f_g)^2        until step 100,000

Heads are three layers D -> 2048 -> 2048 -> D with SiLU; in stage 1 a LayerNorm without weights and a linear layer to a
token's part of the sample follow; in stage 2 the last of the three has the teacher's width. The teacher's null
condition must have been trained: label_drop above 0 in stage 1.

The paper counts blocks from 1, units count from 0 here. Blocks a, m, n are 2, 6, 8 of SiT-B/2 (units 1, 5, 7); 4, 8, 16
of SiT-XL/2, read off the figures; 4, 12, 16 of an MMDiT of 24 blocks, with omega 5 and no range.

Specification: methods/self-transcendence.md. The released range has no effect: w of shape (b, 1, 1, 1) times losses (b)
has the mean mean(loss) mean(w). Here w acts on its own sample; `legacy_trange` has the length of the range instead, the
mean of w under uniform times. The release teaches by raw weights: ema.decay is 0 in
configs/method/self_transcendence_warm.yaml. Sequences of frames and families of two streams: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from edit.alignment.heads import linear, mlp
from edit.alignment.units import as_units
from edit.denoiser import Denoiser
from edit.facts import check_units
from edit.grid import patches
from edit.inputs.limits import Count, Natural, NotNegative, check_numbers
from edit.losses import Seen, Term
from edit.stream import Condition
from edit.structure import grid_of
from edit.widths import Scale

Range = Sequence[float] | None


@dataclass
class VAEWarmUp(Term):
    """Stage 1: a head on a shallow unit predicts what the objective wants of the whole model.

    Args:
        unit: a, from 0
        weight: lambda_1
        trange: first and last time at which it counts; None: all count
        legacy_trange: the release's: every time counts, with the length of the range as a factor
        width: of the head's hidden layers
        ends: optimiser step from which it is gone; None: never
    """

    unit: Natural
    weight: NotNegative = 0.5
    trange: Range = (0.4, 0.7)
    legacy_trange: bool = False
    width: Count = 2048
    ends: Count | None = None

    def __post_init__(self):
        check_numbers(self)
        check_range("VAEWarmUp", self.trange, self.legacy_trange)
        self.taps = (self.unit,)

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> PatchHead:
        check_units("VAEWarmUp", [self.unit], len(student.units), f"this {student.name}")
        return PatchHead(student, self.width)

    def losses(self, seen: Seen) -> dict[str, Tensor]:
        out, noise = seen.output, seen.noise
        target = patches(noise if seen.own.noise else noise - seen.x, out.grid)
        error = (seen.own(out.trace[f"unit.{self.unit}"].float()) - target).square().mean((1, 2))
        return {"warm_up": self.weight * within(seen.t, self.trange, self.legacy_trange) * error}


@dataclass
class SelfTranscendence(Term):
    """Stage 2: a shallow unit regresses guided features of a frozen model, the run's teacher.

    Args:
        units: m of the student and n of the teacher, from 0, n at least m
        omega: 1 is the conditional feature; 30 for class conditions, 5 for text
        weight: lambda_2
        trange, legacy_trange, width: as of `VAEWarmUp`
        ends: optimiser step from which it is gone with the teacher; 50,000 for text; None: never
    """

    units: Sequence[int]
    omega: float = 30.0
    weight: NotNegative = 0.5
    trange: Range = (0.4, 0.7)
    legacy_trange: bool = False
    width: Count = 2048
    ends: Count | None = 100_000

    needs_teacher = True
    reads_taught = False

    def __post_init__(self):
        check_numbers(self)
        check_range("SelfTranscendence", self.trange, self.legacy_trange)
        self.units = as_units("SelfTranscendence", self.units)
        self.taps = (self.units[0],)

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> FeatureHead:
        if teacher is None:
            raise ValueError("SelfTranscendence learns from a first run and there is none: give it with teacher.path")
        check_units("SelfTranscendence", self.units[:1], len(student.units), "the student")
        check_units("SelfTranscendence", self.units[1:], len(teacher.units), "the teacher")
        facts = teacher.facts
        if facts.classes is None and not facts.text:
            raise ValueError(
                f"SelfTranscendence guides features by a condition and this {teacher.name} has none: use a model of "
                "classes or text"
            )
        if facts.told and self.omega != 1:
            raise ValueError(
                f"SelfTranscendence: this {teacher.name} has its guidance as an input and knows no null condition: "
                f"choose a teacher without that input, or set omega=1, got {self.omega:g}"
            )
        if (mine := grid_of(student)) != (theirs := grid_of(teacher)):
            raise ValueError(f"SelfTranscendence: tokens of the student are {mine}, of the teacher {theirs}: use equal")
        return FeatureHead(student.facts.width, self.width, facts.width)

    def losses(self, seen: Seen) -> dict[str, Tensor]:
        f_g = self.target(seen)
        z = seen.own(seen.output.trace[f"unit.{self.units[0]}"].float())
        error = (z - f_g).square().mean((1, 2))
        return {"transcendence": self.weight * within(seen.t, self.trange, self.legacy_trange) * error}

    @torch.no_grad()
    def target(self, seen: Seen) -> Tensor:
        """f_g in fp32, b n d; the head is told how much longer than f_c it is."""
        assert isinstance(seen.whole, Condition) and seen.x_t is not None and seen.t is not None
        n, x_t, t = self.units[1], seen.x_t, seen.t
        both = seen.tapped_teacher(torch.cat((x_t, x_t)), torch.cat((t, t)), seen.whole.join(seen.null), (n,))
        f_c, f_u = both[f"unit.{n}"].float().chunk(2)
        f_g = torch.lerp(f_u, f_c, self.omega)
        seen.own.longer.copy_((f_g.flatten(1).norm(dim=1) / f_c.flatten(1).norm(dim=1)).mean())
        return f_g

    def metrics(self, seen: Seen) -> dict[str, Tensor]:
        """|f_g| / |f_c|, mean over the batch: the target's scale, hence the loss's, is the teacher's own."""
        return {"longer": seen.own.longer.clone()}


# ---- heads ----------------------------------------------------------------------------------------------------------


class PatchHead(nn.Module):
    """Tokens b n d -> the prediction of their parts of the sample, b n (c a p q)."""

    scales: ClassVar = {
        r"mlp\.0\.weight|out\.weight": Scale("output", "xavier"),
        r"mlp\.2\.weight": Scale("finite"),
        r"mlp\.4\.weight": Scale("input", "xavier"),
        "bias": Scale("vector"),
    }

    def __init__(self, student: Denoiser, width: int):
        super().__init__()
        d, (channels, *sizes), grid = student.facts.width, student.sample_shape, grid_of(student)
        size = channels
        for whole, parts in zip(sizes, grid[-len(sizes) :], strict=True):
            size *= whole // parts
        self.noise = student.prediction == "noise"
        self.mlp = mlp(d, width, width, d)
        self.norm = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.out = linear(d, size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.norm(self.mlp(tokens)))


class FeatureHead(nn.Module):
    """Tokens b n d -> features of the teacher's width."""

    scales: ClassVar = {
        r"mlp\.0\.weight": Scale("output", "xavier"),
        r"mlp\.[24]\.weight": Scale("finite"),
        "bias": Scale("vector"),
    }
    longer: Tensor  # |f_g| / |f_c|, mean over the last batch

    def __init__(self, student: int, width: int, teacher: int):
        super().__init__()
        self.mlp = mlp(student, width, width, teacher)
        self.register_buffer("longer", torch.ones(()), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mlp(tokens)


# ---- pieces ---------------------------------------------------------------------------------------------------------


def within(t: Tensor, trange: Range, legacy: bool) -> Tensor:
    """w(t): b -> b."""
    if trange is None:
        return torch.ones_like(t)
    first, last = trange
    return torch.full_like(t, last - first) if legacy else ((t >= first) & (t <= last)).to(t.dtype)


def check_range(who: str, trange: Range, legacy: bool) -> None:
    """Refuse what is no range of times."""
    if trange is not None and not (len(trange) == 2 and 0 <= trange[0] < trange[1] <= 1):
        raise ValueError(f"{who}: trange is a first and a last time, 0 <= first < last <= 1, or null; got {trange}")
    if trange is None and legacy:
        raise ValueError(f"{who}: legacy_trange is the length of trange, which is null: give one, or leave it out")
