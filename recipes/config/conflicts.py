"""Combinations of settings that no run can have, one sentence each."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from data.names import typed
from edit.inputs.command import DEBUG
from edit.inputs.trust import cut
from recipes.config.chosen import procedure_of
from recipes.config.errors import UserError, one_line, refuse
from recipes.config.mistakes import locate
from recipes.config.schema import Evaluation
from recipes.config.staged import Stage, is_swept, key_of, stages_of
from recipes.config.suggestions import suggest
from recipes.config.values import unplaceable

LONGEST = 200  # bytes of a run's name: file systems accept 255 for a folder
# modules that may be run before or after a run
STAGES = ("data.embedded", "data.generate", "data.precompute", "recipes.export", "recipes.prune")


def conflicts(cfg: DictConfig) -> Iterator[str]:
    """One sentence for each conflict of any procedure in a `Root` whose values are right one by one."""
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
    yield from _check_stages(cfg)
    if not OmegaConf.is_interpolation(cfg, "init") and cfg.init == "":  # null means from scratch
        yield "init is missing: this run starts from a trained model; give its run or artifact folder with init=..."
    yield from _check_devices(cfg.trainer)
    yield from _check_folder(cfg.runs)
    yield from _check_packages(cfg)


def unbuilt(cfg: DictConfig) -> Iterator[str]:
    """One sentence for each part that a run needs and that is absent or names no class."""
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


# ---- the run and its machine ----------------------------------------------------------------------------------------


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


def _check_devices(trainer: DictConfig) -> Iterator[str]:
    devices = trainer.devices
    if devices != "auto" and (type(devices) is not int or not 1 <= devices <= 1024):
        yield f"trainer.devices: expected a number from 1 to 1024 or auto, got {devices!r}"
    elif trainer.strategy == "single" and (trainer.num_nodes > 1 or devices not in (1, "auto")):
        yield (
            f"trainer.strategy=single uses one device, got trainer.devices={devices} and "
            f"trainer.num_nodes={trainer.num_nodes}; choose trainer=ddp or trainer=fsdp2"
        )


def _check_folder(runs: str) -> Iterator[str]:
    place = Path(runs).absolute()
    ground = next(folder for folder in (place, *place.parents) if folder.exists())
    if not ground.is_dir() or not os.access(ground, os.W_OK):
        reason = "is not writable" if ground.is_dir() else "is a file"
        yield f"runs={runs}: no run can be kept there because {ground} {reason}; choose another folder"


def _check_packages(cfg: DictConfig) -> Iterator[str]:
    trainer, kinds = cfg.trainer, cfg.logger.kinds
    needed = {"deepspeed": trainer.strategy in ("zero2", "zero3"), **{kind: kind in kinds for kind in kinds}}
    if "wandb" in needed and cfg.logger.wandb.mode == "disabled":
        needed["wandb"] = False
    for package, wanted in needed.items():
        if wanted and find_spec(package) is None:
            asker = f"trainer.strategy={trainer.strategy}" if package == "deepspeed" else f"logger {package}"
            yield f"{asker} needs the package {package}, which is not installed: pip install 'edit-dit[{package}]'"


# ---- training -------------------------------------------------------------------------------------------------------


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
        yield f"teacher.placement=tied makes the student with its edits off the teacher: leave out teacher.path={path}"
    if placement == "tied" and not any(map(_can_be_off, cfg.edits.values())):
        yield (
            "teacher.placement=tied needs an edit that can be switched off, such as edits=lora: else the student is "
            "its own teacher"
        )
    if sentence := unplaceable(placement, cfg.trainer.strategy):
        yield sentence
    pair = OmegaConf.to_container(scale) if OmegaConf.is_list(scale) else [scale, scale]
    if not (isinstance(pair, list) and len(pair) == 2 and all(map(number, pair)) and pair[0] <= pair[1]):
        yield f"teacher.guidance: expected a number of at least 0 or [low, high], got {scale}"


def _can_be_off(node: Any) -> bool:
    """Whether a section makes an edit that can be switched off; one that makes none is refused elsewhere."""
    from edit.denoiser import Edit

    target = node.get("_target_") if isinstance(node, DictConfig) else None
    try:
        made = locate(target, (str(target).split(".")[0],))
    except ValueError:
        return False
    return isinstance(made, type) and issubclass(made, Edit) and made.off is not Edit.off


def procedure_conflicts(cfg: DictConfig) -> Iterator[str]:
    """What the procedure itself cannot be combined with, in a `Root` without other conflicts. Making it imports
    Lightning, so this comes last."""
    for place in ("recipe", "matching"):
        node = cfg[place]
        if node is not None and (not isinstance(node, DictConfig) or "_target_" not in node):
            yield f"{place}: expected a section with _target_, got {cut(node)}"
            return
    try:
        procedure = procedure_of(cfg)
    except InstantiationException as error:
        yield f"recipe: {one_line(error.__cause__ or error)}"
        return
    yield from procedure.check(cfg)


# ---- what runs besides the training ---------------------------------------------------------------------------------


def _check_stages(cfg: DictConfig) -> Iterator[str]:
    for when in ("before", "after"):
        try:
            for i, (entry, stage) in enumerate(zip(cfg[when], stages_of(cfg, when), strict=True)):
                written = OmegaConf.to_container(entry)  # as in the file, with its references
                lists = written.values() if isinstance(written, dict) else [written]
                yield from _check_stage(f"{when}.{stage.name if stage.given else i}", stage, *lists)
        except InterpolationResolutionError:
            continue  # ${hydra:...}: the job itself checks them again
        except UserError as error:
            yield one_line(error)


def _check_stage(place: str, stage: Stage, written: Sequence[str]) -> Iterator[str]:
    words = stage.all
    for word, source in zip(stage.words, written, strict=True):
        if word in words and word.endswith("=None") and (source := re.search(r"\$\{([\w.]+)\}$", source)):
            yield f"{source[1]} has no value, and {place} needs it for {source.string}; give one with {source[1]}=..."
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
    elif module is None and (swept := next(filter(is_swept, stage.given), None)):
        own = [word for word in stage.words if key_of(word) not in (key_of(swept), "name")]
        alone = typed("python", "train.py", "-m", *own, swept, f"name={stage.name}_sweep")
        yield (
            f"{place}: {swept} gives several values, and all jobs of a sweep share the one folder that a stage fills: "
            f"train these first, {alone}, and sweep this run over their folders, with before=[] and init=... or "
            "teacher.path=..."
        )


def _refused_by(module: str, words: Sequence[str]) -> str | None:
    """Why the module itself would refuse its words, asked before anything runs; None if it accepts them."""
    words = [word for word in words if word.lower() not in DEBUG]
    try:
        if module in ("data.embedded", "data.generate"):
            import_module(module).parse(words)
        elif module == "data.precompute":
            from data.precompute import parser

            told = parser()
            told.error = refuse  # type: ignore[method-assign]
            told.parse_args(words)
        elif module == "recipes.export":
            from recipes.export import parse as exported

            exported(words)
        else:
            from recipes.prune import parse as read

            read(words)
    except (UserError, ValueError) as error:
        return one_line(error)
    return None


def _check_evaluate(chosen: Any) -> Iterator[str]:
    if chosen is not None and not isinstance(chosen, DictConfig):
        yield f"evaluate: expected a section with keys of configs/eval.yaml, or null for no report, got {chosen!r}"
        return
    try:
        Evaluation.of(cast(Mapping[str, Any], chosen or {}))
    except UserError as error:
        yield f"evaluate: {error}"
    except InterpolationResolutionError:
        pass  # ${hydra:...}: the job itself checks them again
