"""One training run from its configuration: what train.py does.

A run lives in `runs/<name>/`: config.yaml, env.json, metrics.csv, samples/, checkpoints/, artifact/. The same command
continues it from the last whole checkpoint; a finished run is not trained again.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import edit
from data.names import typed
from edit.artifacts.checkpoint import load, save, skeleton
from edit.artifacts.fingerprint import fingerprint
from edit.artifacts.location import find
from edit.artifacts.official import load_official
from edit.artifacts.weights import Unwritable
from edit.denoiser import Denoiser
from edit.distillation.guidance import TeacherGuidance
from edit.edits import describe
from edit.few_step.method import FewStepMethod
from edit.inputs.command import print_any_name
from edit.inputs.trust import load_yaml
from edit.objectives import Objective
from edit.sampling import Sampler
from recipes.config.errors import UserError
from recipes.config.older import bring_up_to_date
from recipes.config.schema import Evaluation, Root
from recipes.data_set import captions, check_told, conditions, null_condition
from recipes.diffusion import Diffusion
from recipes.few_step import FewStep
from recipes.recipe import Settings
from recipes.report.evaluate import run as evaluate
from recipes.roles import Teacher
from recipes.runtime.callbacks import Checkpoints, Metrics, Preview, ProgressBar, checkpoints, newest, step_of
from recipes.runtime.files import is_first, locked, write
from recipes.runtime.loggers import CSVLogger, close, log_artifact, log_summary, make_loggers
from recipes.runtime.machine import environment
from recipes.runtime.trainer import accelerator_of, count_devices, make_trainer, precision_of, recipe_casts

# what may change between two attempts at one run; everything else decides the numbers
FREE = {"name", "runs", "logger", "checkpoint", "preview", "evaluate", "log_every", "debug", "trusted", "before"}
FREE |= {"after"} | {
    f"trainer.{k}"
    for k in ("max_steps", "accelerator", "strategy", "compile", "gradient_checkpointing", "threads", "memory")
}
BATCH = ("data.batch_size", "trainer.devices", "trainer.num_nodes")  # only their product counts
FREE |= {*BATCH, "data.workers"}


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train, save the artifact, evaluate it.

    Returns:
        The evaluation of the artifact on rank 0; empty on other ranks, or if there was nothing left to do.

    Raises:
        SystemExit: with 143, if the run was told to stop before its last step
        UserError: for what the user can mend, in one sentence
    """
    with ExitStack() as held:
        return _run(cfg, held)


def _run(cfg: DictConfig, held: ExitStack) -> dict[str, Any]:
    """`run`, whose folder is locked from the moment that it is looked into until `held` is left."""
    quiet()
    print_any_name()
    OmegaConf.resolve(cfg)
    cfg.name = str(cfg.name)  # name=${seed} is a number by now
    out = Path(cfg.runs) / cfg.name
    if file := next((p for p in (out, *out.parents) if os.path.lexists(p) and not p.is_dir()), None):
        raise UserError(f"the run cannot be written into {out}: {file} is no folder; choose another name= or runs=")
    cfg.trainer.devices, cfg.trainer.precision = count_devices(cfg.trainer), precision_of(cfg.trainer)
    refuse_other_run(cfg, out)
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)

    torch.manual_seed(cfg.seed)
    objective, sampler = (instantiate(node, _convert_="all") for node in (cfg.objective, cfg.sampler))
    sampler.solver.check(objective)
    if cfg.teacher.path is not None:
        try:
            find(cfg.teacher.path, weights=False)
        except OSError as error:
            raise UserError(f"teacher.path: {error}") from error
    data = instantiate(cfg.data.set, _convert_="all")
    build, structure, plan = builders(cfg, data, objective)
    refuse_unrecorded(sampler, plan)
    terms = instantiate(cfg.terms, _convert_="all") or {}
    matching = instantiate(cfg.matching, _convert_="all")
    if matching is not None:
        matching.check(sampler.solver)
    needy = [f"terms.{name}" for name, term in terms.items() if term.needs_teacher]
    needy += ["matching"] if matching is not None and matching.needs_teacher else []
    teacher = make_teacher(cfg, data, objective, needy, plan)
    sight = make_sight(data, matching)
    stored = getattr(data, "stored", None)  # how a teacher made the data, where a method is to know
    if matching is not None and stored is not None:
        matching.check_stored(stored.get("times", []))
    sampler = told_as_taught(sampler, taught_at(teacher, stored), plan, matching)
    condition, null = conditions(data), null_condition(data)
    refuse_too_large(cfg)
    how = Settings(
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
    if matching is None:
        weight = instantiate(cfg.data_weight) if OmegaConf.is_config(cfg.data_weight) else cfg.data_weight
        module = Diffusion(
            build, structure, objective, how, teacher, null, terms=terms, data_weight=weight, strata=cfg.strata
        )
    else:
        critic = make_critic(cfg, matching, teacher, build, structure)
        follow = cfg.critic.follow
        module = FewStep(build, structure, objective, how, matching, teacher, null, critic, follow, sight)
    if is_first():
        held.enter_context(locked(out))
        refuse_other_run(cfg, out)  # again: another process may have written there until now
    resume = newest(out / "checkpoints")
    done = step_of(resume) if resume else 0
    first_rank = rank_zero_only.rank in (0, None)
    if done > cfg.trainer.max_steps:
        raise UserError(
            f"{out} is at step {done}, and trainer.max_steps={cfg.trainer.max_steps} ends before that: give at least "
            f"{done} to go on, or the new run another name="
        )
    if done >= cfg.trainer.max_steps and (out / "artifact").is_dir():
        if not first_rank:
            return {}
        print(f"{out} is complete ({done} steps): a new run needs another name=")
        if cfg.evaluate and not (out / "report.json").exists():  # it was stopped between training and evaluation
            return finish(cfg, out / "artifact")
        print(f"next      {typed('python', 'eval.py', f'artifact={out}')}")
        return {}
    if first_rank:
        refuse_other_teacher(cfg, out, resume is not None)
        write_once(cfg, out)
        if cfg.optimizer.warmup > cfg.trainer.max_steps:
            print(
                f"warning: optimizer.warmup={cfg.optimizer.warmup} is longer than the run of {cfg.trainer.max_steps} "
                "steps: optimizer.lr is never reached",
                flush=True,
            )
    if cfg.trainer.strategy.startswith("zero"):
        module.configure_model()  # whole, before DeepSpeed partitions it
    loggers = make_loggers(cfg.logger, out, cfg.name, OmegaConf.to_container(cfg))
    assert isinstance(loggers[0], CSVLogger)
    loggers[0].resume(done)

    world = cfg.trainer.devices * cfg.trainer.num_nodes
    batch = cfg.data.batch_size * cfg.trainer.accumulate * world
    flops, peak = speed_limits(structure, cfg)
    metrics = Metrics(cfg.log_every, batch, flops, peak)
    preview = Preview(
        cfg.preview.every,
        cfg.preview.count,
        sampler,
        out / "samples",
        grid=lambda x: picture(data, x),
        condition=lambda n: condition(torch.arange(n)),
        captions=lambda n: captions(data, n),
        negative=null,
        seed=cfg.seed,
        metrics=metrics,
    )
    saver = Checkpoints(out / "checkpoints", cfg.checkpoint.every, cfg.checkpoint.keep, metrics)
    turns = matching is not None and matching.adversarial
    trainer = make_trainer(cfg.trainer, out, loggers, [metrics, ProgressBar(metrics), preview, saver], turns)

    from data.loader import EndlessLoader

    split = data.train()
    if resume and trainer.is_global_zero:
        print(f"resuming {out} at step {done} of {cfg.trainer.max_steps}", flush=True)
    loader = EndlessLoader(
        split,
        batch_size=cfg.data.batch_size,
        total=cfg.trainer.max_steps * cfg.trainer.accumulate,
        seed=cfg.seed,
        rank=trainer.global_rank,
        world=world,
        workers=cfg.data.workers,
    )
    try:
        trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    except FloatingPointError as error:
        raise UserError(str(error)) from error
    if trainer.global_step < cfg.trainer.max_steps:
        sys.exit(143)  # told to stop: what was to follow this run, or this job of a sweep, must not start

    state = full_state(module.ema, trainer)
    if not trainer.is_global_zero:
        return {}
    made = {"name": cfg.name, "step": trainer.global_step, "seed": cfg.seed, "images": batch * cfg.trainer.max_steps}
    if matching is not None:
        made |= {"matching": describe(matching), "teacher": OmegaConf.to_container(cfg.teacher)}
    described = OmegaConf.to_container(cfg.data.set)
    try:
        artifact = save(
            module.ema, out / "artifact", module.objective, sampler, described, run=made | here(), state=state
        )
    except Unwritable as error:
        raise UserError(
            f"no artifact was written: {error}; the checkpoints are kept: remove the newest to go back, and lower "
            "optimizer.lr, or lengthen optimizer.warmup"
        ) from error
    log_artifact(loggers, artifact)  # before the evaluation, which may fail
    try:
        report = finish(cfg, artifact)
        log_summary(loggers, numbers(report))
    finally:
        close(loggers)
    return report


# ---- building -------------------------------------------------------------------------------------------------------


def builders(cfg: DictConfig, data: Any, objective: Objective):
    """Two ways to make the run's denoiser: with its starting weights, and its structure alone; and that structure.

    Raises:
        UserError: if backbone, starting artifact, objective and data do not fit together
    """
    spec = instantiate(cfg.backbone, _convert_="all")
    edits = instantiate(cfg.edits, _convert_="all") or {}
    official = cfg.init is not None and str(cfg.init).endswith((".pt", ".pth"))

    def structure() -> Denoiser:
        denoiser = spec.build() if cfg.init is None or official else skeleton(cfg.init, tuple(cfg.trusted))
        denoiser.settle(data.shape, spec)
        return edit.apply(denoiser, edits, fresh=False)

    def build() -> Denoiser:
        torch.manual_seed(cfg.seed)
        if cfg.init is None:
            denoiser = spec.build()
        elif official:
            denoiser = spec.build()
            load_official(denoiser, cfg.init)
        else:
            denoiser = load(cfg.init, trusted=tuple(cfg.trusted)).denoiser
        denoiser.settle(data.shape, spec)
        return edit.apply(denoiser, edits)

    with torch.device("meta"):
        plan = structure()
        wanted = spec.build()
        wanted.settle(data.shape, spec)
        wanted = wanted.config
    if plan.base != wanted:
        key = next(k for k in wanted if plan.base.get(k) != wanted[k])
        raise UserError(
            f"init={cfg.init} holds a {plan.name} with {key}={plan.base.get(key)}, the backbone group says "
            f"{wanted[key]}: choose the backbone that the artifact was made with"
        )
    if plan.prediction != objective.prediction:
        fit = "objective=ddpm" if plan.prediction == "noise" else "objective=flow or objective=sit"
        raise UserError(
            f"the backbone predicts a {plan.prediction}, the objective trains a {objective.prediction}: choose {fit}, "
            "or another backbone.time"
        )
    shapes = [tuple(shape) for shape in getattr(data, "buckets", None) or [data.shape]]
    if refused := next((shape for shape in shapes if not plan.accepts(shape)), None):
        given, taken = "x".join(map(str, refused)), "x".join(map(str, plan.sample_shape))
        raise UserError(f"the data has samples of {given}, the backbone takes {taken}: change one of the two groups")
    classes = plan.config.get("num_classes")
    if classes is None:
        try:
            check_told(plan, data)
        except ValueError as error:
            raise UserError(f"the backbone cannot be told what this data tells: {error}") from error
    if data.num_classes is None and classes is not None:
        raise UserError(f"the {plan.name} backbone is class-conditional, the data has no labels: sort it into folders")
    if data.num_classes is not None and classes is not None and data.num_classes > classes:
        raise UserError(f"the data has {data.num_classes} classes, the backbone {classes}: set backbone.num_classes")
    return build, structure, plan


def refuse_unrecorded(sampler: Sampler, student: Denoiser) -> None:
    """A sampler is refused before the training whose previews it would end.

    Raises:
        UserError: if its solver is given maps that no edit of the student records
    """
    recorded = {name for e in student.applied.values() for name in e.records}
    if lacking := next((name for name in sampler.solver.extras if name not in recorded), None):
        raise UserError(
            f"sampler.solver: {type(sampler.solver).__name__} needs a model that records {lacking!r}, and no edit of "
            "this run does: add the one that does (edits=policy for a policy), or choose another sampler"
        )


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
    """The sampler, with the guidance that the student is told while it learns from a teacher.

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


def make_teacher(
    cfg: DictConfig, data: Any, objective: Objective, needy: Sequence[str], student: Denoiser
) -> Teacher | None:
    """The frozen teacher.

    Args:
        cfg: of the run
        data: the data set
        objective: of the student
        needy: the sections that cannot do without one
        student: its structure

    Raises:
        UserError: if one is needed and there is none, or it does not fit data and objective
    """
    if cfg.teacher.path is None and cfg.teacher.placement != "tied":
        if needy:
            raise UserError(f"{needy[0]} compares with a teacher: give its folder with teacher.path=...")
        return None
    scale = cfg.teacher.guidance
    low, high = scale if OmegaConf.is_list(scale) else (scale, scale)
    guidance = TeacherGuidance(float(low), float(high))
    if cfg.teacher.placement == "tied":
        return Teacher(None, None, guidance, "tied")
    path, spec = cfg.teacher.path, instantiate(cfg.backbone, _convert_="all")

    def structure() -> Denoiser:
        denoiser = skeleton(path, tuple(cfg.trusted))
        denoiser.settle(data.shape, spec)
        return denoiser

    def build() -> Denoiser:
        denoiser = load(path, trusted=tuple(cfg.trusted)).denoiser
        denoiser.settle(data.shape, spec)
        return denoiser

    plan = structure()
    if plan.name != student.name:
        raise UserError(
            f"teacher.path={path} holds a {plan.name}, the student is a {student.name}: choose a teacher of its family"
        )
    if plan.prediction != objective.prediction:
        raise UserError(
            f"teacher.path={path} predicts a {plan.prediction}, the student is trained on a {objective.prediction}: "
            "choose a teacher of the same kind"
        )
    classes, own = plan.config.get("num_classes"), getattr(spec, "num_classes", None)
    if classes is not None and own is not None and classes != own:
        raise UserError(f"teacher.path={path} knows {classes} classes, the backbone {own}: choose the same for both")
    if not plan.accepts(tuple(data.shape)):
        given, taken = "x".join(map(str, data.shape)), "x".join(map(str, plan.sample_shape))
        raise UserError(f"teacher.path={path} takes samples of {taken}, the data has {given}: choose a teacher for it")
    try:
        check_told(plan, data)
    except ValueError as error:
        raise UserError(f"teacher.path={path} cannot be told what this data tells: {error}") from error
    half = "bf16" in precision_of(cfg.trainer) if cfg.teacher.dtype == "auto" else cfg.teacher.dtype == "bf16"
    return Teacher(build, structure, guidance, cfg.teacher.placement, torch.bfloat16 if half else torch.float32)


def make_critic(
    cfg: DictConfig,
    matching: FewStepMethod,
    teacher: Teacher | None,
    build: Callable[[], Denoiser],
    structure: Callable[[], Denoiser],
) -> tuple[Callable[[], Denoiser], Callable[[], Denoiser]] | None:
    """Two ways to make the critic: with its starting weights, and its structure alone; None if the method has none.

    Raises:
        UserError: if the strategy cannot let roles take turns
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
        return build, structure
    if teacher is None or teacher.build is None or teacher.structure is None:
        raise UserError("critic.start=teacher needs a teacher with weights of its own: use critic.start=student")
    return teacher.build, teacher.structure


def make_sight(data: Any, matching: FewStepMethod | None) -> tuple[nn.Module, nn.Module] | None:
    """What the method looks at images with: the data set's decoder, and its vision model; None if it does not look.

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


def refuse_too_large(cfg: DictConfig) -> None:
    """A run that would end for lack of memory does not begin. A plan that cannot be made stops nothing.

    Raises:
        UserError: with what to change
    """
    from recipes.plan import Request, draft_of, refuse

    gpu = accelerator_of(cfg.trainer) == "gpu"
    capacity = cfg.trainer.memory
    if capacity is None and gpu:
        capacity = torch.cuda.get_device_properties(0).total_memory / 1e9
    if not capacity:
        return
    try:
        draft = draft_of(Request(), cfg, [])
        if draft.plan().total <= capacity * 1e9:
            return
    except Exception as error:  # whatever an edit does that cannot be followed without weights
        print(f"memory    not planned: {' '.join(str(error).split())}", flush=True)
        return
    try:
        refuse(draft, capacity * 1e9)
    except ValueError as error:
        raise UserError(f"{error}; trainer.memory=0 launches it all the same") from error


def refuse_other_run(cfg: DictConfig, out: Path) -> None:
    """A run is continued only with the settings that decide its numbers unchanged.

    The ranks that share a batch may change, as long as the batch does not.

    Raises:
        UserError: naming the first setting that differs
    """
    if not (out / "config.yaml").exists() or not (checkpoints(out / "checkpoints") or (out / "artifact").exists()):
        return
    before, now = (flat(OmegaConf.to_container(c)) for c in (read_config(out / "config.yaml"), cfg))
    for settings_ in (before, now):
        factors = [settings_.get(k) or 1 for k in BATCH]
        whole = all(isinstance(v, int) for v in factors)  # not in a damaged file
        settings_["data.batch_size x trainer.devices x trainer.num_nodes"] = prod(factors) if whole else factors
    defaults = flat(OmegaConf.to_container(OmegaConf.structured(Root)))  # an older run may not know every setting
    for key in {**before, **now}:
        free = key in FREE or key.split(".")[0] in FREE
        if not free and (was := before.get(key, defaults.get(key))) != now.get(key):
            raise UserError(
                f"{out} holds a run with {key}={was}, this command says {now.get(key)}: give the new run "
                f"another name=, or restore the setting to resume"
            )


def read_config(path: Path) -> DictConfig:
    """The configuration that a run was started with.

    Raises:
        UserError: if the file is damaged
    """
    try:
        config = load_yaml(path)
        if isinstance(config, DictConfig) and "trainer" in config and "data" in config:
            bring_up_to_date(config)
            return config
        reason = "it holds no trainer and data"
    except (ValueError, OmegaConfBaseException) as error:
        reason = str(error).split("\n")[0]
    raise UserError(
        f"{path} is damaged ({reason}), and with it what this run was started with: restore it, or delete it to go on "
        "with the settings of this command"
    )


def refuse_other_teacher(cfg: DictConfig, out: Path, resumes: bool) -> None:
    """A run is continued only with the teacher it began with; what that is, is kept in its folder.

    Raises:
        UserError: if the weights under the same path are others by now
    """
    if cfg.teacher.path is None:
        return
    kept, now = out / "teacher.json", fingerprint(cfg.teacher.path)
    try:
        before = json.loads(kept.read_text())["fingerprint"] if resumes and kept.exists() else now
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{kept} is damaged: delete it if {cfg.teacher.path} is the run's teacher") from error
    if before != now:
        raise UserError(
            f"{out} began with another teacher: the weights at {cfg.teacher.path} have changed since; give the new run "
            "another name=, or restore them to resume"
        )
    write(kept, json.dumps({"path": str(cfg.teacher.path), "fingerprint": now}))


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    if isinstance(node, Mapping) and node:
        return {k: v for name, child in node.items() for k, v in flat(child, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): node} if prefix else {}


def write_once(cfg: DictConfig, out: Path) -> None:
    write(out / "config.yaml", OmegaConf.to_yaml(cfg))
    write(out / "env.json", json.dumps(here(), indent=2))


def here() -> dict[str, Any]:
    """What the numbers of this run depend on besides its configuration."""
    return environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")) | {"lightning": pl.__version__}


def speed_limits(structure: Any, cfg: DictConfig) -> tuple[float | None, float | None]:
    """Training FLOPs per image and the device's peak, where it is known."""
    from edit.measuring.cost import macs
    from edit.measuring.devices import peak_flops

    if accelerator_of(cfg.trainer) != "gpu":
        return None, None
    with torch.device("meta"):
        denoiser = structure()
    return 6 * macs(denoiser), peak_flops(torch.cuda.get_device_name())


# ---- finishing ------------------------------------------------------------------------------------------------------


def full_state(denoiser: Denoiser, trainer: Any) -> Mapping[str, Any]:
    """The whole state dict on rank 0, gathered where it is sharded. Every rank must call this."""
    if any(hasattr(p, "ds_id") for p in denoiser.parameters()):
        import deepspeed

        gather = deepspeed.zero.GatheredParameters(list(denoiser.parameters()))
    else:
        gather = nullcontext()
    with gather:
        if isinstance(trainer.strategy, ModelParallelStrategy):
            return get_model_state_dict(denoiser, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return {k: v.detach().cpu().clone() for k, v in denoiser.state_dict().items()}


def picture(data: Any, x: torch.Tensor):
    """Samples as one grid, uint8 y x 3."""
    import numpy as np

    from recipes.report.page import image_grid

    columns = data.num_classes if data.num_classes and data.num_classes <= 12 else 8
    return np.asarray(image_grid(data.to_images(x), columns))


def numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """The qualities that a report measured, by name and guidance weight."""
    return {
        f"{name} w={result['guidance']:g}": measure["value"]
        for artifact in report.get("artifacts", [])
        for result in artifact["results"]
        for name, measure in result["quality"].items()
    }


def finish(cfg: DictConfig, artifact: Path) -> dict[str, Any]:
    """Say what came out, evaluate it, and say what to type next."""
    out = artifact.parent
    print(f"artifact  {artifact}", flush=True)
    report = evaluate([artifact], Evaluation.of(cfg.evaluate), out) if cfg.evaluate else {}
    print(f"next      {typed('python', 'eval.py', f'artifact={out}')}", flush=True)
    return report


def quiet() -> None:
    """Lightning's advice about loaders, loggers and tips is not about this program."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    # units hand `cond` on as FSDP2 gave it to them; nothing writes into it
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
