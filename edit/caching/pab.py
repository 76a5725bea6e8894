"""Pyramid Attention Broadcast: attention outputs are repeated inside a window of times, each kind at its own interval.

PAB (Zhao et al., arXiv 2408.12588). Inside a window of timesteps, of 1000, an attention is computed at every n-th
evaluation and its output repeated in between; outside of it, always. Cross-attention changes least and has the longest
interval, self-attention of an image the shortest. MLPs always run.

The paper's models have spatial, temporal and cross attention; here an attention over all tokens, of a frame or a video,
has `attention`, a further one of image tokens `second`, and one that reads the text `cross`. Fused units (FLUX's single
ones) have no attention of their own and always run.

Specification: methods/feature-cache-baselines.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from edit.caching.branches import BranchCached
from edit.caching.engine import Latest, Predictor
from edit.denoiser import Denoiser
from edit.inputs.limits import Count, check_numbers
from edit.stream import Step
from edit.unit import Unit, core


@dataclass
class PAB(BranchCached):
    """A cache of attention outputs; it needs no training.

    Args:
        attention: n of the attention over all tokens
        second: n of a further attention of the image tokens
        cross: n of the attention that reads the text
        window: of timesteps 0 to 1000 (1000 = noise), both ends excluded, inside which outputs are repeated
    """

    attention: Count = 2
    second: Count = 2
    cross: Count = 3
    window: tuple[float, float] = (100.0, 800.0)

    units = ()
    branches = ("attention", "second", "cross")  # those of them that a unit has

    def __post_init__(self):
        check_numbers(self)
        self.window = tuple(self.window)
        if not 0 <= self.window[0] < self.window[1] <= 1000:
            raise ValueError(f"PAB: window is two timesteps from 0 to 1000, the smaller first, got {list(self.window)}")

    def sites(self, denoiser: Denoiser) -> dict[int, Unit]:
        """Raises ValueError if no unit has an attention of its own."""
        units = {i: core(unit) for i, unit in enumerate(denoiser.units) if not core(unit).anatomy.fused}
        if not units:
            raise ValueError(f"PAB: all units of this {denoiser.name} are fused, so no attention can be repeated alone")
        return units

    @property
    def predictor(self) -> Predictor:
        return Latest()

    def due(self, step: Step, branch: str) -> bool:
        low, high = self.window
        if not low < 1000 * step.sigma < high:
            return True
        interval = {"attention": self.attention, "second": self.second, "cross": self.cross}[branch]
        times = step.times or (step.sigma,)
        entered = sum(1000 * t >= high for t in times[: step.index])  # evaluations before the window
        return (step.index - entered) % interval == 0
