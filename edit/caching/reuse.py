"""Interval reuse: residual branches are computed at every N-th evaluation of a generation and repeated in between.

FORA (arXiv 2407.01425), the naive baseline of feature caches. With F a branch before its gate, norm included, s the
evaluation and s0 the first one after the warm-up:

    F_s = F(x_s)  where s < s0 or (s - s0) mod N = 0,  else F_s = F_(s-1);  x <- x + g_s F_s

Gates and modulation are those of the present step. A repeated branch runs neither norm nor product. Each guidance
branch repeats its own; where the sampler begins or ends to join two of them, all is computed.

FORA's release for DiT counts evaluations down to 0, so that the last is computed (`backwards`). Ours: families other
than DiT, where image and text are repeated together; chosen units and branches; a warm-up. Between two evaluations the
model keeps one tensor of tokens for each branch.

Specification: methods/feature-cache-baselines.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edit.denoiser import Denoiser, Edit
from edit.edits import chosen
from edit.inputs.limits import Count, Share, check_numbers
from edit.stream import Branch, Step, Stream
from edit.unit import Run, Unit, core

EXECUTED = "executed"


@dataclass
class Reuse(Edit):
    """A cache of residual branches that needs no training, and does nothing while the model is trained.

    Args:
        interval: N, in evaluations (Heun makes two in a step); 1 computes all
        units: which, counted from 0; none given: all
        branches: which of "attention", "feed", "cross", "second", "fused"; none given: all. The one branch of a fused
            unit is "fused"
        start: part of the evaluations, from the first on, that are all computed
        backwards: count from the last evaluation, which is then computed, instead of from the first
    """

    interval: Count = 2
    units: tuple[int, ...] = ()
    branches: tuple[str, ...] = ()
    start: Share = 0.0
    backwards: bool = False

    excludes = ("Elastic", "DyDiT")  # they run parts of a batch, whose samples a memory of the whole does not find
    decides = {"executed": "units that were computed, not repeated"}

    def __post_init__(self):
        check_numbers(self)
        self.units, self.branches = tuple(self.units), tuple(self.branches)

    def apply(self, denoiser: Denoiser) -> None:
        units = {i: core(denoiser.units[i]) for i in chosen("Reuse", self.units, denoiser)}
        there = {name: None for unit in units.values() for name in names_of(unit)}
        if unknown := [name for name in self.branches if name not in there]:
            raise ValueError(f"Reuse: these units have the branches {', '.join(there)}, got {unknown[0]!r}")
        for i, unit in units.items():
            self.refuse_cached(unit, i)
            unit.slots.branch = Reused(unit, i, self)

    def refuse_cached(self, unit: Unit, index: int) -> None:
        """Refuse a unit of which another cache repeats the same branches."""
        slot = unit.slots.branch
        while isinstance(slot, Reused):
            other = slot.edit
            if not (self.branches and other.branches and set(self.branches).isdisjoint(other.branches)):
                raise ValueError(
                    f"Reuse: {other.name!r} repeats branches of unit {index} already: choose other units or branches"
                )
            slot = slot.before

    def caches(self, branch: str) -> bool:
        return not self.branches or branch in self.branches

    def due(self, index: int, count: int) -> bool:
        """Whether evaluation `index` of `count` is computed, whatever there is to repeat."""
        first = math.ceil(self.start * count)
        place = count - 1 - index if self.backwards else index - first
        return index < first or place % self.interval == 0

    def decisions(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of each unit with a cache, in their order: 1 where its branches were computed, 0 where they were repeated."""
        shares = [share for key, share in trace.items() if key.startswith(f"{self.name}.{EXECUTED}.")]
        return {EXECUTED: torch.stack(shares)} if shares else {}


def names_of(unit: Unit) -> tuple[str, ...]:
    """The residual branches of a unit, as its family names them."""
    a = unit.anatomy
    further = {"cross": a.cross is not None, "second": a.second is not None, "fused": a.fused}
    return ("attention", "feed", *(name for name, has in further.items() if has))


class Reused:
    """The slot `branch`: what the slot had before, computed or repeated."""

    def __init__(self, unit: Unit, index: int, edit: Reuse):
        self.before, self.index, self.edit = unit.slots.branch, index, edit
        self.record = f"{edit.name}.{EXECUTED}.{index}"

    @torch.compiler.disable(recursive=False)
    def __call__(self, stream: Stream, name: str, run: Run) -> Branch:
        step, edit = stream.step, self.edit
        if step is None or not edit.caches(name):
            return self.before(stream, name, run)
        branch = self.kept(step, name)
        executed = branch is None
        if branch is None:
            branch = self.before(stream, name, run)
            if edit.interval > 1:
                step.recall(edit.name, self.index)[name] = branch
        layout = stream.layout
        assert layout.notes is not None
        if self.record not in layout.notes:  # the same of all branches
            layout.note(self.record, stream.image.new_full((len(stream.image),), float(executed)))
        return branch

    def kept(self, step: Step, name: str) -> Branch | None:
        """The branch as it was, if there is one and this evaluation repeats it."""
        if self.edit.due(step.index, step.count):
            return None
        return step.recall(self.edit.name, self.index).get(name)
