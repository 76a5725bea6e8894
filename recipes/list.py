"""The catalogue: every backbone, edit, loss term, few-step method and solver.

python -m recipes.list             # all of them, in one table
python -m recipes.list caching     # a kind (terms) or a folder of edit/
python -m recipes.list dydit       # one: what it is, paper, settings, worlds, a command to try it
python -m recipes.list --write     # edit/README.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from edit.catalogue import TITLES
from edit.inputs.command import Parser, guarded
from recipes.catalogue import ROOT, Entry, entries
from recipes.config.suggestions import nearest
from recipes.details import details

WRITTEN = ROOT / "edit/README.md"
HEADER = """# What is here

Every backbone, edit, loss term, few-step method and solver. Written by `python -m recipes.list --write`; do not edit
it by hand: change docstrings, `about` in [configs/method](../configs/method) or
[configs/catalogue.yaml](../configs/catalogue.yaml), and write it again.
`method/<name>` is tried on a world with `python train.py experiment=<world>/<name>`; worlds are files of
[configs/world](../configs/world). Conditions of results are in
[configs/RESULTS.md](../configs/RESULTS.md).
"""


@guarded
def main(argv: list[str]) -> int:
    """The command line: 0 if all went well."""
    parser = Parser(
        prog="python -m recipes.list",
        description="Every backbone, edit, loss term, few-step method and solver, or one of them in full.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples: dydit, lcm, caching, few_step, terms, 2410.03456",
    )
    what = "a class, its file or configuration, a folder of edit/, a kind, or an arXiv number; left out: all"
    parser.add_argument("name", nargs="?", help=what)
    parser.add_argument("--write", action="store_true", help=f"write {WRITTEN.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    found = entries()
    if args.write:
        WRITTEN.write_text(page(found))
        print(f"{len(found)} rows written to {WRITTEN.relative_to(ROOT)}")
        return 0
    chosen = found if args.name is None else meant(args.name, found)
    if len(chosen) == 1:
        print(details(chosen[0]))
    else:
        show(chosen)
    return 0


def meant(name: str, found: Sequence[Entry]) -> list[Entry]:
    """The rows that a word means: a kind or folder, else a class, else a file, else a configuration, else a paper.

    Raises:
        ValueError: if there are none, with the nearest names
    """
    wanted = _plain(name)
    keys = (_rooms, lambda e: [e.name], lambda e: [Path(e.file).stem], _configs, lambda e: _spelled(e.configs))
    for key in (*keys, lambda e: e.papers):
        if rows := [e for e in found if wanted in map(_plain, key(e))]:
            return rows
    known = {n for e in found for n in (*_rooms(e), e.name.lower(), Path(e.file).stem, *_configs(e))}
    close = nearest(name.lower(), known)
    meaning = f"did you mean {' or '.join(close)}?" if close else "python -m recipes.list shows all"
    raise ValueError(f"there is no method {name!r}: {meaning}")


def _rooms(e: Entry) -> list[str]:
    """The row's kind, and its folder of edit/."""
    return [e.kind, TITLES[e.kind], Path(e.file).parent.name]


def _configs(e: Entry) -> list[str]:
    """Names of the files of configs that are about the class."""
    return _spelled(e.own)


def _spelled(configs: Sequence[str]) -> list[str]:
    """Configurations with their group, and alone."""
    return [*configs, *(name.rpartition("/")[2] for name in configs)]


def _plain(name: str) -> str:
    """A name as it is compared: few-step, Few_Step and FewStep are one."""
    return "".join(c for c in name.lower().removesuffix(".py").removesuffix(".yaml") if c.isalnum() or c in "./")


# ---- how it is shown ------------------------------------------------------------------------------------------------


def page(found: Sequence[Entry]) -> str:
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


def shortened(configs: Sequence[str]) -> list[str]:
    """The configurations nearest to a class: those of its own group, else of methods, else experiments."""
    for groups in (("backbone", "sampler"), ("edits", "method")):
        if near := [name for name in configs if name.split("/")[0] in groups]:
            return near
    return list(configs)


def show(found: Sequence[Entry]) -> None:
    """The same on the terminal, a table for each kind."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    for kind, title in TITLES.items():
        rows = [e for e in found if e.kind == kind]
        table = Table(
            Column("name", no_wrap=True), "change", "paper", "file", "configuration", "claim", "result", title=title
        )
        for e in rows:
            configs = "\n".join(shortened(e.configs))
            table.add_row(e.name, e.change, "\n".join(e.papers), e.file, configs, "\n".join(e.claims), e.result)
        if rows:
            console.print(table)
    console.print("python -m recipes.list <name> tells all of one", style="dim", highlight=False)


if __name__ == "__main__":
    raise SystemExit(main())
