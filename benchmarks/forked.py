"""`python script.py ...` in a fork of this process, which has imported what a new interpreter takes 10 s to import.

Modules that this process has imported are not imported again: what an import does, or whether it happens, is seen in a
real process only. CPU only: CUDA does not survive a fork.
"""

import multiprocessing as mp
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from time import monotonic, sleep

ROOT = Path(__file__).parents[1]
KILLED = -9  # SIGKILL, as a return code
HEAVY = (  # with them comes nearly all that train.py and eval.py import on the way
    "lightning.pytorch",
    "matplotlib.backends.backend_agg",
    "recipes.calibrate",
    "recipes.few_step",
    "recipes.fitting",
    "recipes.report.evaluate",
    "recipes.rollout",
    "recipes.steps.diffusion",
    "recipes.training",
    "sklearn.datasets",
    "torch._dynamo",
)


class Forked:
    """A command that runs; words begin with a script, or with `-m` and a module.

    Args:
        words: after `python`
        cwd: folder that it runs in
        environment: variables beside those of this process
        threads: of torch; None: as in this process
    """

    def __init__(self, *words: str, cwd: Path, environment: Mapping[str, str] = {}, threads: int | None = None):
        for name in HEAVY:
            import_module(name)
        self.words = words
        self.out, self.err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        outputs = self.out.fileno(), self.err.fileno()
        told = (words, cwd, dict(environment), threads, *outputs)
        self.process = mp.get_context("fork").Process(target=_main, args=told)
        self.process.start()

    def ended(self, timeout: float, or_when: Callable[[], bool] = lambda: False) -> subprocess.CompletedProcess[str]:
        """Wait for the end. After `timeout` seconds, or as soon as `or_when()` holds, it is killed and has returncode
        -9."""
        last = monotonic() + timeout
        while self.process.is_alive() and monotonic() < last and not or_when():
            sleep(0.003)
        self.process.kill()
        self.process.join()
        for file in (self.out, self.err):
            file.seek(0)
        code = self.process.exitcode or 0
        with self.out, self.err:
            return subprocess.CompletedProcess(self.words, code, self.out.read(), self.err.read())


def python(
    *words: str, cwd: Path, timeout: float = 300, threads: int | None = None
) -> subprocess.CompletedProcess[str]:
    """What `python <words>` does in the folder `cwd`, as `Forked`."""
    return Forked(*words, cwd=cwd, threads=threads).ended(timeout)


def _main(
    words: tuple[str, ...], cwd: Path, environment: Mapping[str, str], threads: int | None, out: int, err: int
) -> None:
    os.chdir(cwd)
    os.environ.update(environment, PYTHONPATH=str(ROOT))  # the path for the processes that it starts
    for number, file in ((1, out), (2, err)):
        os.dup2(file, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
