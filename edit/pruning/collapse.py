"""Interval collapse: several consecutive units of a teacher become one unit of its student.

The edit is structural: the artifact is a plain model of its family. A depth subset is `edit.pruning.depth.DepthPruning`
with pattern "listed". Sources: PPCL (OPPO, Qwen-Image pruning, arXiv 2511.16156); the mean of an interval is
Amber-Image's. Specification: methods/distillation.md D2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from edit.denoiser import Denoiser, Edit
from edit.distillation.pairs import Pairs, as_intervals
from edit.facts import check_units
from edit.inputs.limits import check_numbers


@dataclass
class Collapse(Edit):
    """Each interval of units becomes one unit.

    Args:
        intervals: first and last unit of each, increasing and disjoint; in models with two kinds of units (FLUX:
            double, single) an interval stays within one kind
        start: which unit's weights the one starts from: "middle" is (first + last) // 2, "mean" their average
    """

    intervals: Pairs
    start: Literal["middle", "first", "last", "mean"] = "middle"

    def __post_init__(self):
        check_numbers(self)
        self.intervals = as_intervals("Collapse", self.intervals)
        if self.start not in ("middle", "first", "last", "mean"):
            raise ValueError(f"Collapse: start must be middle, first, last or mean, got {self.start!r}")

    def apply(self, denoiser: Denoiser) -> None:
        units = denoiser.units
        check_units("Collapse: intervals", self.intervals[-1], len(units), f"this {denoiser.name}")
        gone: set[int] = set()
        for first, last in self.intervals:
            if len(kinds := {type(u).__name__ for u in units[first : last + 1]}) > 1:
                raise ValueError(
                    f"Collapse: interval {first, last} mixes {' and '.join(sorted(kinds))}: split it there"
                )
            stays = {"first": first, "last": last}.get(self.start, (first + last) // 2)
            if self.start == "mean":
                average(units[first : last + 1], units[stays])  # type: ignore[arg-type]
            gone |= set(range(first, last + 1)) - {stays}
        denoiser.keep([i for i in range(len(units)) if i not in gone])

    def fold(self, denoiser: Denoiser) -> None:
        """Nothing to do: the units are gone already."""


@torch.no_grad()
def average(units: list[nn.Module], into: nn.Module) -> None:
    """Set the parameters of one unit to the mean over all; `into` may be one of them.

    Raises:
        ValueError: if they do not have the same parameters (SD3's last unit, which only reads the text)
    """
    layouts = [{name: p.shape for name, p in u.named_parameters()} for u in units]
    if any(layout != layouts[0] for layout in layouts):
        raise ValueError("Collapse: start=mean needs units with the same weights, these differ: use middle")
    for name, p in into.named_parameters():
        p.copy_(torch.stack([u.get_parameter(name) for u in units]).mean(0))
