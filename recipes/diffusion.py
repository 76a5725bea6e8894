"""Diffusion training, as plans and runs know it. Its step is in `recipes.steps.diffusion`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from edit.losses import wanted
from edit.measuring.turns import Turn, phases
from recipes.assembly import Run
from recipes.models import Models, made
from recipes.procedure import Fit, Probed

if TYPE_CHECKING:
    from recipes.recipe import Recipe


@dataclass(frozen=True)
class Denoising(Fit):
    """Diffusion training: the objective's losses on data, terms beside them, with or without a teacher."""

    def check(self, cfg: DictConfig) -> Iterator[str]:
        if cfg.matching is not None:
            yield "recipe trains by the objective, and matching by a few-step method: leave one of the two out"
        elif cfg.critic.follow or cfg.critic.start != "teacher":
            yield "critic: only a few-step method (matching) has one: leave the section out"

    def taps(self, models: Models) -> tuple[tuple, tuple]:
        return wanted(models.terms.values()), wanted(models.terms.values(), teacher=True)

    def kinds(self, probed: Probed) -> tuple[Turn, ...]:
        terms, steps = probed.models.terms, probed.config.trainer.max_steps
        own = {name: probed.own[f"terms.{name}"] for name in terms}
        asks = probed.models.teacher is not None
        return phases(terms, probed.student, probed.teacher, own, probed.guided, steps, asks, probed.decoder)

    def module(self, run: Run) -> Recipe:
        from recipes.steps.diffusion import Diffusion  # with it comes Lightning

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
            sight=run.sight,
        )
