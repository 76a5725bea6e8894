"""The catalogue's rows: what the code says of each class (`edit.catalogue`), and what configurations and claims add.

Configurations of a class are those that name it, its worlds those that one of them composes on. What cannot be read off
the code is told under `about: rows` by the method's configuration, or by configs/catalogue.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from edit.catalogue import Method, described, implemented
from edit.inputs.trust import load_yaml
from recipes.config import composed

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
CATALOGUE = CONFIGS / "catalogue.yaml"


@dataclass(frozen=True)
class Entry(Method):
    """One row.

    Args:
        kind, name, summary, papers, file: as of `Method`
        configs: group/name of each configuration that names the class
        worlds: those on which such a method works; the first may be `all`, which are those of configs/world
        change: in which way it changes a model or a run
        claims: files of benchmarks/claims, without suffix
        result: in a line
        example: a command that tries it, where none follows from the configurations
    """

    configs: tuple[str, ...]
    worlds: tuple[str, ...]
    change: str
    claims: tuple[str, ...]
    result: str
    example: str

    @property
    def own(self) -> list[str]:
        """The configurations that are about the class: files of its group, and methods whose rows tell of it."""
        methods = {c: c.removeprefix("method/") for c in self.configs if c.startswith("method/")}
        told = [c for c, m in methods.items() if self.name in composed.about(CONFIGS, "method", m).get("rows", {})]
        return [*(c for c in self.configs if c.split("/")[0] in ("backbone", "edits", "sampler")), *told]


def entries() -> list[Entry]:
    """All rows, by kind and file.

    Raises:
        ValueError: for a class of which nothing is told, or of which two files tell
    """
    told, uses, found = sayings(), used(), []
    classes = implemented()
    names = {name for kind, group in classes.items() if kind != "backbones" for name in group}
    if odd := sorted(told.keys() ^ names):
        where = f"under about.rows in its file of configs/method, or in {CATALOGUE.name}"
        known = f"say {where}, as in {odd[0]}: {{change: drops units}}" if odd[0] in names else "there is no such class"
        raise ValueError(f"the catalogue and the code differ in {odd[0]}: {known}")
    for kind, group in classes.items():
        rows = [entry(kind, cls, told.get(name) or of_family(cls), uses, group) for name, cls in group.items()]
        found += sorted(rows, key=lambda row: (row.file, row.name))
    return found


def sayings() -> dict[str, dict[str, Any]]:
    """What files say of classes that cannot be read off the code, by class."""
    found: dict[str, dict[str, Any]] = dict(load_plain(CATALOGUE))
    for method in composed.names(CONFIGS, "method"):
        for name, row in composed.about(CONFIGS, "method", method).get("rows", {}).items():
            if name in found:
                raise ValueError(f"configs/method/{method}.yaml: another file tells of {name}: leave one of them out")
            found[name] = row
    return found


def load_plain(file: Path) -> Any:
    return OmegaConf.to_container(load_yaml(file))


def of_family(spec: type) -> dict[str, Any]:
    """What a backbone's row says, read off its family: the class that `build` promises."""
    family = get_type_hints(vars(spec)["build"])["return"]
    return {"change": "over diffusers" if family.stock else "blocks written out"}


def entry(
    kind: str, cls: type, told: Mapping[str, Any], uses: Mapping[str, list[str]], others: Mapping[str, type]
) -> Entry:
    """The row of a class.

    Args:
        kind: a key of `TITLES`
        cls: the class
        told: what cannot be read off the code
        uses: configurations by the classes that they name
        others: all classes of this kind
    """
    method = described(kind, cls, others)
    names = tuple(uses.get(method.place, ()))
    return Entry(
        **vars(method),
        configs=names,
        worlds=() if kind == "solvers" else worlds_of(names),
        change=told["change"],
        claims=tuple(told.get("claim", ())),
        result=told.get("result", ""),
        example=told.get("example", ""),
    )


def used() -> dict[str, list[str]]:
    """Configurations by the classes that they name: dotted path -> group/name."""
    found: dict[str, list[str]] = {}
    for group in ("backbone", "edits", "sampler", "method", "experiment"):
        for file in sorted((CONFIGS / group).rglob("*.yaml")):
            text = file.read_text()
            for path in dict.fromkeys(re.findall(r"_target_: ([\w.]+)", text)):
                found.setdefault(path, []).append(file.relative_to(CONFIGS).with_suffix("").as_posix())
    for group in ("method", "experiment"):  # those that choose an edit by its name
        for file in sorted((CONFIGS / group).rglob("*.yaml")):
            for chosen in re.findall(r"override /(?:edits|sampler): \[?([\w, ]+)", file.read_text()):
                for kind, name in ((k, n.strip()) for n in chosen.split(",") for k in ("edits", "sampler")):
                    for path in (path for path, names in found.items() if f"{kind}/{name}" in names):
                        place = file.relative_to(CONFIGS).with_suffix("").as_posix()
                        if place not in found[path]:
                            found[path].append(place)
    return found


def worlds_of(configs: tuple[str, ...]) -> tuple[str, ...]:
    """Worlds on which a configuration of configs/method works, and those that have an experiment of their own."""
    worlds = composed.names(CONFIGS, "world")
    methods = [name.removeprefix("method/") for name in configs if name.startswith("method/")]
    own = {name.split("/")[1] for name in configs if name.startswith("experiment/")}
    fitting = {world for world in worlds for method in methods if not composed.unfit(CONFIGS, world, method)}
    if fitting >= set(worlds):
        return ("all", *sorted(own - set(worlds)))
    return tuple(sorted(fitting | own))
