"""Few-step distillation, as plans and runs know it. Its step is in `recipes.steps.few_step`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from edit.edits import describe
from edit.few_step.method import FewStepMethod
from edit.measuring.turns import Turn, turns
from recipes.assembly import Run
from recipes.models import Models
from recipes.procedure import Fit, Probed

if TYPE_CHECKING:
    from recipes.recipe import Recipe


@dataclass(frozen=True)
class FewSteps(Fit):
    """Few-step distillation by the method that `matching` describes."""

    def check(self, cfg: DictConfig) -> Iterator[str]:
        if cfg.matching is None:
            yield "recipe trains by a few-step method, and there is none: choose one with matching={_target_: ...}"
            return
        if cfg.terms:
            yield f"matching and terms are two ways to train: leave out terms.{next(iter(cfg.terms))} or matching"
        if cfg.data_weight != 1.0:
            yield f"data_weight={cfg.data_weight} weighs the objective's losses, which matching replaces: leave it out"
        if cfg.strata != 1:
            yield (
                f"strata={cfg.strata} stratifies the times of diffusion training, which matching replaces: leave it out"
            )
        if cfg.critic.follow and cfg.trainer.strategy.startswith("zero"):
            yield (
                f"critic.follow={cfg.critic.follow} writes into weights that DeepSpeed keeps elsewhere: use "
                "trainer=fsdp2"
            )

    def taps(self, models: Models) -> tuple[tuple, tuple]:
        assert models.matching is not None, "checked: FewSteps.check"
        return (), (models.matching.teacher_taps,)

    def kinds(self, probed: Probed) -> tuple[Turn, ...]:
        matching = probed.models.matching
        assert matching is not None, "checked: FewSteps.check"
        return turns(matching, probed.student, probed.teacher, probed.own["matching"], probed.guided, probed.decoder)

    def module(self, run: Run) -> Recipe:
        from recipes.steps.few_step import FewStep  # with it comes Lightning

        models = run.models
        return FewStep(
            *models.student,
            run.objective,
            run.training,
            method_of(run),
            models.teacher,
            run.null,
            models.critic,
            follow=run.config.critic.follow,
            sight=run.sight,
        )

    def turns(self, run: Run) -> bool:
        return method_of(run).adversarial

    def provenance(self, run: Run) -> dict[str, Any]:
        return {"matching": describe(method_of(run)), "teacher": OmegaConf.to_container(run.config.teacher)}


def method_of(run: Run) -> FewStepMethod:
    assert run.models.matching is not None, "checked: FewSteps.check"
    return run.models.matching
