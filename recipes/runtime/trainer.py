"""From the `trainer` group to a Lightning trainer: strategies, launch environments."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from recipes.config.errors import UserError
from recipes.config.schema import TrainerConfig
from recipes.runtime.atomic import AtomicIO
from recipes.runtime.devices import accelerator_of, count_devices, precision_of, recipe_casts


def make_strategy(t: TrainerConfig, devices: int, turns: bool) -> Strategy | str:
    backend = "gloo" if accelerator_of(t) == "cpu" else "nccl"
    if t.strategy == "single":
        return "auto"
    if t.strategy == "ddp":
        return DDPStrategy(
            process_group_backend=backend,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=turns,
        )
    if t.strategy == "fsdp2":
        # with "auto" sizes all ranks of one node would train on the same batches
        return ModelParallelStrategy(
            data_parallel_size=devices * t.num_nodes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
        )
    if backend == "gloo":
        raise UserError(f"trainer={t.strategy} runs on GPUs (Lightning's DeepSpeed has no CPU): use trainer=fsdp2 here")
    from lightning.pytorch.strategies import DeepSpeedStrategy

    return DeepSpeedStrategy(
        stage=int(t.strategy[-1]), zero_allow_untested_optimizer=True, process_group_backend=backend
    )


def quiet() -> None:
    """Silence Lightning's advice about loaders, loggers and tips, which does not concern this program. Its import sets
    the level of its messages, so this comes after it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    # units hand `cond` on as FSDP2 gave it to them; nothing writes into it
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def make_trainer(
    t: TrainerConfig, out: Path, loggers: list[Logger], callbacks: list[Callback], turns: bool = False
) -> pl.Trainer:
    """The Lightning trainer of a run; data order, checkpoints and logging are our own.

    Args:
        t: the `trainer` group
        out: the run's folder
        loggers: the first writes metrics.csv
        callbacks: in this order
        turns: roles take turns, so some parameters get no gradient in a step

    Raises:
        UserError: if devices, strategy or launch environment do not fit together
    """
    quiet()
    devices = count_devices(t)
    kind = accelerator_of(t)
    deepspeed = t.strategy.startswith("zero")
    plugins: list[Any] = [] if deepspeed else [AtomicIO()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # Lightning's requeue saves inside accumulation windows, and other runs would load its file
        plugins.append(SLURMEnvironment(auto_requeue=False))
    try:
        trainer = pl.Trainer(
            accelerator=kind,
            devices=devices,
            num_nodes=t.num_nodes,
            strategy=make_strategy(t, devices, turns),
            precision="32-true" if recipe_casts(t) else precision_of(t),
            default_root_dir=str(out),
            max_steps=t.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=t.accumulate,
            gradient_clip_val=t.clip if deepspeed else None,  # elsewhere the recipe clips
            logger=loggers,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            plugins=plugins,
        )
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"the trainer group does not fit this machine or launcher: {error}") from error
    if trainer.world_size != devices * t.num_nodes:  # sbatch without srun runs one silent process
        tasks = os.environ.get("SLURM_NTASKS", "unset")
        raise UserError(
            f"{devices} devices x {t.num_nodes} nodes were asked for, but the launcher started {trainer.world_size} "
            f"processes: use srun or torchrun with as many tasks (SLURM_NTASKS={tasks})"
        )
    return trainer
