"""Data set, models and losses of a run: all that decides the memory and time of a step, made without weights.

Training reads the `Files` that its configuration names; planning passes other `Sources`, which replace a data set or a
model that is not here yet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import edit
from edit.artifacts.checkpoint import load, skeleton
from edit.artifacts.location import find
from edit.artifacts.official import load_official
from edit.denoiser import Denoiser, Edit
from edit.distillation.guidance import TeacherGuidance
from edit.few_step.method import FewStepMethod
from edit.losses import Loss, Term
from recipes.config.errors import UserError
from recipes.config.values import unplaceable
from recipes.data_set import check_told
from recipes.roles import Origin, Teacher


@dataclass(frozen=True)
class Models:
    """What a run trains on, its models, and its losses: all that decides memory and time of a step."""

    data: Any  # the data set
    student: Origin  # with its edits
    skeleton: Denoiser  # the student's structure, on the meta device
    terms: Mapping[str, Term]
    matching: FewStepMethod | None  # the few-step method; None: diffusion training
    teacher: Teacher | None
    critic: Origin | None


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
    start = changed(sources.start(spec), lambda denoiser: denoiser.resize(spec))
    data = sources.data(spec, start)
    refuse_erased(cfg.init, edits)
    student = student_of(settled(start, data.shape, spec), edits, cfg.seed)
    with torch.device("meta"):
        plan = student.structure()
    refuse_unfit_start(cfg, plan, spec, data.shape)
    refuse_unfit_data(plan, data, cfg)
    terms, matching = made(cfg.terms) or {}, made(cfg.matching)
    refuse_unending(cfg.trainer.strategy, terms)
    refuse_unstoppable(cfg.trainer, terms)
    refuse_unmasked(plan, terms)
    needy = [f"terms.{name}" for name, term in terms.items() if term.needs_teacher]
    needy += ["matching"] if matching is not None and matching.needs_teacher else []
    teacher = teacher_of(cfg, sources, spec, needy, plan, data)
    refuse_unaveraged(cfg.ema.decay, terms)
    critic = None if matching is None else critic_of(cfg, matching, teacher, student)
    return Models(data, student, plan, terms, matching, teacher, critic)


def losses_of(models: Models) -> dict[str, Loss]:
    """Terms, or the few-step method, by their places in the configuration."""
    terms: dict[str, Loss] = {f"terms.{name}": term for name, term in models.terms.items()}
    return terms if models.matching is None else {"matching": models.matching}


def made(node: Any) -> Any:
    """The object that a section of the configuration describes."""
    return instantiate(node, _convert_="all")


# ---- where data and models come from --------------------------------------------------------------------------------


class Sources(ABC):
    """Where a run's data set and stored models come from; `spec` is the backbone's configuration."""

    @abstractmethod
    def start(self, spec: Any) -> Origin:
        """The student before its edits."""

    @abstractmethod
    def data(self, spec: Any, start: Origin) -> Any:
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

    def data(self, spec: Any, start: Origin) -> Any:
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
    return changed(origin, lambda denoiser: denoiser.settle(shape, spec))


def changed(origin: Origin, change: Callable[[Denoiser], None]) -> Origin:
    """The same models after a change."""

    def made_and_changed(make: Callable[[], Denoiser]) -> Denoiser:
        denoiser = make()
        change(denoiser)
        return denoiser

    return Origin(lambda: made_and_changed(origin.build), lambda: made_and_changed(origin.structure))


# ---- models ---------------------------------------------------------------------------------------------------------


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
    if sentence := unplaceable(placement, cfg.trainer.strategy):
        raise UserError(sentence)
    origin = settled(origin, data.shape, spec)
    with torch.device("meta"):
        plan = origin.structure()
    refuse_unfit_teacher(OmegaConf.select(cfg, "teacher.path"), plan, student, data)
    half = "bf16" in cfg.trainer.precision if cfg.teacher.dtype == "auto" else cfg.teacher.dtype == "bf16"
    return Teacher(*origin, guidance, placement, torch.bfloat16 if half else torch.float32)


def critic_of(cfg: DictConfig, matching: FewStepMethod, teacher: Teacher | None, student: Origin) -> Origin | None:
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


def refuse_erased(path: str | None, edits: Mapping[str, Edit]) -> None:
    """Raises UserError if a run starts from weights that an edit would set anew."""
    if path is not None and (name := next((name for name, e in edits.items() if e.starts), None)):
        raise UserError(
            f"edits.{name} sets the first values of all parameters, and init={path} brings trained ones, which would "
            "be lost: leave init out to train from scratch, or the edit (what was trained with it has it already)"
        )


def refuse_unending(strategy: str, terms: Mapping[str, Term]) -> None:
    """Raises UserError if a term ends under a strategy that keeps its parameters to the end."""
    ends = {name: term.ends for name, term in terms.items() if term.ends is not None}
    if ends and strategy.startswith("zero"):
        name, step = next(iter(ends.items()))
        raise UserError(
            f"terms.{name} ends at step {step}, and trainer={strategy} keeps its parameters in flat pieces: use "
            "trainer=fsdp2 or ddp"
        )


def refuse_unstoppable(trainer: Any, terms: Mapping[str, Term]) -> None:
    """Raises UserError if a term stops by gradients, which its step cannot look at."""
    name = next((name for name, term in terms.items() if term.stops), None)
    if name is not None and not (trainer.strategy in ("single", "ddp") and not trainer.compile):
        what = "trainer.compile=true" if trainer.compile else f"trainer={trainer.strategy}"
        raise UserError(
            f"terms.{name} stops by gradients of single units, which {what} does not let it see: use trainer=ddp "
            "without compile, or give the step at which it ends"
        )


def refuse_unmasked(student: Denoiser, terms: Mapping[str, Term]) -> None:
    """Raises UserError if a term drops tokens that an edit or another term cannot do without."""
    dropping = [name for name, term in terms.items() if term.drops]
    if not dropping:
        return
    if len(dropping) > 1:
        raise UserError(f"terms.{dropping[0]} and terms.{dropping[1]} both drop tokens: leave one of the two out")
    needy = [(f"terms.{name}", term) for name, term in terms.items() if not (term.drops or term.subsets)]
    needy += [(f"edits.{name}", e) for name, e in student.applied.items() if not e.subsets]  # type: ignore[misc]
    if needy:
        place, who = needy[0]
        raise UserError(
            f"{place} ({type(who).__name__}) needs all tokens of a sample, and terms.{dropping[0]} drops some in "
            "training: leave one of the two out"
        )


def refuse_unfit_data(student: Denoiser, data: Any, cfg: DictConfig) -> None:
    """Raises UserError if the data's samples, classes or conditions do not fit the backbone."""
    shapes = [tuple(shape) for shape in getattr(data, "buckets", None) or [data.shape]]
    if refused := next((shape for shape in shapes if not student.accepts(shape)), None):
        given, taken = sizes(refused), sizes(student.sample_shape)
        cure = " or ".join(cures(cfg, student.sample_shape, refused)) or "choose another backbone= and size="
        raise UserError(f"the data has samples of {given}, the backbone takes {taken}: {cure}")
    classes = student.facts.classes
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
        raise UserError(f"the data has {data.num_classes} classes, the backbone {classes}: build it for as many")


def cures(cfg: DictConfig, taken: tuple[int, ...], given: tuple[int, ...]) -> Iterator[str]:
    """Settings that would make the backbone and the samples fit, in words.

    Args:
        cfg: of the run
        taken: shape that the backbone takes
        given: shape of the refused samples
    """
    if cfg.init is not None:
        yield f"choose data that init={cfg.init} was made for"
    elif len(taken) == len(given) and (told := list(_fitting(cfg.backbone, taken, given))):
        yield f"set {' '.join(f'backbone.{key}={value}' for key, value in told)}, choose another backbone= and size="
    size = cfg.data.set.get("size")
    if isinstance(size, int) and taken[0] == given[0] and taken[-1] == taken[-2] and size % given[-1] == 0:
        yield f"set data.set.size={size // given[-1] * taken[-1]}"


def _fitting(backbone: DictConfig, taken: tuple[int, ...], given: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """Keys of a backbone's section that decide the shape it takes, with the values for the shape that is given."""
    for key in ("in_channels", "out_channels"):  # of a token, or of mean and variance: a multiple of the sample's
        if taken[0] != given[0] and isinstance(own := backbone.get(key), int):
            yield key, own * given[0] // taken[0]
    sides = [*given[1:]]
    if "input_size" in backbone and taken[1:] != given[1:] and len(set(sides)) == 1:
        yield "input_size", sides[0]
        if sides[0] % (patch := backbone.get("patch_size") or 1):
            yield "patch_size", next(p for p in range(patch, 0, -1) if sides[0] % p == 0)


def refuse_unaveraged(decay: float, terms: Mapping[str, Term]) -> None:
    """Raises UserError if a term learns from the moving average and the run has none."""
    if decay == 0 and (name := next((name for name, term in terms.items() if term.needs_average), None)):
        raise UserError(
            f"terms.{name} learns from the moving average, and with ema.decay=0 that is the model itself: set "
            "ema.decay (the default is 0.995), or leave the term out"
        )


def refuse_unfit_teacher(path: str | None, teacher: Denoiser, student: Denoiser, data: Any) -> None:
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
    classes, own = teacher.facts.classes, student.facts.classes
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


def sizes(shape: Sequence[int]) -> str:
    """A shape as a sentence has it: 1x8x8."""
    return "x".join(map(str, shape))
