"""A discriminator on the features of a frozen model: a small head on each tapped unit, and the losses of both sides.

LADD (arXiv 2403.12015) scores latents by the teacher's own tokens: nothing is decoded, and the noise level selects
composition (high) or texture (low). Time and pooled text condition the heads by projection, as in StyleGAN-T
(2301.09515): <hidden state, code> is added to a logit. Codes that start at zero are ours. Penalty without second
derivatives: APT (2501.08316). Specification: methods/distillation.md, D3.7.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.denoiser import Denoiser
from edit.losses import Seen
from edit.paths import mean
from edit.stream import Condition

FREQUENCIES = 32  # of the time sinusoid


class Heads(nn.Module):
    """Logits for tokens of a frozen model, one of each token and head. Image tokens alone, in the order of their grid.

    The frames of a video are convolved each by itself.

    Args:
        units: that are tapped, counted from 0
        width: channels d of a token
        pooled: channels of the model's pooled text; 0: none
        hidden: channels inside a head
        kernel: neighbouring tokens a head looks at, in rows and columns; 1: at each one alone
    """

    def __init__(self, units: Sequence[int], width: int, pooled: int = 0, hidden: int = 256, kernel: int = 3):
        super().__init__()
        if not units:
            raise ValueError("Heads: there must be at least one tapped unit, got none")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"Heads: kernel must be odd, got {kernel}; 1 judges each token by itself")
        self.units, self.pooled = tuple(units), pooled
        self.heads = nn.ModuleList(Head(width, hidden, kernel) for _ in units)
        self.code = nn.Linear(2 * FREQUENCIES + pooled, hidden * len(units))
        nn.init.zeros_(self.code.weight)
        nn.init.zeros_(self.code.bias)

    @classmethod
    def on(cls, model: Denoiser, taps: Sequence[int], hidden: int = 256, kernel: int = 3) -> Heads:
        """For units of this model; negative ones count from its end."""
        told = model.example(text=1).pooled
        units = sorted({i % len(model.units) for i in taps})
        return cls(units, model.facts.width, 0 if told is None else told.shape[1], hidden, kernel)

    def forward(
        self, features: Mapping[str, Tensor], t: Tensor, pooled: Tensor | None, grid: tuple[int, int, int]
    ) -> Tensor:
        """Score features of noisy latents.

        Args:
            features: its taps "unit.<index>", b n d
            t: b, times of the noisy latents in [0, 1]
            pooled: b c, pooled text; ignored if the model has none
            grid: frames, rows and columns of the tokens, as the model's `Output` tells

        Returns:
            Logits, fp32: b k with k = heads x tokens, positive for real.

        Raises:
            ValueError: if the tokens are no such grid
        """
        dtype = self.code.weight.dtype
        told = waves(t)
        if self.pooled:
            assert pooled is not None, "the model was built for pooled text, and refuses to go without"
            told = torch.cat((told, pooled.float()), 1)
        frames, rows, columns = grid
        codes = self.code(told.to(dtype)).repeat_interleave(frames, 0).chunk(len(self.units), 1)
        logits = []
        for unit, head, code in zip(self.units, self.heads, codes, strict=True):
            tokens = features[f"unit.{unit}"].to(dtype)
            if tokens.shape[1] != frames * rows * columns:
                raise ValueError(
                    f"unit {unit} has {tokens.shape[1]} tokens, its model's grid {frames} x {rows} x {columns}: tap a "
                    "unit that has all of them"
                )
            images = tokens.unflatten(1, (frames, rows * columns)).flatten(0, 1)  # (b f) n d
            logits.append(head(images.transpose(1, 2).unflatten(2, (rows, columns)), code).view(len(tokens), -1))
        return torch.cat(logits, 1).float()


class Head(nn.Module):
    """GN - convolution - SiLU - convolution to one number per token."""

    def __init__(self, width: int, hidden: int, kernel: int):
        super().__init__()
        groups = math.gcd(32, width // 4, width)  # 32, but of four channels at least: one alone would lose its mean
        self.norm = nn.GroupNorm(groups, width)
        self.inner = nn.Conv2d(width, hidden, kernel, padding=kernel // 2)
        self.outer = nn.Conv2d(hidden, 1, 1)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:  # b d rows columns, b hidden -> b n
        # torch's GroupNorm on a CPU crashes in the backward of tokens-last memory whose gradient nobody wants
        h = F.silu(self.inner(self.norm(x.contiguous())))
        projected = torch.einsum("bdyx,bd->byx", h, code) / math.sqrt(h.shape[1])
        return (self.outer(h)[:, 0] + projected).flatten(1)


def judge(seen: Seen, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Logits of noisy latents: teacher's taps, then the heads in `Seen.own`; gradients reach x_t through both."""
    assert seen.own is not None
    out = seen.features(x_t, t, condition)
    return seen.own(out.trace, t, condition.pooled, out.grid)


def waves(t: Tensor) -> Tensor:
    """Sinusoids of 1000 t: [b] -> b 2 FREQUENCIES."""
    rates = torch.exp(torch.arange(FREQUENCIES, device=t.device) * (-math.log(10_000.0) / FREQUENCIES))
    angle = 1000 * t.float()[:, None] * rates
    return torch.cat((angle.cos(), angle.sin()), 1)


# ---- losses: of logits b k, one number per sample [b] ----------------------------------------------------------------


def hinge_real_fake(real: Tensor, fake: Tensor) -> Tensor:
    """Of the discriminator: max(0, 1 - D(real)) + max(0, 1 + D(fake)); 2 at D = 0."""
    return mean(F.relu(1 - real)) + mean(F.relu(1 + fake))


def hinge_generator(fake: Tensor) -> Tensor:
    """-D(fake)."""
    return -mean(fake)


def softplus_real_fake(real: Tensor, fake: Tensor) -> Tensor:
    """The non-saturating pair, -log sigmoid(D(real)) - log sigmoid(-D(fake)); 2 log 2 at D = 0."""
    return mean(F.softplus(-real)) + mean(F.softplus(fake))


def softplus_generator(fake: Tensor) -> Tensor:
    """-log sigmoid(D(fake)); log 2 at D = 0."""
    return mean(F.softplus(-fake))


def square_real_fake(real: Tensor, fake: Tensor) -> Tensor:
    """Least squares (LSGAN, arXiv 1611.04076): ((D(real) - 1)^2 + D(fake)^2) / 2; 1/2 at D = 0."""
    return 0.5 * (mean((real - 1).square()) + mean(fake.square()))


def square_generator(fake: Tensor) -> Tensor:
    """(D(fake) - 1)^2 / 2."""
    return 0.5 * mean((fake - 1).square())


def approximate_r1(real: Tensor, near: Tensor) -> Tensor:
    """(D(real) - D(near))^2, near being the same noisy latents and a little more noise: a gradient penalty."""
    return mean((real - near).square())
