"""What Hydra, OmegaConf and YAML say against a configuration, in one sentence that names the key and its cure."""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)

from edit.inputs.command import unexpected
from recipes.config import composed
from recipes.config.errors import one_line
from recipes.config.schema import Root
from recipes.config.suggestions import listed, suggest
from recipes.config.values import spell
from recipes.config.words import KEY


def explain(error: Exception, config_dir: Path, overrides: Sequence[str], primary: str = "train") -> str:
    """An exception of Hydra, OmegaConf or YAML as one sentence.

    Args:
        error: as raised by `hydra.compose`
        config_dir: the folder of the YAML groups
        overrides: the `key=value` words of the command line
        primary: name of the configuration file that is composed first
    """
    if isinstance(error, OverrideParseException):
        return _explain_override(error.override)
    if isinstance(error, MissingConfigException):
        return _explain_missing(error, config_dir, overrides, primary)
    if odd := next((o for o in overrides if not KEY.match(o)), None):
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
    return prefix + one_line(cause if isinstance(cause, OmegaConfBaseException) else error).removeprefix(prefix)


def _explain_override(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return f"'{override}' is not a setting; settings are written key=value, for example trainer.max_steps=200"
    if not KEY.match(override):
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
            return _no_choice(config_dir, group, value)
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
    return _no_choice(config_dir, group, value)


def _no_choice(config_dir: Path, group: str, value: str) -> str:
    known = composed.names(config_dir, group)
    return f"there is no {group} named '{value}'{suggest(value, known)}{listed(group)}"


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
    return f"{full}: expected {spell(hint)}, got {value}"
