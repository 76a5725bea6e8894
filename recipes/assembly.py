"""From a configuration to one checked `Run`: each part is made, as far as it needs no weights, and must fit the others.

`assemble` is what training calls. `models_of` makes the part that decides memory and time; planning calls it as well,
with sources that replace a data set or a model that is not there yet. Each refusal is one sentence, said here alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import edit
from edit.artifacts.checkpoint import find, load, load_official, skeleton
from edit.denoiser import Condition, Denoiser
from edit.distillation.guidance import TeacherGuidance
from edit.edits import Edit
from edit.few_step.method import Matching
from edit.objectives import Objective, Term
from edit.sampling import Sampler
from recipes.config.schema import UserError
from recipes.recipe import Training
from recipes.report.evaluate import check_told, conditions, null_condition
from recipes.roles import Origin, Teacher
from recipes.runtime.trainer import precision_of, recipe_casts


@dataclass(frozen=True)
class Models:
    """What a run trains on, its models, and its losses: all that decides memory and time of a step."""

    data: Any  # the data set
    student: Origin  # with its edits
    skeleton: Denoiser  # the student's structure, on the meta device
    terms: Mapping[str, Term]
    matching: Matching | None  # the few-step method; None: diffusion training
    teacher: Teacher | None
    critic: Origin | None


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
    sight: tuple[nn.Module, nn.Module] | None  # decoder and vision model, where the method looks at images


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
    sight = make_sight(data, matching)
    if matching is not None and stored is not None:
        matching.check_stored(stored.get("times", []))
    sampler = told_as_taught(sampler, taught_at(models.teacher, stored), models.skeleton, matching)
    condition, null = conditions(data), null_condition(data)
    return Run(cfg, models, objective, sampler, training_of(cfg), condition, null, sight)


def made(node: Any) -> Any:
    """The object that a section of the configuration describes."""
    return instantiate(node, _convert_="all")


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


# ---- where data and models come from --------------------------------------------------------------------------------


class Sources(ABC):
    """Where a run's data set and stored models come from; `spec` is the backbone's configuration."""

    @abstractmethod
    def start(self, spec: Any) -> Origin:
        """The student before its edits."""

    @abstractmethod
    def data(self, start: Origin) -> Any:
        """The data set, or a stand-in that fits a model of this origin."""

    @abstractmethod
    def teacher(self, spec: Any, needy: Sequence[str]) -> Origin | None:
        """The teacher; None: there is none. `needy`: the sections of the configuration that cannot do without one."""


class Files(Sources):
    """The paths that a configuration names; a path that leads nowhere is refused.

    Raises:
        UserError: if there is no teacher at its path
    """

    def __init__(self, cfg: DictConfig):
        self.cfg, self.trusted = cfg, tuple(cfg.trusted)
        if cfg.teacher.path is not None:
            try:
                find(cfg.teacher.path, weights=False)
            except OSError as error:
                raise UserError(f"teacher.path: {error}") from error

    def start(self, spec: Any) -> Origin:
        path = self.cfg.init
        if path is None:
            return Origin(spec.build, spec.build)
        if not is_official(path):
            return stored_model(path, self.trusted)

        def build() -> Denoiser:
            denoiser = spec.build()
            load_official(denoiser, path)
            return denoiser

        return Origin(build, spec.build)

    def data(self, start: Origin) -> Any:
        return made(self.cfg.data.set)

    def teacher(self, spec: Any, needy: Sequence[str]) -> Origin | None:
        if self.cfg.teacher.path is not None:
            return stored_model(self.cfg.teacher.path, self.trusted)
        if needy:
            raise UserError(f"{needy[0]} compares with a teacher: give its folder with teacher.path=...")
        return None


def is_official(path: str) -> bool:
    """Whether a path is that of an official checkpoint, which does not say what structure it has."""
    return str(path).endswith((".pt", ".pth"))


def stored_model(path: str, trusted: tuple[str, ...]) -> Origin:
    """The model of an artifact, run or `diffusers` folder."""
    return Origin(lambda: load(path, trusted=trusted).denoiser, lambda: skeleton(path, trusted))


def settled(origin: Origin, shape: tuple[int, ...], spec: Any) -> Origin:
    """The same models, told the shape of a sample and the backbone's settings."""

    def told(make: Callable[[], Denoiser]) -> Denoiser:
        denoiser = make()
        denoiser.settle(shape, spec)
        return denoiser

    return Origin(lambda: told(origin.build), lambda: told(origin.structure))


# ---- models ---------------------------------------------------------------------------------------------------------


def models_of(cfg: DictConfig, sources: Sources) -> Models:
    """Make and check data set, models and losses of a run; builds no weights.

    Args:
        cfg: composed; devices and precision are decided
        sources: where data set and models come from

    Raises:
        UserError, ValueError: for the first two parts that do not fit together
        hydra.errors.InstantiationException: for a part that cannot be made
    """
    spec, edits = made(cfg.backbone), made(cfg.edits) or {}
    start = sources.start(spec)
    data = sources.data(start)
    student = student_of(settled(start, data.shape, spec), edits, cfg.seed)
    with torch.device("meta"):
        plan = student.structure()
    refuse_unfit_start(cfg, plan, spec, data.shape)
    refuse_unfit_data(plan, data)
    terms, matching = made(cfg.terms) or {}, made(cfg.matching)
    needy = [f"terms.{name}" for name, term in terms.items() if term.needs_teacher]
    needy += ["matching"] if matching is not None and matching.needs_teacher else []
    teacher = teacher_of(cfg, sources, spec, needy, plan, data)
    critic = None if matching is None else critic_of(cfg, matching, teacher, student)
    return Models(data, student, plan, terms, matching, teacher, critic)


def student_of(start: Origin, edits: Mapping[str, Edit], seed: int) -> Origin:
    """The denoiser that is trained: a model to start from, and the run's edits."""

    def build() -> Denoiser:
        torch.manual_seed(seed)
        return edit.apply(start.build(), edits)

    return Origin(build, lambda: edit.apply(start.structure(), edits, fresh=False))


def teacher_of(
    cfg: DictConfig, sources: Sources, spec: Any, needy: Sequence[str], student: Denoiser, data: Any
) -> Teacher | None:
    """The frozen teacher; None: the run has none.

    Raises:
        UserError: if one is needed and there is none, or if it does not fit student, data or strategy
    """
    placement, scale = cfg.teacher.placement, cfg.teacher.guidance
    low, high = scale if OmegaConf.is_list(scale) else (scale, scale)
    guidance = TeacherGuidance(float(low), float(high))
    if placement == "tied":
        return Teacher(None, None, guidance, "tied")
    origin = sources.teacher(spec, needy)
    if origin is None:
        return None
    refuse_placement(placement, cfg.trainer.strategy)
    origin = settled(origin, data.shape, spec)
    with torch.device("meta"):
        plan = origin.structure()
    refuse_unfit_teacher(OmegaConf.select(cfg, "teacher.path"), plan, student, spec, data)
    half = "bf16" in precision_of(cfg.trainer) if cfg.teacher.dtype == "auto" else cfg.teacher.dtype == "bf16"
    return Teacher(*origin, guidance, placement, torch.bfloat16 if half else torch.float32)


def critic_of(cfg: DictConfig, matching: Matching, teacher: Teacher | None, student: Origin) -> Origin | None:
    """The critic before it is trained; None: the method has none.

    Raises:
        UserError: if the teacher's placement or the strategy does not let the method train
    """
    if matching.teacher_taps and cfg.teacher.placement in ("tied", "offloaded"):
        raise UserError(
            f"matching: {type(matching).__name__} looks at the teacher's tokens, whose weights must stay "
            f"in place, but teacher.placement={cfg.teacher.placement}: use replicated or sharded"
        )
    alternate = matching.adversarial and not (matching.every == 1 and matching.together)
    if alternate and cfg.trainer.strategy.startswith("zero"):
        raise UserError(
            f"trainer={cfg.trainer.strategy} moves every parameter in every step, so roles cannot take turns: use "
            "trainer=fsdp2, or matching.every=1 matching.together=true"
        )
    if not matching.has_critic:
        return None
    if cfg.critic.start == "student":
        return student
    if teacher is None or teacher.build is None or teacher.structure is None:
        raise UserError("critic.start=teacher needs a teacher with weights of its own: use critic.start=student")
    return Origin(teacher.build, teacher.structure)


def make_sight(data: Any, matching: Matching | None) -> tuple[nn.Module, nn.Module] | None:
    """The data set's decoder and the method's vision model; None: the method looks at no images.

    Raises:
        UserError: if one of the two cannot be had, or a crop is larger than the samples
    """
    if matching is None or matching.vision is None:
        return None
    crop, shapes = matching.vision.crop, getattr(data, "buckets", None) or [data.shape]
    if crop is not None and crop > (least := min(side for shape in shapes for side in shape[1:])):
        raise UserError(
            f"matching.vision.crop={crop} is more than the {least} rows of a sample: lower it, or leave it out"
        )
    try:
        return getattr(data, "decoder", nn.Identity)(), matching.vision.load()
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"matching.vision looks at decoded images: {error}") from error


# ---- parts that do not fit ------------------------------------------------------------------------------------------


def refuse_unfit_start(cfg: DictConfig, student: Denoiser, spec: Any, shape: tuple[int, ...]) -> None:
    """Raises UserError if `init` holds another structure than the backbone group says."""
    with torch.device("meta"):
        wanted = spec.build()
        wanted.settle(shape, spec)
    if student.base != wanted.config:
        key = next(k for k in wanted.config if student.base.get(k) != wanted.config[k])
        raise UserError(
            f"init={cfg.init} holds a {student.name} with {key}={student.base.get(key)}, the backbone group says "
            f"{wanted.config[key]}: choose the backbone that the artifact was made with"
        )


def refuse_unfit_objective(student: Denoiser, objective: Objective) -> None:
    """Raises UserError if the backbone predicts another quantity than the objective trains."""
    if student.prediction != objective.prediction:
        fit = "objective=ddpm" if student.prediction == "noise" else "objective=flow or objective=sit"
        raise UserError(
            f"the backbone predicts a {student.prediction}, the objective trains a {objective.prediction}: choose "
            f"{fit}, or another backbone.time"
        )


def refuse_unfit_data(student: Denoiser, data: Any) -> None:
    """Raises UserError if the data's samples, classes or conditions do not fit the backbone."""
    shapes = [tuple(shape) for shape in getattr(data, "buckets", None) or [data.shape]]
    if refused := next((shape for shape in shapes if not student.accepts(shape)), None):
        given, taken = sizes(refused), sizes(student.sample_shape)
        raise UserError(f"the data has samples of {given}, the backbone takes {taken}: change one of the two groups")
    classes = student.config.get("num_classes")
    if classes is None:
        try:
            check_told(student, data)
        except ValueError as error:
            raise UserError(f"the backbone cannot be told what this data tells: {error}") from error
    if data.num_classes is None and classes is not None:
        raise UserError(
            f"the {student.name} backbone is class-conditional, the data has no labels: sort it into folders"
        )
    if data.num_classes is not None and classes is not None and data.num_classes > classes:
        raise UserError(f"the data has {data.num_classes} classes, the backbone {classes}: set backbone.num_classes")


def refuse_unfit_teacher(path: str | None, teacher: Denoiser, student: Denoiser, spec: Any, data: Any) -> None:
    """Raises UserError if the teacher is of another kind than the student, or does not fit the data."""
    if teacher.name != student.name:
        raise UserError(
            f"teacher.path={path} holds a {teacher.name}, the student is a {student.name}: choose a teacher of its "
            "family"
        )
    if teacher.prediction != student.prediction:
        raise UserError(
            f"teacher.path={path} predicts a {teacher.prediction}, the student is trained on a {student.prediction}: "
            "choose a teacher of the same kind"
        )
    classes, own = teacher.config.get("num_classes"), getattr(spec, "num_classes", None)
    if classes is not None and own is not None and classes != own:
        raise UserError(f"teacher.path={path} knows {classes} classes, the backbone {own}: choose the same for both")
    if not teacher.accepts(tuple(data.shape)):
        raise UserError(
            f"teacher.path={path} takes samples of {sizes(teacher.sample_shape)}, the data has {sizes(data.shape)}: "
            "choose a teacher for it"
        )
    try:
        check_told(teacher, data)
    except ValueError as error:
        raise UserError(f"teacher.path={path} cannot be told what this data tells: {error}") from error


def refuse_placement(placement: str, strategy: str) -> None:
    """Raises UserError if the strategy has no shards for a teacher."""
    if placement == "sharded" and strategy == "single":
        raise UserError(
            "teacher.placement=sharded needs several devices: use trainer=ddp or fsdp2, or placement=replicated"
        )
    if placement == "sharded" and strategy.startswith("zero"):
        raise UserError(
            "teacher.placement=sharded is FSDP2's, not DeepSpeed's: use trainer=fsdp2, or placement=replicated"
        )


def refuse_unrecorded(sampler: Sampler, student: Denoiser) -> None:
    """Raises UserError if the solver reads a record that no edit of the student makes: previews would fail."""
    recorded = {name for e in student.applied.values() for name in e.records}
    if lacking := next((name for name in sampler.solver.extras if name not in recorded), None):
        raise UserError(
            f"sampler.solver: {type(sampler.solver).__name__} needs a model that records {lacking!r}, and no edit of "
            "this run does: add the one that does (edits=policy for a policy), or choose another sampler"
        )


def sizes(shape: Sequence[int]) -> str:
    """A shape as a sentence has it: 1x8x8."""
    return "x".join(map(str, shape))


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
    sampler: Sampler, taught: TeacherGuidance | None, student: Denoiser, matching: Matching | None
) -> Sampler:
    """The sampler, which tells the student the guidance that it learns from a teacher.

    Raises:
        UserError: if a student would be sampled at another guidance than it has learned, or guided twice
    """
    takes = student.config.get("guidance_embeds")
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
