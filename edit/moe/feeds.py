"""The feed-forwards that experts stand in place of."""

from __future__ import annotations

from edit.denoiser import Denoiser
from edit.edits import chosen
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
