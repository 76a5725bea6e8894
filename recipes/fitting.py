"""A Lightning fit: the run's trainer with its callbacks, from the newest checkpoint to the last step."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import OmegaConf
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from data.loader import EndlessLoader
from edit.data_set import captions, told
from edit.denoiser import Denoiser
from edit.measuring.cost import macs
from edit.measuring.devices import peak_flops
from recipes.assembly import Run
from recipes.config.errors import UserError
from recipes.heldout import HeldOut
from recipes.recipe import Recipe
from recipes.runtime.callbacks import Checkpoints, Metrics, Preview, ProgressBar
from recipes.runtime.checkpoint_files import read_rank
from recipes.runtime.devices import accelerator_of
from recipes.runtime.files import is_first
from recipes.runtime.loggers import CSVLogger, make_loggers
from recipes.runtime.trainer import make_trainer
from recipes.settings import images_per_step, world_size


def fit(run: Run, module: Recipe, out: Path, resume: Path | None, done: int, turns: bool) -> pl.Trainer:
    """Train to the last step.

    Args:
        run: what is trained
        module: its procedure
        out: the run's folder
        resume: checkpoint to go on from; None: from the start
        done: optimiser steps that it holds
        turns: roles take turns, so some parameters get no gradient in a step

    Raises:
        SystemExit: with 143, if the run was told to stop before its last step
        UserError: if gradients stay non-finite
    """
    cfg = run.config
    if cfg.trainer.strategy.startswith("zero"):
        module.configure_model()  # whole, before DeepSpeed partitions it
    if is_first() and cfg.optimizer.warmup > cfg.trainer.max_steps:
        print(
            f"warning: optimizer.warmup={cfg.optimizer.warmup} is longer than the run of {cfg.trainer.max_steps} "
            "steps: optimizer.lr is never reached",
            flush=True,
        )
    loggers = make_loggers(cfg.logger, out, cfg.name, OmegaConf.to_container(cfg))
    assert isinstance(loggers[0], CSVLogger)
    loggers[0].resume(done)
    module.begun = done
    trainer = trainer_of(run, out, loggers, turns)
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
        repeats=module.repeats,
    )
    if resume is not None:
        module.restore(read_rank(resume, trainer.global_rank, trainer.world_size))
    try:
        trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    except FloatingPointError as error:
        raise UserError(str(error)) from error
    if trainer.global_step < cfg.trainer.max_steps:
        sys.exit(143)  # told to stop: whatever follows this run, or this job of a sweep, must not start
    return trainer


def trainer_of(run: Run, out: Path, loggers: list[Logger], turns: bool) -> pl.Trainer:
    """The run's trainer with its callbacks: numbers, progress, previews, checkpoints."""
    cfg, data = run.config, run.models.data
    metrics = Metrics(cfg.log_every, images_per_step(cfg), *speed_limits(run), HeldOut.of(run))
    preview = Preview(
        cfg.preview.every,
        cfg.preview.count,
        run.sampler,
        out / "samples",
        grid=lambda x, labels: picture(data, x, labels),
        condition=lambda n: run.condition(torch.arange(n)),
        captions=lambda n: captions(data, n),
        labels=lambda n: told(data, n),
        negative=run.null,
        seed=cfg.seed,
        metrics=metrics,
    )
    saver = Checkpoints(out / "checkpoints", cfg.checkpoint.every, cfg.checkpoint.keep, metrics)
    callbacks: list[Callback] = [metrics, ProgressBar(metrics), preview, saver]
    return make_trainer(cfg.trainer, out, loggers, callbacks, turns)


def speed_limits(run: Run) -> tuple[float | None, float | None]:
    """Training FLOPs per image and the device's peak FLOP/s, where they are known."""
    if accelerator_of(run.config.trainer) != "gpu":
        return None, None
    return 6 * macs(run.models.skeleton), peak_flops(torch.cuda.get_device_name())


def picture(data: Any, x: torch.Tensor, labels: Sequence[str] = ()):
    """Samples as one grid with their labels, uint8 y x 3; of a video some frames in a row."""
    import numpy as np

    from recipes.report.grids import image_grid

    columns = data.num_classes if data.num_classes and data.num_classes <= 12 else 8
    return np.asarray(image_grid(data.to_frames(x), columns, labels=labels))


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
