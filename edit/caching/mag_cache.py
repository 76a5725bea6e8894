"""MagCache: the whole stack is skipped as long as the known change of its output's magnitude stays within a budget.

MagCache (arXiv 2506.09045). With R_s what all units add at evaluation s, the ratios

    gamma_s = mean over tokens of |R_s| / |R_(s-1)|,   |.| the norm of a token

are almost the same for all prompts, so they are measured once (`python train.py recipe=calibrate`). After the first
`retention` of the evaluations, with ratio = 1, steps = 0, err = 0 since the stack last ran,

    ratio <- ratio gamma_s,  steps <- steps + 1,  err <- err + |1 - ratio|
    err <= threshold and steps <= most:   h <- h + R, the last one;   else the units run, and the three begin anew

Defaults are those of diffusers; the release has 0.24, 5 and 0.1 for FLUX. A sampler with
another number of evaluations reads the table at the nearest places. A table belongs to one model and one sampler.

Specification: methods/feature-cache-baselines.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edit.caching.engine import Gate, Latest
from edit.caching.spans import SpanCached
from edit.calibration import Calibration
from edit.denoiser import Denoiser
from edit.inputs.limits import Count, NotNegative, Share, Steps, check_numbers
from edit.stream import Output, Step, Stream
from edit.unit import Unit


class Ratios(nn.Module):
    """The measured ratios, one for each place; 0 until they are measured."""

    table: Tensor

    def __init__(self, length: int):
        super().__init__()
        self.register_buffer("table", torch.zeros(length))


@dataclass
class MagCache(SpanCached):
    """A cache with a measured table; it needs calibration, and no training.

    Args:
        threshold: of the accumulated error
        most: K, predicted evaluations one after the other at most
        retention: part of the evaluations, from the first on, that are all computed
        length: places of the table
    """

    threshold: NotNegative = 0.06
    most: Count = 3
    retention: Share = 0.2
    length: Steps = 50

    def __post_init__(self):
        check_numbers(self)

    def apply(self, denoiser: Denoiser) -> nn.Module:
        own = Ratios(self.length)
        self.cache(denoiser, Budget(self, own), Latest())
        return own

    def calibrate(self, denoiser: Denoiser, batches: Calibration, own: nn.Module | None) -> None:
        assert isinstance(own, Ratios)
        own.table.zero_()  # so that every evaluation is computed
        sums: dict[int, list[float]] = {}
        before: dict[str, Tensor] = {}

        def watch(step: Step, output: Output) -> None:
            norms = step.recall(self.name, 0)["value"]["value"].image.float().norm(dim=-1)  # b n
            if step.index:
                ratio = (norms / before[step.branch]).mean().item() if step.branch in before else 1.0
                sums.setdefault(step.index, []).append(ratio)
            before[step.branch] = norms

        batches.generate(watch)
        measured = [1.0, *(sum(sums[k]) / len(sums[k]) for k in sorted(sums))]
        own.table.copy_(torch.tensor([measured[nearest(i, self.length, len(measured))] for i in range(self.length)]))


def nearest(index: int, count: int, length: int) -> int:
    """Of `length` places, the one for number `index` of `count`."""
    return round(index * (length - 1) / max(1, count - 1))


@dataclass(frozen=True)
class Budget(Gate):
    """Computes when the table's accumulated error is above the threshold."""

    edit: MagCache
    own: Any  # Ratios

    def computes(self, unit: Unit, stream: Stream, state: dict) -> bool:
        assert stream.step is not None
        if "table" not in state:
            state.update(table=self.own.table.tolist(), ratio=1.0, steps=0, error=0.0)  # read once in a generation
        return self.after(stream.step, state)

    def after(self, step: Step, state: dict) -> bool:
        """The decision by the table."""
        gamma = state["table"][nearest(step.index, step.count, len(state["table"]))]
        if gamma and step.index >= max(1.0, self.edit.retention * step.count):
            state["ratio"] *= gamma
            state["steps"] += 1
            state["error"] += abs(1 - state["ratio"])
            if state["error"] <= self.edit.threshold and state["steps"] <= self.edit.most:
                return False
        state.update(ratio=1.0, steps=0, error=0.0)
        return True
