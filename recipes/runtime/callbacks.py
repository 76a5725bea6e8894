"""The callbacks of a run: numbers, progress, pictures and checkpoints between optimiser steps."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from edit.artifacts.checksums import of_files
from edit.sampling import Sampler
from edit.stream import Condition
from recipes.config.errors import UserError
from recipes.heldout import HeldOut
from recipes.recipe import Recipe
from recipes.report.curves import HELD_LOSS
from recipes.report.experts_map import Loading, draw_loads, idle_experts, load_numbers, loaded, together
from recipes.report.routing_map import Decisions, draw, drawn, groups
from recipes.runtime.atomic import AtomicIO
from recipes.runtime.checkpoint_files import (
    RANKS,
    WHOLE,
    checkpoints,
    files_in,
    rank_file,
    remove,
    sweep,
)
from recipes.runtime.files import write
from recipes.runtime.loggers import log_image

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # SLURM warns by SIGUSR1 before its time limit


class StepCallback(Callback):
    """A callback that acts once per optimiser step, not once per accumulated batch."""

    last = -1

    def on_train_start(self, trainer: pl.Trainer, module: Recipe) -> None:
        self.last = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: Recipe, *_: Any) -> None:
        if trainer.global_step != self.last:
            self.last = trainer.global_step
            self.on_step(trainer, module, trainer.global_step)

    def on_step(self, trainer: pl.Trainer, module: Recipe, step: int) -> None: ...


class Metrics(StepCallback):
    """Write a row of numbers every `every` optimiser steps, and stop a run whose gradients stay non-finite.

    Losses are means over the optimiser step's batches and over all ranks.

    Args:
        every: optimiser steps
        batch: images per optimiser step, over all ranks
        flops: training FLOPs per image, for MFU, the share of the device's peak; None: not known
        peak: FLOP/s of one device; None: not known
        held: measures the loss on held-out data for some of the rows; None: it is not measured
    """

    def __init__(
        self,
        every: int,
        batch: int,
        flops: float | None = None,
        peak: float | None = None,
        held: HeldOut | None = None,
    ):
        self.every, self.batch, self.flops, self.peak, self.held = every, batch, flops, peak, held
        self.values: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, module: Recipe) -> None:
        super().on_train_start(trainer, module)
        self.mark = (time.perf_counter(), trainer.global_step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of images per second and MFU."""
        start = time.perf_counter()
        yield
        self.mark = (self.mark[0] + time.perf_counter() - start, self.mark[1])

    def on_step(self, trainer: pl.Trainer, module: Recipe, step: int) -> None:
        if step % self.every and step != trainer.max_steps:
            return
        means = torch.stack([v.float() for v in module.losses.values()])
        if trainer.world_size > 1:
            dist.all_reduce(means)
            means /= trainer.world_size
        losses = dict(zip(module.losses, means.tolist(), strict=True))
        now = time.perf_counter()
        speed = (step - self.mark[1]) * self.batch / (now - self.mark[0])
        self.mark = (now, step)
        values = {f"train/{k}": v for k, v in losses.items()}
        values["lr"] = module.rate
        if (norm := module.grad_norm) is not None:
            values["grad_norm"] = norm.item()
        values |= {"skipped_steps": module.skipped[0].item(), "images_per_second": speed, "memory_gb": memory(module)}
        if self.flops and self.peak:
            values["mfu"] = speed * self.flops / (self.peak * trainer.world_size)
        if self.held is not None and self.held.due(step, trainer.max_steps):
            with self.paused():
                loss = self.held.loss(trainer, module)
            values |= {} if loss is None else {HELD_LOSS: loss}
        self.values = values
        for logger in trainer.loggers:
            logger.log_metrics(values, step)
        module.check_progress()


def memory(module: Recipe) -> float:
    """Peak memory so far in GB: of the GPU, else of this process."""
    if module.device.type == "cuda":
        return torch.cuda.max_memory_allocated(module.device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class ProgressBar(StepCallback):
    """A live bar with loss, images/s and time left; without a terminal, a line every `interval` seconds."""

    def __init__(self, metrics: Metrics, interval: float = 15.0):
        self.metrics, self.interval = metrics, interval
        self.console = Console()
        self.shown = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: Recipe) -> None:
        super().on_train_start(trainer, module)
        self.bar = None
        if not trainer.is_global_zero:
            return
        self.start = (time.perf_counter(), trainer.global_step)
        self.shown = self.start[0]
        if self.console.is_terminal:
            columns = ["training", BarColumn(), MofNCompleteColumn(), "loss {task.fields[loss]}"]
            columns += ["{task.fields[speed]} images/s", TimeElapsedColumn(), "left", TimeRemainingColumn()]
            self.bar = Progress(*(TextColumn(c) if isinstance(c, str) else c for c in columns), console=self.console)
            self.task = self.bar.add_task(
                "", total=trainer.max_steps, completed=trainer.global_step, loss="-", speed="-"
            )
            self.bar.start()

    def on_step(self, trainer: pl.Trainer, module: Recipe, step: int) -> None:
        now = time.perf_counter()
        if not trainer.is_global_zero or (now - self.shown < (0.2 if self.bar else self.interval)):
            return
        self.shown = now
        loss, speed = self.metrics.values.get("train/loss"), self.metrics.values.get("images_per_second")
        shown_loss = "-" if loss is None else f"{loss:.4f}"
        shown_speed = "-" if speed is None else f"{speed:,.0f}"
        if self.bar:
            self.bar.update(self.task, completed=step, loss=shown_loss, speed=shown_speed)
        elif step > self.start[1]:
            left = (now - self.start[0]) / (step - self.start[1]) * (trainer.max_steps - step)
            print(
                f"step {step}/{trainer.max_steps}  loss {shown_loss}  {shown_speed} images/s  {left:.0f} s left",
                flush=True,
            )

    def on_train_end(self, trainer: pl.Trainer, module: Recipe) -> None:
        if self.bar:
            self.bar.update(self.task, completed=trainer.global_step)
            self.bar.stop()

    def on_exception(self, trainer: pl.Trainer, module: Recipe, exception: BaseException) -> None:
        if getattr(self, "bar", None):
            self.bar.stop()


class Preview(StepCallback):
    """Every `every` optimiser steps, a grid of samples from the average, always with the same noise and labels.

    Where edits tell decisions, these are drawn as well.

    Args:
        every: optimiser steps; 0: never
        count: images
        sampler: how to generate
        folder: for `step_000500.png`, and `routing_<edit>_000500.png` where an edit tells decisions, and
            `experts_<edit>_000500.png` where it tells loads of experts
        grid: (denoised samples b c *sizes, their labels or none) -> picture, uint8 y x 3
        condition: makes the condition of `count` samples
        captions: describes the conditions in words, for samples without classes
        labels: of the samples, for the grid; empty where there is nothing to say
        negative: one unconditional counterpart for all; None: the denoiser's own
        seed: of the noise
        metrics: its clock is paused meanwhile
    """

    def __init__(
        self,
        every: int,
        count: int,
        sampler: Sampler,
        folder: Path,
        grid: Callable[[torch.Tensor, list[str]], np.ndarray] | None,
        condition: Callable[[int], Any],
        captions: Callable[[int], list[str]],
        labels: Callable[[int], list[str]],
        negative: Condition | None,
        seed: int,
        metrics: Metrics,
    ):
        self.every, self.count, self.sampler, self.folder = every, count, sampler, folder
        self.grid, self.condition, self.captions, self.negative = grid, condition, captions, negative
        self.labels, self.seed, self.metrics = labels, seed, metrics

    def on_step(self, trainer: pl.Trainer, module: Recipe, step: int) -> None:
        if not self.every or (step % self.every and step != trainer.max_steps):
            return
        with self.metrics.paused(), trainer.precision_plugin.forward_context():
            self._draw(trainer, module, step)

    def _draw(self, trainer: pl.Trainer, module: Recipe, step: int) -> None:
        numbers, told = torch.arange(self.count), self.condition(self.count)
        seen = Decisions(module.ema) if trainer.is_global_zero and drawn(module.ema) else None
        loading = Loading(module.ema) if trainer.is_global_zero and loaded(module.ema) else None
        watch = together(seen, loading)
        x = self.sampler(module.ema, module.objective, told, numbers, self.seed, self.negative, watch=watch)
        module.reshard()
        if not trainer.is_global_zero:
            return
        x = x.cpu()
        if (picture := self._picture(x, self.labels(self.count))) is not None:
            self._put(trainer, "samples", f"step_{step:06d}.png", picture, step)
        if seen is not None:
            whom = groups(told.label, self.captions(self.count))
            for name, maps in seen.maps().items():
                decides = module.ema.applied[name].decides
                picture = np.asarray(draw(maps, whom, lambda k: self._picture(x[k : k + 1], []), decides))
                file = f"routing_{name.replace('/', '_')}_{step:06d}.png"
                self._put(trainer, f"routing/{name}", file, picture, step)
        for name, loads in {} if loading is None else loading.found().items():
            file = f"experts_{name.replace('/', '_')}_{step:06d}.png"
            self._put(trainer, f"experts/{name}", file, np.asarray(draw_loads(loads)), step)
            if step == trainer.max_steps and (idle := idle_experts(load_numbers(loads))):
                print(f"warning: {name}: in the last preview {idle}", flush=True)

    def _picture(self, x: torch.Tensor, labels: list[str]) -> np.ndarray | None:
        """Samples as a grid; None: they cannot be decoded."""
        if self.grid is None:
            return None
        try:
            return self.grid(x, labels)
        except (FileNotFoundError, ValueError) as error:  # no VAE to decode with: not worth a training run
            print(f"no more previews: {error}", flush=True)
            self.grid = None
            return None

    def _put(self, trainer: pl.Trainer, name: str, file: str, picture: np.ndarray, step: int) -> None:
        """Write a picture into the folder and send it to the loggers."""
        from PIL import Image

        self.folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(self.folder / file)
        log_image(trainer.loggers, name, picture, step)


class Checkpoints(StepCallback):
    """Save every `every` optimiser steps, after the last, and on SIGTERM, SIGUSR1 or SIGHUP; keep the newest `keep`.

    Only whole optimiser steps are saved: a checkpoint inside an accumulation window would lose its gradients.
    """

    def __init__(self, folder: Path, every: int, keep: int, metrics: Metrics):
        self.folder, self.every, self.keep, self.metrics = folder, every, keep, metrics
        self.told_to_stop = False
        self.ranks = 0  # files of ranks that belong to the checkpoint that is written

    def on_train_start(self, trainer: pl.Trainer, module: Recipe) -> None:
        super().on_train_start(trainer, module)
        if trainer.is_global_zero:
            sweep(self.folder)
        if threading.current_thread() is threading.main_thread():
            # here and not earlier: Lightning would add its own handler, which kills other ranks inside a step
            for told in STOP:
                if signal.getsignal(told) != signal.SIG_IGN:  # under nohup a hang-up is none of our business
                    signal.signal(told, self._stop)

    def _stop(self, number: int, _: Any) -> None:
        self.told_to_stop = True
        if number == signal.SIGHUP:
            leave_terminal()

    def on_step(self, trainer: pl.Trainer, module: Recipe, step: int) -> None:
        stop = self.told_to_stop
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if not (stop or step % self.every == 0 or step == trainer.max_steps):
            return
        with self.metrics.paused():
            self._save(trainer, self.folder / f"step_{step:08d}.ckpt", module.kept())
        if stop and step != trainer.max_steps:
            trainer.should_stop = True
            if trainer.is_global_zero:
                print(f"told to stop: saved step {step}; the same command resumes", flush=True)

    def _save(self, trainer: pl.Trainer, path: Path, kept: dict[str, Any] | None = None) -> None:
        self.ranks = 0 if kept is None else trainer.world_size
        if kept is not None:  # before the common file, which is complete when it is there
            own = AtomicIO()
            own.save_checkpoint(kept, rank_file(path, trainer.global_rank, trainer.world_size))
            self._agree(trainer, own.error, path)
        trainer.save_checkpoint(path)
        self._agree(trainer, getattr(trainer.strategy.checkpoint_io, "error", None), path)
        if trainer.is_global_zero:
            if path.is_dir():
                write(path / WHOLE, json.dumps(of_files(path, files_in(path)), indent=2))
            for old in checkpoints(self.folder)[: -self.keep]:
                remove(old)

    def _agree(self, trainer: pl.Trainer, error: UserError | None, path: Path) -> None:
        """Raises UserError on all ranks if one of them could not write."""
        if not trainer.strategy.reduce_boolean_decision(error is None, all=True):
            raise error or UserError(f"another rank could not write {path}: see its message")

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.ranks:
            checkpoint[RANKS] = self.ranks


def leave_terminal() -> None:
    """Drop further output: printing to a closed terminal would raise an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        try:
            os.write(output, b"")
        except OSError:
            os.dup2(nowhere, output)
    os.close(nowhere)
