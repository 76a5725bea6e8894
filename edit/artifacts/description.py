"""Descriptions of artifacts: the content of `edits.json`, or its equivalent for a stock `diffusers` folder."""

from __future__ import annotations

import inspect
import os
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from edit import backbones
from edit.artifacts.location import find
from edit.denoiser import Denoiser
from edit.inputs import trust

FORMAT = 1


def edits_of(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The edits of an artifact, folded and live, each with its name, import path and fields."""
    description = read_description(find(path, weights=False))
    return [*description["folded"], *({"name": name, **node} for name, node in description["edits"].items())]


def read_description(path: Path) -> dict[str, Any]:
    """Content of edits.json, or its equivalent for a stock folder.

    Raises:
        FileNotFoundError: if it is missing where edits have left parameters
        ValueError: if it cannot be read, or is of another format
    """
    if not os.path.lexists(path / "edits.json"):
        if (path / "edits.safetensors").exists():
            raise FileNotFoundError(
                f"{path / 'edits.json'} is missing, which says what edits.safetensors belongs to: the artifact is not "
                "whole"
            )
        return _describe_stock(trust.read_json(path / "config.json"))
    description = trust.read_json(path / "edits.json")
    if description.get("format") != FORMAT:
        raise ValueError(f"{path} has artifact format {description.get('format')}, this version of edit reads {FORMAT}")
    if missing := [k for k in _PARTS if k not in description]:
        raise ValueError(f"{path / 'edits.json'} has no {missing[0]}: the artifact is not whole")
    _check_parts(description, path / "edits.json")
    return description


def _check_parts(description: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError where a part is not of the type that `save` writes."""
    for part, kinds in _PARTS.items():
        value = description[part]
        items = value.values() if part == "edits" and isinstance(value, dict) else value if part == "folded" else ()
        if not isinstance(value, kinds) or not all(isinstance(item, dict) for item in items):
            raise ValueError(f"{file} holds {trust.cut(value)} for {part}: it was not written by edit.save")
    if odd := [e for e in description["folded"] if not {"name", "_target_"} <= set(e)]:
        raise ValueError(f"{file} holds {trust.cut(odd[0])} for folded: an edit has a name and an import path")


_PARTS: dict[str, Any] = {
    "backbone": str,
    "base": dict | None,
    "edits": dict,
    "folded": list,
    "objective": dict | None,
    "sampler": dict | None,
    "data": dict,
    "run": dict,
}


def family_of(target: str) -> type[Denoiser]:
    if not target.startswith("edit.backbones."):
        raise ValueError(f"the artifact's backbone {trust.cut(target, False)} is not one of edit.backbones")
    try:
        return trust.named(target, ("edit",), (Denoiser,), "the artifact's backbone")
    except ValueError as error:
        raise ValueError(str(error).replace("the artifact's backbone asks for", "the artifact's backbone")) from error


def families() -> list[type[Denoiser]]:
    """The families, which are the classes with a `name` in modules of `edit.backbones`; by module and order therein."""
    modules = [import_module(m.name) for m in pkgutil.iter_modules(backbones.__path__, f"{backbones.__name__}.")]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Denoiser) and value.__module__ == module.__name__
        if "name" in vars(value)
    ]


def readers(config: Mapping[str, Any]) -> list[type[Denoiser]]:
    """The families that read a published `diffusers` folder of this configuration, by `Denoiser.reads`."""
    name = config.get("_class_name")
    return [
        family
        for family in families()
        for stock, settings in family.reads.items()
        if stock == name and all(config.get(k) == v for k, v in settings.items())
    ]


def _reader(config: Mapping[str, Any]) -> type[Denoiser]:
    """The one family that reads a folder without edits.json.

    Raises:
        ValueError: if none does, or several do
    """
    shown, found = trust.cut(config.get("_class_name"), quoted=False), readers(config)
    if not found:
        known = [next(iter(family.reads)) for family in families() if family.reads]
        raise ValueError(f"no backbone here reads a {shown}; known are {', '.join(known)}")
    if len(found) > 1:
        names = " and ".join(family.name for family in found)
        raise ValueError(f"the backbones {names} both read a {shown}: leave it out of `reads` of one of them")
    return found[0]


def _describe_stock(config: Mapping[str, Any]) -> dict[str, Any]:
    """A description for a folder without edits.json."""
    empty: dict[str, Any] = {"base": None, "edits": {}, "folded": [], "objective": None, "sampler": None}
    return {"format": FORMAT, "backbone": import_path(_reader(config)), **empty, "data": {}, "run": {}}


def import_path(family: type[Denoiser]) -> str:
    """Where a family is found again."""
    return f"{family.__module__}.{family.__qualname__}"
