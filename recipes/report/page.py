"""A report as readers see it: `report.json` and a self-contained HTML page of tables, plots, sample grids and details.

A report is a dict of JSON values, made by `recipes.report.evaluate`. Nothing here measures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from data.names import typed
from recipes.report.columns import (
    COUNTED,
    REAL,
    REFERENCE,
    TIMED,
    Column,
    Row,
    best,
    failures,
    groups,
    measured,
    rows,
)
from recipes.report.experts_map import load_sentence
from recipes.report.html import details, document, figure, image
from recipes.report.notes import notes, partial
from recipes.report.plots import losses, plots
from recipes.runtime.files import write

BROAD = 640  # pixels, beyond which the labels of a grid cannot be read when it is shrunk to a narrow window
MOST = 13  # columns of a table, which fit into a window of 1400 px
PAPER = '<a href="https://arxiv.org/abs/{0}">arXiv {0}</a>'


def html(report: Mapping[str, Any], folder: Path) -> str:
    """The report as one page that needs no other file; grids are read from `folder`."""
    table = rows(report)
    names = [a["name"] for a in report["artifacts"]]
    title = ", ".join(names) if len(names) < 5 else f"{', '.join(names[:3])} and {len(names) - 3} more"
    parts = [
        *_made(report),
        *(f"<p class=partial>{escape(text)}</p>" for text in partial(report)),
        *_tables(report, table),
        "<details open><summary>How to read the figures</summary>",
        *(f"<p class=dim>{escape(note)}</p>" for note in notes(report)),
        "</details>",
        *_plots(report),
        *_samples(report, table, folder),
        *_routing(table, folder),
        *_origins(report),
        "<h2>Details</h2>",
        details("environment and settings", {k: report[k] for k in ("environment", "settings")}),
        *(details(a["name"], {k: v for k, v in a.items() if k != "origin"}) for a in report["artifacts"]),
    ]
    return document(title, parts)


def _made(report: Mapping[str, Any]) -> Iterator[str]:
    """When, with which revision, and by which command."""
    here = report["environment"]
    told = [report["created"], f"edit {here['edit']}"]
    if revision := here.get("revision"):
        told.append(f"revision {short(revision)}")
    yield f"<p class=dim>{' &middot; '.join(map(escape, told))}</p>"
    if command := report.get("command"):
        yield f"<pre>{escape(typed('python', *command))}</pre>"


def short(revision: str) -> str:
    """The first digits of a commit, and whether files were changed since."""
    commit, plus, changes = revision.partition("+")
    return f"{commit[:12]}{plus}{changes}"


# ---- tables ---------------------------------------------------------------------------------------------------------


def _tables(report: Mapping[str, Any], table: Sequence[Row]) -> Iterator[str]:
    """What variants change; quality and cost, in tables that fit into a window of 1400 px; what failed."""
    if made := [a for a in measured(report) if a.get("changes")]:
        cells = "".join(f"<tr><td>{escape(a['name'])}</td><td>{escape(a['changes'])}</td></tr>" for a in made)
        yield f"<h2>Variants</h2><div class=wide><table class=told><tbody>{cells}</tbody></table></div>"
    found = list(groups(table))
    for title, names in {"Quality": (REAL, REFERENCE), "Cost": (COUNTED, TIMED)}.items():
        own = [group for group in found if group[0] in names]
        if own:
            yield f"<h2>{title}</h2>"
        whole = sum(len(columns) for _, columns in own) <= MOST
        for part in [own] if own and whole else [[group] for group in own]:
            yield from ("<div class=wide>", *_table(part, table, titled=len(own) > 1), "</div>")
    for a in failures(report):
        yield f"<p class=failed>{escape(a['name'])}: {escape(a['error'])}</p>"


def _table(found: Sequence[tuple[str, Sequence[Column]]], table: Sequence[Row], titled: bool) -> Iterator[str]:
    """Groups of columns side by side, a line per row; `titled`: with the groups' names."""
    columns = [(c, " class=first" if c is own[0] and i else "") for i, (_, own) in enumerate(found) for c in own]
    yield "<table class=figures><thead>"
    if titled:
        yield "<tr class=groups><th></th>"
        for i, (name, own) in enumerate(found):
            yield f"<th colspan={len(own)}{' class=first' if i else ''}>{escape(name)}</th>"
        yield "</tr>"
    yield "<tr><th></th>"
    for c, first in columns:
        unit = f" <span class=unit>{escape(c.unit)} {c.arrow}</span>" if c.unit else f"&nbsp;{c.arrow}"
        yield f"<th{first}>{escape(c.name)}{unit}</th>"
    yield "</tr></thead><tbody>"
    tops = [best(c, table) for c, _ in columns]
    for i, row in enumerate(table):
        yield f"<tr{' class=variant' if row['changes'] else ''}><td>{escape(row['label'])}</td>"
        for (c, first), top in zip(columns, tops, strict=True):
            value, spread = map(escape, c.texts(row))
            kind = " ".join(filter(None, (first and "first", "best" if i in top else "")))
            yield f"<td{f' class={kind!r}' if kind else ''}>{value}{f'<small>{spread}</small>' if spread else ''}</td>"
        yield "</tr>"
    yield "</tbody></table>"


# ---- pictures -------------------------------------------------------------------------------------------------------


def _plots(report: Mapping[str, Any]) -> Iterator[str]:
    drawn = [(text, image(png, text, "plot")) for text, png in plots(report)]
    if drawn:
        yield "<h2>Quality against cost</h2><div class=grids>"
        yield from (figure(text, picture) for text, picture in drawn)
        yield "</div>"
    if png := losses(report):
        yield "<h2>Training</h2>" + image(png, "training loss against optimiser steps", "plot")


def _samples(report: Mapping[str, Any], table: Sequence[Row], folder: Path) -> Iterator[str]:
    if not table:
        return
    yield "<h2>Samples</h2><p class=dim>The same place is the same noise and the same class or caption in all grids of "
    yield "generated samples.</p><div class=grids>"
    for text, path in _pictures(report):
        png = (folder / path).read_bytes()
        yield figure(text, image(png, f"grid of {text}", "broad" if breadth(png) > BROAD else "grid"))
    yield "</div>"
    yield from _captions(report)


def breadth(png: bytes) -> int:
    """Pixels from left to right, as the head of the file has them."""
    return int.from_bytes(png[16:20], "big")


def _pictures(report: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Captions and files of all grids, each file once: real images first."""
    pictures = {}
    for a in measured(report):
        caption = f"real images, {a['reference']['split']} of {a['data'].get('_target_', 'data')}"
        pictures.setdefault(a["reference"]["hash"], (caption, a["reference"]["grid"]))
    return [*pictures.values(), *((row["label"], row["grid"]) for row in rows(report))]


def _captions(report: Mapping[str, Any]) -> Iterator[str]:
    """The whole captions of the grids' images, once for each set of captions."""
    told = [(a["reference"].get("prompts") or {}).get("shown") for a in measured(report)]
    for captions in dict.fromkeys(tuple(t) for t in told if t):
        items = "".join(f"<li>{escape(caption)}</li>" for caption in captions)
        yield f"<details><summary>Captions, row by row</summary><ol class=captions>{items}</ol></details>"


def _routing(table: Sequence[Row], folder: Path) -> Iterator[str]:
    """The decisions of edits and the loads of experts: a sentence per quantity, and the map."""
    maps = [(row, name, path) for row in table for name, path in row.get("routing_maps", {}).items()]
    found = [entry for entry in maps if "load" not in entry[0]["routing"][entry[1]]]
    if found:
        yield "<h2>Routing</h2><p class=dim>What edits decided while the images were made whose cost was counted. A "
        yield "column of a map is a moment of the generation, from noise on the left to the image on the right; a row "
        yield "is a unit of the model, the first on top. Bright: what stands above the map is so for all images; dark: "
        yield "for none. Small maps are those of single classes or prompts.</p>"
        yield from _maps(found, sentence, folder)
    if loads := [entry for entry in maps if entry not in found]:
        yield "<h2>Experts</h2><p class=dim>How many tokens each expert took while the images were made whose cost was "
        yield "counted, over the mean of all experts: 1 where the load is even, 0 for an expert without a token.</p>"
        yield from _maps(loads, lambda _, n: load_sentence(n), folder)


def _maps(found: Sequence[tuple[Row, str, str]], sentence: Callable[..., str], folder: Path) -> Iterator[str]:
    for row, name, path in found:
        said = " ".join(sentence(quantity, n) for quantity, n in row["routing"][name].items())
        caption = f"{row['label']}, {name}"
        yield figure(f"{caption}: {said}", image((folder / path).read_bytes(), f"routing of {caption}", "map"))


def sentence(quantity: str, n: Mapping[str, Any]) -> str:
    """One quantity of `recipes.report.routing_map.numbers` as a sentence."""
    branches = ", ".join(f"{name} {b['mean']:.1%}" for name, b in n["branches"].items())
    return (
        f"{quantity} {n['mean']:.1%} ({branches}), standard deviation {n['std_samples']:.1%} between samples and "
        f"{n['std_timesteps']:.1%} between timesteps, units from {min(n['units']):.1%} to {max(n['units']):.1%}."
    )


# ---- where artifacts come from --------------------------------------------------------------------------------------


def _origins(report: Mapping[str, Any]) -> Iterator[str]:
    """Of each artifact: papers, the command of its run, and its settings."""
    found = [a for a in report["artifacts"] if a.get("origin") or a.get("papers")]
    if found:
        yield "<h2>Where they come from</h2>"
    for a in found:
        origin = a.get("origin") or {}
        yield f"<h3>{escape(a['name'])}</h3>"
        papers = [
            f"{escape(name)} {', '.join(PAPER.format(escape(n)) for n in numbers)}"
            for name, numbers in (a.get("papers") or {}).items()
        ]
        if papers:
            yield f"<p>{'; '.join(papers)}</p>"
        if origin.get("command"):
            yield f"<pre>{escape(typed('python', *origin['command']))}</pre>"
        if origin.get("revision"):
            yield f"<p class=dim>trained with revision {escape(short(origin['revision']))}</p>"
        if origin.get("config"):
            yield details("settings of the run", origin["config"])


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write report.json and report.html; returns their paths.

    Raises:
        ValueError: if the report holds values that are not JSON, NaN included
    """
    return [write_json(report, folder), write(folder / "report.html", html(report, folder))]


def write_json(report: Mapping[str, Any], folder: Path) -> Path:
    """Write report.json alone.

    Raises:
        ValueError: if the report holds values that are not JSON, NaN included
    """
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    return write(folder / "report.json", text + "\n")
