"""Runs that another run needs first: the stages of a method, from one command.

Each is a process of its own, `python train.py` with its own words, so that launchers, devices and memory start afresh.
A finished run answers at once; one that was stopped goes on where it was; any can be started by hand.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

# what all runs of one command share unless a run's own words say otherwise
SHARED = ("runs", "logger.kinds", "logger.wandb.mode", "logger.wandb.project", "debug")
SHARED += ("trainer.accelerator", "trainer.threads")  # not devices: how many share a batch is part of what a run is
FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


def run_before(cfg: DictConfig, script: Path) -> None:
    """Run what `cfg.before` lists, in order.

    Args:
        cfg: the composed configuration
        script: train.py

    Raises:
        SystemExit: with the exit code of the first run that did not finish
    """
    launched = (
        "LOCAL_RANK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ and "SLURM_PROCID" not in os.environ
    )
    if launched:  # by Lightning on rank 0, which has run them
        return
    for words in cfg.before:
        code = _run([sys.executable, str(script), *shared(cfg), *words])
        if code:
            raise SystemExit(code)


def shared(cfg: DictConfig) -> list[str]:
    """What the runs have in common, as words of a command line."""
    words = []
    for key in SHARED:
        value = OmegaConf.select(cfg, key)
        if OmegaConf.is_list(value):
            value = "[" + ",".join(map(str, value)) + "]"
        words.append(f"{key}={'null' if value is None else value}")
    return words


def _run(command: Sequence[str]) -> int:
    """A child's exit code. What this process is told by a signal the child is told; it dies with this process."""
    print("before    " + " ".join(command[1:]), flush=True)
    child = subprocess.Popen(command, preexec_fn=_die_with_parent if sys.platform == "linux" else None)
    kept = {s: signal.signal(s, lambda number, _: child.send_signal(number)) for s in FORWARDED}
    try:
        code = child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    finally:
        for s, handler in kept.items():
            signal.signal(s, handler)
    return code if code >= 0 else 128 - code


def _die_with_parent() -> None:
    """A killed command must not leave a run behind that the same command would start a second time."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
