"""Guidance of the teacher during distillation.

One convention: g in v_null + g (v_cond - v_null), so 1 is no guidance; in v_cond + w (v_cond - v_null), w = g - 1.
Specification: methods/distillation.md D3.2; scales drawn per sample after guided distillation (arXiv 2210.03142) and
SenseFlow (U(1, 8)).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from edit.denoiser import Denoiser
from edit.inputs.limits import check_numbers
from edit.stream import Condition, Output


@dataclass(frozen=True)
class TeacherGuidance:
    """Guidance scales g in [low, high], one per sample.

    A teacher with a guidance input is told g. Any other is asked with and without the condition in one call of twice
    the batch, or, where g is always 1, with the condition alone.
    """

    low: float = 1.0
    high: float = 1.0

    def __post_init__(self):
        check_numbers(self)
        if not 0 <= self.low <= self.high:
            raise ValueError(f"TeacherGuidance: 0 <= low <= high, got {self.low}, {self.high}; 1, 1 is no guidance")

    def scale(self, u: Tensor) -> Tensor:
        """Scales from uniform numbers in (0, 1): [b] -> [b]."""
        return self.low + (self.high - self.low) * u

    @torch.no_grad()
    def __call__(
        self,
        teacher: Denoiser,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        null: Condition,
        scale: Tensor,
        taps: Collection[int] = (),
        branches: Collection[int] = (),
        maps: Mapping[int, int] = MappingProxyType({}),
    ) -> Output:
        """The guided prediction, without a graph.

        Args:
            teacher: frozen
            x_t: b c *sizes, noisy
            t: b, times in [0, 1], 1 = noise
            condition: of the same batch
            null: its unconditional counterpart
            scale: b, returned by `scale`; counts for nothing where g is always 1 and there is no guidance input
            taps: as of `Denoiser.forward`
            branches: likewise
            maps: likewise

        Returns:
            sample: guided; variance and trace (taps, branches and maps, nothing else): of the conditional half.
        """
        ask = partial(teacher, taps=taps, branches=branches, maps=maps)
        if teacher.facts.told:
            return ask(x_t, t, replace(condition, guidance=scale))
        condition, null = replace(condition, guidance=None), replace(null, guidance=None)
        if self.low == self.high == 1:
            return ask(x_t, t, condition)
        b = len(x_t)
        both = ask(torch.cat((x_t, x_t)), torch.cat((t, t)), condition.join(null))
        cond, uncond = both.sample.float().split(b)
        return Output(
            sample=torch.lerp(uncond, cond, scale.float().view(-1, *[1] * (x_t.ndim - 1))),
            variance=None if both.variance is None else both.variance[:b],
            trace={name: v[:b] for name, v in both.trace.items() if name.startswith("unit.")},
            grid=both.grid,
        )
