"""Where numbers and pictures go: `metrics.csv` always, W&B and TensorBoard when asked.

W&B never prompts and never hangs: without a key, or without a network within ten seconds, an online run becomes an
offline one and says so. A resumed run continues under the same id.
"""

from __future__ import annotations

import csv
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich import print

from recipes.config import LoggerConfig, UserError


class CSVLogger(Logger):
    """One row per logged step, flushed at once. Lightning's own would delete the rows of an earlier attempt."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.columns: list[str] = []

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def resume(self, step: int) -> None:
        """Forget rows after `step`: they will be logged again. A row torn by a kill is after it, too."""
        rows = self._rows()
        self.columns = list(rows[0]) if rows else []
        self._write([r for r in rows if (r["step"] or "").isdigit() and int(r["step"]) <= step])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        if not set(row) <= set(self.columns):
            rows = self._rows()
            self.columns += [k for k in row if k not in self.columns]
            self._write(rows)
        with open(self.path, "a", newline="") as f:
            csv.DictWriter(f, self.columns).writerow(row)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run folder holds config.yaml."""

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with open(self.path, newline="") as f:
            return list(csv.DictReader(f))

    def _write(self, rows: list[dict[str, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}")
        with open(temporary, "w", newline="") as f:
            writer = csv.DictWriter(f, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)


def make_loggers(settings: LoggerConfig, out: Path, config: Mapping[str, Any]) -> list[Logger]:
    """The run's loggers, csv first. Called on every rank; only rank 0 opens anything.

    Raises:
        UserError: if a logger is asked for whose package is not installed
    """
    loggers: list[Logger] = [CSVLogger(out / "metrics.csv")]
    if "tensorboard" in settings.kinds:
        try:
            loggers.append(TensorBoardLogger(str(out), name="tensorboard", version=""))
        except ModuleNotFoundError as error:
            raise UserError("logger tensorboard is not installed: pip install 'edit-dit[tensorboard]'") from error
    if "wandb" in settings.kinds and settings.wandb.mode != "disabled":
        loggers.append(make_wandb(settings, out, config))
    return loggers


def make_wandb(settings: LoggerConfig, out: Path, config: Mapping[str, Any]) -> Logger:
    try:
        import wandb
        from lightning.pytorch.loggers import WandbLogger
    except ModuleNotFoundError as error:
        raise UserError("logger wandb is not installed: pip install 'edit-dit[wandb]'") from error

    offline = settings.wandb.mode == "offline"
    if not offline and not has_key():
        print("[yellow]W&B: no API key (WANDB_API_KEY), logging offline; `wandb sync` uploads it later[/]")
        offline = True

    def logger(offline: bool) -> Logger:
        return WandbLogger(
            id=run_id(out),
            name=out.name,
            save_dir=str(out),
            offline=offline,
            project=settings.wandb.project,
            entity=settings.wandb.entity,
            tags=list(settings.wandb.tags),
            resume="allow",
            config=dict(config),
            settings=wandb.Settings(init_timeout=10, silent=True),
        )

    @rank_zero_only
    def opens() -> bool:
        try:
            logger(offline=False).experiment  # noqa: B018 - connects
            return True
        except Exception as error:  # the client raises many kinds; none may end the run
            print(f"[yellow]W&B: cannot connect ({type(error).__name__}), logging offline[/]")
            return False

    if not offline and opens() is False:
        offline = True
    return logger(offline)


def has_key() -> bool:
    """Whether W&B can log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text(errors="ignore")


def run_id(out: Path) -> str:
    """The W&B id of a run folder, made once."""
    file = out / "wandb_id"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex[:12])
    return file.read_text().strip()


@rank_zero_only
def log_image(loggers: list[Logger], name: str, image: np.ndarray, step: int) -> None:
    """Send one picture, uint8 y x 3, to every logger that takes pictures."""
    if image.dtype != np.uint8:
        raise TypeError(f"pictures are logged as uint8, got {image.dtype}: floats come out black in W&B")
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, image, step, dataformats="HWC")
        elif type(logger).__name__ == "WandbLogger":
            logger.log_image(key=name, images=[image], step=step)


@rank_zero_only
def log_artifact(loggers: list[Logger], folder: Path) -> None:
    """Upload (or queue) the artifact folder with W&B and close the run."""
    for logger in loggers:
        if type(logger).__name__ == "WandbLogger":
            import wandb

            artifact = wandb.Artifact(f"{logger.experiment.id}-model", type="model")
            artifact.add_dir(str(folder))
            logger.experiment.log_artifact(artifact)
            logger.experiment.finish()
