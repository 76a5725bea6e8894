"""The loss on held-out data while a run trains: of the average, on samples, times and noise that never change.

Curves of several runs can be compared, whatever their seeds: all that is random is a function of the sample's number
alone. Training does not notice: no generator is used, no gradient is kept, and no weight is touched. Which loss it is
says the recipe (`Recipe.heldout`); a recipe without one has none.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from data.one_size import OneSize
from edit import noise
from edit.data_set import Split, collate
from recipes.assembly import Run
from recipes.recipe import Recipe

SEED = -1  # of no run
GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 spread evenly, however they are divided into batches


class HeldOut:
    """The same held-out samples, asked again and again. The ranks of a run share them.

    Args:
        split: of the data set
        count: of its samples, evenly spread over it
        batch: samples that a device takes at once
        every: optimiser steps
        rows: optimiser steps between rows of the log; the loss is in the first row from each multiple of `every` on
    """

    def __init__(self, split: Split, count: int, batch: int, every: int, rows: int):
        self.split, self.count, self.batch = split, min(count, len(split)), batch
        self.every, self.rows = every, rows

    @classmethod
    def of(cls, run: Run) -> HeldOut | None:
        """That of a run; None where it is switched off or its data set holds out no samples."""
        cfg = run.config
        every = cfg.preview.every or cfg.checkpoint.every if cfg.heldout.every is None else cfg.heldout.every
        split = run.models.data.heldout() if every else None
        if split is None or not len(split) or "x" not in split.sample(0, 0):  # a set of conditions alone
            return None
        return cls(OneSize(split), cfg.heldout.count, cfg.data.batch_size, every, cfg.log_every)

    def due(self, step: int, last: int) -> bool:
        """Whether the row of this step has the loss; that of the last step always has."""
        before = (step - 1) // self.rows * self.rows
        return step == last or step // self.every > before // self.every

    @torch.no_grad()
    def loss(self, trainer: pl.Trainer, module: Recipe) -> float | None:
        """The mean over all samples, the same on every rank, and all of them must call; None: the recipe has none."""
        total = torch.zeros((), dtype=torch.float64, device=module.device)
        with trainer.precision_plugin.forward_context():
            for numbers in self._shares(trainer.global_rank, trainer.world_size):
                found = module.heldout(*self._drawn(numbers, module.device))
                if found is None:
                    return None
                total += found.double()[numbers.to(found.device) < self.count].sum()
        module.reshard()
        if trainer.world_size > 1:
            dist.all_reduce(total)
        return total.item() / self.count

    def _shares(self, rank: int, world: int) -> tuple[Tensor, ...]:
        """Numbers of a rank's samples, in batches: as many on every rank, as sharded weights are gathered by all of
        them. Those from `count` on fill up and do not count."""
        return torch.arange(rank, -(-self.count // world) * world, world).split(self.batch)

    def _drawn(self, numbers: Tensor, device: torch.device) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Samples, quantiles of their times [b], and their noise, on the device."""
        places = [int(k) % self.count * len(self.split) // self.count for k in numbers]
        batch = collate([self.split.sample(place, place) for place in places])
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        numbers = numbers.to(device)
        u = ((numbers.double() + 0.5) * GOLDEN % 1).float().clamp(2**-24, 1 - 2**-24)
        return batch, u, noise.gaussian(SEED, numbers, noise.NOISE, tuple(batch["x"].shape[1:]))
