"""Calibrate the edits of a model: each determines its own values from data or generations, without an optimiser."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from edit import noise
from edit.calibration import Calibration, Noisy, Scored
from edit.denoiser import Denoiser, Edit
from edit.inputs.limits import Count, Seed, check_numbers
from edit.objectives import Objective
from edit.sampling import Sampler, Watch
from edit.stream import Condition, Output


def calibrates(edit: Edit) -> bool:
    """Whether an edit has anything to calibrate."""
    return type(edit).calibrate is not Edit.calibrate


def calibrate(denoiser: Denoiser, calibration: OnData, names: Collection[str] | None = None) -> list[str]:
    """Calibrate edits in the order in which they were applied, so that each sees the earlier ones as they will be.

    Args:
        denoiser: in eval mode
        calibration: of this denoiser
        names: of applied edits; None: all. Those that have nothing to calibrate are left out

    Returns:
        The names of those that were calibrated.
    """
    chosen = [n for n, e in denoiser.applied.items() if calibrates(e) and (names is None or n in names)]
    for name in chosen:
        own = denoiser.edits[name] if name in denoiser.edits else None
        with torch.no_grad():
            denoiser.applied[name].calibrate(denoiser, replace(calibration, title=name), own)
    return chosen


def _silent(what: str, done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class OnData(Calibration):
    """Noisy batches and generations of a model, from a data set.

    Args:
        denoiser: in eval mode, with its edits
        objective: of the denoiser
        sampler: of generations
        data: begins a pass over batches of data, each a dict with `draw` (b int64, numbers of the samples), fields of
            `Condition` and, unless there are conditions only, `x` (b c *sizes)
        batches: of a pass
        samples: of a generation
        seed: of times and noise
        negative: the unconditional counterpart of a condition, one for all; None: the denoiser's own
        progress: called as (what is under way, done, in all) after each batch and each evaluation of a generation
        title: of the progress: the edit that is calibrated
    """

    denoiser: Denoiser
    objective: Objective
    sampler: Sampler  # type: ignore[misc]
    data: Callable[[], Iterable[Mapping[str, Tensor]]]
    batches: Count = 16
    samples: Count = 8
    seed: Seed = 0
    negative: Condition | None = None
    progress: Callable[[str, int, int], None] = _silent
    title: str = ""

    def __post_init__(self):
        check_numbers(self)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Noisy]:
        return (noisy for noisy, _ in self.scored())

    def scored(self) -> Iterator[Scored]:
        device = next(self.denoiser.parameters()).device
        for done, batch in enumerate(islice(self.data(), self.batches)):
            if "x" not in batch:
                raise ValueError(
                    f"edit {self.title!r} calibrates on noisy samples, and this data set has conditions only: choose "
                    "one with samples"
                )
            x, draw = batch["x"].to(device), batch["draw"].to(device)
            t = self.objective.times(noise.uniform(self.seed, draw, noise.TIME))
            eps = noise.gaussian(self.seed, draw, noise.NOISE, tuple(x.shape[1:]))
            x_t = self.objective.corrupt(x, eps, t)

            def loss(out: Output, x: Tensor = x, eps: Tensor = eps, x_t: Tensor = x_t, t: Tensor = t) -> Tensor:
                return torch.stack(list(self.objective.losses(out, x, eps, x_t, t).values())).sum(0)

            yield Scored(Noisy(x_t, t, self._condition(batch, len(x))), loss)
            self.progress(f"{self.title}: batches", done + 1, self.batches)

    def generate(self, watch: Watch | None = None, samples: int | None = None, seed: int | None = None) -> list[Tensor]:
        left, made = self.samples if samples is None else samples, []
        seed, whole = self.seed if seed is None else seed, left
        batches = iter(self.data())
        while left > 0:
            batch = next(batches)
            numbers = batch["draw"][:left]
            shape = tuple(batch["x"].shape[1:]) if "x" in batch else None
            first, last = whole - left + 1, whole - left + len(numbers)
            what = f"{self.title}: samples {first} to {last} of {whole}, evaluations"
            made.append(
                self.sampler(
                    self.denoiser,
                    self.objective,
                    self._condition(batch, len(numbers)),
                    numbers,
                    seed,
                    self.negative,
                    progress=lambda done, total, what=what: self.progress(what, done, total),
                    shape=shape,
                    watch=watch,
                )
            )
            left -= len(numbers)
        return made

    def _condition(self, batch: Mapping[str, Tensor], count: int) -> Condition:
        """Of the first `count` samples, told the sampler's guidance where the model takes it as an input."""
        device = next(self.denoiser.parameters()).device
        condition = Condition.of(batch).map(lambda v: v[:count].to(device))
        if self.sampler.told is None or not self.denoiser.facts.told:
            return condition
        return replace(condition, guidance=torch.full((count,), self.sampler.told, device=device))
