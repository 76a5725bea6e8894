"""Runs that another run needs first: the stages of a method, from one command.

Each is a process of its own, `python train.py` with its own words, so that launchers, devices and memory start afresh.
A finished run answers at once; one that was stopped goes on where it was; any can be started by hand. Under torchrun
the first of all ranks starts it, with as many processes as its own words ask for, while the others wait.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

# what all runs of one command share unless a run's own words say otherwise
SHARED = ("runs", "logger.kinds", "logger.wandb.mode", "logger.wandb.project", "debug")
SHARED += ("trainer.accelerator", "trainer.threads")  # not devices: how many share a batch is part of what a run is
FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
CONNECTED = timedelta(minutes=10)  # for all ranks to come to the store
# what torchrun tells its ranks
LAUNCHER = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
LAUNCHER |= {f"{group}_{what}" for group in ("LOCAL", "GROUP", "ROLE") for what in ("RANK", "WORLD_SIZE")} | {
    "ROLE_NAME"
}


def run_before(cfg: DictConfig, script: Path) -> None:
    """Run what `cfg.before` lists, in order.

    Args:
        cfg: the composed configuration
        script: train.py

    Raises:
        SystemExit: with the exit code of the first run that did not finish; on every rank
    """
    if not cfg.before:
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        code = _while_others_wait(lambda: _run_all(cfg, script), f"before/{cfg.runs}/{cfg.name}")  # a sweep has several
    elif "LOCAL_RANK" in os.environ and "SLURM_PROCID" not in os.environ:
        return  # launched by Lightning on rank 0, which has run them
    else:
        code = _run_all(cfg, script)
    if code:
        raise SystemExit(code)


def _run_all(cfg: DictConfig, script: Path) -> int:
    """The exit code of the first run that did not finish, or 0."""
    commands = ([sys.executable, str(script), *shared(cfg), *words] for words in cfg.before)
    return next((code for command in commands if (code := _run(command))), 0)


def _while_others_wait(work: Callable[[], int], name: str) -> int:
    """What `work` returns on rank 0 of a torchrun launch, on all its ranks; they talk through the launch's store, under
    a name that is used once."""
    from torch.distributed import PrefixStore, rendezvous

    store, rank, world = next(rendezvous("env://", timeout=CONNECTED))
    store = PrefixStore(name, store)
    if rank == 0:
        store.set("code", str(work()))
    else:
        while not store.check(["code"]):
            time.sleep(1)
    code = int(store.get("code"))
    store.add("known", 1)
    while rank == 0 and store.add("known", 0) < world:  # it may be the host of the store
        time.sleep(0.01)
    return code


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
    die = _die_with_parent if sys.platform == "linux" else None
    child = subprocess.Popen(command, preexec_fn=die, env=_environment())
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


def _environment() -> dict[str, str]:
    """This process's, for a run of its own: without the rank, port and store that torchrun gave to this one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return dict(os.environ)
    return {k: v for k, v in os.environ.items() if k not in LAUNCHER and not k.startswith(("TORCHELASTIC_", "SLURM_"))}


def _die_with_parent() -> None:
    """A killed command must not leave a run behind that the same command would start a second time."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
