"""Every mistake of a configuration that can be found before anything is built, one sentence each."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from edit.inputs.trust import cut
from recipes.config.conflicts import conflicts, procedure_conflicts
from recipes.config.mistakes import mistakes
from recipes.config.older import bring_up_to_date
from recipes.config.schema import Root

TRUSTED = ("edit", "data")  # packages whose classes any configuration may name, besides its own `trusted`
# what Hydra itself puts into the configuration of a run
LAUNCHER = {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}
SWEEPER = {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"}


def check(cfg: DictConfig) -> list[str]:
    """The mistakes of a configuration, empty if there are none. Former import paths in it are replaced.

    Values are compared with the rules of the schema, `_target_` nodes with the kind of class that their place expects
    and with the signatures that they name. Conflicts between settings are looked for in a `Root` without mistakes.
    """
    return check_settings(cfg) or check_procedure(cfg)


def check_settings(cfg: DictConfig) -> list[str]:
    """`check`, without what needs the procedure, and with it Lightning."""
    bring_up_to_date(cfg)
    trusted = (*TRUSTED, *(OmegaConf.select(cfg, "trusted") or ()))
    errors = list(mistakes(cfg, "", trusted))
    return errors or (list(conflicts(cfg)) if OmegaConf.get_type(cfg) is Root else [])


def check_procedure(cfg: DictConfig) -> list[str]:
    """The rest of `check`, for a configuration whose settings are right."""
    return list(procedure_conflicts(cfg)) if OmegaConf.get_type(cfg) is Root else []


def check_hydra(node: DictConfig | None) -> Iterator[str]:
    """One sentence for each changed part of Hydra's own section that would run something."""
    if not isinstance(node, DictConfig):
        yield f"hydra: its own section stays as it is, got {cut(node)}; leave hydra out"
        return
    told: Any = OmegaConf.to_container(node)
    job = told.get("job") or {}
    sweeper = {k: v for k, v in (told.get("sweeper") or {}).items() if k != "max_batch_size" and v is not None}
    params = sweeper.pop("params", None) or {}  # words of the sweep, as they might be typed
    own = {
        "launcher": told.get("launcher") == LAUNCHER,
        "sweeper": sweeper == SWEEPER and not any(str(key).lstrip("+~").startswith("hydra") for key in params),
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
