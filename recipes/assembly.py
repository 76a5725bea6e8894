"""From a configuration to one checked `Run`: each part is made, as far as it needs no weights, and must fit the others.

Each refusal is one sentence, and stands here or in `recipes.models` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edit.data_set import conditions, null_condition
from edit.denoiser import Denoiser
from edit.distillation.guidance import TeacherGuidance
from edit.few_step.method import FewStepMethod
from edit.losses import Loss
from edit.objectives import Objective
from edit.predictions import KINDS
from edit.sampling import Sampler
from edit.stream import Condition
from recipes.config.errors import UserError
from recipes.models import Files, Models, losses_of, made, models_of
from recipes.roles import Teacher
from recipes.runtime.devices import recipe_casts
from recipes.seen import Sight
from recipes.settings import Training


@dataclass(frozen=True)
class Run:
    """Everything that a configuration resolves to."""

    config: DictConfig
    models: Models
    objective: Objective
    sampler: Sampler  # of previews and of the artifact
    training: Training
    condition: Callable[[Tensor], Condition]  # numbers of samples [b] -> what they are conditioned on
    null: Condition | None  # the data set's own condition of no text; None: the denoiser's
    sight: Sight  # frozen models of losses


def assemble(cfg: DictConfig) -> Run:
    """Make and check all parts of a run whose files are here.

    Args:
        cfg: composed, checked and resolved, with devices and precision decided

    Raises:
        UserError, ValueError: for the first two parts that do not fit together
        hydra.errors.InstantiationException: for a part that cannot be made
    """
    objective, sampler = made(cfg.objective), made(cfg.sampler)
    sampler.solver.check(objective)
    models = models_of(cfg, Files(cfg))
    refuse_unfit_objective(models.skeleton, objective)
    refuse_unrecorded(sampler, models.skeleton)
    data, matching = models.data, models.matching
    stored = getattr(data, "stored", None)  # how a teacher made the data, where a method must know
    if matching is not None:
        matching.check(sampler.solver)
    sight = make_sight(data, losses_of(models))
    if matching is not None and stored is not None:
        matching.check_stored(stored.get("times", []))
    sampler = told_as_taught(sampler, taught_at(models.teacher, stored), models.skeleton, matching)
    refuse_unmade(sampler, models.skeleton, objective)
    condition, null = conditions(data), null_condition(data)
    return Run(cfg, models, objective, sampler, training_of(cfg), condition, null, sight)


def training_of(cfg: DictConfig) -> Training:
    return Training(
        optimizer=cfg.optimizer,
        max_steps=cfg.trainer.max_steps,
        accumulate=cfg.trainer.accumulate,
        clip=cfg.trainer.clip,
        label_drop=cfg.label_drop,
        ema_decay=cfg.ema.decay,
        ema_ramp=cfg.ema.ramp,
        compile=cfg.trainer.compile,
        gradient_checkpointing=cfg.trainer.gradient_checkpointing,
        autocast=recipe_casts(cfg.trainer),
        seed=cfg.seed,
    )


# ---- parts that do not fit ------------------------------------------------------------------------------------------


def refuse_unfit_objective(student: Denoiser, objective: Objective) -> None:
    """Raises UserError if the backbone predicts another quantity than the objective trains."""
    if student.prediction != objective.prediction:
        raise UserError(
            f"the backbone predicts a {student.prediction}, the objective trains a {objective.prediction}: choose "
            f"{KINDS[student.prediction].settings}, or another backbone.time"
        )


def refuse_unrecorded(sampler: Sampler, student: Denoiser) -> None:
    """Raises UserError if the solver reads a record that no edit of the student makes: previews would fail."""
    recorded = {name for e in student.applied.values() for name in e.records}
    if lacking := next((name for name in sampler.solver.extras if name not in recorded), None):
        raise UserError(
            f"sampler.solver: {type(sampler.solver).__name__} needs a model that records {lacking!r}, and no edit of "
            f"this run does: add the one that does ({type(sampler.solver).__module__} tells which), or choose another "
            "sampler"
        )


def refuse_unmade(sampler: Sampler, student: Denoiser, objective: Objective) -> None:
    """Raises UserError if an edit of the student was not made for the sampler, or the two do not fit otherwise."""
    try:
        sampler.check(student, objective)
    except ValueError as error:
        raise UserError(f"sampler: {error}") from error


def make_sight(data: Any, losses: Mapping[str, Loss]) -> Sight:
    """The frozen models of losses, and the data set's decoder where one asks for pixels.

    Args:
        data: the data set
        losses: by their places in the configuration

    Raises:
        UserError: if one of them cannot be had, or does not take the samples
    """
    shapes = [tuple(shape) for shape in getattr(data, "buckets", None) or [data.shape]]
    sight = Sight(None, {})
    for place, loss in losses.items():
        try:
            for frozen in loss.frozen.values():
                frozen.check(shapes)
                if frozen not in sight.models:
                    sight.models[frozen] = frozen.load()
            if loss.decodes and sight.decoder is None:
                sight.decoder = getattr(data, "decoder", nn.Identity)()
            loss.check_data(data, pixels_of(sight.decoder, shapes) if loss.decodes else [])
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{place} looks with a frozen model: {error}") from error
    return sight


def pixels_of(decoder: nn.Module | None, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The shapes of decoded samples, (c, *sizes) each; nothing is computed."""
    assert decoder is not None
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        return [tuple(decoder(torch.zeros(1, *shape)).shape[1:]) for shape in shapes]


# ---- guidance -------------------------------------------------------------------------------------------------------


def taught_at(teacher: Teacher | None, stored: Mapping[str, Any] | None) -> TeacherGuidance | None:
    """The guidance that a student learns: its teacher's, or that of stored paths.

    Raises:
        UserError: if there are both, and they differ
    """
    live = None if teacher is None else teacher.guidance
    cached = None if stored is None else TeacherGuidance(float(stored["guidance"]), float(stored["guidance"]))
    if live and cached and live != cached:
        raise UserError(
            f"the stored paths were made at guidance {cached.high:g}, and teacher.guidance asks at {live.low:g} to "
            f"{live.high:g}: set teacher.guidance={cached.high:g}"
        )
    return live or cached


def told_as_taught(
    sampler: Sampler, taught: TeacherGuidance | None, student: Denoiser, matching: FewStepMethod | None
) -> Sampler:
    """The sampler, which tells the student the guidance that it learns from a teacher.

    Raises:
        UserError: if a student would be sampled at another guidance than it has learned, or guided twice
    """
    takes = student.facts.told
    if sampler.told is not None and not takes:
        raise UserError(
            f"sampler.told={sampler.told:g}, but this {student.name} has no guidance input: use sampler.guidance"
        )
    if taught is None:
        return sampler
    low, high = taught.low, taught.high
    if matching is not None and (low, high) != (1.0, 1.0) and sampler.guidance != 1:
        raise UserError(
            f"the student learns the teacher's guidance of {high:g}, and sampler.guidance={sampler.guidance:g} would "
            "guide it a second time: set sampler.guidance=1"
        )
    if not takes:
        return sampler
    if sampler.told is None and low == high:
        return replace(sampler, told=low)
    if sampler.told is not None and not low <= sampler.told <= high:
        raise UserError(
            f"sampler.told={sampler.told:g} is a guidance that the student does not learn: the teacher is asked at "
            f"{low:g} to {high:g} (teacher.guidance)"
        )
    return sampler
