"""What the commands cost before they do their work: CPU seconds and wall time, each in a fresh process.

    python -m benchmarks.startup                       # all commands, five times each
    python -m benchmarks.startup --only cost,plan --rounds 3 --json startup.json

CPU seconds are those of the process and of the children that it waited for. Training is measured from the start of
the process to the row of its first step in metrics.csv, where it is stopped. A shared core's speed changes from minute
to minute: a loop of plain Python is timed before and after each command, and "ordinary" is what the command would have
taken on a core that needs 0.25 s for it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
ADDITIONS = 5_000_000  # of the loop that tells this machine's speed
ORDINARY = 0.25  # seconds that they take on the core for which the bars were written
PATIENCE = 600  # seconds for one command


@dataclass(frozen=True)
class Command:
    """One command line, how it ends, and the most CPU seconds that it may take on an ordinary core."""

    name: str
    words: tuple[str, ...]
    code: int = 0
    bar: float | None = None
    stops: str | None = None  # a file: the command is stopped as soon as it has two lines
    after: tuple[str, ...] = ()  # a command that is run once before


@dataclass(frozen=True)
class Measured:
    """Of each round."""

    name: str
    words: tuple[str, ...]
    bar: float | None
    cpu: tuple[float, ...]  # seconds, likewise the next two
    wall: tuple[float, ...]
    first: tuple[float, ...]  # until the first word; as `wall` if there was none
    speed: tuple[float, ...]  # how often this core was slower than an ordinary one

    @property
    def ordinary(self) -> list[float]:
        """CPU seconds on an ordinary core."""
        return [cpu / speed for cpu, speed in zip(self.cpu, self.speed, strict=True)]


def commands(folder: Path) -> list[Command]:
    """The commands, with their runs in `folder`."""
    runs, digits = f"runs={folder}", ("name=complete", "trainer.max_steps=1", "evaluate=null")
    new = ("train.py", runs, "name=first", "log_every=1")
    plan = ("experiment=flux_dev/distill", "backbone.path=FLUX.1-dev", "trainer=zero3", "devices=8")
    return [
        Command("train help", ("train.py", "--help"), bar=1.5),
        Command("eval help", ("eval.py", "--help"), bar=1.5),
        Command("mistyped", ("train.py", "trainer.max_step=3"), 2, bar=1.5),
        Command("first step", new, bar=6, stops=str(folder / "first" / "metrics.csv")),
        Command("complete", ("train.py", runs, *digits), bar=4, after=("train.py", runs, *digits)),
        Command("no gpu", ("train.py", runs, "name=nowhere", "trainer=gpu"), 2, bar=4),
        Command("cost", ("-m", "recipes.cost", "backbone=flux_dev"), bar=8),
        Command("plan", ("-m", "recipes.plan", *plan), bar=30),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, with commas: " + ", ".join(c.name for c in commands(Path())))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args(argv)
    print(f"load {load()}; medians of {args.rounds}, seconds")
    heads = ("CPU", "ordinary", "bar", "wall", "first word", "slower")
    print(f"{'command':<12}" + "".join(f"{head:>11}" for head in heads) + "   ordinary, each round")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for command in chosen(commands(Path(folder)), args.only):
            m = measure(command, Path(folder), args.rounds)
            rows.append(m)
            print(line(m), flush=True)
    if args.json is not None:
        about = {"python": platform.python_version(), "torch": version("torch"), "cores": os.cpu_count()}
        told = {**about, "load": load(), "commands": [{**asdict(m), "ordinary": m.ordinary} for m in rows]}
        args.json.write_text(json.dumps(told, indent=2))


def chosen(known: Sequence[Command], names: str) -> list[Command]:
    """Those of the given names, all if there are none. Raises SystemExit for a name that is not known."""
    asked = [name for name in names.split(",") if name]
    if unknown := [name for name in asked if name not in {c.name for c in known}]:
        sys.exit(f"there is no command {unknown[0]!r}: choose of {', '.join(c.name for c in known)}")
    return [c for c in known if not asked or c.name in asked]


def line(m: Measured) -> str:
    """A row of the table: medians."""
    cpu, ordinary, wall, first, speed = map(statistics.median, (m.cpu, m.ordinary, m.wall, m.first, m.speed))
    bar = "" if m.bar is None else f"{m.bar:g}"
    each = " ".join(f"{seconds:.2f}" for seconds in m.ordinary)
    return f"{m.name:<12}{cpu:>11.2f}{ordinary:>11.2f}{bar:>11}{wall:>11.2f}{first:>11.2f}{speed:>11.2f}   {each}"


def loop() -> float:
    """CPU seconds of a loop of plain Python."""
    begin, total = time.process_time(), 0
    for i in range(ADDITIONS):
        total += i
    return time.process_time() - begin


def load() -> str:
    return " ".join(f"{v:.1f}" for v in os.getloadavg())


# ---- one command ----------------------------------------------------------------------------------------------------


def measure(command: Command, folder: Path, rounds: int) -> Measured:
    """Run a command so many times. Raises RuntimeError if it does not end as it should."""
    if command.after:
        run(command.after, 0)
    found = []
    for _ in range(rounds):
        if command.stops is not None:
            shutil.rmtree(Path(command.stops).parent, ignore_errors=True)
        stop = None if command.stops is None else two_lines(Path(command.stops))
        before = loop()
        seconds = run(command.words, command.code, stop)
        found.append((*seconds, (before + loop()) / 2 / ORDINARY))
    cpu, wall, first, speed = zip(*found, strict=True)
    return Measured(command.name, command.words, command.bar, cpu, wall, first, speed)


def two_lines(path: Path) -> Callable[[], bool]:
    """Whether a file has a second line: metrics.csv then has the first step."""
    return lambda: path.exists() and path.read_bytes().count(b"\n") > 1


def run(words: Sequence[str], code: int, stop: Callable[[], bool] | None = None) -> tuple[float, float, float]:
    """CPU seconds, wall seconds, and wall seconds until the first word, of one command in a fresh process.

    Raises:
        RuntimeError: if it ends with another exit code, with what it said
    """
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    begin, before, first = time.perf_counter(), spent(), None
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, stdout=said, stderr=said)
        while child.poll() is None:
            if first is None and os.fstat(said.fileno()).st_size:
                first = time.perf_counter() - begin
            if time.perf_counter() - begin > PATIENCE or (stop is not None and stop()):
                child.kill()
            time.sleep(0.005)
        wall = time.perf_counter() - begin
        said.seek(0)
        if child.returncode != (code if stop is None else -signal.SIGKILL) or wall > PATIENCE:
            text = said.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(words)} ended with {child.returncode} after {wall:.0f} s: {text}")
    return spent() - before, wall, wall if first is None else first


def spent() -> float:
    """CPU seconds of all children that this process has waited for, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
