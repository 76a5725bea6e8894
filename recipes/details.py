"""One row of the catalogue in full, as text: what it is, where, its settings, and a command that tries it."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from typing import Any

from edit.artifacts.shown import brief
from edit.catalogue import TITLES, first_sentence
from recipes.catalogue import CONFIGS, Entry
from recipes.config import composed

LINE = 110
KEYS = {"backbones": "backbone", "few_step": "matching", "solvers": "sampler.solver"}  # of a run's configuration
FIRST = ("dit_digits", "flux_tiny")  # worlds that train fastest


def details(e: Entry) -> str:
    """All that is known of one row."""
    cls = getattr(import_module(e.place.rpartition(".")[0]), e.name)
    lines = {
        "paper": ", ".join(f"https://arxiv.org/abs/{number}" for number in e.papers),
        "kind": f"{TITLES[e.kind].removesuffix('s').lower()}: {e.change}",
        "file": e.file,
        "configs": ", ".join(f"configs/{name}.yaml" for name in e.configs),
        "worlds": ", ".join(worlds(e)),
        "try it": example(e),
        "claim": ", ".join(f"benchmarks/claims/{name}.yaml" for name in e.claims),
        "result": e.result,
    }
    told = "".join(_wrapped(title, value) for title, value in lines.items() if value)
    return "\n\n".join([e.name, *about(cls, e.summary), told.rstrip(), *settings(cls, e)])


def about(cls: type, summary: str) -> Iterator[str]:
    """What docstrings say before their arguments: the module's where it is about this class, then the class's own."""
    module = inspect.getdoc(sys.modules[cls.__module__]) or ""
    for doc in (module, inspect.getdoc(cls) or ""):
        said = doc.partition("\nArgs:\n")[0].strip()
        if said and (doc is not module or first_sentence(module) == summary):
            yield textwrap.indent(said, "  ")


def worlds(e: Entry) -> list[str]:
    """Those on which it composes, by name."""
    return [*composed.names(CONFIGS, "world"), *e.worlds[1:]] if e.worlds[:1] == ("all",) else list(e.worlds)


def example(e: Entry) -> str:
    """A command that works as it stands; "" if none follows from the configurations: files then tell `example`."""
    if e.example:
        return e.example
    name = e.configs[0].partition("/")[2] if e.configs else ""
    if e.kind == "backbones":
        return f"python -m recipes.cost backbone={name}"
    if found := next(_experiments(e), None):
        return f"python train.py experiment={found}"
    return f"python train.py sampler={name} name={name}" if e.kind == "solvers" else ""


def _experiments(e: Entry) -> Iterator[str]:
    """Experiments of small worlds that have the class and need nothing else; first those of the class's own method."""
    own = [name.removeprefix("method/") for name in e.configs if name.startswith("method/")]
    own.sort(key=lambda m: f"method/{m}" not in e.own)
    own = [composed.about(CONFIGS, "method", m).get("part of", m) for m in own]
    known, small = composed.names(CONFIGS, "experiment"), composed.names(CONFIGS, "world")
    for name in (f"{world}/{method}" for method in own for world in (*FIRST, *small)):
        if name in known and (composed.read(CONFIGS, "experiment", name) or {}).get("init") != "":
            yield name
    yield from (name for c in e.configs if (name := c.removeprefix("experiment/")) != c and name.split("/")[0] in small)


# ---- settings -------------------------------------------------------------------------------------------------------


def settings(cls: type, e: Entry) -> Iterator[str]:
    """The class's fields with their defaults, and what its docstring says of each."""
    if not is_dataclass(cls) or not fields(cls):
        return
    said, lines = arguments(cls), []
    for f in fields(cls):
        if f.init and not f.name.startswith("_"):
            lines.append(_wrapped(f"{f.name}={_default(f)}", said.get(f.name, ""), wide=26))
    head = f"settings, {_key(e)}.<name>=<value>; + in front where the configuration leaves one out"
    yield "\n".join([head, "".join(lines).rstrip()])


def arguments(cls: type) -> dict[str, str]:
    """What a class's docstring, or a comment behind a field, says of each."""
    found: dict[str, str] = {}
    for line in inspect.getsource(cls).splitlines():
        if comment := re.match(r" {4}(\w+): [^#]+#\s*(.+)", line):
            found[comment[1]] = comment[2]
    names: list[str] = []
    for line in (inspect.getdoc(cls) or "").partition("\nArgs:\n")[2].partition("\n\n")[0].splitlines():
        if begin := re.match(r" {4}([\w, ]+): (.+)", line):
            names = [name.strip() for name in begin[1].split(",")]
            found |= {name: begin[2] for name in names}
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _default(f: Field) -> str:
    value = f.default_factory() if f.default_factory is not MISSING else f.default
    return "<needed>" if value is MISSING else _spelled(value)


def _spelled(value: Any) -> str:
    """A value as a command line has it; an object as its class with what differs from the defaults."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_spelled, value))}]"
    return value if isinstance(value, str) else brief(value)


def _key(e: Entry) -> str:
    """Where a run's configuration holds the class: the name under which a file of its own has it, else any."""
    if e.kind in KEYS:
        return KEYS[e.kind]
    for config in e.configs:
        group, _, name = config.partition("/")
        content = composed.read(CONFIGS, group, name) or {}
        for key, node in (content if group == "edits" else content.get(e.kind) or {}).items():
            if isinstance(node, dict) and node.get("_target_") == e.place:
                return f"{e.kind}.{key}"
    return f"{e.kind}.<its name>"


def _wrapped(title: str, value: str, wide: int = 10) -> str:
    """A title, and its value in a column beside it."""
    first = f"  {title:<{wide - 3}} "
    lines = textwrap.wrap(value, LINE - wide, break_on_hyphens=False, break_long_words=False) or [""]
    begin = f"{first.rstrip()}\n{' ' * wide}" if len(first) > wide and value else first
    return (begin + f"\n{' ' * wide}".join(lines)).rstrip() + "\n"
