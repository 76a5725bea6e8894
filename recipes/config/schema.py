"""The front end of train.py and eval.py: what a configuration may say, and one sentence for each mistake in it.

Hydra composes YAML groups under the typed `Root`; `check` then looks through what was composed, so that a mistyped key,
a wrong type or an impossible combination is refused before anything is built. `launch` puts both in front of
`hydra.main` and turns what goes wrong afterwards into a sentence and an exit code.
Nothing heavy is imported here: `--help` and most mistakes are answered without torch.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf, flag_override, open_dict
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)

from data.names import legible
from edit.inputs.command import DEBUG, unexpected
from edit.inputs.limits import LAST_SEED
from edit.inputs.trust import cut, read_yaml
from edit.moved import COMMANDS, current
from recipes.config import composed
from recipes.config.check import describe, flat, mistakes, rule, suggest

LONGEST = 200  # bytes of a run's name: file systems take 255 for a folder
TRUSTED = ("edit", "data")  # packages whose classes a config may name, besides those that it trusts


class UserError(Exception):
    """A mistake of the user, said in one sentence: what was given, what was expected, how to mend it."""


# ---- schema ---------------------------------------------------------------------------------------------------------


@dataclass
class TrainerConfig:
    max_steps: int = rule(MISSING, low=1)  # optimiser steps
    accelerator: str = rule("auto", of=("auto", "cpu", "gpu"))
    devices: Any = 1  # per node: a number or "auto"
    num_nodes: int = rule(1, low=1, high=100_000)
    strategy: str = rule("single", of=("single", "ddp", "fsdp2", "zero2", "zero3"))
    precision: str = rule("auto", of=("auto", "32-true", "bf16-mixed"))  # auto: bf16 autocast on a GPU, fp32 on a CPU
    accumulate: int = rule(1, low=1)  # micro-batches per optimiser step
    clip: float | None = rule(1.0, above=0)  # gradient norm; null leaves gradients as they are
    compile: bool = False
    gradient_checkpointing: bool = False
    threads: int | None = rule(None, low=1, high=1024)  # of torch on the CPU; null leaves the choice to torch
    memory: float | None = rule(None, low=0)  # GB of a device that a run must fit in; null: the GPU's own; 0: unchecked


@dataclass
class DataConfig:
    set: Any = MISSING  # node with _target_: the data set
    batch_size: int = rule(MISSING, low=1, high=1_000_000)  # per device and micro-batch
    workers: int = rule(0, low=0, high=1024)  # processes that read ahead; 0: the run itself reads


@dataclass
class OptimizerConfig:
    kind: str = rule("adamw", of=("adamw", "adamw8bit"))  # 8bit: moments of a byte each (torchao)
    lr: float = rule(MISSING, low=0, high=100)
    betas: list[float] = rule([0.9, 0.999], low=0, below=1, count=2)
    weight_decay: float = rule(0.0, low=0, high=100)
    eps: float = rule(1e-8, above=0, below=1)
    warmup: int = rule(0, low=0)  # optimiser steps
    schedule: str = rule("constant", of=("constant", "cosine"))
    end: float = rule(0.0, low=0, high=1)  # part of lr that a cosine ends at
    # regex found in parameter names -> {lr_scale, weight_decay, betas}; names begin with denoiser, critic or own
    groups: dict[str, Any] = field(default_factory=dict)


@dataclass
class EmaConfig:
    decay: float = rule(0.9999, low=0, below=1)  # 0 keeps no history
    ramp: bool = False  # min(decay, (1 + step) / (10 + step))


@dataclass
class CheckpointConfig:
    every: int = rule(1000, low=1)  # optimiser steps
    keep: int = rule(2, low=1)


@dataclass
class WandbConfig:
    mode: str = rule("offline", of=("online", "offline", "disabled"))
    project: str = "edit"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class LoggerConfig:
    kinds: list[str] = rule([], of=("wandb", "tensorboard"))  # besides csv, which is always on
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class PreviewConfig:
    every: int = rule(0, low=0)  # optimiser steps between sample grids; 0 = only at the end
    count: int = rule(40, low=1, high=10_000)  # images in a grid


@dataclass
class TeacherConfig:
    """The frozen model that terms compare with; there is one where `path` is given or the student is tied to it."""

    path: str | None = None  # artifact, run or diffusers folder, or hub id; null for a tied one
    placement: str = rule("replicated", of=("replicated", "sharded", "offloaded", "tied"))
    guidance: Any = 1.0  # scale it is asked at: a number, or [low, high] to draw from for each sample
    dtype: str = rule("auto", of=("auto", "fp32", "bf16"))  # of its weights; auto: bf16 where the run has bf16


@dataclass
class CriticConfig:
    """The model that learns the student's distribution, in few-step methods that have one."""

    start: str = rule("teacher", of=("teacher", "student"))  # whose weights and structure it starts with
    follow: float = rule(0.0, low=0, high=1)  # part of the way to the student after its steps; SenseFlow: 0.03


@dataclass
class WorldConfig:
    """A world to try methods on, as a file of configs/world tells it: what the files of configs/method refer to."""

    name: str | None = None  # of its file
    teacher: str = "${world.name}/teacher"  # the experiment that trains its whole model
    path: str = "${runs}/${world.name}_teacher"  # of that run
    guidance: float = rule(1.0, low=0)  # scale at which the whole model is good
    lr: float = rule(1e-3, low=0, high=100)  # rate that a model is trained at from scratch, or after surgery
    tuned: float = rule(2.5e-4, low=0, high=100)  # rate that a trained model is trained on at
    sigma: float = rule(1.0, above=0)  # standard deviation of the data
    lengths: list[int] = field(default_factory=list)  # units of each kind, in order
    kept: list[int] = field(default_factory=list)  # every second unit
    pairs: list[Any] = field(default_factory=list)  # of these, each with the last unit of what it stands for
    taps: list[int] = field(default_factory=list)  # a few units, evenly spread
    middle: list[int] = field(default_factory=list)  # the unit half-way
    linear: list[int] = field(default_factory=list)  # every second of the later units
    linear_pairs: list[Any] = field(default_factory=list)  # each of these with itself


@dataclass
class Root:
    """Everything that train.py understands at the top level."""

    name: Any = MISSING  # text: the run lives in <runs>/<name>; a sweep puts each job in a folder below
    world: WorldConfig = field(default_factory=WorldConfig)
    backbone: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    edits: dict[str, Any] = field(default_factory=dict)  # name -> node with _target_, applied in order
    objective: Any = MISSING
    data_weight: Any = 1.0  # of the objective's losses beside the terms: a number, or an edit.objectives.Ramp
    # parts of the times that the samples of a batch are drawn from in turn; 1: none
    strata: int = rule(1, low=1, high=1_000_000)
    terms: dict[str, Any] = field(default_factory=dict)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    matching: Any = None  # node with _target_: a few-step method, in place of the objective's losses and terms
    critic: CriticConfig = field(default_factory=CriticConfig)
    # runs this one needs: lists of key=value words for train.py, or for the module of ours that the first word names
    before: list[Any] = field(default_factory=list)
    # modules of ours that do something with its artifact, each with its settings
    after: list[Any] = field(default_factory=list)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    sampler: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    evaluate: Any = None  # the keys of configs/eval.yaml; null: training ends without a report
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    seed: int = rule(0, low=0, high=LAST_SEED)
    log_every: int = rule(10, low=1)  # optimiser steps per row of metrics.csv
    label_drop: float = rule(0.1, low=0, high=1)  # share of conditions replaced by the null condition
    init: str | None = None  # artifact folder or official checkpoint to start from; "": one must be given
    runs: str = "runs"
    # further packages whose classes _target_ may name, each of the kind that its place expects; what importing them
    # does is done: name only packages of your own. It is the only way to anything outside of edit and data
    trusted: list[str] = field(default_factory=list)
    debug: bool = False  # show tracebacks


def register() -> None:
    """What Hydra needs to compose our files: `root_schema` for their defaults lists, and a reader that refuses what is
    no settings. A file cannot read the environment, which would be written into config.yaml and reports."""
    ConfigStore.instance().store(name="root_schema", node=Root)
    Plugins.instance()  # registers Hydra's own sources, of which one is replaced
    SourcesRegistry.instance().types[Files.scheme()] = Files
    OmegaConf.register_new_resolver("oc.env", _refuse_environment, replace=True)


class Files(FileConfigSource):
    """The YAML files of a folder, each looked at before Hydra reads it, and the choices composed of them."""

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path, self._normalize_file_name(config_path))
        try:
            if (made := composed.made(Path(self.path), config_path)) is not None:
                header = {"package": made.package}
                return ConfigResult(self.provider, self.full_path(), OmegaConf.create(made.content), header)
            if file.exists():
                read_yaml(file)
            result = super().load_config(config_path)
        except RecursionError as error:
            raise ValueError(f"{file} is nested too deep: no settings need that") from error
        composed.finish(config_path, result.config)
        return result

    def is_config(self, config_path: str) -> bool:
        return super().is_config(config_path) or composed.made(Path(self.path), config_path) is not None

    def is_group(self, config_path: str) -> bool:
        return super().is_group(config_path) or (config_path == "size" and bool(composed.families(Path(self.path))))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "size":
            return [] if results_filter == ObjectType.GROUP else composed.names(Path(self.path), "size")
        own = super().list(config_path, results_filter)
        group = not config_path and results_filter != ObjectType.CONFIG and self.is_group("size")
        return sorted({*own, *(["size"] if group else [])})


def _refuse_environment(*names: Any) -> NoReturn:
    raise ValueError(
        f"oc.env:{','.join(map(str, names))} reads the environment, which would be written into config.yaml and "
        f'reports: write the value, or let the shell put it in, as in key="${names[0]}"'
    )


# what Hydra builds or sets for a run before we see it
LAUNCHER = {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}
SWEEPER = {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"}


def check_hydra(node: DictConfig | None) -> Iterator[str]:
    """One sentence for each part of Hydra's own section that would run something, and is not as Hydra has it."""
    if not isinstance(node, DictConfig):
        yield f"hydra: its own section stays as it is, got {cut(node)}; leave hydra out"
        return
    told: Any = OmegaConf.to_container(node)
    job = told.get("job") or {}
    sweeper = {k: v for k, v in (told.get("sweeper") or {}).items() if k != "max_batch_size" and v is not None}
    own = {
        "launcher": told.get("launcher") == LAUNCHER,
        "sweeper": sweeper == SWEEPER,
        "callbacks": not told.get("callbacks"),
        "job.env_set": not job.get("env_set"),
        "job.env_copy": not job.get("env_copy"),
        **{kind: told.get(kind) in _logging(kind) for kind in ("job_logging", "hydra_logging")},
    }
    for key in (key for key, right in own.items() if not right):
        value = OmegaConf.to_container(node).get(key) if "." not in key else job.get(key.removeprefix("job."))  # type: ignore
        yield f"hydra.{key}: a configuration may not change what Hydra itself runs, got {cut(value)}; leave it out"


@functools.cache
def _logging(kind: str) -> list[Any]:
    """Hydra's own choices of a logging configuration."""
    folder = Path(hydra.__file__).parent / "conf/hydra" / kind
    return [OmegaConf.to_container(OmegaConf.load(file)) for file in folder.glob("*.yaml")]


# ---- check ----------------------------------------------------------------------------------------------------------


def check(cfg: DictConfig) -> list[str]:
    """Every mistake that can be found without building anything, one sentence each; empty if there is none.

    Values are compared with the rules of the schema, `_target_` nodes with the kind of class that their place expects
    and with the signatures they name.
    """
    bring_up_to_date(cfg)
    for stage in [*(OmegaConf.select(cfg, "before") or ()), *(OmegaConf.select(cfg, "after") or ())]:
        if OmegaConf.is_list(stage) and len(stage) and stage[0] in COMMANDS:
            stage[0] = COMMANDS[stage[0]]
    trusted = (*TRUSTED, *(OmegaConf.select(cfg, "trusted") or ()))
    errors = list(mistakes(cfg, "", trusted))
    return errors or (list(_conflicts(cfg)) if OmegaConf.get_type(cfg) is Root else [])


def bring_up_to_date(node: Any) -> None:
    """Replace, in place, each `_target_` that an older version wrote by its path of today."""
    if isinstance(node, DictConfig):
        with flag_override(node, "readonly", False):
            for key in node:
                if key == "_target_" and isinstance(path := node._get_node(key)._value(), str):
                    node[key] = current(path)
                elif not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
                    bring_up_to_date(node[key])
    elif isinstance(node, ListConfig):
        for index in range(len(node)):
            if not OmegaConf.is_missing(node, index) and not OmegaConf.is_interpolation(node, index):
                bring_up_to_date(node[index])


def _conflicts(cfg: DictConfig) -> Iterator[str]:
    if absent := list(unbuilt(cfg)):
        yield from absent
        return
    yield from _check_name(cfg)
    yield from _check_optimizer(cfg)
    yield from _check_groups(cfg.optimizer.groups)
    yield from _check_evaluate(cfg.evaluate)
    yield from _check_teacher(cfg)
    for section in ("edits", "terms"):
        for name, node in cfg[section].items():
            if not isinstance(node, DictConfig) or "_target_" not in node:
                yield f"{section}.{name}: expected a section with _target_, got {node}; ~{section}.{name} leaves it out"
    yield from _check_matching(cfg)
    for when in ("before", "after"):
        for i, words in enumerate(cfg[when]):
            yield from _check_stage(f"{when}.{i}", words)
    if not OmegaConf.is_interpolation(cfg, "init") and cfg.init == "":  # null means from scratch
        yield "init is missing: this run starts from a trained model; give its run or artifact folder with init=..."
    trainer, kinds = cfg.trainer, cfg.logger.kinds
    devices = trainer.devices
    if devices != "auto" and (type(devices) is not int or not 1 <= devices <= 1024):
        yield f"trainer.devices: expected a number from 1 to 1024 or auto, got {devices!r}"
    elif trainer.strategy == "single" and (trainer.num_nodes > 1 or devices not in (1, "auto")):
        yield (
            f"trainer.strategy=single uses one device, got trainer.devices={devices} and "
            f"trainer.num_nodes={trainer.num_nodes}; choose trainer=ddp or trainer=fsdp2"
        )
    needed = {"deepspeed": trainer.strategy in ("zero2", "zero3"), **{kind: kind in kinds for kind in kinds}}
    if "wandb" in needed and cfg.logger.wandb.mode == "disabled":
        needed["wandb"] = False
    place = Path(cfg.runs).absolute()
    ground = next(folder for folder in (place, *place.parents) if folder.exists())
    if not ground.is_dir() or not os.access(ground, os.W_OK):
        reason = "is not writable" if ground.is_dir() else "is a file"
        yield f"runs={cfg.runs}: no run can be kept there because {ground} {reason}; choose another folder"
    for package, wanted in needed.items():
        if wanted and find_spec(package) is None:
            asker = f"trainer.strategy={trainer.strategy}" if package == "deepspeed" else f"logger {package}"
            yield f"{asker} needs the package {package}, which is not installed: pip install 'edit-dit[{package}]'"


def unbuilt(cfg: DictConfig) -> Iterator[str]:
    """What is built must be there, and say how."""
    for place in ("backbone", "data", "objective", "sampler"):
        node = cfg[place]
        if node is None:
            yield f"{place}=null: a run needs one; choose one with {place}=..."
        elif place == "data" and not isinstance(node, DictConfig):
            yield f"data: expected a section with set, batch_size and workers, got {cut(node)}"
        elif place == "data" and not isinstance(node.get("set"), DictConfig):
            given = cut(node.get("set"))
            yield f"data.set: expected a section with _target_, such as one of configs/data, got {given}"
        elif "_target_" not in (node := node.set if place == "data" else node):
            yield f"{place}: expected a section with _target_, got {cut(node)}; choose one with {place}=..."


def _check_name(cfg: DictConfig) -> Iterator[str]:
    if OmegaConf.is_interpolation(cfg, "name"):  # may be known only once the job runs
        return
    name = cfg.name
    if not isinstance(name, str):  # an experiment file's: the command line's words are taken as typed
        yield f"name: expected text, got {name!r}: put it in quotes, as in name: '1e3'"
        return
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        yield f"name={name}: expected a folder below runs, such as digits or sweep/a; runs=... moves them elsewhere"
    elif not name.isprintable() or any(part != part.strip() or part.startswith("-") for part in path.parts):
        yield (
            f"name={name!r}: expected a folder's name of printable characters that begins neither with a dash nor with "
            "a blank, and does not end with one"
        )
    elif len(os.fsencode(name)) > LONGEST:
        yield f"name={name[:40]}...: expected at most {LONGEST} bytes, got {len(os.fsencode(name))}"


def _check_optimizer(cfg: DictConfig) -> Iterator[str]:
    if cfg.optimizer.kind != "adamw8bit":
        return
    if cfg.trainer.strategy.startswith("zero"):
        yield (
            f"optimizer.kind=adamw8bit does not fit trainer={cfg.trainer.strategy}: DeepSpeed steps on flat pieces of "
            "an fp32 copy of its own and takes state for plain tensors; use trainer=fsdp2, or optimizer.kind=adamw"
        )
    elif find_spec("torchao") is None:
        yield (
            "optimizer.kind=adamw8bit needs the package torchao, which is not installed: pip install 'edit-dit[quant]'"
        )


def _check_groups(groups: DictConfig) -> Iterator[str]:
    known = ("lr_scale", "weight_decay", "betas")
    for pattern, change in groups.items():
        place = f"optimizer.groups.{pattern}"
        try:
            re.compile(str(pattern))
        except re.error as error:
            yield f"{place}: expected a regular expression, got {str(pattern)!r} ({error})"
        if not isinstance(change, DictConfig):
            yield f"{place}: expected a section with {', '.join(known[:-1])} or {known[-1]}, got {change!r}"
            continue
        for key, value in change.items():
            if key not in known:
                yield f"unknown key '{place}.{key}'{suggest(key, known)}"
            elif key == "betas":
                pair = list(value) if OmegaConf.is_list(value) else []
                if len(pair) != 2 or not all(type(v) in (int, float) and 0 <= v < 1 for v in pair):
                    yield f"{place}.betas: expected two numbers of at least 0 and below 1, got {value!r}"
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                yield f"{place}.{key}: expected a number of at least 0, got {value!r}"


def _check_teacher(cfg: DictConfig) -> Iterator[str]:
    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf

    ramp = isinstance(cfg.data_weight, DictConfig) and "_target_" in cfg.data_weight
    if not ramp and not number(cfg.data_weight):
        yield f"data_weight: expected a number of at least 0 or a section with _target_, got {cfg.data_weight!r}"
    path, placement, scale = cfg.teacher.path, cfg.teacher.placement, cfg.teacher.guidance
    if placement == "tied" and path is not None:
        yield f"teacher.placement=tied makes the student without its LoRA the teacher: leave out teacher.path={path}"
    if placement == "tied" and not any("LoRA" in str(node.get("_target_")) for node in cfg.edits.values()):
        yield "teacher.placement=tied needs a LoRA edit: without one the student is its own teacher"
    if placement == "sharded" and cfg.trainer.strategy == "single":
        yield "teacher.placement=sharded needs several devices: use trainer=ddp or fsdp2, or placement=replicated"
    if placement == "sharded" and cfg.trainer.strategy.startswith("zero"):
        yield "teacher.placement=sharded is FSDP2's, not DeepSpeed's: use trainer=fsdp2, or placement=replicated"
    pair = OmegaConf.to_container(scale) if OmegaConf.is_list(scale) else [scale, scale]
    if not (isinstance(pair, list) and len(pair) == 2 and all(map(number, pair)) and pair[0] <= pair[1]):
        yield f"teacher.guidance: expected a number of at least 0 or [low, high], got {scale}"


def _check_matching(cfg: DictConfig) -> Iterator[str]:
    if cfg.matching is None:
        if cfg.critic.follow or cfg.critic.start != "teacher":
            yield "critic: only a few-step method (matching) has one: leave the section out"
        return
    if not isinstance(cfg.matching, DictConfig) or "_target_" not in cfg.matching:
        yield f"matching: expected a section with _target_, got {cut(cfg.matching)}"
    if cfg.terms:
        yield f"matching and terms are two ways to train: leave out terms.{next(iter(cfg.terms))} or matching"
    if cfg.data_weight != 1.0:
        yield f"data_weight={cfg.data_weight} weighs the objective's losses, which matching replaces: leave it out"
    if cfg.strata != 1:
        yield f"strata={cfg.strata} stratifies the times of diffusion training, which matching replaces: leave it out"
    if cfg.critic.follow and cfg.trainer.strategy.startswith("zero"):
        yield f"critic.follow={cfg.critic.follow} writes into weights that DeepSpeed keeps elsewhere: use trainer=fsdp2"


def _check_stage(place: str, words: Any) -> Iterator[str]:
    try:
        words = OmegaConf.create([*words]) if OmegaConf.is_list(words) else words
    except InterpolationResolutionError:
        return  # ${hydra:...}: the job itself checks them again
    if not OmegaConf.is_list(words) or not words or not all(isinstance(w, str) for w in words):
        yield f"{place}: expected a list of settings such as [experiment=flux_tiny/teacher], got {cut(words)}"
        return
    for word, written in zip(words, OmegaConf.to_container(words), strict=True):
        if word.endswith("=None") and (source := re.search(r"\$\{([\w.]+)\}$", written)):
            yield f"{source[1]} has no value, and {place} needs it for {written}; give one with {source[1]}=..."
            return
    module, *settings = words if "=" not in words[0] else [None, *words]
    if module is not None and module not in STAGES:
        known = suggest(module, STAGES)
        yield f"{place}: {cut(module)} is neither a setting, key=value, nor a module that is run{known}"
        return
    if module is None and place.startswith("after"):
        yield f"{place}: expected a module of ours and settings, such as [recipes.export, artifact=...], got {words}"
        return
    dashes = "--" if module == "data.precompute" else ""
    begins = re.compile(rf"{dashes}(\+{{1,2}}|~)?\w")  # not an option of the program
    if odd := next((w for w in settings if "=" not in w or not begins.match(w)), None):
        yield f"{place}: expected settings, {dashes}key=value, after the first word, got {cut(odd)}"
    elif module is not None and (wrong := _refused_by(module, settings)):
        yield f"{place}: {module}: {wrong}"


# modules that may be run before or after a run
STAGES = ("data.embedded", "data.generate", "data.precompute", "recipes.export", "recipes.prune")


def _refused_by(module: str, words: Sequence[str]) -> str | None:
    """What the module's own reading of its words says against them, so that it is said before anything runs."""
    words = [word for word in words if word.lower() not in DEBUG]
    try:
        if module in ("data.embedded", "data.generate"):
            import_module(module).parse(words)
        elif module == "data.precompute":
            from data.precompute import parser

            told = parser()
            told.error = _refuse  # type: ignore[method-assign]
            told.parse_args(words)
        elif module == "recipes.export":
            from recipes.export import parsed

            parsed(list(words))
        else:
            from recipes.prune import parse as read

            read(words)
    except (UserError, ValueError) as error:
        return flat(error)
    return None


def _refuse(message: str) -> NoReturn:
    """In place of `ArgumentParser.error`, which prints how a command is used and ends the process."""
    raise UserError(message)


def _check_evaluate(chosen: Any) -> Iterator[str]:
    from recipes.report.evaluate import settings  # which itself imports this module

    if chosen is not None and not isinstance(chosen, DictConfig):
        yield f"evaluate: expected a section with keys of configs/eval.yaml, or null for no report, got {chosen!r}"
        return
    try:
        settings(typing.cast(typing.Mapping[str, Any], chosen or {}))
    except UserError as error:
        yield f"evaluate: {error}"
    except InterpolationResolutionError:
        pass  # ${hydra:...}: the job itself checks them again


# ---- explain --------------------------------------------------------------------------------------------------------


def explain(error: Exception, config_dir: Path, overrides: Sequence[str], primary: str = "train") -> str:
    """One sentence for what Hydra, OmegaConf or YAML said against a configuration.

    Args:
        error: as raised by `hydra.compose`
        config_dir: the folder of the YAML groups
        overrides: the `key=value` words of the command line
        primary: the file that all begins with
    """
    if isinstance(error, OverrideParseException):
        return _explain_override(error.override)
    if isinstance(error, MissingConfigException):
        return _explain_missing(error, config_dir, overrides, primary)
    if odd := next((o for o in overrides if not _KEY.match(o)), None):
        return _explain_override(odd)
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f"{mark.name}, line {mark.line + 1}" if mark else str(config_dir)
        return f"{where}: this is not valid YAML: {error.problem or error.context}"
    if several := re.search(r"Ambiguous value for argument '(.+?)=(.+)'", str(error)):
        key, values = several.groups()
        return f"{key}={values} gives several values; add -m for one job each, or write {key}=[{values}] for a list"
    if taken := re.search(r"An item is already at '(.+?)'", str(error)):
        return f"{taken[1]} is in the config already; write {taken[1]}=... without the +"
    if "Config group override must be a string" in str(error):  # backbone=3, which Hydra does not name
        return _explain_choice(config_dir, overrides)
    file = re.match(r"In '(.+?)'", str(error))
    prefix = f"{config_dir.name}/{file[1]}.yaml: " if file else ""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return prefix + _explain_key(cause, config_dir, file[1] if file else "")
    if isinstance(cause, ValidationError):
        return prefix + _explain_value(cause)
    group = re.search(r"Could not override '(.+?)'", str(error))
    if group and group[1] in ("world", "method"):
        return f"{group[1]}= chooses nothing by itself: write experiment=<world>/<method>"
    if group:
        return f"{prefix}there is no config group '{group[1]}'{suggest(group[1], composed.groups(config_dir))}"
    known = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError)
    if not isinstance(error, known):
        return unexpected(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}; correct the path or its permissions"
    if isinstance(error, InterpolationResolutionError):
        word = next((o for o in overrides if "${" in o), "")
        prefix = f"{error.full_key or word}: ".removeprefix(": ")
    section = next((o for o in overrides if "=[" in o or "={" in o), None)
    if section and "Cannot merge" in f"{error} {error.__cause__}":
        return f"'{section}' puts a list where a section with keys of its own is, or the other way round"
    return prefix + flat(cause if isinstance(cause, OmegaConfBaseException) else error).removeprefix(prefix)


_KEY = re.compile(r"(\+{1,2}|~)?[\w./@:$-]+(=|$)")  # how a setting begins


def _explain_override(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return f"'{override}' is not a setting; settings are written key=value, for example trainer.max_steps=200"
    if not _KEY.match(override):
        return f"'{override}' does not begin with a key; settings are written key=value, for example seed=1"
    quoted = value.replace("'", "")
    return f"the value of '{override}' cannot be read; put it in quotes that reach the program: \"{key}='{quoted}'\""


def _explain_choice(config_dir: Path, overrides: Sequence[str]) -> str:
    """Of words such as backbone=3, sampler=null or hydra=null, the first that chooses no file."""
    plain = {f.name for f in fields(Root)} - set(
        composed.groups(config_dir)
    )  # seed=3, evaluate=null: no choices, and right
    for word in overrides:
        group, _, value = word.partition("=")
        group = group.lstrip("+")
        if "." in group or group in plain or re.match(r"(?!(null|true|false)$)[A-Za-z_\['\"]", value, re.IGNORECASE):
            continue
        if group in composed.groups(config_dir):
            return f"there is no {group} named '{value}'{suggest(value, composed.names(config_dir, group))}"
        return f"'{word}' chooses no file: {group} is no group of ours{suggest(group, composed.groups(config_dir))}"
    return "a group is given something else than the name of one of its files"


def _explain_missing(error: MissingConfigException, config_dir: Path, overrides: Sequence[str], primary: str) -> str:
    wanted = error.missing_cfg_file or ""
    if not config_dir.is_dir():
        return f"there is no configuration folder {config_dir}"
    if "/" not in wanted or wanted.strip("/").removesuffix(".yaml") == primary.strip("/").removesuffix(".yaml"):
        names = [file.stem for file in config_dir.glob("*.yaml")]
        return f"there is no {wanted.removesuffix('.yaml')}.yaml in {config_dir}{suggest(wanted, names)}"
    # backbone=tny asks for backbone/tny; a group may have folders, so the override decides where the value begins
    group = next((k for k, _, v in (o.partition("=") for o in overrides) if f"{k}/{v}" == wanted), wanted.split("/")[0])
    value = wanted.removeprefix(f"{group}/")
    other, _, choice = value.partition("/")
    if other in composed.groups(config_dir) and other != group:
        return f"in the defaults of a file in {group}/, write '/{other}: {choice}': without the slash it means {wanted}"
    return f"there is no {group} named '{value}'{suggest(value, composed.names(config_dir, group))}"


def _explain_key(cause: OmegaConfBaseException, config_dir: Path, file: str) -> str:
    key, full, parent = str(cause.key), cause.full_key or str(cause.key), cause.parent_node
    if file.startswith(f"{key}/"):
        return f"what {file}.yaml says belongs to the top level; begin it with the line '# @package _global_'"
    if not isinstance(parent, DictConfig):
        return f"'{full}' cannot be set: {full.rpartition('.')[0]} is a single value"
    accepted = {str(k) for k in parent if k not in ("hydra", "_target_")}
    if "." not in full:
        accepted |= set(composed.groups(config_dir))
    hint = ""
    closed = is_dataclass(OmegaConf.get_type(parent)) or full.startswith("evaluate.")
    if not closed or not accepted:
        hint = f"; to add a key that the config leaves out write +{full}=..."
    return f"unknown key '{full}'{suggest(key, accepted)}{hint}"


def _explain_value(cause: OmegaConfBaseException) -> str:
    message, key, full, owner = cause.msg or str(cause), cause.key, cause.full_key, cause.object_type
    section = re.search(r"is not a subclass of (\w+)\. value: (.*)", message)
    if section:  # a plain value where a section belongs; merging a file does not say which
        if not full and is_dataclass(owner):
            full = next((f.name for f in fields(owner) if str(f.type) == section[1]), "")
        return f"{full}: expected a section with keys of its own, got {section[2].strip()!r}"
    value = repr(cause.value)
    if cause.value is None and (given := re.search(r"Value '(.*)' of type", message)):
        value = repr(given[1])
    if is_dataclass(owner) and key in {f.name for f in fields(owner)}:
        hint = typing.get_type_hints(owner)[key]
        if is_dataclass(hint):
            return f"{full}: expected a section with keys of its own, got {value}"
    else:  # an item of a list or mapping
        hint = (*typing.get_args(cause.ref_type), Any)[-2 if typing.get_args(cause.ref_type) else -1]
    return f"{full}: expected {describe(hint)}, got {value}"


# ---- launch ---------------------------------------------------------------------------------------------------------


def launch(
    task: Callable[[DictConfig], Any], config_name: str, config_dir: Path, argv: Sequence[str] | None = None
) -> None:
    """Compose, check, then run `task(cfg)` under `hydra.main`. The process ends by `SystemExit` if anything fails.

    Exit codes: 2 for a mistake in the configuration, 1 for a task that failed (in a sweep: any of its jobs; the others
    still run), 130 for Ctrl-C. `debug=true` or HYDRA_FULL_ERROR=1 shows tracebacks. In a sweep `cfg.name` names the
    job's own folder below `cfg.runs`.

    Args:
        task: receives the composed, checked, unresolved configuration
        config_name: the primary YAML file, without suffix
        config_dir: its folder
        argv: replaces `sys.argv[1:]`, for good: launchers of further ranks repeat the command line from there
    """
    words = list(sys.argv[1:] if argv is None else argv)
    full = _full_errors()
    try:
        _launch(task, config_name, config_dir, [as_typed(word) for word in words])
    except UserError as error:
        _say(*str(error).split("\n"))
        sys.exit(2)
    except KeyboardInterrupt:
        _say("interrupted before the run began", label="")
        sys.exit(130)
    except Exception as error:  # of Hydra, about its options, folders and sweeps
        if full or "debug=true" in words:
            traceback.print_exc()
        _say(explain(error, config_dir, [word for word in words if not word.startswith("-")], config_name))
        sys.exit(2 if isinstance(error, ValueError | HydraException) else 1)


def _launch(task: Callable[[DictConfig], Any], config_name: str, config_dir: Path, words: list[str]) -> None:
    register()
    args, flags = _parse(words)
    sweep = args.multirun or "hydra.mode=MULTIRUN" in args.overrides
    config_dir = Path(args.config_path or config_dir).resolve()
    if not (args.help or args.hydra_help or args.shell_completion or args.info):
        fixed = _refuse_mistakes(args, config_name, config_dir, sweep)
        if sweep:  # a job's folder is named after what distinguishes it from the others
            fixed = ",".join(f"'{key}'" for key in (*fixed, "name", "runs"))
            args.overrides.append(f"hydra.job.config.override_dirname.exclude_keys=[{fixed}]")
    sys.argv[1:] = [*args.overrides, *flags]  # Hydra's parser loses settings that follow a flag
    codes = [0]

    @functools.wraps(task)
    def job(cfg: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN and "name" in cfg and "runs" in cfg:
            with open_dict(cfg):
                cfg.name = os.path.relpath(HydraConfig.get().runtime.output_dir, cfg.runs)
        with _hydra_errors(shown):
            codes.append(_guard(_checked(task), cfg))

    shown = os.environ.get("HYDRA_FULL_ERROR")
    with _hydra_errors("1"):  # or Hydra prints what it meets, and ends the process
        hydra.main(version_base="1.3", config_path=str(config_dir), config_name=config_name)(job)()
    if any(codes):
        sys.exit(max(codes))


@contextmanager
def _hydra_errors(full: str | None) -> Iterator[None]:
    """HYDRA_FULL_ERROR is this while the block runs."""
    before = os.environ.pop("HYDRA_FULL_ERROR", None)
    try:
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _parse(words: list[str]) -> tuple[Any, list[str]]:
    """Hydra's reading of the words, and those of them that are its options.

    Raises:
        UserError: for words that are neither settings nor options that this program has
    """
    if odd := next((word for word in words if any("\ud800" <= c <= "\udfff" for c in word)), None):
        raise UserError(f"{legible(odd)} is no text in UTF-8, which Hydra cannot read: rename the file that it names")
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    args, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        raise UserError(
            f"there is no option {unknown[0]}; settings are written key=value, for example trainer.max_steps=200"
        )
    if args.experimental_rerun is not None:
        raise UserError("--experimental-rerun reads a pickle, which may run anything: give the command again instead")
    if args.config_dir is not None and not Path(args.config_dir).is_dir():
        raise UserError(f"--config-dir={args.config_dir}: there is no such folder")
    return args, [word for word in words if word not in args.overrides]


def _checked(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """The task, after another look at its configuration: references to the running job can be followed only now."""

    def checked(cfg: DictConfig) -> None:
        if errors := check(cfg):
            raise UserError(errors[0])
        task(cfg)

    return checked


def as_typed(word: str) -> str:
    """A setting whose value is text, in quotes where Hydra would read a number or a truth: name=1e3 is no 1000.0.

    Raises:
        UserError: for a number in place of true or false, or text in place of a number, which OmegaConf would convert
    """
    key, equals, value = word.partition("=")
    kind = KINDS.get(key.lstrip("+"))
    if not equals or kind is None or not _KEY.match(word):
        return word
    try:
        read = OverridesParser.create().parse_override(word).value()
    except HydraException:  # explained once all is composed
        return word
    number = isinstance(read, int | float)
    if kind is str:
        return f"{key}='{value}'" if number else word
    if kind is bool and number and not isinstance(read, bool):
        raise UserError(f"{key.lstrip('+')}: expected true or false, got {value}")
    if kind in (int, float) and value[:1] in ("'", '"'):
        raise UserError(f"{key.lstrip('+')}: expected {describe(kind)}, got the text {value}")
    return word


def _kinds(section: Any, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Dotted keys of a schema that hold one value, and of which type."""
    for key, hint in typing.get_type_hints(section).items():
        if is_dataclass(hint):
            yield from _kinds(hint, f"{prefix}{key}.")
        for kind in (str, bool, int, float):
            if hint in (kind, kind | None):
                yield f"{prefix}{key}", kind


KINDS = {"name": str, **dict(_kinds(Root))}


def _refuse_mistakes(args: Any, config_name: str, config_dir: Path, sweep: bool) -> list[str]:
    """Compose and check each value of a sweep once, or the one run. Returns the keys that the sweep leaves fixed."""
    overrides, name = list(args.overrides), args.config_name or config_name
    extra = [f"hydra.searchpath=['file://{Path(args.config_dir).resolve()}']"] if args.config_dir else []
    fixed: list[str] = []
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_dir)):
            jobs = [overrides]
            if sweep:
                jobs, fixed = _jobs(overrides)
            for job in jobs:
                cfg = compose(name, [*job, *extra], return_hydra_config=True)
                own = OmegaConf.select(cfg, "hydra")
                with open_dict(cfg):
                    cfg.pop("hydra", None)
                if args.cfg:  # shows what was composed, right or wrong
                    continue
                if OmegaConf.get_type(cfg) is not Root:
                    raise UserError(f"{name} is no configuration of a run: its defaults do not begin with root_schema")
                if errors := [*check_hydra(own), *check(cfg)]:
                    raise UserError("\n".join(errors))
    except UserError:
        raise
    except Exception as error:  # what Hydra makes of words that are no settings is of many kinds
        if _full_errors():
            raise
        raise UserError(explain(error, config_dir, overrides, name)) from error
    return fixed


def _jobs(overrides: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Jobs in which every value of every sweep occurs at least once (not their product), and the keys not swept."""
    loader = GlobalHydra.instance().config_loader()
    columns, fixed = [], []
    for override in OverridesParser.create(loader).parse_overrides(list(overrides)):
        if not override.is_sweep_override():
            columns.append([override.input_line])
            fixed.append(override.key_or_group)
        elif override.is_discrete_sweep():
            key = override.get_key_element()
            columns.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            raise UserError(f"'{override.input_line}' is no list of values: give them, as in seed=0,1,2")
    length = max((len(column) for column in columns), default=1)
    return [[column[min(i, len(column) - 1)] for column in columns] for i in range(length)], fixed


class _Failure(NamedTuple):
    sentence: str
    code: int = 1
    everywhere: bool = True  # may concern one rank only, so each rank says it


def _guard(task: Callable[[DictConfig], Any], cfg: DictConfig) -> int:
    """Run the task; 0, or the exit code after saying what went wrong."""
    try:
        task(cfg)
        return 0
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        failure = _describe_failure(error)
        if _full_errors() or OmegaConf.select(cfg, "debug", default=False):
            traceback.print_exc()
        _say(failure.sentence, everywhere=failure.everywhere, label="" if failure.code == 130 else "error: ")
        if failure.code == 130:
            sys.exit(130)  # ends a sweep, too
        return failure.code


def _describe_failure(error: BaseException) -> _Failure:
    place = os.path.relpath(HydraConfig.get().runtime.output_dir)
    if isinstance(error, SystemExit):  # Lightning answers Ctrl-C by leaving
        error = typing.cast(KeyboardInterrupt, error.__context__)
    if isinstance(error, KeyboardInterrupt):
        where = f" at {error}" if str(error) else ""
        return _Failure(f"interrupted{where}; the same command resumes from what {place} holds", 130, False)
    key = ""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        key = next(iter(re.findall(r"full_key: (.+)", str(error))), "")
        error = error.__cause__
    sentence = f"{key}: {flat(error)}" if key else flat(error)
    if isinstance(error, UserError):
        return _Failure(sentence, everywhere=False)
    chain = list(_chain(error))
    full = next((e for e in chain if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)), None)
    if full is not None:
        return _Failure(
            f"the disk is full ({full.filename or place}); nothing whole was lost: free some space and give the same "
            "command, which resumes from the last whole checkpoint"
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        return _Failure(
            f"out of memory ({flat(error).split('. ')[0]}); lower data.batch_size and raise trainer.accumulate, "
            "or set trainer.gradient_checkpointing=true"
        )
    if isinstance(error, FileNotFoundError | PermissionError) and error.filename and error.strerror:
        return _Failure(f"{error.filename}: {error.strerror.lower()}; correct the path or its permissions")
    if isinstance(error, ValueError | FileNotFoundError | PermissionError):
        return _Failure(sentence)
    return _Failure(f"{type(error).__name__}: {sentence}; rerun with debug=true for the traceback")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _full_errors() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def _rank() -> int:
    """This process's rank as torchrun, Lightning's launcher or SLURM tells it; 0 without any of them."""
    return int(next((os.environ[v] for v in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if os.environ.get(v)), "0"))


def _say(*sentences: str, everywhere: bool = False, label: str = "error: ") -> None:
    """One line each on stderr, red on a terminal; by rank 0 only unless `everywhere`, which then names the rank."""
    from rich.console import Console
    from rich.text import Text

    if rank := _rank():
        if not everywhere:
            return
        label = f"rank {rank}: {label}"
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for sentence in sentences:
        console.print(Text(label, style="bold red").append(sentence, style="not bold default"))
