"""Settings of training that all recipes share, and what follows from them. Without Lightning: plans use them, too."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import Any

from omegaconf import DictConfig


@dataclass(frozen=True)
class Training:
    """The settings of training that all recipes share.

    Args:
        optimizer: a `recipes.config.schema.OptimizerConfig`
        max_steps: optimiser steps of the whole run, for the schedule
        accumulate: batches per optimiser step
        clip: largest norm of the gradient; None: no clipping
        label_drop: probability with which a sample's condition is replaced by the null condition
        ema_decay: decay of the moving average in [0, 1); 0 keeps no history
        ema_ramp: limit the decay to (1 + k) / (10 + k) after k updates; for short runs
        compile: compile each unit
        gradient_checkpointing: recompute units in the backward pass
        autocast: the recipe runs the denoiser in bf16, not the trainer: DeepSpeed's bf16 would round the average away
        patience: the run stops after so many consecutive steps with a non-finite gradient; each of them is skipped
        seed: of times, noise, label drop and dropout
    """

    optimizer: Any
    max_steps: int
    accumulate: int = 1
    clip: float | None = 1.0
    label_drop: float = 0.1
    ema_decay: float = 0.9999
    ema_ramp: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False
    autocast: bool = False
    patience: int = 20
    seed: int = 0

    def rate(self, step: int) -> float:
        """The factor on the learning rate after `step` optimiser steps: linear warmup, then constant or a cosine, whose
        last value stays from the fraction `until` of the run on."""
        s = self.optimizer
        if step < s.warmup:
            return (step + 1) / s.warmup
        if s.schedule == "cosine":
            way = min(1.0, (step - s.warmup) / max(1, s.until * self.max_steps - s.warmup))
            return s.end + (1 - s.end) * 0.5 * (1 + cos(pi * way))
        return 1.0


def world_size(cfg: DictConfig) -> int:
    return cfg.trainer.devices * cfg.trainer.num_nodes


def images_per_step(cfg: DictConfig) -> int:
    """Samples per optimiser step, over all ranks."""
    return cfg.data.batch_size * cfg.trainer.accumulate * world_size(cfg)
