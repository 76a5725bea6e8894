"""Every method through every tool, and a table of what holds, what refuses in which sentence, and what fails.

    python -m benchmarks.all_tools out=all_tools
    python -m benchmarks.all_tools out=all_tools only=lcm,dydit workers=1

A case is one method of configs/method on the smallest world that has what it needs, or the command that the catalogue
tells for a class without such a file. Each is planned, then trained for four steps on the CPU with bf16 autocast,
gradient checkpointing and compiled units, killed by SIGKILL as soon as its first checkpoint is there, and started again
with the same words; its artifact is counted, exported and evaluated. One case of each folder of edit/ is trained
on two ranks, too, by DDP and by FSDP2. A setting that a method refuses is left out after its sentence has been noted.

The models mean nothing after so few steps. A case that is done stays in `out`: the same command goes on with the rest.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.forked import KILLED, ROOT, Forked, python
from edit.inputs import words as texts
from edit.inputs.command import guarded
from recipes.catalogue import CONFIGS, Entry, entries
from recipes.config import composed
from recipes.details import example
from recipes.runtime.files import write

LIMIT = 1200.0  # seconds of one command
LATE = f"it was ended after {LIMIT:.0f} s"
STEPS, FIRST = 4, 2  # optimiser steps of a run, and those after which its first checkpoint is written
SMALL = (  # of each run, those before it too
    "data.batch_size=8",
    "checkpoint.every=2",
    "log_every=1",
    "preview.every=0",
    "heldout.every=0",
    "evaluate=null",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
)
SETTINGS = {
    "bf16": "trainer.precision=bf16-mixed",
    "checkpointing": "trainer.gradient_checkpointing=true",
    "compile": "trainer.compile=true",
}
RANKS = {"ddp": "trainer=ddp", "fsdp2": "trainer=fsdp2"}
TOOLS = ("plan", "train", *SETTINGS, "resume", "cost", "export", "eval", *RANKS)
WHOLE = "init=${runs}/dit_digits_teacher"  # for a method that leaves its start open
MORE = {"add": ("matching.vision.path=${runs}/vision",)}  # words that a method needs and its configuration leaves open
HOLDS, REFUSED, FAILED, NONE = "holds", "refused", "failed", "-"


@dataclass(frozen=True)
class Case:
    """A run to be made.

    Args:
        name: of the method or class
        kind: folder of edit/ of the classes that it is about; "" where it is about none
        words: of train.py
    """

    name: str
    kind: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What a tool made of a case.

    Args:
        state: "holds", "refused" in a sentence, "failed", or "-" where there was nothing to do
        said: the sentence, or the last line of a failure
        seconds: that its commands took
    """

    state: str
    said: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Words:
    """Which cases are made, and where.

    Args:
        out: folder of the table and of all runs
        only: names of cases; left out: all
        workers: cases at a time, each on one core; left out: as many as there are cores
    """

    out: Path = Path("all_tools")
    only: list[str] = field(default_factory=list)
    workers: int | None = None


@guarded(interrupted="interrupted: the same command goes on with the cases that are left")
def main(argv: list[str]) -> int:
    """The exit code: 0, or 1 if a tool failed."""
    if texts.asks_help(argv):
        print(f"{__doc__}\n{texts.explained(Words)}")
        return 0
    asked = texts.read(Words, argv)
    rows = made(asked.out, chosen(asked.only), asked.workers or os.cpu_count() or 1)
    print(markdown(rows))
    return int(any(o.state == FAILED for row in rows.values() for o in row.values()))


# ---- what is to be made ---------------------------------------------------------------------------------------------


@cache
def cases() -> tuple[Case, ...]:
    """Every method that is one by itself, then classes that no method has but an example of training or caching."""
    rows = {e.name: e for e in entries() if e.kind in ("edits", "terms", "few_step")}
    found, covered = list[Case](), set[str]()
    for method in composed.names(CONFIGS, "method"):
        about = composed.about(CONFIGS, "method", method)
        if about.get("part") is not True:
            name, classes = f"{smallest(method)}/{method}", list(about.get("rows", {}))
            starts = () if (composed.read(CONFIGS, "experiment", name) or {}).get("init") != "" else (WHOLE,)
            kind = folder(rows[classes[0]]) if classes else ""
            found.append(Case(method, kind, (f"experiment={name}", *starts, *MORE.get(method, ()))))
            covered |= set(classes)
    for e in rows.values():
        if e.name not in covered and (words := runnable(example(e))):
            found.append(Case(e.name, folder(e), words))
    return tuple(found)


def folder(e: Entry) -> str:
    return Path(e.file).parent.name


def smallest(method: str) -> str:
    """The world of the fewest tokens, then units, on which a method works."""
    worlds = {w: composed.about(CONFIGS, "world", w) for w in composed.names(CONFIGS, "world")}
    fitting = [w for w in worlds if composed.unfit(CONFIGS, w, method) is None]
    return min(fitting, key=lambda w: (worlds[w]["tokens"], worlds[w]["units"]))


def runnable(command: str) -> tuple[str, ...]:
    """The words of train.py for an example of the catalogue, () where it needs weights that are not here.

    An edit that needs no training is tried as a variant of an artifact; here it becomes an artifact of its own.
    """
    words = [w for w in shlex.split(command)[2:] if not w.startswith("name=")]
    if command.startswith("python eval.py"):
        edits = next((w.partition("=")[2] for w in words if w.startswith("variant.fast=")), None)
        steps = [f"sampler.solver.{w}" for w in words if w.startswith("steps=")]
        words = ["recipe=calibrate", "init=runs/digits", f"edits={edits}", *steps] if edits else []
    if any("FLUX.1-dev" in w for w in words):
        return ()
    return tuple(WHOLE if w == "init=runs/digits" else w for w in words)


def chosen(names: Sequence[str]) -> list[Case]:
    """Cases by their names, all for none. Raises ValueError for a name that is nobody's."""
    known = {case.name: case for case in cases()}
    if odd := [name for name in names if name not in known]:
        raise ValueError(f"there is no case {odd[0]!r}: there are {', '.join(known)}")
    return [known[name] for name in names] if names else list(known.values())


def parallel(asked: Sequence[Case]) -> set[str]:
    """Names of the cases that are trained on two ranks: the first of each folder."""
    first = {case.kind: case.name for case in reversed(asked) if case.kind}
    return set(first.values())


# ---- a case ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """A case in its own folder of runs.

    Args:
        case: what is made
        runs: folder of its runs, with the whole model of its world
        logs: folder of what its commands say
    """

    case: Case
    runs: Path
    logs: Path

    @property
    def run(self) -> Path:
        return self.runs / self.case.name

    def row(self, ranks: bool) -> dict[str, Outcome]:
        """What each tool made of it.

        Args:
            ranks: whether it is trained on two ranks, too
        """
        found = {"plan": self.tool("plan", "-m", "recipes.plan", *self.words(SETTINGS), "--json")}
        found |= self.training()
        if (self.run / "artifact").is_dir():
            there = f"artifact={self.run}"
            found["cost"] = self.tool("cost", "-m", "recipes.cost", there, "--json")
            if "--real" in found["cost"].said:  # it decides by what tokens are, and is counted as the sentence says
                found["cost"] = self.tool("cost", "-m", "recipes.cost", there, "--json", "--real")
            found["export"] = self.tool("export", "-m", "recipes.export", there, f"out={self.run}_exported")
            few = ("n=8", "batch=8", "guidance=1.5", "rounds=1", "references=64", "device=cpu")
            found["eval"] = self.tool("eval", "eval.py", there, *few, f"out={self.run}_report")
        if ranks:
            found |= {name: self.ranks(name) for name in RANKS}
        return {tool: found.get(tool, Outcome(NONE)) for tool in TOOLS}

    def words(self, settings: Sequence[str] | Mapping[str, str], name: str | None = None) -> list[str]:
        """The words of train.py with some of `SETTINGS`."""
        own = [f"runs={self.runs}", f"name={name or self.case.name}", *SMALL, f"trainer.max_steps={STEPS}"]
        words = [*self.case.words, *own, *(SETTINGS[s] for s in settings)]
        return [*words, *before(words, "before")]

    def training(self) -> dict[str, Outcome]:
        """Train, kill and resume with all settings, then without those that do not work."""
        found, left = dict[str, Outcome](), list(SETTINGS)
        last = self.resumed(left)
        while last["train"].state != HOLDS and last["train"].said != LATE and left:
            for one in left:
                rest = [s for s in left if s != one]
                without = self.resumed(rest)
                if without["train"].state == HOLDS:
                    found[one], left, last = last["train"], rest, without
                    break
            else:  # several do not work, or the reason is another one
                found[left.pop()] = last["train"]
                last = self.resumed(left)
        if last["train"].state != HOLDS:
            return last  # the settings have nothing to do with it
        kept = HOLDS if "resume" in last else NONE  # without a step there is nothing to cast, recompute or compile
        return found | {s: Outcome(kept) for s in left} | last

    def resumed(self, settings: Sequence[str]) -> dict[str, Outcome]:
        """Start the run, kill it at its first checkpoint, start it again: "train", and "resume" if there was one."""
        shutil.rmtree(self.run, ignore_errors=True)
        words, begin = self.words(settings), time.monotonic()
        first = Forked("train.py", *words, cwd=ROOT, threads=1).ended(LIMIT, or_when=self.checkpointed)
        self.log("train", first)
        seconds = time.monotonic() - begin
        if first.returncode != KILLED or not self.checkpointed():
            return {"train": replace(read(first), seconds=seconds)}
        second = python("train.py", *words, cwd=ROOT, timeout=LIMIT, threads=1)
        self.log("resume", second)
        went_on = read(second)
        if went_on.state == HOLDS:
            steps = [line.partition(",")[0] for line in (self.run / "metrics.csv").read_text().splitlines()[1:]]
            if f"at step {FIRST} of {STEPS}" not in second.stdout or steps != [str(s + 1) for s in range(STEPS)]:
                went_on = Outcome(FAILED, f"it did not go on from step {FIRST}: rows of steps {', '.join(steps)}")
        took = time.monotonic() - begin - seconds
        return {"train": Outcome(HOLDS, seconds=seconds), "resume": replace(went_on, seconds=took)}

    def checkpointed(self) -> bool:
        """Whether there is a whole checkpoint: its checksum is written last, after the files of single ranks."""
        return any((self.run / "checkpoints").glob("*.ckpt.sha256"))

    def ranks(self, name: str) -> Outcome:
        """Two steps on two ranks."""
        shutil.rmtree(self.runs / f"{self.case.name}_{name}", ignore_errors=True)
        words = self.words((), f"{self.case.name}_{name}")
        words = [RANKS[name], *words, "trainer.devices=2", "trainer.max_steps=2", "data.batch_size=4"]
        words.append("trainer.gradient_checkpointing=false")  # on with trainer=fsdp2; it has a column of its own
        begin = time.monotonic()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        started = [Forked("train.py", *words, cwd=ROOT, environment=rank(i, port), threads=1) for i in range(2)]
        ended = [one.ended(LIMIT) for one in started]
        for i, one in enumerate(ended):
            self.log(f"{name}_{i}", one)
        if all(one.returncode == 2 for one in ended):
            ended = ended[:1]  # the first alone says why
        states = sorted(map(read, ended), key=lambda s: (FAILED, REFUSED, HOLDS).index(s.state))
        return replace(states[0], seconds=time.monotonic() - begin)

    def tool(self, name: str, *words: str) -> Outcome:
        begin = time.monotonic()
        ended = python(*words, cwd=ROOT, timeout=LIMIT, threads=1)
        self.log(name, ended)
        return replace(read(ended), seconds=time.monotonic() - begin)

    def log(self, name: str, ended: subprocess.CompletedProcess[str]) -> None:
        told = f"python {shlex.join(ended.args)}\nreturned {ended.returncode}\n\n{ended.stdout}\n{ended.stderr}"
        write(self.logs / f"{name}.txt", told)


def rank(number: int, port: int) -> dict[str, str]:
    """The variables by which torchrun tells one of two ranks on this machine."""
    told = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "all_tools"}
    return {name: str(value) for name, value in told.items()}


def before(words: Sequence[str], path: str) -> Iterator[str]:
    """Words that make all runs before a run as small as it is, and those before them."""
    from recipes.config.staged import stages_of
    from recipes.plan import compose

    for stage in stages_of(compose(CONFIGS, words)):
        if stage.module is None:
            small = (*SMALL, "trainer.max_steps=2")
            yield from (f"{path}.{stage.name}.{word}" for word in small)
            yield from before([*stage.all, *small], f"{path}.{stage.name}.before")


def read(ended: subprocess.CompletedProcess[str]) -> Outcome:
    """A command that says in one sentence what is wrong has refused; any other end but a good one is a failure."""
    if ended.returncode == 0:
        return Outcome(HOLDS)
    lines = [line for line in (ended.stdout + "\n" + ended.stderr).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error: ") and "shows the traceback" not in line]
    if ended.returncode in (1, 2) and told and not any(line.startswith("Traceback") for line in lines):
        return Outcome(REFUSED, told[-1].removeprefix("error: "))
    if ended.returncode == KILLED:
        return Outcome(FAILED, LATE)
    return Outcome(FAILED, lines[-1] if lines else f"it ended with code {ended.returncode} and said nothing")


# ---- all of them ----------------------------------------------------------------------------------------------------


def made(out: Path, asked: Sequence[Case], workers: int) -> dict[str, dict[str, Outcome]]:
    """The row of each case, by name; rows that `out` holds already are read. The table is renewed after each."""
    out = out.resolve()
    rows, both = {}, parallel(cases())
    queue, results = mp.Queue(), mp.Queue()
    for case in asked:
        if (known := out / "rows" / f"{case.name}.json").is_file():
            rows[case.name] = {tool: Outcome(**one) for tool, one in json.loads(known.read_text()).items()}
        else:
            queue.put((case, case.name in both))
    left = len(asked) - len(rows)
    hands = [mp.Process(target=work, args=(out, queue, results)) for _ in range(min(workers, left))]
    for hand in hands:
        queue.put(None)
        hand.start()
    begin = time.monotonic()
    for done in range(1, left + 1):
        name, row = results.get()
        rows[name] = row
        write(out / "rows" / f"{name}.json", json.dumps({tool: asdict(one) for tool, one in row.items()}, indent=2))
        write(out / "all_tools.md", page(rows))
        told = ", ".join(f"{tool} {o.state}" for tool, o in row.items() if o.state in (REFUSED, FAILED)) or "all hold"
        took = sum(o.seconds for o in row.values())
        print(f"[{done}/{left}] {name}: {told} ({took:.0f} s; {time.monotonic() - begin:.0f} s in all)", flush=True)
    for hand in hands:
        hand.join()
    return {case.name: rows[case.name] for case in asked}


def work(out: Path, queue: Any, results: Any) -> None:
    """Make cases until there are none left."""
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    whole = out / f"worlds_{os.getpid()}"
    while (told := queue.get()) is not None:
        case, ranks = told
        bench = Bench(case, out / "runs" / case.name, out / "logs" / case.name)
        shutil.rmtree(bench.runs, ignore_errors=True)
        try:
            row = begun(bench, whole).row(ranks)
        except Exception as error:  # a case that cannot even be composed must not end the others
            row = {tool: Outcome(NONE) for tool in TOOLS} | {"plan": Outcome(FAILED, " ".join(str(error).split()))}
        shutil.rmtree(bench.runs, ignore_errors=True)
        results.put((case.name, row))
    shutil.rmtree(whole, ignore_errors=True)


def begun(bench: Bench, whole: Path) -> Bench:
    """The case with the whole model of its world in its folder of runs, and a model of images if it looks with one.

    Raises:
        RuntimeError: if the whole model cannot be trained
    """
    from recipes.plan import compose

    world = compose(CONFIGS, bench.case.words).world.name or "dit_digits"
    kept = whole / f"{world}_teacher"
    if not kept.is_dir():
        words = (f"experiment={world}/teacher", f"runs={whole}", *SMALL, "trainer.max_steps=2")
        ended = python("train.py", *words, cwd=ROOT, timeout=LIMIT, threads=1)
        if ended.returncode:
            raise RuntimeError(f"the whole model of {world} was not trained: {read(ended).said}")
    shutil.copytree(kept, bench.runs / kept.name)
    if bench.case.name in MORE:
        write_vision(bench.runs / "vision")
    return bench


def write_vision(folder: Path) -> None:
    """A DINOv2 of the published depth, small and random."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    size = {"height": 28, "width": 28}
    shape = Dinov2Config(hidden_size=16, num_hidden_layers=12, num_attention_heads=2, image_size=28, patch_size=7)
    Dinov2Model(shape).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)


# ---- what is written ------------------------------------------------------------------------------------------------

HEAD = """# What holds for every method

Written by `python -m benchmarks.all_tools`: four steps on the smallest world that has what a method needs, on the CPU.
*train*: with bf16 autocast, gradient checkpointing and compiled units, as far as the next three columns hold; *resume*:
after SIGKILL at the first checkpoint, on the same line of steps; *ddp*, *fsdp2*: two ranks, one method of each folder
of edit/. *refused*: with the sentence below the table; "-": nothing to do. Nothing is said of quality.
"""


def page(rows: Mapping[str, Mapping[str, Outcome]]) -> str:
    """The table with its head, the versions that it was made with, and the time that all commands took."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "lightning", "diffusers"))
    minutes = sum(o.seconds for row in rows.values() for o in row.values()) / 60
    told = f"{date.today()}, {versions}; {len(rows)} cases, {minutes:.0f} minutes of commands, one core each."
    return f"{HEAD}\n{told}\n\n{markdown(rows)}"


def markdown(rows: Mapping[str, Mapping[str, Outcome]]) -> str:
    """The table, and below it each sentence with the cases that said it."""
    lines = [f"| case | {' | '.join(TOOLS)} |", "|---" * (len(TOOLS) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(row[tool].state for tool in TOOLS)} |")
    for state in (REFUSED, FAILED):
        said: dict[tuple[str, str], list[str]] = {}
        for name, row in rows.items():
            for tool, one in row.items():
                if one.state == state:
                    said.setdefault((tool, plain(one.said, name)), []).append(name)
        if said:
            lines += ["", f"{state.capitalize()}:", ""]
            lines += [f"- {tool} of {', '.join(names)}: {text}" for (tool, text), names in sorted(said.items())]
    return "\n".join(lines) + "\n"


def plain(text: str, name: str) -> str:
    """A sentence without folders of this machine and names of runs and edits, so that equal ones are equal."""
    text = re.sub(r"'\w+' stays live: \w+ ", "'...' stays live: it ", text)
    return re.sub(rf"\b{re.escape(name)}\b", "<name>", re.sub(r"/\S*/(?=[\w<])", "", text))


if __name__ == "__main__":
    sys.exit(main())
