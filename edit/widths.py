"""How parameters follow the width of their model: what families and modules declare, and muP reads.

A dimension is infinite if it grows with the width, else finite. A family tells the kinds of its own parameters in
`Facts.scales`. A module that an edit or a loss adds tells those of its own in a class attribute `scales`, with names
as they are inside it. Both are patterns of names: the first one that fits the end of a name, from a dot on, holds.

Source: muP (arXiv 2203.03466, 2505.15270); specification methods/mup.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from torch import nn

Kind = Literal["input", "hidden", "output", "vector", "finite"]
Law = Literal["fan_in", "xavier", "label", "zero", "constant", "keep"]


@dataclass(frozen=True)
class Scale:
    """One parameter, or all of one name.

    Args:
        kind: "input": outputs alone are infinite (embeddings, tables); "hidden": inputs and outputs; "output": inputs
            alone; "vector": one number for each channel (biases, gains); "finite": nothing
        start: law of the first values: a standard deviation; "fan_in", 1 / sqrt(inputs); "xavier",
            sqrt(2 / (inputs + outputs)), uniform; "label", that of the table of classes; "zero"; "constant", as they
            are, with deviations that no width changes; "keep", as they are
        axis: of the inputs; behind it, and before the stack, a convolution's other ones follow
        stack: the first axis counts matrices or vectors, as of experts
    """

    kind: Kind
    start: Law | float = "keep"
    axis: int = 1
    stack: bool = False

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"Scale: kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if isinstance(self.start, str) and self.start not in get_args(Law):
            raise ValueError(f"Scale: start must be a number or one of {', '.join(get_args(Law))}, got {self.start!r}")

    def fans(self, shape: Sequence[int]) -> tuple[int, int]:
        """Inputs and outputs of one matrix of a parameter of this shape; of a vector (1, its size)."""
        each, axis = tuple(shape[self.stack :]), self.axis - self.stack
        if len(each) < 2:
            return 1, prod(each)
        inputs = prod(each[1:]) if axis == 1 and not self.stack else each[axis]
        return inputs, prod(each) // inputs

    def std(self, shape: Sequence[int]) -> float | None:
        """Standard deviation of the first values in a model of this shape; None: they are kept."""
        inputs, outputs = self.fans(shape)
        match self.start:
            case "keep":
                return None
            case "zero":
                return 0.0
            case "label" | "constant":
                return 1.0
            case "fan_in":
                return inputs**-0.5
            case "xavier":
                return (2 / (inputs + outputs)) ** 0.5
            case _:
                return float(self.start)


def scale_of(scales: Mapping[str, Scale], name: str) -> Scale | None:
    """The scale that patterns tell of a name; None: they tell none."""
    return next((scale for pattern, scale in scales.items() if re.search(rf"(?:^|\.)(?:{pattern})$", name)), None)


def scales_of(module: nn.Module) -> dict[str, Scale]:
    """Scales of parameters by their names in a module, as far as modules inside tell them; inner ones are right."""
    found: dict[str, Scale] = {}
    for path, part in module.named_modules():
        if scales := getattr(type(part), "scales", None):
            for name, _ in part.named_parameters():
                if (scale := scale_of(scales, name)) is not None:
                    found[f"{path}.{name}" if path else name] = scale
    return found
