"""Small training runs inside forked processes: what `python train.py ...` does, without its start-up time."""

import csv
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401 - else each forked run imports it for its page
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from ranks import run_ranks

from recipes.config.check import check
from recipes.config.errors import UserError
from recipes.config.sources import register

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = (
    "backbone.hidden_size=32",
    "backbone.num_heads=2",
    "backbone.depth=2",
    "data.batch_size=16",
    "log_every=1",
    "preview.every=0",
    "heldout.every=0",
    "evaluate=null",
    "trainer.max_steps=12",
    "checkpoint.every=4",
)
TWO_RANKS = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true", "trainer.max_steps=12")


def config(folder: Path, *overrides: str) -> DictConfig:
    """The checked configuration of a small digits run below `folder`."""
    register()
    groups = [o for o in overrides if "." not in o.split("=")[0]]  # a group choice must come before its keys
    keys = [o for o in overrides if o not in groups]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        cfg = compose("train", [*groups, f"runs={folder}", *SMALL, *keys])
    if errors := check(cfg):
        raise UserError(errors[0])
    return cfg


def train(folder: Path, *overrides: str) -> None:
    """Run to the end in this process."""
    from recipes.training import run

    run(config(folder, *overrides))


def train_ranks(folder: Path, *overrides: str, world: int = 1) -> None:
    run_ranks(_train, world, args=(folder, overrides), timeout=120)


def _train(folder: Path, overrides: Sequence[str]) -> None:
    train(folder, *overrides)


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with open(folder / name / "metrics.csv", newline="") as f:
        return list(csv.DictReader(f))


def losses(folder: Path, name: str) -> list[str]:
    """As written: comparing text compares every bit of a float's shortest representation."""
    return [r["train/loss"] for r in rows(folder, name)]


def kill_when(condition, *pids: int, timeout: float = 60) -> None:
    """SIGKILL the processes as soon as `condition()` holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "the run never came to the point where it was to be killed"
        time.sleep(0.002)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
