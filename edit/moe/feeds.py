"""The dense feed-forwards that experts stand in place of: which they are, and how experts take over their channels.

Specifications: methods/dit-moe.md (copies), methods/dense2moe.md (parts). Letters in shape comments are those of
`edit.moe.experts`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from edit.denoiser import Denoiser
from edit.edits import chosen
from edit.moe.experts import MoE
from edit.unit import Features, Unit, core


def separate(who: str, units: tuple[int, ...], denoiser: Denoiser) -> list[int]:
    """Units whose feed-forward is a layer of its own: those listed, or all that have one.

    Args:
        who: for errors
        units: counted from 0; none given: all
        denoiser: of any family

    Raises:
        ValueError: if a listed unit does not exist, is listed twice, or is fused
    """
    found = chosen(who, units, denoiser)
    fused = {i for i in found if core(denoiser.units[i]).anatomy.fused}
    if odd := sorted(fused & {*units}):
        raise ValueError(
            f"{who}: unit {odd[0]} of this {denoiser.name} has one output layer for attention and feed-forward: "
            "list others in units"
        )
    return [i for i in found if i not in fused]


def replaced(unit: Unit, text: bool = False) -> Features:
    """The hidden channels of a unit's own feed-forward, whose slot an edit has filled."""
    features = unit.anatomy.text_feed if text else unit.anatomy.feed
    assert features is not None
    return features


class Dense(NamedTuple):
    """The weights of a dense feed-forward."""

    into: Tensor  # w d
    into_bias: Tensor | None
    out: Tensor  # d h
    out_bias: Tensor | None  # None, too, where the layer is another branch's as well (fused units)


def dense(unit: Unit, features: Features) -> Dense:
    """The feed-forward of a unit, as views on its weights.

    Args:
        unit: of any family
        features: its hidden channels: `unit.anatomy.feed` or `text_feed`
    """

    def joined(parts: list[Tensor | None]) -> Tensor | None:
        known = [p for p in parts if p is not None]
        return None if not known else known[0] if len(known) == 1 else torch.cat(known)

    writers: list[Any] = [unit.get_submodule(path) for path, _ in features.writers]
    (path, first), *_ = features.readers
    reader: Any = unit.get_submodule(path)
    own = reader.in_features == features.size
    into = joined([w.weight for w in writers])
    assert into is not None
    out = reader.weight[:, first : first + features.size]
    return Dense(into, joined([w.bias for w in writers]), out, reader.bias if own else None)


def layers_of(denoiser: Denoiser, unit: Unit, features: Features) -> list[str]:
    """Full names of the layers that are a feed-forward's alone (`Edit.replaces`): a fused unit's output layer is not.

    Args:
        denoiser: around the unit
        unit: of the family
        features: as of `dense`
    """
    at = next(name for name, m in denoiser.named_modules() if m is unit)
    readers = [path for path, _ in features.readers if unit.get_submodule(path).in_features == features.size]
    return [f"{at}.{path}" for path in (*(path for path, _ in features.writers), *readers)]


def divided(who: str, hidden: int, shared: int, experts: int) -> int:
    """The width of each routed expert where hidden channels are divided among a shared one and E equal ones.

    Raises:
        ValueError: naming `who`, if they do not divide
    """
    rest = hidden - shared
    if rest <= 0 or rest % experts:
        raise ValueError(
            f"{who}: {hidden} hidden channels less {shared} shared ones cannot be divided among {experts} experts of "
            "one width: choose another number of experts or of shared channels"
        )
    return rest // experts


@torch.no_grad()
def take_neurons(moe: MoE, source: Dense, shared: Tensor | None, routed: Tensor) -> None:
    """Give a layer the hidden channels of a dense feed-forward: divided, as in Dense2MoE, or copies.

    b2 goes whole to whatever has one: the shared expert of a divided feed-forward alone, each of the copies.

    Args:
        moe: whose weights are written
        source: of h channels
        shared: those of the shared expert, int64; None: it keeps its weights
        routed: E x channels of an expert, int64
    """
    parts = source.into.chunk(1 + moe.experts.gated)

    def rows(of: tuple[Tensor, ...], which: Tensor) -> Tensor:
        return torch.cat([part[which] for part in of], which.ndim - 1)

    moe.experts.into.copy_(rows(parts, routed))
    moe.experts.out.copy_(source.out[:, routed].movedim(0, 1))
    biases = None if source.into_bias is None else source.into_bias.chunk(1 + moe.experts.gated)
    if biases is not None and moe.experts.into_bias is not None:
        moe.experts.into_bias.copy_(rows(biases, routed))
    if source.out_bias is not None and moe.experts.out_bias is not None:
        moe.experts.out_bias.copy_(source.out_bias.expand_as(moe.experts.out_bias))
    if shared is None or moe.shared is None:
        return
    moe.shared.into.weight.copy_(rows(parts, shared))
    moe.shared.out.weight.copy_(source.out[:, shared])
    if biases is not None and moe.shared.into.bias is not None:
        moe.shared.into.bias.copy_(rows(biases, shared))
    if source.out_bias is not None and moe.shared.out.bias is not None:
        moe.shared.out.bias.copy_(source.out_bias)
