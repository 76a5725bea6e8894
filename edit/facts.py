"""Facts of a model that the rest of the code asks for, whatever its family calls them in a configuration."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from edit.widths import Scale

# What weights predict: of x_t = (1 - t) x + t noise the velocity or the noise, or EDM's mixture of data and noise
Prediction = Literal["velocity", "noise", "mixture"]


@dataclass(frozen=True)
class Facts:
    """Of a model in its present state, as `Denoiser.facts` tells them.

    Args:
        width: channels d of a token between units
        heads: h of an attention over all tokens
        classes: labels are 0 to classes - 1; None: the model is told no labels
        text: widths c of the embeddings that the model is told, by their names in `Condition`; empty: it is told none
        scale: the guidance scale that the model, which has it as an input, is told where nobody says another; None: the
            model has no such input
        guided_by: the stock pipeline's argument for guidance by two predictions
        modulation: parts of the names of the parameters that make shifts, scales and gates
        tokenwise: whether units take a condition for each of two groups of tokens (`Layout.spread`)
        lora: name endings of the layers that a LoRA adapts where nobody names others
        grows: keys of the configuration that are proportional to the number of heads, at a head width that stays
        scales: how parameters follow the width, by patterns of their names; empty: nobody has told
    """

    width: int
    heads: int
    classes: int | None = None
    text: Mapping[str, int] = field(default_factory=dict)
    scale: float | None = None
    guided_by: str = "guidance_scale"
    modulation: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    tokenwise: bool = False
    grows: tuple[str, ...] = ()
    scales: Mapping[str, Scale] = field(default_factory=dict)

    @property
    def told(self) -> bool:
        """Whether the model has its guidance scale as an input, `Condition.guidance`."""
        return self.scale is not None


def check_units(who: str, units: Iterable[int], depth: int, of: str, first: int = 0) -> None:
    """Refuse a unit that a model does not have: the one sentence of all that name units.

    Args:
        who: names them: a class, a setting
        units: that are named
        depth: units of the model
        of: the model, in words: "this dit", "the teacher"
        first: the lowest number that is one: 0, or -depth where units are counted from the end, too

    Raises:
        ValueError: naming the first that does not exist
    """
    if bad := [i for i in units if not first <= i < depth]:
        raise ValueError(f"{who}: {of} has units 0 to {depth - 1}, got {bad[0]}")


def check_kept(units: Collection[int], depth: int, of: str) -> None:
    """Refuse to keep no unit at all, or one that a model does not have.

    Args:
        units: that are to stay
        depth, of: as of `check_units`

    Raises:
        ValueError: if there is none, or one does not exist
    """
    if not units:
        raise ValueError(f"keep: at least one unit of {of} must stay, got none")
    check_units("keep", units, depth, of)
