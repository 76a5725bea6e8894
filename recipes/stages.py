"""The stages of a method, from one command: runs that come before a run, and commands that come after it.

Each stage is a process of its own, so that launchers, devices and memory start afresh: `python train.py` with its own
words or, where the first word names a module of ours, `python -m`: `[data.generate, teacher=..., ...]`. A finished run
answers at once, a stopped one resumes, and each can be started by hand. Under torchrun the first of all ranks starts a
stage, with as many processes as its own words ask for, while the others wait. Under SLURM every task starts train.py,
and the first task starts a module.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from data.names import setting, typed
from edit.inputs.command import print_any_name

# settings that all runs of train.py from one command share unless a run's own words say otherwise
SHARED = ("runs", "logger.kinds", "logger.wandb.mode", "logger.wandb.project", "debug")
SHARED += ("trainer.accelerator", "trainer.threads")  # not devices: their number decides the batch, and with it the run
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
CONNECTED = timedelta(minutes=10)  # for all ranks to reach the store
OURS = Path(__file__).parents[1]  # the folder of `data` and `edit`
# variables that torchrun, or Lightning as a launcher, sets for its ranks
LAUNCHER = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"}
LAUNCHER |= {f"{group}_{what}" for group in ("LOCAL", "GROUP", "ROLE") for what in ("RANK", "WORLD_SIZE")} | {
    "ROLE_NAME"
}


def run_before(cfg: DictConfig, script: Path) -> None:
    """Run the stages of `cfg.before`, in order.

    Args:
        cfg: the composed configuration
        script: train.py, for words that name no module

    Raises:
        SystemExit: with the exit code of the first run that did not finish; on every rank
    """
    if not cfg.before:
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        name = f"before/{cfg.runs}/{cfg.name}"  # a sweep has several
        code = _while_others_wait(lambda: _run_all(cfg, script), name, "env://")
    elif "LOCAL_RANK" in os.environ and "SLURM_PROCID" not in os.environ:
        return  # launched by Lightning on rank 0, which has run them
    else:
        code = _run_all(cfg, script)
    if code:
        raise SystemExit(code)


def run_after(cfg: DictConfig) -> None:
    """Run the stages of `cfg.after`, in order, on the first of all ranks, whenever the run itself is complete.

    Raises:
        SystemExit: with the exit code of the first that failed
    """
    if any(os.environ.get(rank, "0") != "0" for rank in ("RANK", "LOCAL_RANK", "SLURM_PROCID")):
        return
    for words in cfg.after:
        if code := _run([sys.executable, "-m", *words], "after"):
            raise SystemExit(code)


@contextmanager
def launched() -> Iterator[None]:
    """Restore the launcher's environment at the end: after a run on several devices, Lightning leaves rank and port
    behind, and the next process would take itself for one of those ranks."""
    before = {name: os.environ.get(name) for name in LAUNCHER}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _run_all(cfg: DictConfig, script: Path) -> int:
    """The exit code of the first run that did not finish, or 0."""
    for number, words in enumerate(cfg.before):
        if "=" in words[0]:
            code = _run([sys.executable, str(script), *shared(cfg), *map(_readable, words)])
        else:
            work, tasks = partial(_run, [sys.executable, "-m", *words]), _slurm_tasks(number)
            code = _while_others_wait(work, f"before/{cfg.runs}/{cfg.name}/{number}", tasks) if tasks else work()
        if code:
            return code
    return 0


def _slurm_tasks(number: int) -> str | None:
    """The address at which the tasks of a SLURM launch meet for a stage, for `rendezvous`; None: there are no others.

    Each stage has its own port, so that a fast task does not find the store that a slow one is about to close.
    """
    if "SLURM_PROCID" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    from lightning.fabric.plugins.environments import SLURMEnvironment

    if not SLURMEnvironment.detect() or os.environ["SLURM_NTASKS"] == "1":
        return None
    launch = SLURMEnvironment()
    port = 10_000 + (launch.main_port + 1 + number) % 50_000  # not train.py's own
    return f"tcp://{launch.main_address}:{port}?rank={launch.global_rank()}&world_size={launch.world_size()}"


def _while_others_wait(work: Callable[[], int], name: str, meeting: str) -> int:
    """Do `work` on rank 0 of a launch and return its result on all ranks, through the launch's store; `name` must be
    new."""
    from torch.distributed import PrefixStore, rendezvous

    store, rank, world = next(rendezvous(meeting, timeout=CONNECTED))
    store = PrefixStore(name, store)
    if rank == 0:
        store.set("code", str(work()))
    else:
        while not store.check(["code"]):
            time.sleep(1)
    code = int(store.get("code"))
    store.add("known", 1)
    patience = time.monotonic() + CONNECTED.total_seconds()  # a task may have died meanwhile
    while rank == 0 and store.add("known", 0) < world and time.monotonic() < patience:  # rank 0 may host the store
        time.sleep(0.01)
    return code


def shared(cfg: DictConfig) -> list[str]:
    """The settings that all runs share, as words of a command line."""
    words = []
    for key in SHARED:
        value = OmegaConf.select(cfg, key)
        if OmegaConf.is_list(value):
            value = "[" + ",".join(map(str, value)) + "]"
        elif isinstance(value, str):
            words.append(setting(key, value))
            continue
        words.append(f"{key}={'null' if value is None else value}")
    return words


def _readable(word: str) -> str:
    """A word for train.py, in quotes where Hydra cannot read it otherwise, such as a path with odd characters."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(word)
        return word
    except HydraException:
        key, equals, value = word.partition("=")
        return setting(key, value) if equals else word


def _run(command: Sequence[str], when: str = "before") -> int:
    """Run a command and return its exit code. It gets the signals of this process, and dies with it."""
    print_any_name()
    print(f"{when:<10}" + typed(*command[1:]), flush=True)
    die = _die_with_parent if sys.platform == "linux" else None
    child = subprocess.Popen(command, preexec_fn=die, env=_environment())
    heard = [s for s in FORWARDED if signal.getsignal(s) != signal.SIG_IGN]  # under nohup, no SIGHUP
    kept = {s: signal.signal(s, lambda number, _: child.send_signal(number)) for s in heard}
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
    """The environment of a stage: our modules are found from any folder; rank, port and store of torchrun are left
    out."""
    found = {"PYTHONPATH": os.pathsep.join(filter(None, (str(OURS), os.environ.get("PYTHONPATH"))))}
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return dict(os.environ) | found
    passing = ("TORCHELASTIC_", "SLURM_")
    return {k: v for k, v in os.environ.items() if k not in LAUNCHER and not k.startswith(passing)} | found


def _die_with_parent() -> None:
    """Die with the parent: a killed command must not leave a run behind, which the same command would start again."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
