"""The site of a cache that is residual branches of units: each is computed, or predicted before its gate.

The other site, a span of units, is in `edit.caching.spans`, predictors of both in `edit.caching.engine`.

Specification: methods/feature-cache-baselines.md.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection

import torch

from edit.caching.engine import Cached, Predictor, covered, names_of
from edit.denoiser import Denoiser
from edit.edits import chosen
from edit.stream import Branch, Step, Stream
from edit.unit import Run, Unit, core


class BranchCached(Cached):
    """A cache of residual branches before their gates: gates and modulation are those of the present evaluation.

    A predicted branch runs neither norm nor product.
    """

    units: tuple[int, ...]  # counted from 0; none given: all
    branches: tuple[str, ...]  # "attention", "feed", "cross", "second", "fused"; none given: all

    @property
    @abstractmethod
    def predictor(self) -> Predictor: ...

    @abstractmethod
    def due(self, step: Step, branch: str) -> bool:
        """Whether a branch is computed at this evaluation, whatever is remembered."""

    def remembers(self, step: Step, branch: str) -> bool:
        """Whether an evaluation that follows will need this one's value."""
        return True

    def sites(self, denoiser: Denoiser) -> dict[int, Unit]:
        """The units with such branches, by index.

        Raises:
            ValueError: if there are none, or one of those that are named is not there
        """
        units = {i: core(denoiser.units[i]) for i in chosen(type(self).__name__, self.units, denoiser)}
        there = {name: None for unit in units.values() for name in names_of(unit)}
        if unknown := [name for name in self.branches if name not in there]:
            raise ValueError(
                f"{type(self).__name__}: these units have the branches {', '.join(there)}, got {unknown[0]!r}"
            )
        return units

    def covers(self, denoiser: Denoiser) -> Collection[tuple[int, str]]:
        return covered(denoiser, list(self.sites(denoiser)), self.branches)

    def apply(self, denoiser: Denoiser) -> None:
        units = self.sites(denoiser)
        self.refuse_cached(denoiser)
        for i, unit in units.items():
            unit.slots.branch = CachedBranch(unit, i, self)


class CachedBranch:
    """The slot `branch`: what the slot had before, computed or predicted."""

    def __init__(self, unit: Unit, index: int, edit: BranchCached):
        self.before, self.index, self.edit = unit.slots.branch, index, edit

    @torch.compiler.disable(recursive=False)  # what is run stays compiled
    def __call__(self, stream: Stream, name: str, run: Run) -> Branch:
        step, edit = stream.step, self.edit
        if step is None or (edit.branches and name not in edit.branches):
            return self.before(stream, name, run)
        if (branch := self.predicted(stream, step, name)) is None:
            branch = self.before(stream, name, run)
            self.observe(step, name, branch)
        return branch

    @torch.compiler.disable  # places and factors are Python numbers: compiled, each evaluation would compile anew
    def predicted(self, stream: Stream, step: Step, name: str) -> Branch | None:
        """The value of a branch that is not computed at this evaluation; None: it is."""
        edit = self.edit
        state = step.memory.get((edit.name, self.index, step.branch), {}).get(name)
        executed = state is None or edit.due(step, name)
        layout, record = stream.layout, edit.record(self.index)
        assert layout.notes is not None
        if record not in layout.notes:  # the same of all branches
            layout.note(record, stream.image.new_full((len(stream.image),), float(executed)))
        return None if executed else edit.predictor.predict(state, edit.at(step))

    @torch.compiler.disable
    def observe(self, step: Step, name: str, branch: Branch) -> None:
        """Take a computed value, where an evaluation that follows will need it."""
        edit = self.edit
        if edit.remembers(step, name):
            state = step.recall(edit.name, self.index).setdefault(name, {})
            edit.predictor.observe(state, edit.at(step), branch)
