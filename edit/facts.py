"""Facts of a model that the rest of the code asks for, whatever its family calls them in a configuration."""

from __future__ import annotations

from collections.abc import Mapping
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
