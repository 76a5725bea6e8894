"""The end of a part of a run: its parameters leave the optimiser and the strategy, so that nothing of it is left."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch import nn


def forget(trainer: pl.Trainer, module: pl.LightningModule, gone: Sequence[nn.Parameter]) -> None:
    """Forget parameters that the module no longer has, between two optimiser steps; every rank calls this.

    Their optimiser state goes, and an optimiser group that becomes empty with its learning rates. DDP, which waits for
    the gradient of every parameter, is set up anew around the module.

    Args:
        trainer: of the run
        module: without the parameters
        gone: the parameters
    """
    for p in module.parameters():
        p.grad = None  # views into the buckets of the DDP that goes
    _leave_optimizer(trainer, {id(p) for p in gone})
    if isinstance(strategy := trainer.strategy, DDPStrategy):
        strategy.model = module
        gc.collect()  # with the former DDP go its hooks
        strategy.configure_ddp()


def _leave_optimizer(trainer: pl.Trainer, gone: set[int]) -> None:
    optimizer, schedule = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
    for i in reversed(range(len(optimizer.param_groups))):
        members = optimizer.param_groups[i]["params"]
        for p in members:
            if id(p) in gone:
                optimizer.state.pop(p, None)
        members[:] = [p for p in members if id(p) not in gone]
        if not members:
            for per_group in (optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, schedule._last_lr):
                del per_group[i]
