"""A stock pipeline around an exported transformer: its other components, its scheduler where the steps differ."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from edit.artifacts.checkpoint import Artifact
from edit.artifacts.formats import stock_config
from edit.artifacts.steps import steps_of
from edit.artifacts.usage import Usage, calling, dtype_name
from edit.inputs import trust
from edit.solvers import FLOW_SCHEDULER as FLOW

LINKED = 2**20  # bytes from which a component's file is linked rather than copied: weights, not settings


def write_pipeline(
    artifact: Artifact, source: Path, index: Mapping[str, Any], folder: Path, dtype: torch.dtype | None
) -> Usage:
    """Everything of a stock pipeline but its transformer. Large files are hard links where the disk allows.

    Where the artifact is sampled at other times than the pipeline's, its flow-matching scheduler is written anew.

    Raises:
        ValueError: if the pipeline has a transformer of another class
    """
    mine, other = stock_config(artifact.denoiser)["_class_name"], index["transformer"][1]
    if mine != other:
        raise ValueError(f"the pipeline {source} has a {other} as its transformer, the artifact is a {mine}")
    scheduler = read_scheduler(source, index)
    steps = steps_of(artifact, scheduler)
    own = ("transformer", "scheduler") if steps.scheduler else ("transformer",)
    for name in components(index):
        if name not in own:
            shutil.copytree(source / name, folder / name, copy_function=_take)
    if steps.scheduler:
        write_scheduler(steps.scheduler, source / "scheduler", folder / "scheduler")
    kept = {k: v for k, v in index.items() if k != "_name_or_path"}  # a folder of this machine
    (folder / "model_index.json").write_text(json.dumps(kept, indent=2) + "\n")
    of = dtype_name(artifact.denoiser, dtype)

    def usage(export: str, base: str | None) -> str:
        lines = ["import torch", "from diffusers import DiffusionPipeline", ""]
        lines += [f'pipe = DiffusionPipeline.from_pretrained("{export}", torch_dtype={of})']
        return "\n".join([*lines, *calling(artifact, steps)])

    return usage


def read_scheduler(source: Path, index: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of a pipeline's scheduler, with its class; None: it has none.

    Raises:
        ValueError: if it cannot be read
    """
    if "scheduler" not in components(index):
        return None
    file = source / "scheduler" / "scheduler_config.json"
    try:
        return {**trust.read_json(file), "_class_name": index["scheduler"][1]}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.parent} is not the folder of a scheduler: {error}") from error


def write_scheduler(settings: Mapping[str, Any], source: Path, folder: Path) -> None:
    """A stock flow-matching scheduler of these settings; of the old one it has the unit of time.

    Raises:
        ValueError: if the old one's configuration cannot be read
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    try:
        unit = FlowMatchEulerDiscreteScheduler.from_pretrained(source).config["num_train_timesteps"]
    except OSError as error:
        raise ValueError(f"{source} is not the folder of a {FLOW}: {error}") from error
    FlowMatchEulerDiscreteScheduler(unit, **settings).save_pretrained(folder)


def pipeline_index(folder: Path) -> dict[str, Any]:
    """A stock pipeline's `model_index.json`, once all that it names is found to be there.

    Raises:
        FileNotFoundError: if the folder is no pipeline, or a component is missing
        ValueError: if it has no transformer, or names a component outside its folder
    """
    file = folder / "model_index.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a diffusers pipeline: it has no model_index.json")
    try:
        index = trust.read_json(file)
        names = components(index)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if "transformer" not in names:
        raise ValueError(f"the pipeline {folder} has no transformer, but {', '.join(names) or 'nothing'}")
    if outside := [n for n in names if not re.fullmatch(r"\w+", n)]:
        raise ValueError(f"{file} names a component outside its folder: {outside[0]}")
    if missing := [n for n in names if n != "transformer" and not (folder / n).is_dir()]:
        raise FileNotFoundError(f"the pipeline {folder} is not whole: its {missing[0]} is missing")
    return index


def components(index: Mapping[str, Any]) -> list[str]:
    """Names of the parts that a pipeline has."""
    return [k for k, v in index.items() if not k.startswith("_") and isinstance(v, list) and v and v[0] is not None]


def _take(source: str, target: str) -> str:
    """Link a large file, copy a small one, that somebody may want to edit."""
    source = os.path.realpath(source)  # the hub's cache has symbolic links
    if os.path.getsize(source) >= LINKED:
        try:
            os.link(source, target)
            return target
        except OSError:  # another disk, or one that has no links
            pass
    return shutil.copy2(source, target)
