"""Settings that make a stock pipeline take the steps of an artifact's sampler."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edit.artifacts.card import few_steps
from edit.artifacts.checkpoint import Artifact
from edit.objectives import RescaledFlow
from edit.sampling import Sampler
from edit.solvers import FLOW_SCHEDULER as FLOW
from edit.solvers import Euler, StockEuler, times


@dataclass(frozen=True)
class Steps:
    """Settings of a stock pipeline for the steps of an artifact's sampler."""

    scheduler: dict[str, Any] | None = None  # arguments of the FlowMatchEulerDiscreteScheduler to put in
    sigmas: tuple[float, ...] = ()  # times before the scheduler's shift; empty: the pipeline's own
    remarks: tuple[str, ...] = ()  # comments on settings that the pipeline lacks


def steps_of(artifact: Artifact, scheduler: Mapping[str, Any] | None = None) -> Steps:
    """Settings for the pipeline around an artifact; empty if its own steps are equal.

    Args:
        artifact: with its sampler
        scheduler: the configuration of the pipeline's scheduler; None: the one that the family is published with
    """
    solver, grid, velocity = artifact.sampler.solver, few_steps(artifact), artifact.objective.prediction == "velocity"
    family, remarks = artifact.denoiser.sampler(), (*_foreign_guidance(artifact), *_louder(artifact))
    even = family is not None and isinstance(family.solver, StockEuler) and family.solver.even
    named = scheduler["_class_name"] if scheduler else FLOW if velocity else "scheduler of the pipeline"
    if named != FLOW:
        if grid:
            asked = ", ".join(f"{t:.4g}" for t in grid.grid[:-1])
            return Steps(remarks=(*remarks, f"# trained for the times {asked} (1 is noise): the {named} makes its own"))
        if scheduler or family is None or type(family.solver) is not type(solver):
            remarks = (*remarks, f"# evaluated with {solver}: the {named} may step otherwise")
        return Steps(remarks=remarks)
    if grid:
        if grid.renoise:
            seed = "torch.manual_seed(0)  # decides the fresh noise of each step: a generator does not reach it"
            remarks = (*remarks, seed)
        unasked = even and _are_even(grid.times)
        settings = {"shift": grid.shift, "stochastic_sampling": grid.renoise}
        return Steps(settings, () if unasked else grid.times, remarks)
    if not isinstance(solver, Euler | StockEuler):
        return Steps(remarks=(*remarks, f"# evaluated with {solver}: the {named} steps otherwise"))
    stock = _stock_steps(artifact, scheduler, even)
    shape = artifact.denoiser.sample_shape
    wanted = solver.times(shape) if isinstance(solver, StockEuler) else times(solver.steps, solver.shift)
    if stock and _close(stock.times(shape), wanted):
        return Steps(remarks=remarks)
    if isinstance(solver, StockEuler):
        return Steps(solver.scheduler, () if solver.even == even else solver.asked, remarks)
    asked = tuple(times(solver.steps, 1)[:-1])
    return Steps({"shift": solver.shift}, () if even else asked, remarks)


def _stock_steps(artifact: Artifact, scheduler: Mapping[str, Any] | None, even: bool) -> StockEuler | None:
    """The pipeline's own steps, as many as the artifact's; None: not known."""
    count, family = artifact.sampler.solver.steps, artifact.denoiser.sampler()
    if scheduler:
        return StockEuler.of(scheduler, count, even)
    return replace(family.solver, steps=count) if family and isinstance(family.solver, StockEuler) else None


def _foreign_guidance(artifact: Artifact) -> tuple[str, ...]:
    """A remark on settings of the sampler that a stock pipeline does not have."""
    sampler, family = artifact.sampler, artifact.denoiser.sampler() or Sampler()
    names = ("interval", "channels", "perturbation", *(() if sampler.guidance == 1 else ("norm_patch",)))
    found = [f"{n}={getattr(sampler, n)}" for n in names if getattr(sampler, n) != getattr(family, n)]
    return (f"# evaluated with {', '.join(found)}, which the pipeline does otherwise",) if found else ()


def _louder(artifact: Artifact) -> tuple[str, ...]:
    """A remark on noise of another size than that of stock pipelines."""
    scale = artifact.objective.scale if isinstance(artifact.objective, RescaledFlow) else 1
    return () if scale == 1 else (f"# trained with {scale:g} times the noise: multiply the first latents by it",)


def _are_even(asked: tuple[float, ...]) -> bool:
    return _close(asked, [1 - k / len(asked) for k in range(len(asked))], 1e-6)


def _close(a: Iterable[float], b: Iterable[float], within: float = 1e-4) -> bool:
    """Whether times agree: a difference of 1e-4 is that of one training step's tenth."""
    return all(math.isclose(x, y, abs_tol=within) for x, y in zip(a, b, strict=True))
