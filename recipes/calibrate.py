"""Edits without training: apply them to a trained model, let those calibrate that can, write the artifact.

    python train.py recipe=calibrate init=runs/digits edits=reuse name=fast

`init` is the model, the run's `edits` are applied to it, and each that has something to calibrate (`Edit.calibrate`)
does so on the run's data and with the run's sampler. Then artifact and report are written as after training. Nothing
else is kept: a command that was stopped begins the calibration again, a finished one is not run again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.loader import EndlessLoader
from edit.calibrating import OnData, calibrate
from edit.edits import describe
from edit.inputs.limits import LAST_SEED, Count, check_numbers
from recipes.assembly import Run
from recipes.config.errors import UserError
from recipes.procedure import Procedure, Result, Stand
from recipes.runtime.devices import accelerator_of
from recipes.runtime.files import is_first

APART = 2**31  # from the run's seed to that of calibration: evaluations, at small seeds, have other noise
WITHOUT_END = 10**9  # batches: an edit may ask for any number of samples
INTERVAL = 15.0  # seconds between lines of progress without a terminal


@dataclass(frozen=True)
class Calibrating(Procedure):
    """Calibration in place of training: no optimiser, no average, one device.

    Args:
        batches: that an edit sees in a pass over noisy data, each of data.batch_size samples
        samples: of a generation
    """

    batches: Count = 16
    samples: Count = 8

    optimises: ClassVar[bool] = False
    cure: ClassVar[str] = "calibrate on more batches (recipe.batches), or start from another model"

    def __post_init__(self):
        check_numbers(self)

    def check(self, cfg: DictConfig) -> Iterator[str]:
        if not OmegaConf.is_interpolation(cfg, "init") and cfg.init is None:
            yield "recipe=calibrate starts from a trained model: give its run or artifact folder with init=..."
        if not cfg.edits:
            yield "recipe=calibrate applies edits to a trained model, and there are none: choose some with edits=..."
        if cfg.matching is not None:
            yield "recipe=calibrate trains nothing, and matching is a way to train: leave one of the two out"
        if cfg.terms:
            yield f"recipe=calibrate has no losses: leave out terms.{next(iter(cfg.terms))}"
        if cfg.teacher.placement == "tied" or cfg.teacher.path is not None:
            yield "recipe=calibrate compares with no teacher: leave the section out"
        trainer = cfg.trainer
        if trainer.strategy != "single" or trainer.num_nodes > 1:
            yield (
                f"recipe=calibrate is the work of one device, got trainer.strategy={trainer.strategy} and "
                f"trainer.num_nodes={trainer.num_nodes}: choose trainer=cpu or trainer=gpu"
            )

    def stand(self, cfg: DictConfig, out: Path) -> Stand:
        if not is_first() or int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise UserError("recipe=calibrate is the work of one process: start it without torchrun or srun")
        return Stand(finished=(out / "artifact").is_dir())

    def perform(self, run: Run, out: Path, stand: Stand) -> Result:
        from recipes.runtime.loggers import make_loggers  # with them comes Lightning

        cfg = run.config
        loggers = make_loggers(cfg.logger, out, cfg.name, OmegaConf.to_container(cfg))  # type: ignore[arg-type]
        with torch.device("cpu"):  # the same weights on every device
            denoiser = run.models.student.build()
        device = torch.device("cuda" if accelerator_of(cfg.trainer) == "gpu" else "cpu")
        denoiser.eval().to(device)
        half = torch.autocast(device.type, torch.bfloat16, enabled="bf16" in cfg.trainer.precision)
        with shown() as progress, half:
            calibration = OnData(
                denoiser,
                run.objective,
                run.sampler,
                lambda: self.data(run),
                batches=self.batches,
                samples=self.samples,
                seed=(cfg.seed + APART) % (LAST_SEED + 1),
                negative=run.null,
                progress=progress,
            )
            names = calibrate(denoiser, calibration, names=list(cfg.edits))
        said = ", ".join(names) or f"nothing to do for {', '.join(cfg.edits)}"
        print(f"calibrated {said}", flush=True)
        state = {k: v.detach().cpu() for k, v in denoiser.state_dict().items()}
        told = {"seed": cfg.seed, "recipe": describe(self), "calibrated": names}
        return Result(denoiser, state, told, loggers)

    def data(self, run: Run) -> Iterable[dict[str, torch.Tensor]]:
        """A pass over the training data, from its first batch on, without end."""
        cfg = run.config
        return EndlessLoader(run.models.data.train(), cfg.data.batch_size, WITHOUT_END, cfg.seed)


@contextmanager
def shown() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for what is under way, on a terminal; elsewhere a line every `INTERVAL` seconds."""
    console, last = Console(), [time.perf_counter()]
    words = TextColumn("{task.description}", markup=False)  # names may contain markup
    columns = (words, BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("calibrating", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)
            if not console.is_terminal and time.perf_counter() - last[0] >= INTERVAL:
                last[0] = time.perf_counter()
                print(f"{what}  {done}/{total}", flush=True)

        yield tell
