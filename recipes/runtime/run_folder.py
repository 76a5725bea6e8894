"""The folder of a run: where it is, whether this command may continue what is in it, what is written at the start.

A run lives in `runs/<name>/`: index.html, config.yaml, env.json, metrics.csv, samples/, checkpoints/, artifact/. Torch
is imported inside: what is in the folder is told without it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from itertools import dropwhile
from math import prod
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.names import setting
from edit.inputs.trust import load_yaml
from recipes.config.errors import UserError
from recipes.config.older import bring_up_to_date
from recipes.config.schema import Root
from recipes.config.staged import as_given
from recipes.runtime.checkpoint_files import checkpoints
from recipes.runtime.files import write
from recipes.runtime.machine import environment

# settings that may change between two attempts at one run; all others decide its numbers
FREE = {"name", "runs", "logger", "checkpoint", "preview", "evaluate", "log_every", "debug", "trusted", "before"}
FREE |= {"heldout", "stages", "after", "world"} | {  # what refers to the world is compared by its value
    f"trainer.{k}"
    for k in ("max_steps", "accelerator", "strategy", "compile", "gradient_checkpointing", "threads", "memory")
}
MADE = ("artifact", "encoder")  # what a finished run leaves, by its procedure
BATCH = ("data.batch_size", "trainer.devices", "trainer.num_nodes")  # only their product counts
FREE |= {*BATCH, "data.workers"}


def folder_of(cfg: DictConfig) -> Path:
    """The folder of a run.

    Raises:
        UserError: if a file is in its place
    """
    out = Path(cfg.runs) / cfg.name
    if file := next((p for p in (out, *out.parents) if os.path.lexists(p) and not p.is_dir()), None):
        raise UserError(f"the run cannot be written into {out}: {file} is no folder; choose another name= or runs=")
    return out


def refuse_other_run(cfg: DictConfig, out: Path) -> None:
    """Continue a run only with unchanged settings, as far as they decide its numbers.

    The number of ranks that share a batch may change, the size of the batch may not.

    Raises:
        UserError: naming the first setting that differs
    """
    begun = checkpoints(out / "checkpoints") or any((out / made).exists() for made in MADE)
    if not (out / "config.yaml").exists() or not begun:
        return
    before, now = decisive(read_config(out / "config.yaml")), decisive(cfg)
    defaults = dotted(OmegaConf.to_container(OmegaConf.structured(Root)))  # an older run may not know every setting
    for key in {**before, **now}:
        was = before[key] if key in before else defaults.get(key, default_of(key, now))
        if was != now.get(key):
            raise UserError(
                f"{out} holds a run with {key}={was}, this command says {now.get(key)}: give the new run "
                f"another name=, or restore the setting to resume"
            )


def decisive(cfg: DictConfig) -> dict[str, Any]:
    """The settings that decide a run's numbers, with dotted keys."""
    found = dotted(OmegaConf.to_container(cfg))
    factors = [found.get(k) or 1 for k in BATCH]
    whole = all(isinstance(v, int) for v in factors)  # not in a damaged file
    found["data.batch_size x trainer.devices x trainer.num_nodes"] = prod(factors) if whole else factors
    return {k: v for k, v in found.items() if k not in FREE and k.split(".")[0] not in FREE}


def default_of(key: str, settings: Mapping[str, Any]) -> Any:
    """A setting's default, by the class that its section names; None: there is no such class, or no default.

    Args:
        key: with dots
        settings: of this run, whose classes are trusted
    """
    section, _, name = key.rpartition(".")
    target = settings.get(f"{section}._target_")
    if not isinstance(target, str):
        return None
    module, _, cls = target.rpartition(".")
    known = inspect.signature(getattr(importlib.import_module(module), cls)).parameters
    value = known[name].default if name in known else None
    return list(value) if isinstance(value, tuple) else value


def read_config(path: Path) -> DictConfig:
    """The configuration that a run was started with.

    Raises:
        UserError: if the file is damaged
    """
    try:
        config = load_yaml(path)
        if isinstance(config, DictConfig) and "trainer" in config and "data" in config:
            bring_up_to_date(config)
            return config
        reason = "it holds no trainer and data"
    except (ValueError, OmegaConfBaseException) as error:
        reason = str(error).split("\n")[0]
    raise UserError(
        f"{path} is damaged ({reason}), and with it what this run was started with: restore it, or delete it to go on "
        "with the settings of this command"
    )


def refuse_overrun(cfg: DictConfig, out: Path, done: int) -> None:
    """Raises UserError if the run is past its last step already."""
    if done > cfg.trainer.max_steps:
        raise UserError(
            f"{out} is at step {done}, and trainer.max_steps={cfg.trainer.max_steps} ends before that: give at least "
            f"{done} to go on, or the new run another name="
        )


def begin(cfg: DictConfig, out: Path, resumes: bool) -> None:
    """Write down what the run is made from; called on the first rank, before its first step.

    Raises:
        UserError: if a run would be continued with another teacher
    """
    refuse_other_teacher(cfg, out, resumes)
    write(out / "config.yaml", OmegaConf.to_yaml(cfg))
    write(out / "env.json", json.dumps(here() | {"command": command_of(cfg)}, indent=2))


def command_of(cfg: DictConfig) -> list[str]:
    """The words after `python` that make this very run, a job of a sweep included; empty if no command line did."""
    if not HydraConfig.initialized():
        return []
    given = HydraConfig.get().overrides
    settings = [word for word in as_given(given.task) if word.partition("=")[0] != "name"]
    settings += [word for word in given.hydra if word.startswith("hydra.searchpath=")]
    options = dropwhile(lambda word: not word.startswith("-"), sys.argv[1:])  # they come last: `recipes.config.launch`
    flags = [word for word in options if word not in ("-m", "--multirun")]
    return [sys.argv[0], *settings, setting("name", cfg.name), *flags]


def refuse_other_teacher(cfg: DictConfig, out: Path, resumes: bool) -> None:
    """Continue a run only with the weights of the teacher that it began with; their fingerprint is in its folder.

    Raises:
        UserError: if other weights are under the same path by now
    """
    if cfg.teacher.path is None:
        return
    from edit.artifacts.fingerprint import fingerprint

    kept, now = out / "teacher.json", fingerprint(cfg.teacher.path)
    try:
        before = json.loads(kept.read_text())["fingerprint"] if resumes and kept.exists() else now
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{kept} is damaged: delete it if {cfg.teacher.path} is the run's teacher") from error
    if before != now:
        raise UserError(
            f"{out} began with another teacher: the weights at {cfg.teacher.path} have changed since; give the new run "
            "another name=, or restore them to resume"
        )
    write(kept, json.dumps({"path": str(cfg.teacher.path), "fingerprint": now}))


def here() -> dict[str, Any]:
    """Everything besides the configuration that the numbers of this run depend on: device, versions, revision."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return environment(device) | {"lightning": version("lightning")}


def dotted(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    if isinstance(node, Mapping) and node:
        return {k: v for name, child in node.items() for k, v in dotted(child, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): node} if prefix else {}
