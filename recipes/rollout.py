"""Training on the sampler's own path, as plans and runs know it.

    python train.py recipe=rollout "recipe.method={_target_: ...}" init=runs/digits edits=... sampler.solver.steps=10

Its step is in `recipes.steps.rollout`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from data import manifest
from data.loader import EndlessLoader
from edit.calibrating import OnData
from edit.denoiser import Denoiser
from edit.edits import describe
from edit.inputs.limits import LAST_SEED, Count, check_numbers
from edit.losses import Loss
from edit.measuring.rollouts import remembered, turns_of
from edit.measuring.turns import Turn
from edit.rollout import RolloutMethod, trained
from edit.sampling import Sampler
from edit.solvers import DDIMSolver, DDPMSolver, DPMSolver, Euler, Heun
from recipes.assembly import Run, make_sight
from recipes.calibrate import APART, WITHOUT_END
from recipes.config.errors import UserError
from recipes.models import Models, is_official, made
from recipes.procedure import Fit, Probed
from recipes.settings import world_size

if TYPE_CHECKING:
    from recipes.recipe import Recipe


@dataclass(frozen=True)
class RollingOut(Fit):
    """Training on the sampler's own path by a method of `edit.rollout`.

    Args:
        method: what is trained, and how
        batches: of noisy data that a method's `refresh` sees in a pass, each of data.batch_size samples
        samples: of a generation in `refresh`
    """

    method: RolloutMethod
    batches: Count = 16
    samples: Count = 8

    def __post_init__(self):
        check_numbers(self)
        if not isinstance(self.method, RolloutMethod):
            raise ValueError(f"recipe.method is a section with the _target_ of a RolloutMethod, got {self.method!r}")

    def check(self, cfg: DictConfig) -> Iterator[str]:
        if cfg.matching is not None:
            yield "recipe=rollout trains by recipe.method, and matching by a few-step method: leave one of the two out"
        if cfg.terms:
            yield f"recipe=rollout has the losses of recipe.method: leave out terms.{next(iter(cfg.terms))}"
        if cfg.data_weight != 1.0 or cfg.strata != 1:
            yield "data_weight and strata are of diffusion training: leave them out with recipe=rollout"
        if cfg.critic.follow or cfg.critic.start != "teacher":
            yield "critic: only a few-step method (matching) has one: leave the section out"
        if cfg.teacher.placement == "tied":
            yield (
                "teacher.placement=tied: without another teacher the model itself, dense, is the teacher of a rollout: "
                "leave the section out"
            )
        if self.method.needs_teacher and not OmegaConf.is_missing(cfg.teacher, "path") and cfg.teacher.path is None:
            yield f"recipe.method: {type(self.method).__name__} compares with another model: give teacher.path=..."
        trainer = cfg.trainer
        if trainer.accumulate != 1:
            yield (
                f"trainer.accumulate={trainer.accumulate}: a rollout updates after each evaluation: set "
                "trainer.accumulate=1, and data.batch_size as large as wanted"
            )
        if trainer.gradient_checkpointing:
            yield (
                "trainer.gradient_checkpointing=true computes units again when edits remember the next evaluation "
                "already: set it to false with recipe=rollout"
            )
        if trainer.strategy.startswith("zero"):
            yield (
                f"trainer.strategy={trainer.strategy} keeps weights where a rollout cannot ask a teacher between two "
                "updates: use trainer=ddp or fsdp2"
            )

    def losses(self, models: Models) -> Mapping[str, Loss]:
        return {"recipe.method": self.method}

    def taps(self, models: Models) -> tuple[tuple, tuple]:
        return (self.method.taps,), (self.method.teacher_taps,)

    def kinds(self, probed: Probed) -> tuple[Turn, ...]:
        sampler, objective = made(probed.config.sampler), made(probed.config.objective)
        times = sampler.solver.times_of(objective, probed.student.shape)
        student, taps = probed.student, self.method.teacher_taps
        teacher = "student" if probed.teacher is None else "teacher"
        if self.method.asks == "path" and getattr(probed.models.data, "features", False):
            teacher = None
        elif self.method.asks == "path":
            branches = 1 + (sampler.guidance != 1)
            trace = (probed.teacher or student).tapped(taps) if taps else {}
            kept = [v for k, v in trace.items() if k.startswith(("unit.", "end.")) and not k.endswith(".text")]
            tokens = sum(v[0].numel() for v in kept)
            each = 2 * (math.prod(student.shape) + branches * tokens) * (len(times) - 1)
            probed.notes.append(
                f"its teacher's answers, stored by data.generate taps=..., would take {each / 1e6:.3g} MB per sample "
                "in 16 bits and save the calls of the teacher"
            )
        if self.method.every:
            probed.notes.append(
                f"the generations from which recipe.method makes its values anew every {self.method.every} updates are "
                "not counted"
            )
        return turns_of(self.method, sampler, times, student.denoiser, teacher)

    def remembered(self, probed: Probed) -> int:
        sampler, objective = made(probed.config.sampler), made(probed.config.objective)
        student = probed.student
        found = remembered(student.denoiser, sampler, objective, student.shape, student.condition)
        if found is None:
            probed.notes.append(
                "what edits remember between evaluations depends on values: it is neither known nor counted"
            )
        return found or 0

    def module(self, run: Run) -> Recipe:
        from recipes.steps.rollout import Rollout  # with it comes Lightning

        models, method = run.models, self.method
        times = run.sampler.solver.times_of(run.objective, tuple(models.data.shape))
        if method.asks is not None and run.sampler.perturbation:
            raise UserError(
                f"sampler.perturbation={run.sampler.perturbation:g}: a dense teacher has no perturbed branch: set it "
                "to 0 while training"
            )
        if models.teacher is not None and models.teacher.guidance.high != 1 and run.sampler.told is None:
            raise UserError(
                "teacher.guidance: a rollout guides its teacher as the student, by sampler.guidance: leave it out"
            )
        try:
            method.check(models.skeleton, run.sampler, times)
            trained(method, len(times) - 1)
        except ValueError as error:
            raise UserError(f"recipe.method: {error}") from error
        stored = getattr(models.data, "stored", None) or {}
        if "taps" not in stored or not getattr(models.data, "features", False):
            stored = {}
        if stored and method.asks == "path":
            refuse_other_features(stored, method, run.sampler, run)
            refuse_another_teacher(stored, run.config.init if models.teacher is None else run.config.teacher.path)
            refuse_few(len(models.data.train()), run.config)
        return Rollout(
            *models.student,
            run.objective,
            run.training,
            method,
            run.sampler,
            len(times) - 1,
            lambda denoiser: self.calibration(run, denoiser),
            models.teacher,
            run.null,
            make_sight(models.data, {"recipe.method": method}),
            stored.get("seed"),
        )

    def calibration(self, run: Run, denoiser: Denoiser) -> OnData:
        """Noisy data and generations, the same on every rank, at each call, and however many ranks share a batch."""
        cfg = run.config
        return OnData(
            denoiser,
            run.objective,
            run.sampler,
            lambda: EndlessLoader(run.models.data.train(), cfg.data.batch_size, WITHOUT_END, cfg.seed),
            batches=self.batches * world_size(cfg),
            samples=self.samples,
            seed=(cfg.seed + APART) % (LAST_SEED + 1),
            negative=run.null,
            title="recipe.method",
        )

    def turns(self, run: Run) -> bool:
        return True  # an evaluation may reach some of the parameters alone

    def provenance(self, run: Run) -> dict[str, Any]:
        return {"recipe": describe(self), "teacher": OmegaConf.to_container(run.config.teacher)}


def refuse_other_features(stored: Mapping[str, Any], method: RolloutMethod, sampler: Sampler, run: Run) -> None:
    """Raises UserError if stored features are not those of the run's sampler, or lack a tap of the method."""
    times = sampler.solver.times_of(run.objective, tuple(run.models.data.shape))[:-1]
    made, guidance = stored["evaluations"], sampler.guidance if sampler.told is None else sampler.told
    kinds = {"euler": Euler, "heun": Heun, "dpm": DPMSolver, "ddim": DDIMSolver, "ddpm": DDPMSolver}
    same = type(sampler.solver) is kinds[stored["solver"]] and len(made) == len(times)
    if not same or any(abs(a - b) > 1e-6 for a, b in zip(made, times, strict=True)):
        raise UserError(
            f"the stored features are of {stored['solver']} in {stored['steps']} steps with shift {stored['shift']:g}, "
            f"and the sampler is {sampler.solver}: choose it alike"
        )
    if abs(guidance - stored["guidance"]) > 1e-6 or sampler.interval != (0.0, 1.0):
        raise UserError(
            f"the stored features were made at guidance {stored['guidance']:g} at all times, and the sampler guides at "
            f"{guidance:g} in {sampler.interval}: choose it alike"
        )
    depth = len(run.models.skeleton.units)
    if ends := [name for name in method.teacher_taps if isinstance(name, str)]:
        raise UserError(
            f"recipe.method wants the teacher's tokens behind the last {ends[0]}, and data.generate stores those of "
            "units: leave data.set.features out"
        )
    if lacking := [unit for unit in method.teacher_taps if unit % depth not in stored["taps"]]:
        raise UserError(
            f"recipe.method wants the teacher's tokens behind unit {lacking[0]}, stored are those of {stored['taps']}: "
            "run data.generate with this tap, or leave data.set.features out"
        )


def refuse_another_teacher(stored: Mapping[str, Any], path: str | None) -> None:
    """Raises UserError if stored features are of another model than the one at `path`, the run's teacher."""
    found = None if path is None or is_official(path) else manifest.teacher_hash(path)
    if found != stored["teacher"]:
        told = "a model with fresh weights" if path is None else f"{path}, {(found or 'no artifact'):.12}"
        raise UserError(
            f"the stored features are of the teacher {stored['teacher']:.12}, and the run's is {told}: run "
            "data.generate with this teacher, or leave data.set.features out"
        )


def refuse_few(count: int, cfg: DictConfig) -> None:
    """Raises UserError if there are fewer stored generations than a batch has samples: it would have one twice."""
    if (batch := cfg.data.batch_size * world_size(cfg)) > count:
        raise UserError(
            f"a batch has {batch} generations, and {count} are stored: run data.generate with more prompts, or lower "
            "data.batch_size"
        )
