"""Mistakes that one part of a configuration shows by itself, each in one sentence, without building anything.

Values of typed sections are compared with their `rule`s, `_target_` nodes with the signatures that they name.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from edit.inputs.trust import accepted, cut, is_kind, refuse_enormous, said
from edit.inputs.trust import hints as annotations
from recipes.config.errors import one_line
from recipes.config.suggestions import LISTS, nearest, suggest
from recipes.config.values import breaches, choices, fits, spell


def mistakes(node: DictConfig | ListConfig, path: str, trusted: Sequence[str], hint: Any = None) -> Iterator[str]:
    """One sentence for each mistake in a node and below it.

    Args:
        node: a part of the configuration
        path: its dotted key, '' for the root
        trusted: packages that a `_target_` may name
        hint: annotation of the object that is built here; None: nothing is built
    """
    hints: Mapping[str, Any] = {}
    if isinstance(node, DictConfig):
        if is_dataclass(OmegaConf.get_type(node)):
            yield from _check_fields(node, path)
        if "_target_" in node:
            hints = yield from _check_target(node, path, trusted, hint)
    keys = list(node) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        place = f"{path}[{key}]" if isinstance(node, ListConfig) else f"{path}.{key}".lstrip(".")
        if OmegaConf.is_missing(node, key):
            yield f"{place} has no value; give one with {place}=..."
            continue
        try:
            child = node[key]
        except InterpolationResolutionError as error:
            if "HydraConfig was not set" not in str(error):  # ${hydra:...} is known only once the job runs
                yield f"{place}: {one_line(error)}"
            continue
        if isinstance(child, DictConfig | ListConfig):
            below = hints.get(str(key)) if "_target_" in node else _kind_at(place, path) or hint
            if hint is None and below is not None:
                yield from _check_sizes(child, place)
            yield from mistakes(child, place, (*trusted, *HOMES.get(place, ())), below)


def _check_sizes(node: DictConfig | ListConfig, path: str) -> Iterator[str]:
    try:
        refuse_enormous(OmegaConf.to_container(node, resolve=True), path)
    except OmegaConfBaseException:
        pass  # an unresolved reference is reported by `mistakes`
    except ValueError as error:
        yield one_line(error)


# dotted keys of train.py's configuration where an object is built, and its class; * is any name
BUILT = {
    "backbone": "edit.denoiser.Spec",
    "data.set": "edit.data_set.Splits",
    "edits.*": "edit.edits.Edit",
    "objective": "edit.objectives.Objective",
    "data_weight": "edit.objectives.Ramp",
    "terms.*": "edit.losses.Term",
    "matching": "edit.few_step.method.FewStepMethod",
    "recipe": "recipes.procedure.Procedure",
    "sampler": "edit.sampling.Sampler",
}
# packages that may be named there and nowhere else
HOMES: Mapping[str, Sequence[str]] = {"recipe": ("recipes",)}
# pure functions that may stand in place of a value
FUNCTIONS = ("edit.pruning.patterns.aligned",)
FUNCTIONS += tuple(f"edit.moe.block_groups.{name}" for name in ("layout", "ends", "outside"))
# Hydra's own keys in a node, and their only accepted values, which are the defaults
HYDRA = {"_partial_": False, "_recursive_": True, "_convert_": "all"}


def _kind_at(place: str, parent: str) -> Any:
    """The class that a dotted key of train.py's configuration takes; None where nothing is built."""
    path = BUILT.get(place) or BUILT.get(f"{parent}.*")
    if path is None:
        return None
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _check_fields(node: DictConfig, path: str) -> Iterator[str]:
    known = {f.name: f for f in fields(OmegaConf.get_type(node))}
    for key in node:
        place = f"{path}.{key}".lstrip(".")
        if key not in known:  # reached by +key=value only
            yield f"unknown key '{place}'{suggest(key, known)}"
        elif known[key].metadata and not OmegaConf.is_missing(node, key):
            or_null = " or null" if "None" in str(known[key].type) else ""
            with suppress(InterpolationResolutionError):  # reported by `mistakes`
                yield from list(breaches(node[key], place, or_null, **known[key].metadata))


# ---- targets --------------------------------------------------------------------------------------------------------


def locate(path: Any, trusted: Sequence[str]) -> Any:
    """Import the object that a `_target_` names.

    Raises:
        ValueError: if it is defined outside the trusted packages (a mere import into one of
            them, as in `torch.os.system`, does not count), or if it does not exist
    """
    if not isinstance(path, str):
        raise ValueError(f"expected an import path, got {cut(path)}")
    top, *rest = path.split(".")
    if top not in trusted:
        raise ValueError(
            f"{cut(path, quoted=False)} is in none of the trusted packages ({', '.join(trusted)}); if it is a class "
            f"for edit and you trust its package, set trusted=[{cut(top, quoted=False)}]"
        )
    found = _import(top)
    for depth, name in enumerate(rest, 1):
        parent = ".".join((top, *rest[: depth - 1]))
        if not hasattr(found, name):
            submodules = [m.name for m in pkgutil.iter_modules(getattr(found, "__path__", []))]
            if name not in submodules:
                options = {n for n in (*dir(found), *submodules) if not n.startswith("_")}
                close = nearest(name, options)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"{parent} has no {name!r}{hint}{LISTS * (top == 'edit')}")
            _import(f"{parent}.{name}")
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(f"{path} is a {type(found).__name__}, not a class or function")
    home = getattr(inspect.getmodule(found), "__name__", "builtins")
    if home.split(".")[0] not in trusted:
        raise ValueError(f"{path} comes from {home}, not one of the trusted packages")
    return found


def _import(module: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"importing {module} needs the package {error.name}, which is not installed") from error


def _check_target(
    node: DictConfig, path: str, trusted: Sequence[str], hint: Any
) -> Generator[str, None, Mapping[str, Any]]:
    """Mistakes of a node with a `_target_`; returns the annotations of its arguments."""
    prefix = f"{path}." if path else ""
    for key, value in OmegaConf.to_container(node).items():  # type: ignore[union-attr]
        if str(key).startswith("_") and key != "_target_" and (key not in HYDRA or value != HYDRA[key]):
            yield f"{prefix}{key}: arguments are given by their names and built at once; leave {key} out"
    try:
        target = locate(node._target_, trusted)
        _check_kind(target, node._target_, hint)
        parameters = inspect.signature(target).parameters
    except ValueError as error:
        yield f"{prefix}_target_: {one_line(error)}"
        return {}
    name = getattr(target, "__qualname__", node._target_)
    hints = annotations(target, parameters)
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = [str(key) for key in node if not str(key).startswith("_")]
    for key in given:
        if key not in named:
            if not open_ended:
                yield f"{prefix}{key}: {name} has no argument {key!r}{suggest(key, named)}"
            continue
        if OmegaConf.is_missing(node, key):
            continue
        try:
            value = node[key]
        except InterpolationResolutionError:
            continue  # reported by `mistakes`
        if not fits(value, hints[key]):
            near = suggest(value, choices(hints[key])).split(" (")[0] if isinstance(value, str) else ""
            shown = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            yield f"{prefix}{key}: expected {spell(hints[key])}, got {shown!r}{near if 'did you' in near else ''}"
    missing = [n for n, p in named.items() if p.default is p.empty and n not in given]
    yield from (f"{prefix}{n}: {name} needs it and it is not given; add {prefix}{n}=..." for n in missing)
    return hints


def _check_kind(target: Any, path: str, hint: Any) -> None:
    """Raise a ValueError unless the annotation accepts the `_target_`'s class: see `edit.inputs.trust`."""
    if hint is None:
        raise ValueError(f"nothing is built here, so {path} is not called: leave it out")
    kinds = accepted(hint)
    if isinstance(target, type) and is_kind(target, kinds):
        return
    if path in FUNCTIONS and typing.get_type_hints(target)["return"] == hint:
        return
    what = f"{target.__module__}.{target.__qualname__}" if isinstance(target, type) else f"{path}, which is no class,"
    raise ValueError(f"{said(kinds)} was expected, got {what}{' and is not called' * (what[-1] == ',')}")
