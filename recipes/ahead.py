"""The stages before a run, looked at before the first of them starts: their words, their work and how long it takes.

Each run of train.py among them is composed and checked here, with the stages that it needs itself, so that a mistyped
word ends the command at once and not after hours of the stage before it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.names import legible
from recipes.config.check import check
from recipes.config.chosen import procedure_of
from recipes.config.errors import UserError
from recipes.config.explain import explain
from recipes.config.sources import register
from recipes.config.staged import Stage, for_stage, gathered, readable, shared, stages_of
from recipes.report.amounts import duration
from recipes.runtime.checkpoint_files import checkpoints, step_of
from recipes.runtime.devices import accelerator_of
from recipes.runtime.machine import device_name, pick_device

# the file that a module writes last
LAST = {
    "data.embedded": "prompts.txt",
    "data.generate": "manifest.json",
    "data.precompute": "manifest.json",
    "recipes.prune": "pruning.json",
}
# what the speed of a run depends on, besides the device and the size of the batch, which counts by its images
KIND = ("backbone", "edits", "terms", "matching", "recipe", "data.set._target_", "teacher.placement")
KIND += tuple(f"trainer.{key}" for key in ("strategy", "devices", "num_nodes", "compile", "gradient_checkpointing"))
TIMED = 100  # runs that are looked at, the newest first


@dataclass(frozen=True)
class Ahead:
    """A stage that is about to be started.

    Args:
        stage: with all words that reach it
        place: by which the command line reaches it, before.search.before.teacher
        out: the folder that it fills; None: not known
        cfg: of a run of train.py
        before: the stages that it needs itself
    """

    stage: Stage
    place: str
    out: Path | None
    cfg: DictConfig | None = None
    before: tuple[Ahead, ...] = ()

    def inside(self) -> Iterator[Ahead]:
        """The stages that it starts, in their order."""
        for item in self.before:
            yield from item.inside()
            yield item

    @property
    def steps(self) -> tuple[int, int] | None:
        """Optimiser steps that are done, and all; None: it is no training."""
        if self.cfg is None or self.out is None or not procedure_of(self.cfg).optimises:
            return None
        saved = checkpoints(self.out / "checkpoints")
        return (step_of(saved[-1]) if saved else 0), self.cfg.trainer.max_steps

    @property
    def complete(self) -> bool:
        """Whether its work is done, by the names of files: the stage itself looks into them."""
        if self.out is None:
            return False
        if self.cfg is None:
            return (self.out / LAST.get(self.stage.module or "", "")).is_file()
        done, wanted = self.steps or (0, 0)
        return done >= wanted and (self.out / procedure_of(self.cfg).makes).is_dir()


def look_ahead(cfg: DictConfig, configs: Path, place: str = "before", folders: Sequence[Path] = ()) -> list[Ahead]:
    """The stages before a run, with the words that reach them.

    Words for a stage also reach the stage of a later one that fills the same folder, or it would be continued with
    others.

    Args:
        cfg: of the run, checked
        configs: folder of the configuration groups
        place: by which the command line reaches its stages
        folders: of the runs for which these are

    Raises:
        UserError: for a stage whose words cannot be used, or one that needs itself
    """
    found: list[Ahead] = []
    folders = (*folders, Path(cfg.runs) / str(cfg.name))
    for stage in stages_of(cfg):
        item = _looked_at(stage, cfg, configs, f"{place}.{stage.name}", folders)
        if passed := list(_passed_on(found, item)):
            again = replace(stage, given=(*stage.given, *passed))
            item = _looked_at(again, cfg, configs, item.place, folders)
        found.append(item)
    return found


def _looked_at(stage: Stage, cfg: DictConfig, configs: Path, place: str, folders: Sequence[Path]) -> Ahead:
    if stage.module is not None:
        out = stage.value("out")
        return Ahead(stage, place, None if out is None else Path(out))
    own = _composed(place, [*shared(cfg), *map(readable, stage.all)], configs)
    out = Path(own.runs) / str(own.name)
    if out in folders:
        raise UserError(f"{place}: this run fills {out} and needs itself first: give it another name=")
    return Ahead(stage, place, out, own, tuple(look_ahead(own, configs, f"{place}.before", folders)))


def _passed_on(earlier: Sequence[Ahead], item: Ahead) -> Iterator[str]:
    """Words for the stages of `item` that were given for an earlier stage of the same folder."""
    for one in earlier:
        for inner in item.inside():
            if inner.out is not None and inner.out == one.out:
                yield from (for_stage(inner.place.removeprefix(f"{item.place}."), word) for word in one.stage.given)


def _composed(place: str, words: Sequence[str], configs: Path) -> DictConfig:
    """The checked configuration of train.py with these words. Raises UserError, naming the place."""
    register()
    try:
        with _another_hydra(), initialize_config_dir(version_base="1.3", config_dir=str(configs.resolve())):
            cfg = compose("train", gathered(words))
    except UserError:
        raise
    except Exception as error:  # words that are no settings raise many types in Hydra
        raise UserError(f"{place}: {explain(error, configs, words)}") from error
    if errors := check(cfg):
        raise UserError(f"{place}: {errors[0]}")
    return cfg


@contextmanager
def _another_hydra() -> Iterator[None]:
    """Put Hydra's own state aside, which belongs to the command that is running."""
    current = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        if current is not None:
            GlobalHydra.instance().initialize(current)


# ---- in words -------------------------------------------------------------------------------------------------------


def told(ahead: Sequence[Ahead]) -> list[str]:
    """What is to be done, a line for each stage in the order in which it is done; complete ones in one line."""
    every: dict[Any, Ahead] = {}
    for item in ahead:
        for one in (*item.inside(), item):
            every.setdefault(one.out or one.place, one)
    done = [item for item in every.values() if item.complete]
    left = [item for item in every.values() if not item.complete]
    lines = [f"{', '.join(map(_short, done))}: complete"] if done else []
    lines += [f"{_short(item)}: {_work(item)}" for item in left]
    if trained := next((item for item in left if item.steps is not None), None):
        lines.append(f"words for one stage: {trained.place}.<key>=..., such as {trained.place}.trainer.max_steps=100")
    elif left:
        lines.append(f"words for one stage: {left[0].place}.<key>=...")
    return lines


def _short(item: Ahead) -> str:
    return item.place.removeprefix("before.")


def _work(item: Ahead) -> str:
    where = "" if item.out is None else f" into {legible(str(item.out))}"
    if item.steps is None:
        return (item.stage.module or "a run in one piece") + where
    done, wanted = item.steps
    if done >= wanted:
        return f"{wanted:,} steps are trained, the artifact is to be written{where}"
    steps = f"steps {done:,} to {wanted:,}" if done else f"{wanted:,} steps of training"
    return f"{steps}{where}, {_how_long(item, wanted - done)}"


def _how_long(item: Ahead, steps: int) -> str:
    assert item.cfg is not None
    if (known := timed(item.cfg)) is None:
        return "how long is not known: no run like it was timed on this device yet"
    seconds, source = known
    return f"about {duration(steps * seconds)} at the speed of {legible(str(source))}"


# ---- how long -------------------------------------------------------------------------------------------------------


def timed(cfg: DictConfig) -> tuple[float, Path] | None:
    """Seconds per optimiser step by the newest run of the same kind on the same device, and that run's folder.

    Runs are of the same kind if KIND is the same; the number of images in a step may differ.
    """
    runs = Path(cfg.runs)
    logs = sorted((*runs.glob("*/metrics.csv"), *runs.glob("*/*/metrics.csv")), key=_changed, reverse=True)
    kind, t = _kind(OmegaConf.to_container(cfg, resolve=True)), cfg.trainer
    device = device_name(pick_device("cuda" if accelerator_of(t) == "gpu" else "cpu"))
    for log in logs[:TIMED]:
        if _kind_of(log.parent, device) == kind and (speed := _speed(log)):
            world = t.num_nodes * (t.devices if isinstance(t.devices, int) else 1)
            return cfg.data.batch_size * t.accumulate * world / speed, log.parent
    return None


def _changed(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # deleted meanwhile
        return 0.0


def _kind(settings: Any) -> dict[str, Any]:
    return {key: OmegaConf.select(OmegaConf.create(settings), key) for key in KIND}


def _kind_of(folder: Path, device: str) -> dict[str, Any] | None:
    """The kind of a run; None: it ran on another device, or its files cannot be read."""
    from edit.inputs.trust import load_yaml

    try:
        if json.loads((folder / "env.json").read_text())["device"] != device:
            return None
        return _kind(OmegaConf.to_container(load_yaml(folder / "config.yaml")))
    except (ValueError, LookupError, TypeError, OSError, OmegaConfBaseException):
        return None


def _speed(log: Path) -> float | None:
    """Images per second, the median of a run's rows; None: it has none."""
    try:
        with open(log, newline="") as file:
            speeds = [float(row["images_per_second"]) for row in csv.DictReader(file)]
    except (ValueError, LookupError, TypeError, OSError, csv.Error):
        return None
    return median(speeds) if speeds and median(speeds) > 0 else None
