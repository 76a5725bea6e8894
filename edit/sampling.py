"""Generation: the sampler owns steps, guidance branches and all state between steps.

A generation is a `Walk` from evaluation to evaluation. `Sampler.__call__` gives the solver what the model predicts;
training on a model's own path, or stopping in between, steps the same walk by hand.

Noise is a pure function of (seed, sample number, step) (`edit.noise`), so an image depends neither on its batch nor on
the number of ranks. Source of the guidance interval: arXiv 2404.07724.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edit import noise
from edit.denoiser import Denoiser
from edit.inputs.limits import Count, NotNegative, check_numbers
from edit.objectives import Objective
from edit.predictions import KINDS
from edit.solvers import DDPMSolver, Euler, Query, Solver
from edit.stream import Condition, Output, Step
from edit.walk import Look, Walk

Watch = Callable[[Step, Output], None]  # sees every evaluation; of branch "joint", cond's samples come first


@dataclass(frozen=True)
class Sampler:
    """How to generate: the solver, and the weight of each guidance branch.

    guided = uncond + guidance (cond - uncond) + perturbation (cond - perturbed). Cond and uncond share a batch, in this
    order, as one evaluation of the branch "joint", unless an edit is `separate` or the conditions cannot be joined. A
    branch without weight is not run.

    With `norm_patch` p, each p x p patch of the guided prediction keeps the length of the conditional one: guidance
    changes only its direction, as in Qwen-Image's pipeline (p = 2, its token).
    """

    solver: Solver = field(default_factory=Euler)
    guidance: NotNegative = 1.0  # 1: the conditional prediction alone
    interval: tuple[float, float] = (0.0, 1.0)  # times at which guidance is applied; cond alone outside
    channels: Count | None = None  # guide the first channels only (3 in the official DiT); None: all
    told: NotNegative | None = None  # scale for a model with a guidance input; None: the model's own
    perturbation: NotNegative = 0.0  # needs an edit with `perturbs`
    norm_patch: Count | None = None  # rows and columns of latent pixels; None: lengths change

    def __post_init__(self):
        check_numbers(self)
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"Sampler: interval must be 0 <= low < high <= 1 (1 = noise), got {low}, {high}")

    def __call__(
        self,
        denoiser: Denoiser,
        objective: Objective,
        condition: Condition,
        samples: Tensor,
        seed: int = 0,
        negative: Condition | None = None,
        progress: Callable[[int, int], None] | None = None,
        shape: tuple[int, ...] | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Generate one image per sample number.

        Args:
            denoiser: in eval mode
            objective: of the denoiser
            condition: b entries
            samples: b int64, sample numbers; with the seed they decide the noise
            seed: of the whole set
            negative: the unconditional counterpart, b entries or one for all; None: the denoiser's own
            progress: called as (evaluations done, evaluations in all) after each prediction
            shape: of one sample; None: the denoiser's own
            watch: called with each evaluation's step and output; of branch "joint", the first b samples are cond's

        Returns:
            b c *sizes float32, in the range of the training data.

        Raises:
            ValueError: if the solver does not fit the objective, if no edit perturbs the branch "perturbed", if `told`
                is set for a model without guidance input, or if an edit was made for other samplers
        """
        weight = next(denoiser.parameters())
        # inference_mode is faster than no_grad, but training cannot use the shards that it leaves gathered
        sharded = hasattr(weight, "device_mesh") or hasattr(weight, "ds_id")  # of FSDP2, of DeepSpeed
        with torch.no_grad() if sharded else torch.inference_mode():
            walk = self.walk(denoiser, objective, condition, samples, seed, negative, progress, shape, watch)
            for moment in walk:
                moment.give(moment.ask())
                walk.given.clear()  # nobody continues this one elsewhere
        return walk.x.clone()  # an ordinary tensor, so that a model can train on it

    def walk(
        self,
        denoiser: Denoiser,
        objective: Objective,
        condition: Condition,
        samples: Tensor,
        seed: int = 0,
        negative: Condition | None = None,
        progress: Callable[[int, int], None] | None = None,
        shape: tuple[int, ...] | None = None,
        watch: Watch | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> Walk:
        """The same generation, to be stepped by the caller.

        Args:
            denoiser, objective, condition, samples, seed, negative, progress, shape, watch: as of `__call__`
            state: `Walk.state()` of a walk with the same arguments, which goes on after its last evaluation

        Raises:
            ValueError: as `__call__`, or if the state is of another solver or of samples of another shape
        """
        shape = denoiser.sample_shape if shape is None else shape
        self.check(denoiser, objective, shape)
        samples = samples.to(next(denoiser.parameters()).device)
        path = self.solver.path(
            noise.gaussian(seed, samples, noise.NOISE, shape),
            objective,
            lambda k: noise.gaussian(seed, samples, noise.SOLVER + k, shape),
        )
        guided = self.guided(denoiser, condition, samples, negative, watch)
        times = self.solver.times_of(objective, shape)
        return Walk(guided, path, times, progress, state, tuple(map(objective.level, times)))

    def guided(
        self,
        denoiser: Denoiser,
        condition: Condition,
        samples: Tensor,
        negative: Condition | None = None,
        watch: Watch | None = None,
    ) -> Guided:
        """The guided prediction of a model at any query, as a generation asks for it; arguments as of `__call__`, the
        samples on the device of the queries."""
        return Guided(self, denoiser, *self._conditions(denoiser, condition, negative, samples), watch)

    def check(self, denoiser: Denoiser, objective: Objective, shape: tuple[int, ...] | None = None) -> None:
        """Refuse a model that cannot be sampled so.

        Args:
            denoiser: with its edits; on any device
            objective: of the denoiser
            shape: of one sample; None: the denoiser's own

        Raises:
            ValueError: if the solver does not fit the objective, if no edit perturbs the branch "perturbed", if `told`
                is set for a model without guidance input, or if an edit was made for other samplers
        """
        if self.perturbation and not any(e.perturbs for e in denoiser.applied.values()):
            raise ValueError(
                "perturbation guidance needs an edit that perturbs the model; none of the applied ones does"
            )
        if self.told is not None and not denoiser.facts.told:
            raise ValueError(
                f"Sampler: told={self.told:g}, but this {denoiser.name} has no guidance input: use guidance instead"
            )
        self.solver.check(objective)
        if denoiser.applied:
            times = self.solver.times_of(objective, denoiser.sample_shape if shape is None else shape)
            for e in denoiser.applied.values():
                e.check(self, times)

    def _conditions(
        self, denoiser: Denoiser, condition: Condition, negative: Condition | None, samples: Tensor
    ) -> tuple[Condition, Condition | None]:
        """The condition and its unconditional counterpart on the device of the samples; None without guidance."""
        count, device = len(samples), samples.device
        condition = condition.map(lambda v: v.to(device))
        if self.told is not None:
            condition = replace(condition, guidance=torch.full((count,), self.told, device=device))
        if self.guidance == 1:
            return condition, None
        if negative is None:
            negative = denoiser.null(condition)
        else:
            negative = negative.map(lambda v: v.to(device).expand(count, *v.shape[1:]))
        return condition, replace(negative, guidance=condition.guidance)


class Guided:
    """The guided prediction of one generation.

    Args:
        sampler: weights of the branches
        denoiser: evaluated once per branch, or once for cond and uncond together
        condition: b entries
        negative: b entries; None without guidance
        watch: called with each evaluation's step and output; of branch "joint", the first b samples are cond's
    """

    def __init__(
        self,
        sampler: Sampler,
        denoiser: Denoiser,
        condition: Condition,
        negative: Condition | None,
        watch: Watch | None,
    ):
        self.sampler, self.solver, self.denoiser = sampler, sampler.solver, denoiser
        self.condition, self.negative, self.watch = condition, negative, watch
        self.joint = None if negative is None else joined(denoiser, condition, negative)
        self.leads = any(e.leads for e in denoiser.applied.values())

    def __call__(self, query: Query, step: Step | None, taps: Collection[int] = (), look: Look | None = None) -> Tensor:
        """Predict for a solver: b c *sizes -> the same, behind it the maps that the solver takes, as channels.

        Args:
            query: where
            step: the evaluation, with the memory of the generation; None: outside of a generation
            taps: units whose tokens are wanted
            look: called with branch and output of each call of the model

        Raises:
            ValueError: if the solver takes a map that the model does not record, or a perturbed branch has no step
        """
        x, t, _ = query
        s = self.sampler

        def branch(name: str, condition: Condition, query: Query) -> Tensor:
            return self.branch(name, condition, query, step, taps, look)

        c = x.shape[1] if s.channels is None else s.channels
        inside = s.interval[0] <= t <= s.interval[1]
        if self.negative is None or not inside:
            cond = guided = branch("cond", self.condition, query)
        else:
            if self.joint is not None:
                cond, uncond = branch("joint", self.joint, query._replace(x=torch.cat((x, x)))).chunk(2)
            else:
                cond = branch("cond", self.condition, query)
                uncond = branch("uncond", self.negative, query)
            guided = torch.lerp(uncond[:, :c], cond[:, :c], s.guidance)
            if s.norm_patch:
                length = lengths(guided, s.norm_patch).clamp_min(torch.finfo(guided.dtype).tiny)
                guided = guided * (lengths(cond[:, :c], s.norm_patch) / length)
            guided = torch.cat((guided, cond[:, c:]), 1)
        if inside and s.perturbation:
            if step is None:
                raise ValueError(
                    "edits perturb by the branch of the step, and a dense answer has no step: set perturbation=0"
                )
            perturbed = branch("perturbed", self.condition, query)
            shove = s.perturbation * (cond[:, :c] - perturbed[:, :c])
            guided = torch.cat((guided[:, :c] + shove, guided[:, c:]), 1)
        return guided

    def branch(
        self,
        name: str,
        condition: Condition,
        query: Query,
        step: Step | None,
        taps: Collection[int] = (),
        look: Look | None = None,
    ) -> Tensor:
        """One evaluation of the denoiser, in fp32."""
        x, t, end = query
        at = torch.full((len(x),), t, device=x.device, dtype=torch.float32)
        if self.leads:
            condition = replace(condition, end=at if end is None else torch.full_like(at, end))
        if step is not None:
            step = replace(step, branch=name)
            if self.joint is not None and name in ALTERNATIVES:
                forget(step.memory, ALTERNATIVES[name])
        out = self.denoiser(x, at, condition, step=step, taps=taps)
        if look is not None:
            look(name, out)
        if self.watch is not None and step is not None:
            self.watch(step, out)
        if lacking := next((name for name in self.solver.extras if name not in out.trace), None):
            raise ValueError(
                f"{type(self.solver).__name__} needs a model that records {lacking!r}, this {self.denoiser.name} "
                "does not: apply the edit that does, or use another solver"
            )
        maps = [out.sample, *(out.trace[name] for name in self.solver.extras)]
        if isinstance(self.solver, DDPMSolver) and out.variance is not None:
            maps.append(out.variance)
        return torch.cat([m.float() for m in maps], 1) if len(maps) > 1 else out.sample.float()


ALTERNATIVES = {"cond": "joint", "joint": "cond"}  # cond alone outside the interval, with uncond inside


def forget(memory: dict, branch: str) -> None:
    """Drop what edits remember of a branch: when it is evaluated again, its last evaluation is long ago."""
    for key in [k for k in memory if isinstance(k, tuple) and k[-1] == branch]:
        del memory[key]


def joined(denoiser: Denoiser, condition: Condition, negative: Condition) -> Condition | None:
    """Both conditions as one batch of 2b; None where that would change a prediction, or is impossible."""
    if any(e.separate for e in denoiser.applied.values()):
        return None
    try:
        both = condition.join(negative)
    except ValueError:  # texts of two lengths without masks, a field in one only
        return None
    level = both.text is None or condition.text.shape[1] == negative.text.shape[1]  # type: ignore[union-attr]
    return both if level or denoiser.masks else None  # some families attend to padding


def lengths(x: Tensor, patch: int) -> Tensor:
    """Euclidean length of each patch x patch square of all channels at each of its pixels: b c *sizes -> b 1 *sizes."""
    squares = x.square().sum(1, keepdim=True)
    pooled = F.avg_pool2d(squares.flatten(1, -3), patch) * patch**2  # the frames of a video each by itself
    return pooled.sqrt().repeat_interleave(patch, -2).repeat_interleave(patch, -1).view_as(squares)


def default_sampler(denoiser: Denoiser, objective: Objective | None = None) -> Sampler:
    """The family's stock sampler if it fits the prediction; else a usual one of the prediction, without guidance."""
    own, predicted = denoiser.sampler(), objective.prediction if objective else denoiser.prediction
    if own is not None and predicted in own.solver.integrates:
        return own
    return Sampler(KINDS[predicted].solver)


def at_guidance(sampler: Sampler, denoiser: Denoiser, weight: float) -> Sampler:
    """The sampler at another guidance weight, which a model with a guidance input is told instead."""
    if denoiser.facts.told:
        return replace(sampler, guidance=1.0, told=float(weight))
    return replace(sampler, guidance=float(weight))


def at_steps(sampler: Sampler, steps: int | None) -> Sampler:
    """The sampler with another number of steps; None: its own.

    Raises:
        ValueError: if its solver has times of its own
    """
    if steps is None or steps == sampler.solver.steps:
        return sampler
    if "steps" not in {f.name for f in fields(sampler.solver)}:  # type: ignore[arg-type]
        raise ValueError(
            f"steps={steps}, but this model is sampled at times of its own, {sampler.solver}: leave it out"
        )
    return replace(sampler, solver=replace(sampler.solver, steps=steps))  # type: ignore[type-var]
