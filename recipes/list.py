"""The catalogue: every backbone, edit, loss term, few-step method and solver, in one table.

    python -m recipes.list             # on the terminal
    python -m recipes.list --write     # edit/README.md

Rows are classes found in `edit`: summary and papers are those of their docstrings, configurations those that name them,
worlds those that a configuration composes on. What cannot be read off the code is told under `about: rows` by the
method's configuration, or by configs/catalogue.yaml.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf

import edit
from edit.denoiser import Edit
from edit.few_step.method import FewStepMethod
from edit.inputs.command import Parser, guarded
from edit.inputs.trust import load_yaml
from edit.losses import Term
from edit.solvers import Solver
from recipes.config import composed

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
CATALOGUE = CONFIGS / "catalogue.yaml"
WRITTEN = ROOT / "edit/README.md"
TITLES = {
    "backbones": "Backbones",
    "edits": "Edits",
    "terms": "Loss terms",
    "few_step": "Few-step methods",
    "solvers": "Solvers",
}
HEADER = """# What is here

Every backbone, edit, loss term, few-step method and solver. Written by `python -m recipes.list --write`; do not edit
it by hand: change docstrings, `about` in [configs/method](../configs/method) or
[configs/catalogue.yaml](../configs/catalogue.yaml), and write it again.
`method/<name>` is tried on a world with `python train.py experiment=<world>/<name>`; worlds are files of
[configs/world](../configs/world). Conditions of results are in
[configs/RESULTS.md](../configs/RESULTS.md).
"""
ARXIV = re.compile(r"\b(\d{4}\.\d{5})\b")


@dataclass(frozen=True)
class Entry:
    """One row.

    Args:
        kind: a key of `TITLES`
        name: of the class
        summary: the first sentence of its docstring
        papers: arXiv numbers
        file: of the class, from the root of the repository
        configs: group/name of each configuration that names the class
        worlds: those on which such a method works; the first may be `all`, which are those of configs/world
        change: in which way it changes a model or a run
        claims: files of benchmarks/claims, without suffix
        result: in a line
    """

    kind: str
    name: str
    summary: str
    papers: tuple[str, ...]
    file: str
    configs: tuple[str, ...]
    worlds: tuple[str, ...]
    change: str
    claims: tuple[str, ...]
    result: str


@guarded
def main(argv: list[str]) -> int:
    """The command line: 0 if all went well."""
    parser = Parser(
        prog="python -m recipes.list",
        description="Every backbone, edit, loss term, few-step method and solver.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help=f"write {WRITTEN.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    found = entries()
    if args.write:
        WRITTEN.write_text(page(found))
        print(f"{len(found)} rows written to {WRITTEN.relative_to(ROOT)}")
    else:
        show(found)
    return 0


# ---- what there is --------------------------------------------------------------------------------------------------


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


def implemented() -> dict[str, dict[str, type]]:
    """Concrete classes of `edit`, by kind and name."""
    for module in pkgutil.walk_packages(edit.__path__, "edit."):
        if not module.name.startswith("edit.kernels"):
            importlib.import_module(module.name)
    bases: dict[str, type] = {"edits": Edit, "terms": Term, "few_step": FewStepMethod, "solvers": Solver}
    specs = {
        name: value
        for module in list(sys.modules.values())
        if module.__name__.startswith("edit.backbones.")
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and "build" in vars(value) and is_ours(value)
    }
    return {"backbones": specs} | {
        kind: {c.__name__: c for c in below(base) if not inspect.isabstract(c) and is_ours(c)}
        for kind, base in bases.items()
    }


def of_family(spec: type) -> dict[str, Any]:
    """What a backbone's row says, read off its family: the class that `build` promises."""
    family = get_type_hints(vars(spec)["build"])["return"]
    return {"change": "over diffusers" if family.stock else "blocks written out"}


def is_ours(cls: type) -> bool:
    """Whether a class is of a file of this repository: examples and tests derive from the same bases."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return file is not None and Path(file).is_relative_to(ROOT / "edit")


def below(base: type) -> Iterator[type]:
    for child in base.__subclasses__():
        yield child
        yield from below(child)


def entry(
    kind: str, cls: type, told: Mapping[str, Any], uses: Mapping[str, list[str]], others: Mapping[str, type]
) -> Entry:
    """The row of a class.

    Args:
        kind: a key of `TITLES`
        cls: the class
        told: what cannot be read off the code
        uses: configurations by the classes that they name
        others: all classes of this kind; one that is alone in its module is summed up by the module
    """
    module, doc = sys.modules[cls.__module__], inspect.getdoc(cls) or ""
    names = tuple(uses.get(f"{cls.__module__}.{cls.__name__}", ()))
    alone = [other.__module__ for other in others.values()].count(cls.__module__) == 1
    summary = (module.__doc__ or "") if alone else doc
    return Entry(
        kind=kind,
        name=cls.__name__,
        summary=first_sentence(summary),
        papers=papers(cls, told),
        file=Path(inspect.getfile(cls)).relative_to(ROOT).as_posix(),
        configs=names,
        worlds=() if kind == "solvers" else worlds_of(names),
        change=told["change"],
        claims=tuple(told.get("claim", ())),
        result=told.get("result", ""),
    )


def papers(cls: type, told: Mapping[str, Any]) -> tuple[str, ...]:
    """arXiv numbers of a class: those told, else of its docstring, else, but for solvers, of its module's."""
    if "paper" in told:
        return tuple(told["paper"])
    docs = [inspect.getdoc(cls), None if issubclass(cls, Solver) else sys.modules[cls.__module__].__doc__]
    return next((tuple(dict.fromkeys(found)) for doc in docs if (found := ARXIV.findall(doc or ""))), ())


def papers_of(paths: Iterable[str]) -> dict[str, list[str]]:
    """arXiv numbers by class, of those among dotted paths that have rows here and papers; only these are imported."""
    found, told = {}, sayings()
    for module, _, name in (path.rpartition(".") for path in paths):
        try:
            cls = getattr(importlib.import_module(module), name, None) if module.startswith("edit.") else None
        except ImportError:  # of another version
            cls = None
        has_row = isinstance(cls, type) and (
            issubclass(cls, Edit | Term | FewStepMethod | Solver) or module.startswith("edit.backbones.")
        )
        if has_row and (numbers := papers(cls, told.get(name, {}))):  # type: ignore[arg-type]
            found[name] = list(numbers)
    return found


def first_sentence(doc: str) -> str:
    """A docstring's first sentence, without its full stop and the papers, which have a column of their own."""
    text = re.split(r"\.(?=\s+[A-Z`]|\s*$)", " ".join(doc.split("\n\n")[0].split()))[0]
    return re.sub(r" \([^()]*arXiv [^()]*\)", "", text)


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


# ---- how it is shown ------------------------------------------------------------------------------------------------


def page(found: list[Entry]) -> str:
    """The table of each kind as markdown."""
    parts = [HEADER]
    for kind, title in TITLES.items():
        parts.append(f"## {title}\n")
        parts.append("| name | what it is | kind of change | paper | configuration | worlds | claim | result |")
        parts.append("|---|---|---|---|---|---|---|---|")
        parts += [row(e) for e in found if e.kind == kind]
        parts.append("")
    return "\n".join(parts)


def row(e: Entry) -> str:
    file = Path(e.file).relative_to("edit").as_posix()
    papers = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in e.papers)
    configs = ", ".join(f"[{name}](../configs/{name}.yaml)" for name in shortened(e.configs))
    claims = ", ".join(f"[{name}](../benchmarks/claims/{name}.yaml)" for name in e.claims)
    cells = (f"[{e.name}]({file})", e.summary, e.change, papers, configs, ", ".join(e.worlds), claims, e.result)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def shortened(configs: tuple[str, ...]) -> list[str]:
    """The configurations nearest to a class: those of its own group, else of methods, else experiments."""
    for groups in (("backbone", "sampler"), ("edits", "method")):
        if near := [name for name in configs if name.split("/")[0] in groups]:
            return near
    return list(configs)


def show(found: list[Entry]) -> None:
    """The same on the terminal, a table for each kind."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for kind, title in TITLES.items():
        table = Table("name", "change", "paper", "file", "configuration", "claim", "result", title=title)
        for e in (e for e in found if e.kind == kind):
            configs = "\n".join(shortened(e.configs))
            table.add_row(e.name, e.change, "\n".join(e.papers), e.file, configs, "\n".join(e.claims), e.result)
        console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
