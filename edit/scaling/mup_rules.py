"""What muP says of one parameter: its first values, its rate and its decay (the table of `mup.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from edit.denoiser import Denoiser
from edit.groups import PLAIN, Group
from edit.widths import Scale


@dataclass(frozen=True)
class Ruled:
    """One parameter under muP.

    Args:
        scale: as declared
        r: its fan_in over that of the base
        std: of its first values, of an output layer without a multiplier, too; None: they are kept
        group: rate and decay
    """

    scale: Scale
    r: float
    std: float | None
    group: Group


def scaled(denoiser: Denoiser, heads: int) -> dict[str, int]:
    """What the keys of a configuration that grow are at another number of heads of the same width.

    Raises:
        ValueError: if one has no whole value there
    """
    found = {key: divmod(denoiser.base[key] * heads, denoiser.facts.heads) for key in denoiser.facts.grows}
    if odd := next((key for key, (_, rest) in found.items() if rest), None):
        raise ValueError(
            f"{odd}={denoiser.base[odd]} of this {denoiser.name} has no whole value at {heads} of its "
            f"{denoiser.facts.heads} heads: choose another width"
        )
    return {key: value for key, (value, _) in found.items()}


def ruled(whole: nn.Module, base: nn.Module, scales: Mapping[str, Scale], multiplied: set[str]) -> dict[str, Ruled]:
    """The rule of each parameter that has a scale.

    Args:
        whole: module of the model's width
        base: the same of the base's
        scales: by names in both
        multiplied: output layers with a multiplier in the forward

    Raises:
        ValueError: if a matrix follows the width and has no scale, or the base has other layers
    """
    there, found = dict(base.named_parameters()), {}
    for name, p in whole.named_parameters():
        if name not in there:
            raise ValueError(
                f"MuP: {name} is not in the base model, whose layers must be those of the model: choose another width "
                "of the edit that added it, or another base_width"
            )
        small, scale = there[name].shape, scales.get(name)
        if scale is None:
            if p.ndim > 1 and p.shape != small:
                raise ValueError(
                    f"MuP: nobody tells how {name} follows the width, which has shape {tuple(p.shape)}, and "
                    f"{tuple(small)} in the base: declare it in `scales` of its module (edit/widths.py)"
                )
            continue
        r = scale.fans(p.shape)[0] / scale.fans(small)[0]
        start, group = factors(scale, r, name in multiplied)
        std = scale.std(small)
        found[name] = Ruled(scale, r, None if std is None else std * start, group)
    return found


def factors(scale: Scale, r: float, multiplied: bool) -> tuple[float, Group]:
    """Of the base's first values, and of rate and decay: the table above."""
    if scale.kind == "hidden":
        return r**-0.5, Group(lr=1 / r, decay=r)
    if scale.kind == "output" and not multiplied:
        return 1 / r, Group(lr=1 / r, decay=r)
    return 1.0, PLAIN


def draw(p: Tensor, rule: Ruled) -> None:
    """New first values."""
    assert rule.std is not None
    if rule.std == 0:
        nn.init.zeros_(p)
    elif rule.scale.start == "xavier":
        nn.init.uniform_(p, -(3**0.5) * rule.std, 3**0.5 * rule.std)
    else:
        nn.init.normal_(p, std=rule.std)


def rescale(p: Tensor, rule: Ruled) -> None:
    """First values as they were drawn, by the usual law at this width, with the deviation that muP wants."""
    usual = rule.scale.std(p.shape)
    if usual and rule.std != usual:
        p.mul_((rule.std or 0.0) / usual)
