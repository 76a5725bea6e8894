"""REPA: representation alignment of one early unit with a frozen encoder of images (arXiv 2410.06940), and iREPA.

    L = L_v + lambda L_align,   L_align = -(1 / (B N)) sum_{b,n} cos(y_{b,n}, P(h_{b,n})),   mean over encoders

h (B, N, D): image tokens behind unit k, both residuals added, not normalised. P: Linear D -> K, SiLU, Linear K -> K,
SiLU, Linear K -> D_e. y (B, N_e, D_e): patch tokens behind the encoder's final norm, of the clean sample. Where the
grids differ, h goes to the encoder's by bilinear interpolation, before P. At every t, with and without a dropped label.
"nt_xent": cross-entropy of cos / temperature over all tokens y of the rank's batch, the token's own the label.

iREPA: P is one 3 x 3 convolution on the grid of tokens ("conv"); y <- (y - gamma mean_n y) / (std_n y + 1e-6) per
channel, gamma 0.6 (`standardise`); lambda 1.

The paper counts blocks from 1, units here count from 0: its k = 8 is unit=7. Specification: methods/repa.md.

Inferred: P starts as the SiT port's does (Xavier-uniform, zero bias) in every family, the convolution as torch has it;
the temperature 0.1; the encoder sees each frame of a video alone, and y is the mean over the frames of a token. Where
the data do not have y, the encoder sees decoded samples, in the reference the images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.alignment.encoder import Encoder
from edit.alignment.heads import mlp
from edit.alignment.looker import Encoded
from edit.alignment.targets import averaged, check_cached, resized, side_by_side, standardised
from edit.denoiser import Denoiser
from edit.facts import check_units
from edit.frames import folded
from edit.grid import Grid
from edit.inputs.limits import Count, Natural, NotNegative, Positive, check_numbers
from edit.losses import Frozen, Seen, Term
from edit.objectives import Weight, weight_at
from edit.subset import gathered
from edit.widths import Scale


@dataclass
class REPA(Term):
    """Tokens of a unit follow what a frozen encoder sees in the clean picture.

    Args:
        encoder: what they follow
        unit: whose tokens, counted from 0: the paper's k - 1
        further: more encoders, each with a projector of its own; their losses are averaged
        weight: of the term
        similarity: "cosine", or "nt_xent", which is faster in the first 100,000 steps alone
        temperature: of "nt_xent"
        projector: "mlp", or iREPA's "conv"
        hidden: channels K inside "mlp"
        standardise: iREPA's gamma, 0.6 there; None: targets stay as they are
        cached: the data set has the encoder's features (`data.set.encoded=true`): it is neither loaded nor run
        ends: optimiser step from which the term is gone; None: never, as published
    """

    encoder: Encoder
    unit: Natural
    further: tuple[Encoder, ...] = ()
    weight: Weight = 0.5
    similarity: Literal["cosine", "nt_xent"] = "cosine"
    temperature: Positive = 0.1
    projector: Literal["mlp", "conv"] = "mlp"
    hidden: Count = 2048
    standardise: NotNegative | None = None
    cached: bool = False
    ends: Natural | None = None

    def __post_init__(self):
        check_numbers(self)
        self.further, self.taps = tuple(self.further), (self.unit,)
        if self.similarity not in ("cosine", "nt_xent"):
            raise ValueError(f"REPA: similarity must be cosine or nt_xent, got {self.similarity!r}")
        if self.projector not in ("mlp", "conv"):
            raise ValueError(f"REPA: projector must be mlp or conv, got {self.projector!r}")
        if self.cached and self.further:
            raise ValueError("REPA: the data have the features of one encoder: leave out further, or say cached=false")

    @property
    def decodes(self) -> bool:  # type: ignore[override] - here a consequence
        return not self.cached

    @property
    def subsets(self) -> bool:  # type: ignore[override] - likewise: a convolution needs the grid
        return self.projector == "mlp"

    @property
    def encoders(self) -> tuple[Encoder, ...]:
        return (self.encoder, *self.further)

    @property
    def frozen(self) -> Mapping[str, Frozen]:
        return {} if self.cached else {f"encoder.{i}": encoder for i, encoder in enumerate(self.encoders)}

    @property
    def reads(self) -> Mapping[str, tuple[int, ...]]:  # type: ignore[override] - likewise
        return {"encoded": (1, self.encoder.structure().width)} if self.cached else {}

    def check_data(self, data: Any, pixels: Sequence[tuple[int, ...]]) -> None:
        if self.cached:
            check_cached(self.encoder, getattr(data, "encoded", None))
            return
        for looker in (encoder.structure() for encoder in self.encoders):
            for shape in pixels:
                looker.size(*shape[-2:])

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> Projectors:
        check_units("REPA", [self.unit], len(student.units), f"this {student.name}")
        widths = [encoder.structure().width for encoder in self.encoders]
        width, hidden = student.facts.width, None if self.projector == "conv" else self.hidden
        return Projectors([projector(width, theirs, hidden) for theirs in widths])

    def losses(self, seen: Seen) -> dict[str, Tensor]:
        return {"repa": self.loss(seen, self.encoded(seen), seen.own)}

    def loss(self, seen: Seen, encoded: Sequence[Encoded], own: nn.Module) -> Tensor:
        """The weighted loss of each sample, [b], against what `encoded` gave; `own`: as of `build`."""
        output, h = seen.output, seen.output.trace[f"unit.{self.unit}"]
        grid, kept = output.grid, output.kept
        assert grid is not None, "every forward tells it"
        grids = [(grid[0], *e.grid) for e in encoded]
        if kept is not None and (odd := next((to for to in grids if to != grid), None)):
            raise ValueError(
                f"REPA: some of {grid[1]} x {grid[2]} tokens are kept, and the encoder sees {odd[1]} x {odd[2]} "
                "patches: choose an encoder and a side that have the model's grid, or leave masking out"
            )
        guesses = own([h.float() if kept is not None else resized(h.float(), grid, to) for to in grids], grids)
        found = []
        for guess, (tokens, *_), (_, rows, columns) in zip(guesses, encoded, grids, strict=True):
            y = averaged(tokens, len(h), grid[0], rows * columns)
            y = y if self.standardise is None else standardised(y, self.standardise)
            y = y if kept is None else gathered(y, kept)
            found.append(self.distance(y, guess))
        return weight_at(self.weight, seen.progress) * torch.stack(found).mean(0)

    def distance(self, y: Tensor, guess: Tensor) -> Tensor:
        """L_align of each sample, b n d twice in fp32 -> b: -1 to 1 by the cosine."""
        if self.similarity == "cosine":
            return -F.cosine_similarity(guess, y, dim=-1).mean(1)
        p, q = (F.normalize(v, dim=-1).flatten(0, 1) for v in (guess, y))
        with torch.autocast(p.device.type, enabled=False):
            logits = p @ q.T / self.temperature  # of all tokens with all
        own = torch.arange(len(p), device=p.device)
        return F.cross_entropy(logits, own, reduction="none").view(len(y), -1).mean(1)

    @torch.no_grad()
    def encoded(self, seen: Seen) -> list[Encoded]:
        """What each encoder makes of the clean samples; of a video's frames as of a batch."""
        if self.cached:
            assert seen.output is not None and seen.output.grid is not None
            tokens = seen.batch["encoded"].float()
            return [Encoded(tokens, side_by_side(tokens.shape[1], seen.output.grid), {})]
        pixels = self.shown(seen)
        return [seen.frozen[name](pixels) for name in self.frozen]

    @torch.no_grad()
    def shown(self, seen: Seen) -> Tensor:
        """The clean samples as pictures b 3 y x, the frames of a video as a batch."""
        assert seen.x is not None
        return folded(seen.decode(seen.x))


# ---- projectors ------------------------------------------------------------------------------------------------------


class Projectors(nn.Module):
    """P, one for each encoder. Sharding gathers parameters around `forward` only: all tokens go through in one call."""

    scales: ClassVar = {
        r"maps\.\d+\.0\.weight": Scale("output", "xavier"),
        r"maps\.\d+\.\d+\.weight": Scale("finite"),
        r"maps\.\d+\.weight": Scale("output", "fan_in"),  # iREPA's convolution, as torch starts it
        "bias": Scale("vector"),
    }

    def __init__(self, maps: Sequence[nn.Module]):
        super().__init__()
        self.maps = nn.ModuleList(maps)

    def forward(self, tokens: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        """Tokens b (f n) d for each encoder, on its grid -> b (f n) d_e in fp32."""
        found = []
        for project, h, (frames, rows, columns) in zip(self.maps, tokens, grids, strict=True):
            h = h.to(next(project.parameters()).dtype)
            if isinstance(project, nn.Conv2d):
                images = h.unflatten(1, (frames, rows, columns)).flatten(0, 1).movedim(-1, 1)
                h = project(images).flatten(2).transpose(1, 2).reshape(len(h), frames * rows * columns, -1)
            else:
                h = project(h)
            found.append(h.float())
        return found


def projector(width: int, theirs: int, hidden: int | None) -> nn.Module:
    """P from the student's width to the encoder's; `hidden` None: iREPA's convolution."""
    if hidden is None:
        return nn.Conv2d(width, theirs, 3, padding=1)
    return mlp(width, hidden, hidden, theirs)
