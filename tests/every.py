"""What there is to test of every method: classes found by importing, and settings that fit tiny models."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import edit
from edit.edits import rebuild

CONFIGS = Path(edit.__file__).parents[1] / "configs"


@cache
def classes(base: type) -> dict[str, type]:
    """The dataclasses of the package that derive from a contract, by name, in the order of their modules."""
    modules = [import_module(module.name) for module in pkgutil.walk_packages(edit.__path__, "edit.")]
    own = ((cls, module) for module in modules for cls in vars(module).values() if isinstance(cls, type))
    found = [cls for cls, module in own if cls.__module__ == module.__name__ and issubclass(cls, base)]
    return {cls.__name__: cls for cls in found if is_dataclass(cls) and not isabstract(cls)}


def sections(node: Any) -> Iterator[Mapping]:
    """All sections of a configuration that name a class."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from sections(value)


@cache
def written() -> dict[str, Mapping]:
    """What files of configs/edits say, by import path; the smallest file first, which is about the edit alone."""
    files = [OmegaConf.to_container(OmegaConf.load(file)) for file in sorted((CONFIGS / "edits").glob("*.yaml"))]
    found = [list(sections(content)) for content in files]
    return {node["_target_"]: node for nodes in sorted(found, key=len, reverse=True) for node in nodes}


def opened(cls: type) -> dict[str, Any]:
    """Fields without a default, with their annotations."""
    return {f.name: f.type for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}


def small(cls: type) -> Any:
    """An edit with settings that a tiny model can have: those of its file in configs/edits, else its defaults.

    Raises:
        LookupError: if there are neither, with what to add
    """
    path = f"{cls.__module__}.{cls.__qualname__}"
    if path in written():
        return rebuild(written()[path])
    if open_ := opened(cls):
        raise LookupError(
            f"{cls.__name__} cannot be made without {', '.join(open_)}, and no file of configs/edits names it: add "
            f"configs/edits/<name>.yaml with _target_: {path} and values that a model of two units can have"
        )
    return cls()
