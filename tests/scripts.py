"""`python script.py ...` in a fork of this process, which has imported what a new interpreter takes 10 s to import."""

import multiprocessing as mp
import os
import runpy
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
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


def python(*words: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """What `python <words>` does in the folder `cwd`; words begin with a script, or with `-m` and a module.

    Modules that this process has imported are not imported again: what an import does, or whether it happens, is
    seen in a real process only. A process that lasts longer than `timeout` seconds is killed and has returncode -9.
    """
    for name in HEAVY:
        import_module(name)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = mp.get_context("fork").Process(target=_main, args=(words, cwd, out.fileno(), err.fileno()))
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(words, process.exitcode or 0, out.read(), err.read())


def _main(words: tuple[str, ...], cwd: Path, out: int, err: int) -> None:
    os.chdir(cwd)
    os.environ["PYTHONPATH"] = str(ROOT)  # for the processes that it starts
    for number, file in ((1, out), (2, err)):
        os.dup2(file, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
