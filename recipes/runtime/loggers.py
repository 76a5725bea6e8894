"""The loggers of a run: `metrics.csv` always, W&B and TensorBoard on request.

W&B never prompts, hangs or ends a run. Without a key, a network or access to the server, an online run becomes an
offline one and says so. A network lost later costs at most `UPLOAD` seconds of waiting for the artifact, and as many
for the rest. A resumed run continues under the same id, and its rows carry the optimiser's step, W&B's own step too. A
run that was offline is a folder of each attempt with that id; `wandb sync wandb/offline-run-*` sends them one after the
other, as one run, whose charts go on where the attempt before ended. Steps that an attempt repeated, because the one
before was killed after its last checkpoint, are in the files twice: which of them a server keeps has not been tried.
"""

from __future__ import annotations

import csv
import io
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from rich import print
from rich.markup import escape

from recipes.config.errors import UserError
from recipes.config.schema import LoggerConfig
from recipes.runtime.files import write

CONNECT = 5  # seconds to wait for an address to answer
OPEN = 20  # seconds to wait for W&B to open a run, once it can be reached
STEP = "trainer/global_step"  # the axis of charts
UPLOAD = 300  # seconds to wait for an upload; `wandb sync` sends the rest later


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
        """Remove rows after `step`, which will be logged again, and rows torn by a kill or a full disk.

        Raises:
            UserError: if the file is damaged, or cannot be written
        """
        try:
            rows = self._rows()
            whole = [r for r in rows if None not in r.values() and r["step"].isdigit() and int(r["step"]) <= step]
            self.columns = [str(k) for k in rows[0] if k is not None] if rows else []
        except (ValueError, LookupError, csv.Error) as error:
            raise UserError(
                f"{self.path} is damaged ({str(error) or type(error).__name__}): restore it, or move it away to go on "
                "without the rows so far"
            ) from error
        self._write([{k: r[k] for k in self.columns} for r in whole])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        if not set(row) <= set(self.columns):
            rows = self._rows()
            self.columns += [k for k in row if k not in self.columns]
            self._write(rows)
        with self._writing(), open(self.path, "a", newline="") as f:
            csv.DictWriter(f, self.columns).writerow(row)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run folder holds config.yaml."""

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with open(self.path, newline="") as f:
            return list(csv.DictReader(f))

    def _write(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        with self._writing():
            write(self.path, text.getvalue())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"could not write {self.path} ({(error.strerror or str(error)).lower()}): the checkpoints so far are "
                "whole; free some space or check the disk, and give the same command, which resumes from them"
            ) from error


class Wandb(WandbLogger):
    """W&B counts rows from 0 in each attempt at a run: here a row's number is the optimiser's step."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.experiment.log({**metrics, STEP: step}, step=step)


def make_loggers(settings: LoggerConfig, out: Path, name: str, config: Mapping[str, Any]) -> list[Logger]:
    """The run's loggers, csv first. Called on every rank; only rank 0 opens anything.

    Args:
        settings: the kinds of loggers, and settings of W&B
        out: the run folder
        name: of the run in W&B: its path below the folder of all runs, which tells a sweep's jobs apart
        config: the resolved configuration, for W&B

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
        loggers.append(make_wandb(settings, out, name, config))
    return loggers


def make_wandb(settings: LoggerConfig, out: Path, name: str, config: Mapping[str, Any]) -> Logger:
    """The W&B logger; on rank 0 its run is open already, offline if an online one cannot be opened."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise UserError("logger wandb is not installed: pip install 'edit-dit[wandb]'") from error

    if rank_zero_only.rank != 0:
        return Wandb()  # never opens: its experiment is a dummy here

    def opened(mode: str) -> Logger:
        run = wandb.init(  # Lightning's own call gives settings that W&B has removed
            id=run_id(out),
            name=name,
            dir=str(out),
            mode=mode,
            project=settings.wandb.project,
            entity=settings.wandb.entity,
            tags=list(settings.wandb.tags),
            resume="allow",
            config=dict(config),
            settings=wandb.Settings(init_timeout=OPEN, finish_timeout=UPLOAD, finish_timeout_raises=True, silent=True),
        )
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        return Wandb(experiment=run, save_dir=str(out))

    client = wandb.setup().settings  # from the environment and W&B's own files
    if settings.wandb.mode == "online" and client.mode == "online":  # WANDB_MODE=offline counts, too
        server = client.base_url
        if not has_key(server):
            offline("no API key (WANDB_API_KEY)")
        elif not reachable(server):
            offline("no network")
        else:
            try:
                return opened("online")
            except Exception as error:  # the client raises many kinds; none may end the run
                wandb.teardown()  # or the id stays in use
                offline(f"cannot open the run ({short(error)})")
    return opened("offline")


def offline(reason: str) -> None:
    print(f"[yellow]W&B: {escape(reason)}, logging offline; `wandb sync` uploads it later[/]")


def short(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def has_key(server: str) -> bool:
    """Whether W&B can log in to `server`, a URL, without asking."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    known = netrc.read_text(errors="ignore") if netrc.is_file() else ""
    return "wandb" in known or (urlsplit(server).hostname or server) in known


def reachable(url: str) -> bool:
    """Whether the host of `url`, or the proxy on the way to it, takes a TCP connection within `CONNECT` seconds."""
    address = urlsplit(url)
    proxy = getproxies().get(address.scheme)
    if proxy and not proxy_bypass(address.hostname or ""):
        address = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=CONNECT).close()
    except OSError:
        return False
    return True


def run_id(out: Path) -> str:
    """The W&B id of a run folder, made once. Call on rank 0 only: several ranks would make different ids."""
    file = out / "wandb_id"
    if not file.exists():
        write(file, uuid.uuid4().hex[:12])
    return file.read_text().strip()


@rank_zero_only
def log_image(loggers: list[Logger], name: str, image: np.ndarray, step: int) -> None:
    """Send one picture, uint8 y x 3, to every logger that takes pictures."""
    if image.dtype != np.uint8:
        raise TypeError(f"pictures are logged as uint8, got {image.dtype}: floats come out black in W&B")
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, image, step, dataformats="HWC")
        elif isinstance(logger, Wandb):
            logger.log_image(key=name, images=[image], step=step)


@rank_zero_only
def log_artifact(loggers: list[Logger], folder: Path) -> None:
    """Upload the artifact folder with W&B, or queue it in an offline run. A failure is printed, not raised.

    Online, this waits for the upload, `UPLOAD` seconds at most; a slower one continues in the background.
    """
    for run in wandb_runs(loggers):
        import wandb

        try:
            artifact = wandb.Artifact(f"{run.id}-model", type="model")
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            if not files:
                raise FileNotFoundError("it holds no files")
            for file in files:  # add_dir would print
                name = file.relative_to(folder).as_posix()
                artifact.add_file(str(file), name, policy="immutable", skip_cache=True)  # no copies in the home folder
            logged = run.log_artifact(artifact)
            if not run.offline:
                logged.wait(UPLOAD)
        except Exception as error:  # the training is done and saved: W&B must not take that away
            failed(f"{folder} is not uploaded", error)


@rank_zero_only
def log_summary(loggers: list[Logger], values: Mapping[str, float]) -> None:
    """Put final numbers into the summary of the W&B run; on disk, report.json has them. A failure is printed."""
    for run in wandb_runs(loggers):
        try:
            run.summary.update(dict(values))
        except Exception as error:  # as above
            failed("the final numbers are not sent", error)


@rank_zero_only
def close(loggers: list[Logger]) -> None:
    """Finish the W&B run, waiting `UPLOAD` seconds at most for what is still to be sent. A failure is printed."""
    for run in wandb_runs(loggers):
        try:
            run.finish()
        except Exception as error:  # as above
            failed("the run is not fully uploaded, `wandb sync` sends the rest", error)


def wandb_runs(loggers: list[Logger]) -> Iterator[Any]:
    """The open W&B runs among the loggers: one or none."""
    return (logger.experiment for logger in loggers if isinstance(logger, Wandb))


def failed(what: str, error: Exception) -> None:
    print(f"[yellow]W&B: {escape(what)} ({escape(short(error))})[/]")
