"""Evaluations of a generation as graphs: each kind is recorded once and run again, without Python in between.

A static policy has few kinds of evaluations: computed, predicted, and those at the beginning, where less is remembered.
What tells two evaluations of one kind apart is in tensors: sample, time, condition, and what caches remember. `Graphed`
stands before a denoiser and keeps these tensors at fixed places. `edit.caching.recorders` has the graphs.

    sampler(Graphed(denoiser), objective, condition, samples)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from edit.caching.branches import CachedBranch
from edit.caching.engine import Cached, Scheduled, names_of
from edit.caching.recorders import CudaGraph, Tape
from edit.caching.spans import SpanUnit
from edit.caching.tokens import TokenCached
from edit.denoiser import Denoiser
from edit.stream import Condition, Output, Step, pack, unpack
from edit.unit import Wrapper

# ---- kinds ----------------------------------------------------------------------------------------------------------


def check_kinds(denoiser: Denoiser) -> None:
    """Raises ValueError if evaluations are of no fixed kinds: an edit decides by numbers that only a run knows."""
    dynamic = {n for n, e in denoiser.applied.items() if e.adaptive or e.batchwise or isinstance(e, TokenCached)}
    dynamic |= {span.edit.name for span in _spans(denoiser) if not isinstance(span.gate, Scheduled)}
    if dynamic:
        name = min(dynamic)
        raise ValueError(
            f"{name} ({type(denoiser.applied[name]).__name__}) decides by numbers that only a run knows, so its "
            "evaluations cannot be recorded as graphs: sample without them, or take a cache with a schedule"
        )


def _layers(denoiser: Denoiser) -> Iterator[Any]:
    """What stands in place of units, from outside to inside."""
    for unit in denoiser.units:
        while isinstance(unit, Wrapper):
            yield unit
            unit = unit.unit
        yield unit


def _spans(denoiser: Denoiser) -> list[Any]:
    return [unit.span for unit in _layers(denoiser) if isinstance(unit, SpanUnit)]


def kind_of(denoiser: Denoiser, step: Step) -> Hashable:
    """What caches decide at an evaluation; `check_kinds` says whether they decide by its number alone."""
    found: list[Hashable] = [e.kind(step) for e in denoiser.applied.values() if isinstance(e, Cached)]
    found += [span.gate.due(step) for span in _spans(denoiser)]
    for unit in _layers(denoiser):
        branch = getattr(unit, "filled", {}).get("branch")
        while isinstance(branch, CachedBranch):
            edit = branch.edit
            names = [n for n in names_of(unit) if not edit.branches or n in edit.branches]
            found += [decided for n in names for decided in (edit.due(step, n), edit.remembers(step, n))]
            branch = branch.before
    return tuple(found)


# ---- the denoiser ---------------------------------------------------------------------------------------------------


@dataclass
class Kind:
    """A recorded kind of evaluations: its inputs, what runs, and what is remembered afterwards, as `pack` gives it."""

    inputs: list[Tensor]
    recorded: Any
    output: Output
    after: Any


class Graphed:
    """Stands before a denoiser in a sampler, for one generation at a time; several may follow each other.

    The first evaluation of a kind runs as ever, the second is recorded, later ones replay the record. The first of each
    guidance branch in each generation always runs as ever: it begins what caches remember.

    Args:
        denoiser: in eval mode; edits other than caches must not read the step's numbers
        recorder: makes a graph; None: CUDA's, or a `Tape` where the denoiser is elsewhere

    Raises:
        ValueError: if an edit decides by numbers that only a run knows
    """

    def __init__(self, denoiser: Denoiser, recorder: Callable[..., Any] | None = None):
        check_kinds(denoiser)
        cuda = next(denoiser.parameters()).is_cuda
        self.denoiser, self.recorder = denoiser, recorder or (CudaGraph if cuda else Tape)
        self.pool = torch.cuda.graph_pool_handle() if cuda else None
        self.kinds: dict[Hashable, Kind | None] = {}  # None: seen once
        self.places: dict[Hashable, Tensor] = {}  # of what is remembered, by its path, shape and type
        self.memory: dict | None = None  # of the generation under way
        self.caches = any(isinstance(e, Cached) for e in denoiser.applied.values())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)

    @torch.inference_mode()
    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, step: Step | None = None, taps: Collection[int] = ()
    ) -> Output:
        """As a denoiser. Raises ValueError if an earlier generation goes on behind a later one."""
        if step is None:
            return self.denoiser(x, t, condition, taps=taps)
        if step.memory is not self.memory:
            if step.memory:
                raise ValueError("graphs hold what one generation remembers, and another began: finish one first")
            self.memory = step.memory
        given = (x, t, *_fields(condition))
        shapes = tuple((tuple(v.shape), v.dtype) for v in given)
        kind = (step.branch, tuple(taps), shapes, kind_of(self.denoiser, step), _outline(_own(step)))
        if kind not in self.kinds or (self.caches and not _own(step)):
            out = self.denoiser(x, t, condition, step=step, taps=taps)
            settled = self._settle(step)
            step.memory.update(unpack(settled))
            if not self.caches or kind[-1] != _outline({}):
                self.kinds.setdefault(kind, None)
            return out
        known = self.kinds[kind]
        if known is None:
            known = self.kinds[kind] = self._record(given, condition, step, taps)
        for place, v in zip(known.inputs, given, strict=True):
            place.copy_(v)
        known.recorded.replay()
        step.memory.update(unpack(known.after))
        sample, variance, trace, *rest = known.output
        trace = {name: v.clone() for name, v in trace.items()}
        return Output(sample.clone(), None if variance is None else variance.clone(), trace, *rest)

    def _record(self, given: Sequence[Tensor], condition: Condition, step: Step, taps: Collection[int]) -> Kind:
        inputs = [v.clone() for v in given]
        fields = iter(inputs[2:])
        told = condition.map(lambda v: next(fields))

        def run() -> tuple[Output, Any]:
            mine = replace(step, memory=unpack(pack(_own(step), lambda v: v)))
            out = self.denoiser(*inputs[:2], told, step=mine, taps=taps)
            return out, self._settle(mine)

        recorded = self.recorder(run, list(self.places.values()), self.pool)
        return Kind(inputs, recorded, *recorded.result)

    def _settle(self, step: Step) -> Any:
        """Bring what is remembered to its places; returns the memory of the branch as `pack` gives it."""
        moved: list[tuple[Tensor, Tensor]] = []
        held = {v.untyped_storage()._cdata for v in self.places.values()}
        paths = iter(_paths(_own(step)))

        def settle(v: Tensor) -> Tensor:
            key = (next(paths), tuple(v.shape), v.dtype)
            if key not in self.places:
                self.places[key] = torch.empty_like(v, memory_format=torch.contiguous_format)
            if (place := self.places[key]) is not v:
                moved.append((place, v.clone() if v.untyped_storage()._cdata in held else v))
            return place

        packed = pack(_own(step), settle)
        for place, v in moved:
            place.copy_(v)
        return packed


def _fields(condition: Condition) -> list[Tensor]:
    found: list[Tensor] = []
    condition.map(lambda v: found.append(v) or v)  # type: ignore[func-returns-value]
    return found


def _own(step: Step) -> dict:
    """What is remembered of the step's guidance branch."""
    return {key: value for key, value in step.memory.items() if key[-1] == step.branch}


def _outline(memory: dict) -> str:
    """A memory with shapes in place of tensors."""
    return repr(pack(memory, lambda v: f"{tuple(v.shape)} {v.dtype}"))  # type: ignore[arg-type, return-value]


def _paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Of the tensors in a memory, in the order of `pack`."""
    if isinstance(value, Tensor):
        yield path
    elif isinstance(value, dict):
        for key, v in value.items():
            yield from _paths(v, (*path, key))
    elif isinstance(value, list | tuple):
        for i, v in enumerate(value):
            yield from _paths(v, (*path, i))
