"""Taylor importance of the hidden channels of feed-forwards, measured on data without an optimiser (Dense2MoE).

    I_j = | sum_w (dL / dw) w |,  w in {W1[j, :], b1[j], W2[:, j]}

L is the training loss on data, its gradient that of the whole calibration set. In a gated feed-forward, channel j has
row j of gate and value. A channel that nothing reads has I = 0. The sum is over signed terms, so that it is the slope
of the loss in a common scale of the channel's weights; `terms="absolute"` sums |dL / dw w| instead, the published form
for one weight. How weights are put together into channels is not published: both are ours.

Source: Dense2MoE (arXiv 2510.09094). Specification: methods/dense2moe.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from edit.calibration import Calibration
from edit.denoiser import Denoiser, Edit
from edit.edits import chosen
from edit.inputs.limits import check_numbers
from edit.unit import Features, Unit, core

SLOTS = {"ffn": "", "text_ffn": "_text"}  # of a unit, with what follows its number in names of their parameters


class Site(NamedTuple):
    """One feed-forward of a model."""

    key: str  # "3", "3_text": its name among an edit's modules and buffers
    unit: Unit
    slot: str
    features: Features


def sites(who: str, denoiser: Denoiser, units: tuple[int, ...] = ()) -> list[Site]:
    """The feed-forwards of the image and those of the text's own, by units.

    Args:
        who: for errors
        denoiser: of any family
        units: counted from 0; none given: all

    Raises:
        ValueError: if a unit has none of plain linear layers, or another edit has put something in its place
    """
    found = []
    for i in chosen(who, units, denoiser):
        unit = core(denoiser.units[i])
        parts = dict(zip(SLOTS, (unit.anatomy.feed, unit.anatomy.text_feed), strict=True))
        for slot, features in parts.items():
            if features is None and slot == "text_ffn":
                continue
            if features is None or slot in unit.slots or not plain(unit, features):
                raise ValueError(
                    f"{who}: unit {i} of this {denoiser.name} has no feed-forward of plain linear layers: apply it "
                    "before other edits change that (a LoRA, experts), or leave the unit out"
                )
            found.append(Site(f"{i}{SLOTS[slot]}", unit, slot, features))
    return found


def plain(unit: Unit, features: Features) -> bool:
    paths = (path for path, _ in (*features.writers, *features.readers))
    return all(type(unit.get_submodule(path)) is nn.Linear for path in paths)


@dataclass
class TaylorRanking(Edit):
    """Scores beside a model that stays as it is: what `Dense2MoE` begins with.

        python train.py recipe=calibrate init=runs/digits edits=taylor_ranking name=ranked

    512 to 1024 samples are meant, as the method's paper gives no number.

    Args:
        terms: what is summed over a channel's weights: "signed" or "absolute" terms
        units: whose feed-forwards are ranked, counted from 0; none given: all
    """

    terms: Literal["signed", "absolute"] = "signed"
    units: tuple[int, ...] = ()

    def __post_init__(self):
        check_numbers(self)
        self.units = tuple(self.units)
        if self.terms not in ("signed", "absolute"):
            raise ValueError(f"TaylorRanking: terms must be signed or absolute, got {self.terms!r}")

    def apply(self, denoiser: Denoiser) -> nn.Module:
        own = nn.Module()
        for site in sites("TaylorRanking", denoiser, self.units):
            device = site.unit.get_submodule(site.features.readers[0][0]).weight.device
            own.register_buffer(site.key, torch.zeros(site.features.size, device=device))
        return own

    def calibrate(self, denoiser: Denoiser, batches: Calibration, own: nn.Module | None) -> None:
        """Raises ValueError if there is no sample, or the loss depends on no channel."""
        assert own is not None
        places = sites("TaylorRanking", denoiser, self.units)
        groups = [list(weights(site)) for site in places]
        wanted = [w for group in groups for w, _ in group]
        found, count = [torch.zeros_like(own.get_buffer(site.key), dtype=torch.float64) for site in places], 0
        total: list[Tensor] = []  # the set's gradient, where it is needed whole: signed terms add up by themselves
        with differentiated(denoiser, wanted), torch.enable_grad():
            for noisy, loss in batches.scored():
                now = torch.autograd.grad(loss(denoiser(*noisy)).sum(), wanted, allow_unused=True)
                now = [torch.zeros_like(w) if g is None else g for g, w in zip(now, wanted, strict=True)]
                count += len(noisy.t)
                if self.terms == "signed":
                    self.add(found, groups, now)
                else:
                    total = [a + g for a, g in zip(total, now, strict=True)] if total else now
        if not count:
            raise ValueError(
                f"{self.name} (TaylorRanking): the calibration set is empty: give data with samples, and recipe.batches"
            )
        if total:
            self.add(found, groups, total)
        if not any(scores.any() for scores in found):
            raise ValueError(
                f"{self.name} (TaylorRanking): the loss depends on no feed-forward of this {denoiser.name}, whose "
                "gates are zero as in a new model: rank a trained one"
            )
        for site, scores in zip(places, found, strict=True):
            own.get_buffer(site.key).copy_(scores.abs() / count)

    def add(self, found: list[Tensor], groups: list[list[tuple[Tensor, int]]], gradients: Sequence[Tensor]) -> None:
        """Add each channel's terms; gradients are those of the weights of all groups in order."""
        rest = iter(gradients)
        for scores, group in zip(found, groups, strict=True):
            for weight, first in group:
                terms = next(rest).float() * weight.detach().float()
                terms = terms.abs() if self.terms == "absolute" else terms
                scores += channels(terms, first, len(scores)).double()


def weights(site: Site) -> Iterator[tuple[nn.Parameter, int]]:
    """Of a feed-forward: W1 and b1 of each writer, with -1, and W2, with its first column."""
    for path, _ in site.features.writers:
        layer = site.unit.get_submodule(path)
        yield layer.weight, -1  # type: ignore[misc]
        if layer.bias is not None:
            yield layer.bias, -1  # type: ignore[misc]
    path, first = site.features.readers[0]
    yield site.unit.get_submodule(path).weight, first  # type: ignore[misc]


def channels(terms: Tensor, first: int, size: int) -> Tensor:
    """Sums over the elements of a weight that belong to each channel: shaped as a weight -> size."""
    if first >= 0:
        return terms[:, first : first + size].sum(0)
    return terms.view(-1, size, terms.numel() // len(terms)).sum((0, 2))


@contextmanager
def differentiated(denoiser: Denoiser, wanted: Sequence[nn.Parameter]) -> Iterator[None]:
    """A block in which these parameters alone have gradients, and activations are computed twice instead of being kept;
    afterwards all is as before."""
    before, checkpointing = [(p, p.requires_grad) for p in denoiser.parameters()], denoiser.gradient_checkpointing
    try:
        denoiser.gradient_checkpointing = True
        denoiser.requires_grad_(False)
        for p in wanted:
            p.requires_grad_(True)
        yield
    finally:
        denoiser.gradient_checkpointing = checkpointing
        for p, had in before:
            p.requires_grad_(had)
