"""HASTE: holistic alignment with stage-wise termination (arXiv 2505.16792): REPA and attention maps, then neither.

    L = L_v + lambda_R L_R + lambda_A L_A   before step tau,   L = L_v from then on
    L_A = mean over pairs (l_s, l_t), samples, heads m < M and queries i of
          - sum_j softmax(A^t)_{m,i,j} log softmax(A^s)_{m,i,j}

L_R: REPA's loss (`edit.alignment.repa`). A^s = q k' / sqrt(e) of the student's unit l_s, as it attends (norms and
rotations of q and k included); A^t of the encoder's layer l_t, class and register tokens left out before the softmax.
Of a joint sequence, the image's rows and keys alone: image tokens stand last in it. Head m follows head m, M the
smaller of the two numbers. Where the grids differ, the student's probabilities are resized over keys, then over
queries, and renormalised over keys (to renormalise is inferred). Of a video, each frame within itself.

Both terms, encoder and projector end for good at step `ends` (tau; halve it where the batch doubles), or, with a
`trigger`, earlier: when their gradient has turned against the denoising gradient. The paper's trigger takes 2048 images
at four times; this one the mean cosine of a few batches as they are trained on. Units count from 0 here.
Specification: methods/haste.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from edit.alignment.encoder import Encoder
from edit.alignment.repa import REPA, Projectors
from edit.denoiser import Denoiser
from edit.facts import check_units
from edit.grid import Grid
from edit.inputs.limits import Count, Natural, check_numbers
from edit.losses import Frozen, Seen, Term
from edit.objectives import Weight, weight_at

WHOLE = 1 << 20  # rows of a map: all
SMALL = 1e-12


@dataclass(frozen=True)
class GradientAngle:
    """Stop when gradients of alignment and denoising, to the weights of one unit, point apart.

    Args:
        unit: whose weights, counted from 0: the paper's k - 1
        below: the cosine under which the terms stop
        first: optimiser step of the first look
        period: steps between two looks
        batches: that a look takes, one step after the other; the paper's 2048 images are 8 of 256
    """

    unit: Natural = 4
    below: float = -0.05
    first: Natural = 50_000
    period: Count = 10_000
    batches: Count = 8

    def __post_init__(self):
        check_numbers(self)
        if self.batches > self.period:
            raise ValueError(f"GradientAngle: batches={self.batches} is more than period={self.period}: lower it")

    def place(self, step: int) -> int | None:
        """The number of a step's batch within a look; None: nobody looks."""
        place = (step - self.first) % self.period
        return place if step >= self.first and place < self.batches else None


@dataclass
class HASTE(Term):
    """Tokens of a unit follow a frozen encoder's, and attention maps those of its layers, until a step or a turn.

    Args:
        features: REPA; its `weight` is lambda_R, its encoder the one of the maps
        pairs: (student unit, encoder layer), counted from 0, layers also from the end: -1
        weight: lambda_A
        ends: tau, the optimiser step from which both are gone; None: never, which the paper finds worse than REPA
        trigger: stops them earlier; None: `ends` alone
    """

    features: REPA
    pairs: tuple[tuple[int, int], ...]
    weight: Weight = 0.5
    ends: Natural | None = 250_000
    trigger: GradientAngle | None = None

    def __post_init__(self):
        check_numbers(self)
        self.pairs = tuple(tuple(pair) for pair in self.pairs)  # type: ignore[assignment]
        if not self.pairs or not all(len(p) == 2 and all(isinstance(i, int) for i in p) for p in self.pairs):
            raise ValueError(f"HASTE: pairs are (student unit, encoder layer), at least one; got {self.pairs}")
        if self.features.cached or self.features.further:
            raise ValueError(
                "HASTE: maps come from the one encoder of the features as it runs: leave out features.further, and say "
                "features.cached=false"
            )
        if self.features.ends is not None:
            raise ValueError("HASTE: features and maps end together: say ends, and leave out features.ends")
        self.taps, self.stops = self.features.taps, self.trigger is not None
        self.maps = {unit: WHOLE for unit, _ in self.pairs}

    decodes = True

    @property
    def encoder(self) -> Encoder:
        return replace(self.features.encoder, layers=tuple(dict.fromkeys(layer for _, layer in self.pairs)))

    @property
    def frozen(self) -> Mapping[str, Frozen]:
        return {"encoder.0": self.encoder}

    def check_data(self, data: Any, pixels: Sequence[tuple[int, ...]]) -> None:
        self.features.check_data(data, pixels)

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> nn.Module:
        units = [unit for unit, _ in self.pairs] + ([] if self.trigger is None else [self.trigger.unit])
        check_units("HASTE", units, len(student.units), f"this {student.name}")
        self.encoder.structure()  # refuses layers that it does not have
        projectors = self.features.build(student)
        return projectors if self.trigger is None else Watched(projectors)

    def losses(self, seen: Seen) -> dict[str, Tensor]:
        encoded = seen.frozen["encoder.0"](self.features.shown(seen))
        own = seen.own.projectors if isinstance(seen.own, Watched) else seen.own
        grid, found = seen.output.grid, []
        for unit, layer in self.pairs:
            mine = by_frame(seen.output.trace[f"unit.{unit}.maps"], grid)
            theirs = encoded.maps[layer]
            if len(mine) != len(theirs):
                raise ValueError(
                    f"HASTE: the model has {grid[0]} frames of tokens, the video {len(theirs) // len(seen.x)} frames: "
                    "their maps cannot be compared; leave the maps out (REPA)"
                )
            found.append(map_loss(mine, theirs, grid[1:], encoded.grid).unflatten(0, (len(seen.x), -1)).mean(1))
        maps = weight_at(self.weight, seen.progress) * torch.stack(found).mean(0)
        return {"features": self.features.loss(seen, [encoded], own), "maps": maps}

    # ---- the trigger ----------------------------------------------------------------------------------------------

    def over(self, seen: Seen) -> bool:
        trigger = self.trigger
        if trigger is None or (place := trigger.place(seen.step)) is None:
            return False
        if seen.data_loss is None:
            raise ValueError(
                "HASTE: there is no denoising loss whose gradient the trigger could compare: set data_weight"
            )
        alignment = torch.stack(list(self.losses(seen).values())).sum(0).mean()
        pulls = [seen.gradient(value, trigger.unit) for value in (alignment, seen.data_loss.mean())]
        mean = seen.own.take(F.cosine_similarity(*pulls, dim=0), seen.step, fresh=place == 0)
        return place == trigger.batches - 1 and bool(mean < trigger.below)

    def metrics(self, seen: Seen) -> dict[str, Tensor]:
        """The mean cosine of the present look, or of the last."""
        return {"angle": seen.own.mean} if isinstance(seen.own, Watched) else {}


class Watched(nn.Module):
    """Projectors, and what the trigger has found in the present look."""

    found: Tensor

    def __init__(self, projectors: Projectors):
        super().__init__()
        self.projectors = projectors
        self.register_buffer("found", torch.tensor([0.0, 0.0, -1.0]))  # sum of the cosines, their number, last step

    @property
    def mean(self) -> Tensor:
        return self.found[0] / self.found[1].clamp_min(1)

    @torch.no_grad()
    def take(self, cosine: Tensor, step: int, fresh: bool) -> Tensor:
        """Take in the cosine of one batch; returns the mean of this look.

        Args:
            cosine: of all ranks' gradients
            step: the optimiser step
            fresh: this step begins a look
        """
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(cosine, 0)  # ranks decide alike
        if fresh and int(self.found[2]) != step:
            self.found.zero_()
        self.found[0] += cosine
        self.found[1] += 1
        self.found[2] = step
        return self.mean


# ---- maps ------------------------------------------------------------------------------------------------------------


def by_frame(maps: Tensor, grid: Grid) -> Tensor:
    """Logarithms of attention b h s s in a joint sequence -> within each frame of the image: (b f) h n n."""
    frames, count = grid[0], grid[1] * grid[2]
    image = maps[:, :, -frames * count :, -frames * count :]  # text and registers stand in front
    if frames > 1:
        image = image.unflatten(3, (frames, count)).unflatten(2, (frames, count)).diagonal(dim1=2, dim2=4)
        image = image.movedim(-1, 1).flatten(0, 1)
    return image if image.shape == maps.shape else image.log_softmax(-1)


def map_loss(mine: Tensor, theirs: Tensor, grid: Sequence[int], to: Sequence[int]) -> Tensor:
    """L_A of one pair for each image, over the first heads that both have.

    Args:
        mine: b h n n, logarithms
        theirs: likewise on its own grid, without a gradient
        grid: rows and columns of `mine`
        to: of `theirs`
    """
    heads = min(mine.shape[1], theirs.shape[1])
    mine, theirs = mine[:, :heads], theirs[:, :heads].detach()
    if tuple(grid) != tuple(to):
        mine = regridded(mine.exp(), grid, to).clamp_min(SMALL).log()
    return -(theirs.exp() * mine).sum(-1).mean((1, 2))


def regridded(p: Tensor, grid: Sequence[int], to: Sequence[int]) -> Tensor:
    """Attention b h n n on another grid, bilinear over keys, then over queries, with rows that sum to 1."""
    b, h = p.shape[:2]
    n, m = grid[0] * grid[1], to[0] * to[1]
    keys = F.interpolate(p.reshape(b, h * n, *grid), tuple(to), mode="bilinear")  # b (h n) y x
    keys = keys.reshape(b, h, n, m).transpose(2, 3)
    both = F.interpolate(keys.reshape(b, h * m, *grid), tuple(to), mode="bilinear").reshape(b, h, m, m)
    both = both.transpose(2, 3)  # queries, keys
    return both / both.sum(-1, keepdim=True)
