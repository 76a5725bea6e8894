"""What there is in `edit`, read off the code: every backbone, edit, loss term, few-step method and solver.

    import edit
    edit.methods()             # in a notebook a table, at a prompt lines of text

Summary and papers are those of docstrings. `python -m recipes.list` adds what configurations and claims say.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from edit.denoiser import Edit
from edit.few_step.method import FewStepMethod
from edit.losses import Term
from edit.solvers import Solver

HERE = Path(__file__).parent
ROOT = HERE.parent
TITLES = {
    "backbones": "Backbones",
    "edits": "Edits",
    "terms": "Loss terms",
    "few_step": "Few-step methods",
    "solvers": "Solvers",
}
ARXIV = re.compile(r"\b(\d{4}\.\d{5})\b")


@dataclass(frozen=True)
class Method:
    """One backbone, edit, loss term, few-step method or solver.

    Args:
        kind: a key of `TITLES`
        name: of the class
        summary: the first sentence of its docstring
        papers: arXiv numbers
        file: of the class, from the root of the repository
    """

    kind: str
    name: str
    summary: str
    papers: tuple[str, ...]
    file: str

    @property
    def place(self) -> str:
        """The import path, which a configuration names as `_target_`."""
        return f"{self.file.removesuffix('.py').replace('/', '.')}.{self.name}"


class Methods(list[Method]):
    """All of them, by kind and file."""

    def __repr__(self) -> str:
        parts = []
        for kind, title in TITLES.items():
            if rows := [m for m in self if m.kind == kind]:
                wide, far = (max(len(getattr(m, what)) for m in rows) for what in ("name", "file"))
                parts.append(f"{title}\n")
                parts += [f"  {m.name:<{wide}}  {m.file:<{far}}  {', '.join(m.papers)}".rstrip() + "\n" for m in rows]
        return "".join(parts).rstrip()

    def _repr_html_(self) -> str:
        left = "style='text-align:left;vertical-align:top'"
        parts = ["<table>"]
        for kind, title in TITLES.items():
            rows = [m for m in self if m.kind == kind]
            parts += [f"<tr><th colspan=4 {left}>{title}</th></tr>"] if rows else []
            for m in rows:
                cells = (
                    f"<b>{escape(m.name)}</b>",
                    escape(m.summary),
                    links(m.papers),
                    f"<code>{escape(m.file)}</code>",
                )
                parts.append(f"<tr>{''.join(f'<td {left}>{cell}</td>' for cell in cells)}</tr>")
        return "".join(parts) + "</table>"


def links(papers: tuple[str, ...]) -> str:
    return ", ".join(f"<a href='https://arxiv.org/abs/{number}'>{number}</a>" for number in papers)


def methods() -> Methods:
    """Every backbone, edit, loss term, few-step method and solver, with paper and file."""
    found = Methods()
    for kind, group in implemented().items():
        found += sorted((described(kind, cls, group) for cls in group.values()), key=lambda m: (m.file, m.name))
    return found


def implemented() -> dict[str, dict[str, type]]:
    """Concrete classes of `edit`, by kind and name."""
    for module in pkgutil.walk_packages([str(HERE)], "edit."):
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


def is_ours(cls: type) -> bool:
    """Whether a class is of a file of this repository: examples and tests derive from the same bases."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return file is not None and Path(file).is_relative_to(HERE)


def below(base: type) -> Iterator[type]:
    for child in base.__subclasses__():
        yield child
        yield from below(child)


def described(kind: str, cls: type, others: Mapping[str, type]) -> Method:
    """What the code says of a class.

    Args:
        kind: a key of `TITLES`
        cls: the class
        others: all classes of this kind; one that is alone in its module is summed up by the module
    """
    module, doc = sys.modules[cls.__module__], inspect.getdoc(cls) or ""
    alone = [other.__module__ for other in others.values()].count(cls.__module__) == 1
    return Method(
        kind=kind,
        name=cls.__name__,
        summary=first_sentence((module.__doc__ or "") if alone else doc),
        papers=papers(cls),
        file=Path(inspect.getfile(cls)).relative_to(ROOT).as_posix(),
    )


def papers(cls: type) -> tuple[str, ...]:
    """arXiv numbers of its docstring, else, but for solvers, of its module's."""
    docs = [inspect.getdoc(cls), None if issubclass(cls, Solver) else sys.modules[cls.__module__].__doc__]
    return next((tuple(dict.fromkeys(found)) for doc in docs if (found := ARXIV.findall(doc or ""))), ())


def papers_of(paths: Iterable[str]) -> dict[str, list[str]]:
    """arXiv numbers by class, of those among dotted paths that are methods of `edit`; only these are imported."""
    found = {}
    for module, _, name in (path.rpartition(".") for path in paths):
        try:
            cls = getattr(importlib.import_module(module), name, None) if module.startswith("edit.") else None
        except ImportError:  # of another version
            cls = None
        listed = isinstance(cls, type) and (
            issubclass(cls, Edit | Term | FewStepMethod | Solver) or module.startswith("edit.backbones.")
        )
        if listed and (numbers := papers(cls)):  # type: ignore[arg-type]
            found[name] = list(numbers)
    return found


def first_sentence(doc: str) -> str:
    """A docstring's first sentence, without its full stop and the papers, which have a column of their own."""
    text = re.split(r"\.(?=\s+[A-Z`]|\s*$)", " ".join(doc.split("\n\n")[0].split()))[0]
    return re.sub(r" \([^()]*arXiv [^()]*\)", "", text)
