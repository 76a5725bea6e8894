"""Diffusion training: one denoiser, one objective, any edits and terms. The step reads as the algorithm.

The procedure that makes it from a run is `recipes.diffusion.Denoising`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edit import noise
from edit.denoiser import Denoiser
from edit.losses import Draws, Seen, Term, teaches, wanted
from edit.objectives import Objective, Weight, weight_at
from edit.stream import Branch, Condition, Forced, Output
from recipes.ending import forget
from recipes.recipe import Recipe
from recipes.roles import Teacher
from recipes.seen import Asked, Sight
from recipes.settings import Training


class Diffusion(Recipe):
    """Train a denoiser on data, on a teacher's predictions at the same noisy samples, or on both.

    Args:
        build, structure, objective, settings, teacher, null, sight: as of `Recipe`
        terms: further losses, by name
        data_weight: weight of the objective's own losses, which compare with the data
        strata: the time law is divided into so many parts of equal probability, and sample k of the run draws its time
            from part k mod strata; so the batch of all ranks spans all times
    """

    def __init__(
        self,
        build: Callable[[], Denoiser],
        structure: Callable[[], Denoiser],
        objective: Objective,
        settings: Training,
        teacher: Teacher | None = None,
        null: Condition | None = None,
        terms: Mapping[str, Term] | None = None,
        data_weight: Weight = 1.0,
        strata: int = 1,
        sight: Sight | None = None,
    ):
        super().__init__(build, structure, objective, settings, teacher, null, sight)
        self.terms, self.data_weight, self.strata = dict(terms or {}), data_weight, strata
        self.guidance = None if teacher is None else teacher.guidance  # which the student is told
        self.taps, self.branches, self.maps = wanted(self.terms.values())
        self.teaches = teaches(self.terms.values())
        self.own = nn.ModuleDict()  # trainable parameters of terms
        self.over: list[str] = []  # terms that said so

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        x, draw = batch["x"], batch["draw"]  # b c *sizes, b
        self._seed_dropout(batch_index)
        self.advance(self.denoiser)
        seed = self.settings.seed
        u = (draw % self.strata + noise.uniform(seed, draw, noise.TIME)) / self.strata
        t = self.objective.times(u.clamp_max(1 - 2**-24))  # the sum may be rounded up, and 1 is no quantile
        eps = noise.gaussian(seed, draw, noise.NOISE, tuple(x.shape[1:]))
        whole, condition, null = self.conditions(batch)
        x_t = self.objective.corrupt(x, eps, t)
        scale, taught = torch.ones_like(t), None
        if self.guidance is not None:
            scale = self.guidance.scale(noise.uniform(seed, draw, noise.GUIDANCE))
        draws = Draws(seed, draw, self.micro(batch_index), tuple(x.shape[1:]))
        seen = Seen(condition, null, scale, draws, self.progress, x, eps, **self._asked(null, scale).callables())
        seen = self._mixed(replace(seen, x_t=x_t, t=t, whole=whole, batch=batch, step=self.trainer.global_step))
        x_t, condition = seen.x_t, seen.condition
        with self.casting():
            if self.teacher is not None and self.teaches:  # at the same noisy sample, time and condition
                taught = self.teacher(self.denoiser, x_t, t, condition, null, scale)
            if self.told and self.guidance is not None:
                condition = replace(condition, guidance=scale)
            forced = {} if taught is None else self._forced(taught, draw)
            out = self.denoiser(
                x_t, t, condition, taps=self.taps, branches=self.branches, forced=forced, maps=self.maps
            )

        weight = weight_at(self.data_weight, self.progress)
        losses, watched = self.objective.losses(out, x, eps, x_t, t) if weight else {}, {}
        if weight != 1:
            losses = {name: weight * loss for name, loss in losses.items()}
        if self.terms:
            data_loss = torch.stack(list(losses.values())).sum(0) if losses else None
            seen = replace(seen, data_loss=data_loss, gradient=self._gradient)
            scored, watched = self._scored(replace(seen, condition=condition, output=out, taught=taught))
            losses |= scored
        for name, edit in self.denoiser.applied.items():
            losses |= {f"{name}/{k}": v for k, v in edit.losses(out.trace).items()}
            for further, prediction in edit.further(out).items() if weight else ():
                scored = self.objective.losses(prediction, x, eps, x_t, t)
                losses |= {f"{name}/{further}/{k}": weight * v for k, v in scored.items()}
            watched |= {f"{name}/{k}": v.float().mean() for k, v in edit.metrics(out.trace).items()}
        means = {name: loss.mean() for name, loss in losses.items()}
        loss = sum(means.values(), start=torch.zeros((), device=x.device))
        if not weight:  # no term may reach the last units, and DDP waits for the gradient of every parameter
            loss = loss + 0.0 * out.sample.float().sum()
        self._record(batch_index, {"loss": loss, **(means if len(means) > 1 else {}), **watched})
        return loss

    def heldout(self, batch: dict[str, Tensor], u: Tensor, eps: Tensor) -> Tensor | None:
        """The objective's own losses, without terms; none where the data themselves have no part in training."""
        if self.data_weight == 0:
            return None
        x, t, condition = batch["x"], self.objective.times(u), Condition.of(batch)
        x_t = self.objective.corrupt(x, eps, t)
        if self.told and self.guidance is not None:  # it knows no other scales than its teacher's
            condition = replace(condition, guidance=self.guidance.scale(torch.full_like(t, 0.5)))
        with self.casting():
            out = self.ema(x_t, t, condition)
        return torch.stack(list(self.objective.losses(out, x, eps, x_t, t).values())).sum(0)

    def _asked(self, null: Condition, scale: Tensor) -> Asked:
        told = None if self.guidance is None else scale
        return Asked(self.objective, self.denoiser, self.ema, self.teacher, None, null, scale, told, self.casting)

    def _gradient(self, value: Tensor, unit: int) -> Tensor:
        weights = [p for p in self.denoiser.units[unit].parameters() if p.requires_grad]
        found = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        parts = (torch.zeros_like(p) if g is None else g for p, g in zip(weights, found, strict=True))
        whole = torch.cat([part.float().flatten() for part in parts])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(whole)
            whole /= dist.get_world_size()
        return whole

    def _mixed(self, seen: Seen) -> Seen:
        """What is seen before the forward, with the sample and condition that the terms make of it, in their order."""
        for name, term in self.terms.items():
            own = self.own[name] if name in self.own else None
            x_t, condition = term.mixed(replace(seen, own=own, draws=seen.draws.of(name)))
            seen = replace(seen, x_t=x_t, condition=condition)
        return seen

    def _scored(self, seen: Seen) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses of all terms, and what they log beside them."""
        losses, watched = {}, {}
        for name, term in self.terms.items():
            own = self.own[name] if name in self.own else None
            mine = replace(seen, own=own, draws=seen.draws.of(name), **self.sight.of(term))
            losses |= {f"{name}/{k}": v for k, v in term.losses(mine).items()}
            if term.stops and name not in self.over and term.over(mine):
                self.over.append(name)
            watched |= {f"{name}/{k}": v.float().mean() for k, v in term.metrics(mine).items()}
        return losses, watched

    def _forced(self, taught: Output, draw: Tensor) -> dict[int, Forced]:
        """Teacher tokens that replace the inputs of units, as loss terms ask, in a share of the samples."""
        forced = {}
        for term in self.terms.values():
            sources, share = term.forced(self.progress)
            if not sources or not share:
                continue
            where = noise.uniform(self.settings.seed, draw, noise.FORCE) < share
            for unit, source in sources.items():
                tokens = Branch(taught.trace[f"unit.{source}"], taught.trace.get(f"unit.{source}.text"))
                forced[unit] = Forced(tokens, where)
        return forced

    # ---- models and terms -----------------------------------------------------------------------------------------

    def configure_parts(self) -> None:
        self._leave(self.begun)
        whole_teacher = None
        if self.teacher is not None:
            whole_teacher = self.teacher.configure(self.denoiser, *wanted(self.terms.values(), teacher=True))
        torch.manual_seed(self.settings.seed)  # the same on every rank, also where rank 0 alone builds weights
        for name, term in self.terms.items():
            build = partial(term.build, teacher=whole_teacher)
            if (own := build(self.denoiser)) is not None:
                self.adopt(f"own.{name}", build, own)
                self.own[name] = self.whole_or_sharded(own)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["over"] = {name: name not in self.terms for name in self.over}  # and whether their parts are gone

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before its weights are read and an optimiser is made: let go of the terms whose parts were gone by then."""
        over = checkpoint.get("over", {})
        self.over = [name for name, gone in over.items() if gone]
        self._leave(self.begun)
        self.over = list(over)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        super().on_train_batch_start(batch, batch_index)
        between = batch_index % self.settings.accumulate == 0  # two optimiser steps
        if between and (gone := self._leave(self.trainer.global_step)):
            forget(self.trainer, self, gone)
            self.trained = [p for p in self.parameters() if p.requires_grad]

    def _leave(self, step: int) -> list[nn.Parameter]:
        """Let go of the terms that have ended by this step, and of what they alone needed. Returns their parameters."""
        ended = [name for name, term in self.terms.items() if term.ends is not None and term.ends <= step]
        over = [*ended, *(name for name in self.over if name in self.terms and name not in ended)]
        if not over:
            return []
        taught = any(term.needs_teacher for term in self.terms.values())
        gone = [p for name in over if name in self.own for p in self.own.pop(name).parameters()]
        for name in over:
            del self.terms[name]
        self.taps, self.branches, self.maps = wanted(self.terms.values())
        self.teaches = teaches(self.terms.values())
        self.sight.keep(self.terms.values())
        if self.teacher is not None and taught and not any(term.needs_teacher for term in self.terms.values()):
            self.teacher.release()
            self.teacher = None
        elif self.teacher is not None:
            self.teacher.taps, self.teacher.branches, self.teacher.maps = wanted(self.terms.values(), teacher=True)
        return gone
