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
from importlib.metadata import distributions
from pathlib import Path

from omegaconf import DictConfig

from data.names import typed
from edit.inputs.command import print_any_name
from recipes.config.staged import Stage, readable, shared, stages_of
from recipes.runtime.files import is_first

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
CONNECTED = timedelta(minutes=10)  # for all ranks to reach the store
OURS = Path(__file__).parents[1]  # the folder of `data` and `edit`
# variables that torchrun, or Lightning as a launcher, sets for its ranks
LAUNCHER = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"}
LAUNCHER |= {f"{group}_{what}" for group in ("LOCAL", "GROUP", "ROLE") for what in ("RANK", "WORLD_SIZE")} | {
    "ROLE_NAME"
}


def run_before(cfg: DictConfig, script: Path) -> None:
    """Run the stages of `cfg.before`, in order, having said what is to be done.

    Args:
        cfg: the composed configuration
        script: train.py, for words that name no module; `configs` beside it has its configurations

    Raises:
        SystemExit: with the exit code of the first run that did not finish; on every rank
        UserError: if a stage cannot be started with its words, before the first one starts
    """
    if not cfg.before:
        return
    if "LOCAL_RANK" in os.environ and not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys():
        return  # launched by Lightning on rank 0, which has run them
    from recipes.ahead import look_ahead, told  # needs what training needs

    ahead = look_ahead(cfg, script.parent / "configs")
    if is_first():
        for line in told(ahead):
            print(f"{'before':<10}{line}", flush=True)
    name, stages = f"before/{cfg.runs}/{cfg.name}", [item.stage for item in ahead]  # a sweep has several names
    if "TORCHELASTIC_RUN_ID" in os.environ:
        code = _while_others_wait(lambda: _run_all(stages, cfg, script, name), name, "env://")
    else:
        code = _run_all(stages, cfg, script, name)
    if code:
        raise SystemExit(code)


def run_after(cfg: DictConfig) -> None:
    """Run the stages of `cfg.after`, in order, on the first of all ranks, whenever the run itself is complete.

    Raises:
        SystemExit: with the exit code of the first that failed
    """
    if any(os.environ.get(rank, "0") != "0" for rank in ("RANK", "LOCAL_RANK", "SLURM_PROCID")):
        return
    for stage in stages_of(cfg, "after"):
        if code := _run([sys.executable, "-m", *stage.all], "after"):
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


def _run_all(stages: Sequence[Stage], cfg: DictConfig, script: Path, name: str) -> int:
    """The exit code of the first run that did not finish, or 0."""
    for number, stage in enumerate(stages):
        if stage.module is None:
            code = _run([sys.executable, str(script), *shared(cfg), *map(readable, stage.all)])
        else:
            work, tasks = partial(_run, [sys.executable, "-m", *stage.all]), _slurm_tasks(number)
            code = _while_others_wait(work, f"{name}/{number}", tasks) if tasks else work()
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


def _run(command: Sequence[str], when: str = "before") -> int:
    """Run a command and return its exit code. It gets the signals of this process, and dies with it."""
    print_any_name()
    print(f"{when:<10}" + pasteable(command[1:]), flush=True)
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


def pasteable(words: Sequence[str]) -> str:
    """A line for the shell in which this process was started: `python` and words."""
    here, known = Path.cwd(), os.environ.get("PYTHONPATH", "").split(os.pathsep)
    found = words[0] != "-m" or OURS in (here, *(here / path for path in known if path)) or _installed()
    return f"PYTHONPATH={typed(OURS)} " * (not found) + typed("python", *words)


def _installed() -> bool:
    """Whether every folder has our modules, for processes of this Python."""
    return any(True for _ in distributions(name="edit-dit"))


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
