"""What a run folder holds, read without torch and whatever state it is in: the source of pages, lists and sweeps.

A damaged file is a sentence in `Record.faults`, and what it would have told is missing.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from math import prod
from pathlib import Path
from typing import Any

import yaml

from data.names import legible
from edit.artifacts.reference import home
from edit.inputs.trust import read_json, read_yaml
from recipes.report.columns import own_results
from recipes.report.curves import HELD
from recipes.report.values import at, number
from recipes.runtime.files import LOCK

MARKS = ("config.yaml", "artifact", "metrics.csv", "checkpoints", "pruning.json")  # one of them makes a folder a run's
# folders of a run that hold no runs
INSIDE = {"artifact", "encoder", "checkpoints", "samples", "grids", "wandb", "tensorboard"}
DEEP = 4  # folders below that of all runs
STEP = re.compile(r"step_(\d+)\.(?:png|ckpt)")


@dataclass(frozen=True)
class Record:
    """A run folder; what is missing or damaged is empty.

    Args:
        folder: of the run
        config: its settings, from config.yaml
        told: of its artifact, from edits.json
        report: from report.json
        environment: from env.json
        pruning: from pruning.json
        last: the last row of metrics.csv, by column; numbers on held-out data of the last row that has them
        faults: a sentence for each damaged file
    """

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    pruning: Mapping[str, Any] = field(default_factory=dict)
    last: Mapping[str, float] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name that the run was given, else that of its folder."""
        given = at(self.config, "name")
        parts = Path(str(given)).parts if given is not None else ()
        return legible(
            "/".join(parts if parts and self.folder.parts[-len(parts) :] == parts else self.folder.parts[-1:])
        )

    @property
    def root(self) -> Path:
        """The folder of all runs."""
        return self.folder.parents[self.name.count("/")] if self.name.count("/") < len(self.folder.parts) else Path()

    # ---- how far it is ----------------------------------------------------------------------------------------------

    @property
    def artifact(self) -> bool:
        return (self.folder / "artifact").is_dir()

    @property
    def steps(self) -> int | None:
        """Optimiser steps that are done; None: this run takes none."""
        told = number(at(self.told, "run", "step"))
        if self.artifact and at(self.told, "run") is not None:
            if told is None or self.pruning or at(self.told, "run", "applied") is not None:
                return None
        saved = [int(found[1]) for p in _names(self.folder / "checkpoints") if (found := STEP.fullmatch(p))]
        return max([int(told or 0), int(self.last.get("step", 0)), *saved])

    @property
    def planned(self) -> int | None:
        """Optimiser steps that it is to take."""
        steps = number(at(self.config, "trainer", "max_steps"))
        return None if steps is None or self.steps is None else int(steps)

    @property
    def finished(self) -> bool:
        made = self.artifact or (self.folder / "encoder").is_dir()
        return made and (self.steps is None or self.planned is None or self.steps >= self.planned)

    @property
    def state(self) -> str:
        """In words: finished, running, or where it stopped."""
        if self.finished:
            return "finished"
        if not isinstance(at(self.config, "trainer"), Mapping):
            return "unfinished"
        where = f"at step {self.steps:,}" if self.steps else "before its first row"
        of = f" of {self.planned:,}" if self.steps and self.planned is not None else ""
        return f"{'running,' if is_locked(self.folder) else 'stopped'} {where}{of}"

    @property
    def date(self) -> datetime | None:
        """When the last of its results was written, in local time."""
        files = ("artifact/edits.json", "report.json", "metrics.csv", "pruning.json", "config.yaml")
        times = [t for file in files if (t := _changed(self.folder / file)) is not None]
        return datetime.fromtimestamp(max(times)).astimezone() if times else None

    # ---- what was done ----------------------------------------------------------------------------------------------

    @property
    def backbone(self) -> str:
        """The class of the model, as in DiT."""
        name = _class(at(self.config, "backbone")) or str(at(self.told, "backbone") or "").rpartition(".")[-1]
        return legible(name.removesuffix("Config")) or "–"

    @property
    def methods(self) -> list[str]:
        """What is done besides plain training: recipe, few-step method, edits and terms, by their classes."""
        config = self.config or self.told
        alone = [_class(at(config, key)) for key in ("recipe", "matching")]
        listed = [_class(node) for key in ("edits", "terms") for node in _values(at(config, key))]
        by = [f"pruned by {at(self.pruning, 'settings', 'by')}"] if self.pruning else []
        return [legible(name) for name in (*by, *alone, *listed) if name]

    @property
    def images(self) -> int:
        """Images of an optimiser step, over all ranks; 0: not known."""
        keys = (("data", "batch_size"), ("trainer", "accumulate"), ("trainer", "devices"), ("trainer", "num_nodes"))
        factors = [number(at(self.config, *key)) for key in keys]
        return int(prod(1 if f is None else f for f in factors)) if factors[0] is not None else 0

    @property
    def results(self) -> list[Mapping[str, Any]]:
        """Its rows in the report, one per guidance weight."""
        return own_results(self.report)

    @property
    def command(self) -> list[str]:
        """The words that started it, after `python`; empty for runs of older versions."""
        words = at(self.environment, "command")
        whole = isinstance(words, Sequence) and not isinstance(words, str) and all(isinstance(w, str) for w in words)
        return list(words) if whole else []

    @property
    def samples(self) -> list[tuple[int, Path]]:
        """Steps and files of the sample grids, in order."""
        folder = self.folder / "samples"
        return sorted((int(f[1]), folder / n) for n in _names(folder) if (f := STEP.fullmatch(n)) and n.endswith("png"))

    @property
    def picture(self) -> Path | None:
        """The picture that shows what the run has made."""
        if self.samples:
            return self.samples[-1][1]
        grids = [self.folder / str(row.get("grid")) for row in self.results if row.get("grid")]
        inside = [g for g in grids if g.is_file() and g.resolve().is_relative_to(self.folder.resolve())]
        other = [self.folder / "pruning.png"] if (self.folder / "pruning.png").is_file() else []
        return next(iter([*inside, *other]), None)


def read(folder: Path) -> Record:
    """Read a run folder. Raises nothing about its files."""
    faults: list[str] = []

    def part(name: str, reader: Callable[[Path], Any]) -> Mapping[str, Any]:
        path = folder / name
        try:
            found = reader(path) if path.exists() else {}
            if isinstance(found, Mapping):
                return found
            reason = f"it holds a {type(found).__name__}, expected keys and values"
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            reason = " ".join(str(error).split()).removeprefix(f"{path} ")[:200]
        faults.append(legible(f"{name} is damaged: {reason}"))
        return {}

    parts = {
        "config": part("config.yaml", read_settings),
        "told": part("artifact/edits.json", read_json),
        "report": part("report.json", read_json),
        "environment": part("env.json", read_json),
        "pruning": part("pruning.json", read_json),
        "last": part("metrics.csv", last_row),
    }
    return Record(folder, **parts, faults=tuple(faults))


def read_settings(path: Path) -> Any:
    """config.yaml as plain values: a tenth of the time that OmegaConf takes, which a list of many runs feels.

    Raises:
        ValueError, OSError, yaml.YAMLError: if it is damaged
    """
    return yaml.load(read_yaml(path), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def last_row(path: Path) -> dict[str, float]:
    """The last whole row of metrics.csv, by column, without reading more than the end of the file. Numbers on held-out
    data are of the last row that has them.

    Raises:
        OSError, ValueError: if it cannot be read
    """
    with open(path, "rb") as file:
        columns = file.readline(2**20).decode().strip().split(",")
        file.seek(max(file.tell(), path.stat().st_size - 2**16))
        rows = file.read(2**16).decode(errors="replace").splitlines()
    whole = [cells for row in rows if len(cells := row.split(",")) == len(columns) and cells[0].isdigit()]
    found = {}
    for place, name in enumerate(columns):
        for row in reversed(whole if name.startswith(HELD) else whole[-1:]):
            if (value := _float(row[place])) is not None:
                found[name] = value
                break
    return found


def find_runs(root: Path, depth: int = DEEP) -> Iterator[Path]:
    """The run folders below a folder, nested ones included; what is not readable is left out."""
    try:
        with os.scandir(root) as entries:
            below = sorted((e.name for e in entries if not e.name.startswith(".") and e.is_dir()), key=str)
    except OSError:
        return
    if is_run(root):
        below = [name for name in below if name not in INSIDE]
    for folder in (root / name for name in below):
        if is_run(folder):
            yield folder
        if depth > 1:
            yield from find_runs(folder, depth - 1)


def is_run(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in MARKS)


def is_locked(folder: Path, locks: Path = Path("/proc/locks")) -> bool:
    """Whether another process on this machine writes into a run folder; False where that cannot be told."""
    try:
        node = (folder / LOCK).stat().st_ino
        held = [line.split() for line in locks.read_text().splitlines()]
    except OSError:
        return False
    others = (words for words in held if "FLOCK" in words and str(os.getpid()) not in words)
    return any(word.endswith(f":{node}") for words in others for word in words[1:])


def writer(folder: Path) -> str | None:
    """The machine that a run was last written on, if it is another one."""
    try:
        host = (folder / LOCK).read_text(errors="replace").rpartition(" on ")[2].strip()
    except OSError:
        return None
    return legible(host) if host and host != socket.gethostname() else None


def parameters(record: Record) -> int | None:
    """Numbers that the artifact's weights hold, from the heads of its files; None: there is no artifact."""
    counted = next((n for row in record.results if (n := number(at(row, "cost", "parameters"))) is not None), None)
    if counted is not None:
        return int(counted)
    own = record.folder / "artifact"
    try:
        folders = {own, home(own, record.told)}
        files = {f.resolve() for folder in folders for f in folder.glob("*.safetensors")}
        return sum(map(_numbers, files)) or None
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None


def _numbers(path: Path) -> int:
    """Elements of all tensors in a safetensors file."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > 2**27:
            raise ValueError(f"{path} is no safetensors file")
        head = json.loads(file.read(size))
    return sum(prod(entry["shape"]) for name, entry in head.items() if name != "__metadata__")


def _class(node: Any) -> str:
    """The class that a node of a configuration names; a plain word stands for itself."""
    target = at(node, "_target_")
    return target.rpartition(".")[2] if isinstance(target, str) else node if isinstance(node, str) else ""


def _values(node: Any) -> list[Any]:
    return list(node.values()) if isinstance(node, Mapping) else []


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
