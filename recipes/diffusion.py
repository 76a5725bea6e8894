"""Diffusion training: one denoiser, one objective, any edits and terms. The step reads as the algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from edit import noise
from edit.denoiser import Denoiser
from edit.objectives import Objective, Pass, Term, Weight, wanted, weight_at
from edit.stream import Branch, Condition, Forced, Output
from recipes.assembly import Run
from recipes.models import made
from recipes.procedure import Fit
from recipes.recipe import Recipe, Training
from recipes.roles import Teacher


class Diffusion(Recipe):
    """Train a denoiser on data, on a teacher's predictions at the same noisy samples, or on both.

    Args:
        build, structure, objective, settings, teacher, null: as of `Recipe`
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
    ):
        super().__init__(build, structure, objective, settings, teacher, null)
        self.terms, self.data_weight, self.strata = dict(terms or {}), data_weight, strata
        self.taps, self.branches, self.maps = wanted(self.terms.values())
        self.own = nn.ModuleDict()  # trainable parameters of terms

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        x, draw = batch["x"], batch["draw"]  # b c *sizes, b
        self._seed_dropout(batch_index)
        self.advance(self.denoiser)
        seed = self.settings.seed
        u = (draw % self.strata + noise.uniform(seed, draw, noise.TIME)) / self.strata
        t = self.objective.times(u.clamp_max(1 - 2**-24))  # the sum may be rounded up, and 1 is no quantile
        eps = noise.gaussian(seed, draw, noise.NOISE, tuple(x.shape[1:]))
        condition, null = self.conditions(batch)
        x_t = self.objective.corrupt(x, eps, t)
        with self.casting():
            taught = None
            if self.teacher is not None:  # at the same noisy sample, time and condition
                scale = self.teacher.guidance.scale(noise.uniform(seed, draw, noise.GUIDANCE))
                taught = self.teacher(self.denoiser, x_t, t, condition, null, scale)
                condition = replace(condition, guidance=scale) if self.told else condition
            forced = {} if taught is None else self._forced(taught, draw)
            out = self.denoiser(
                x_t, t, condition, taps=self.taps, branches=self.branches, forced=forced, maps=self.maps
            )

        weight = weight_at(self.data_weight, self.progress)
        losses = self.objective.losses(out, x, eps, x_t, t) if weight else {}
        if weight != 1:
            losses = {name: weight * loss for name, loss in losses.items()}
        seen = Pass(out, {**batch, "noise": eps, "x_t": x_t}, t, self.progress, taught)
        for name, term in self.terms.items():
            own = self.own[name] if name in self.own else None
            losses |= {f"{name}/{k}": v for k, v in term.losses(seen, own).items()}
        watched = {}
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

    def configure_parts(self) -> None:
        whole_teacher = None
        if self.teacher is not None:
            whole_teacher = self.teacher.configure(self.denoiser, *wanted(self.terms.values(), teacher=True))
        torch.manual_seed(self.settings.seed)  # the same on every rank, also where rank 0 alone builds weights
        for name, term in self.terms.items():
            if (own := term.build(self.denoiser, whole_teacher)) is not None:
                self.own[name] = self.whole_or_sharded(own)


@dataclass(frozen=True)
class Denoising(Fit):
    """Diffusion training: the objective's losses on data, terms beside them, with or without a teacher."""

    def check(self, cfg: DictConfig) -> Iterator[str]:
        if cfg.matching is not None:
            yield "recipe trains by the objective, and matching by a few-step method: leave one of the two out"
        elif cfg.critic.follow or cfg.critic.start != "teacher":
            yield "critic: only a few-step method (matching) has one: leave the section out"

    def module(self, run: Run) -> Diffusion:
        cfg, models = run.config, run.models
        weight = made(cfg.data_weight) if OmegaConf.is_config(cfg.data_weight) else cfg.data_weight
        return Diffusion(
            *models.student,
            run.objective,
            run.training,
            models.teacher,
            run.null,
            terms=models.terms,
            data_weight=weight,
            strata=cfg.strata,
        )
