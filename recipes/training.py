"""One training run from its configuration: what train.py does.

The same command continues a run from its last whole checkpoint; a finished run is not trained again.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from data.loader import EndlessLoader
from data.names import typed
from edit.artifacts.checkpoint import save
from edit.artifacts.weights import Unwritable
from edit.denoiser import Denoiser
from edit.edits import describe
from edit.inputs.command import print_any_name
from edit.measuring.cost import macs
from edit.measuring.devices import peak_flops
from edit.measuring.memory import refuse
from recipes.assembly import Run, assemble
from recipes.config.errors import UserError
from recipes.config.schema import Evaluation
from recipes.data_set import captions
from recipes.diffusion import Diffusion
from recipes.few_step import FewStep
from recipes.models import made
from recipes.plan import draft_of
from recipes.recipe import Recipe
from recipes.report.evaluate import run as evaluate
from recipes.runtime.callbacks import Checkpoints, Metrics, Preview, ProgressBar, newest, step_of
from recipes.runtime.files import is_first, locked
from recipes.runtime.loggers import CSVLogger, close, log_artifact, log_summary, make_loggers
from recipes.runtime.run_folder import begin, folder_of, here, refuse_other_run, refuse_overrun
from recipes.runtime.trainer import accelerator_of, count_devices, make_trainer, precision_of


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train, save the artifact, evaluate it.

    Returns:
        The evaluation of the artifact on rank 0; empty on other ranks, or if there was nothing left to do.

    Raises:
        SystemExit: with 143, if the run was told to stop before its last step
        UserError: for what the user can mend, in one sentence
    """
    quiet()
    print_any_name()
    out = settle(cfg)
    refuse_other_run(cfg, out)
    set_up_torch(cfg)
    job = assemble(cfg)
    refuse_too_large(job)
    module = module_of(job)
    with ExitStack() as held:
        if is_first():
            held.enter_context(locked(out))
            refuse_other_run(cfg, out)  # again: another process may have written there until now
        resume = newest(out / "checkpoints")
        done = step_of(resume) if resume else 0
        refuse_overrun(cfg, out, done)
        first_rank = rank_zero_only.rank in (0, None)
        if done >= cfg.trainer.max_steps and (out / "artifact").is_dir():
            return complete(cfg, out, done) if first_rank else {}
        if first_rank:
            begin(cfg, out, resume is not None)
        trainer = fit(job, module, out, resume, done)
        state = full_state(module.ema, trainer)
        if not trainer.is_global_zero:
            return {}
        artifact = keep(job, module, out, state, trainer.global_step)
        log_artifact(trainer.loggers, artifact)  # before the evaluation, which may fail
        try:
            report = finish(cfg, artifact)
            log_summary(trainer.loggers, numbers(report))
        finally:
            close(trainer.loggers)
        return report


# ---- before the first step ------------------------------------------------------------------------------------------


def settle(cfg: DictConfig) -> Path:
    """Decide, in place, what the configuration leaves to this machine. Returns the run's folder.

    Raises:
        UserError: if the folder cannot be made, or the devices are not here
    """
    OmegaConf.resolve(cfg)
    cfg.name = str(cfg.name)  # name=${seed} is a number by now
    out = folder_of(cfg)
    cfg.trainer.devices, cfg.trainer.precision = count_devices(cfg.trainer), precision_of(cfg.trainer)
    return out


def set_up_torch(cfg: DictConfig) -> None:
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    torch.manual_seed(cfg.seed)


def refuse_too_large(run: Run) -> None:
    """Refuse a run that would end for lack of memory. A plan that cannot be made stops nothing.

    Raises:
        UserError: with settings that would make it fit
    """
    trainer = run.config.trainer
    capacity = trainer.memory
    if capacity is None and accelerator_of(trainer) == "gpu":
        capacity = torch.cuda.get_device_properties(0).total_memory / 1e9
    if not capacity:
        return
    try:
        draft = draft_of(run.models, run.config, [])
        if draft.plan().total <= capacity * 1e9:
            return
    except Exception as error:  # an edit may do anything that cannot be followed without weights
        print(f"memory    not planned: {' '.join(str(error).split())}", flush=True)
        return
    try:
        refuse(draft, capacity * 1e9)
    except ValueError as error:
        raise UserError(f"{error}; trainer.memory=0 launches it all the same") from error


def module_of(run: Run) -> Recipe:
    """The training procedure: few-step distillation if the run has a method for it, else diffusion training."""
    cfg, models = run.config, run.models
    shared = *models.student, run.objective, run.training
    if models.matching is not None:
        roles = models.teacher, run.null, models.critic
        return FewStep(*shared, models.matching, *roles, follow=cfg.critic.follow, sight=run.sight)
    weight = made(cfg.data_weight) if OmegaConf.is_config(cfg.data_weight) else cfg.data_weight
    terms = {"terms": models.terms, "data_weight": weight, "strata": cfg.strata}
    return Diffusion(*shared, models.teacher, run.null, sight=run.sight, **terms)


# ---- training -------------------------------------------------------------------------------------------------------


def fit(run: Run, module: Recipe, out: Path, resume: Path | None, done: int) -> pl.Trainer:
    """Train to the last step.

    Args:
        run: what is trained
        module: its procedure
        out: the run's folder
        resume: checkpoint to go on from; None: from the start
        done: optimiser steps that it holds

    Raises:
        SystemExit: with 143, if the run was told to stop before its last step
        UserError: if gradients stay non-finite
    """
    cfg = run.config
    if cfg.trainer.strategy.startswith("zero"):
        module.configure_model()  # whole, before DeepSpeed partitions it
    loggers = make_loggers(cfg.logger, out, cfg.name, OmegaConf.to_container(cfg))
    assert isinstance(loggers[0], CSVLogger)
    loggers[0].resume(done)
    module.begun = done
    trainer = trainer_of(run, out, loggers)
    split = run.models.data.train()
    if resume and trainer.is_global_zero:
        print(f"resuming {out} at step {done} of {cfg.trainer.max_steps}", flush=True)
    loader = EndlessLoader(
        split,
        batch_size=cfg.data.batch_size,
        total=cfg.trainer.max_steps * cfg.trainer.accumulate,
        seed=cfg.seed,
        rank=trainer.global_rank,
        world=world_size(cfg),
        workers=cfg.data.workers,
    )
    try:
        trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    except FloatingPointError as error:
        raise UserError(str(error)) from error
    if trainer.global_step < cfg.trainer.max_steps:
        sys.exit(143)  # told to stop: whatever follows this run, or this job of a sweep, must not start
    return trainer


def trainer_of(run: Run, out: Path, loggers: list[Logger]) -> pl.Trainer:
    """The run's trainer with its callbacks: numbers, progress, previews, checkpoints."""
    cfg, data = run.config, run.models.data
    metrics = Metrics(cfg.log_every, images_per_step(cfg), *speed_limits(run))
    preview = Preview(
        cfg.preview.every,
        cfg.preview.count,
        run.sampler,
        out / "samples",
        grid=lambda x: picture(data, x),
        condition=lambda n: run.condition(torch.arange(n)),
        captions=lambda n: captions(data, n),
        negative=run.null,
        seed=cfg.seed,
        metrics=metrics,
    )
    saver = Checkpoints(out / "checkpoints", cfg.checkpoint.every, cfg.checkpoint.keep, metrics)
    callbacks: list[Callback] = [metrics, ProgressBar(metrics), preview, saver]
    turns = run.models.matching is not None and run.models.matching.adversarial
    return make_trainer(cfg.trainer, out, loggers, callbacks, turns)


def world_size(cfg: DictConfig) -> int:
    return cfg.trainer.devices * cfg.trainer.num_nodes


def images_per_step(cfg: DictConfig) -> int:
    """Samples per optimiser step, over all ranks."""
    return cfg.data.batch_size * cfg.trainer.accumulate * world_size(cfg)


def speed_limits(run: Run) -> tuple[float | None, float | None]:
    """Training FLOPs per image and the device's peak FLOP/s, where they are known."""
    if accelerator_of(run.config.trainer) != "gpu":
        return None, None
    return 6 * macs(run.models.skeleton), peak_flops(torch.cuda.get_device_name())


def picture(data: Any, x: torch.Tensor):
    """Samples as one grid, uint8 y x 3; of a video some frames in a row."""
    import numpy as np

    from recipes.report.page import image_grid

    columns = data.num_classes if data.num_classes and data.num_classes <= 12 else 8
    return np.asarray(image_grid(data.to_frames(x), columns))


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


def keep(run: Run, module: Recipe, out: Path, state: Mapping[str, Any], step: int) -> Path:
    """Save the average as the run's artifact. Returns its folder.

    Raises:
        UserError: if its weights are not finite
    """
    cfg, matching = run.config, run.models.matching
    images = images_per_step(cfg) * cfg.trainer.max_steps
    told = {"name": cfg.name, "step": step, "seed": cfg.seed, "images": images}
    if matching is not None:
        told |= {"matching": describe(matching), "teacher": OmegaConf.to_container(cfg.teacher)}
    data = OmegaConf.to_container(cfg.data.set)
    try:
        return save(module.ema, out / "artifact", module.objective, run.sampler, data, run=told | here(), state=state)
    except Unwritable as error:
        raise UserError(
            f"no artifact was written: {error}; the checkpoints are kept: remove the newest to go back, and lower "
            "optimizer.lr, or lengthen optimizer.warmup"
        ) from error


def complete(cfg: DictConfig, out: Path, done: int) -> dict[str, Any]:
    """Answer for a run that is finished; evaluate it if it was stopped between training and evaluation."""
    print(f"{out} is complete ({done} steps): a new run needs another name=")
    if cfg.evaluate and not (out / "report.json").exists():
        return finish(cfg, out / "artifact")
    print(f"next      {typed('python', 'eval.py', f'artifact={out}')}")
    return {}


def finish(cfg: DictConfig, artifact: Path) -> dict[str, Any]:
    """Print where the artifact is, evaluate it, and print the command for the next step."""
    out = artifact.parent
    print(f"artifact  {artifact}", flush=True)
    report = evaluate([artifact], Evaluation.of(cfg.evaluate), out) if cfg.evaluate else {}
    print(f"next      {typed('python', 'eval.py', f'artifact={out}')}", flush=True)
    return report


def numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """The qualities that a report measured, by name and guidance weight."""
    return {
        f"{name} w={result['guidance']:g}": measure["value"]
        for artifact in report.get("artifacts", [])
        for result in artifact["results"]
        for name, measure in result["quality"].items()
    }


def quiet() -> None:
    """Silence Lightning's advice about loaders, loggers and tips, which does not concern this program."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    # units hand `cond` on as FSDP2 gave it to them; nothing writes into it
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
