"""An artifact as five lines of text, and as a card in a notebook."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from html import escape
from pathlib import Path
from typing import Any

from edit.artifacts.measured import cost_of, picture, quality_of, results, run_folder, short
from edit.denoiser import Denoiser
from edit.objectives import Objective
from edit.sampling import Sampler

LINE = 110  # characters; longer lines are cut


def told(
    path: Path, denoiser: Denoiser, objective: Objective, sampler: Sampler, data: Mapping[str, Any], run: Mapping
) -> dict[str, str]:
    """What is said of an artifact, by its title: five lines."""
    applied = [f"{name}: {brief(e)}" for name, e in denoiser.applied.items()]
    applied += [f"{e.get('name')} (folded)" for e in denoiser.folded]
    count = sum(p.numel() for p in denoiser.parameters())
    made = [f"step {run['step']}"] if "step" in run else []
    made += [f"seed {run['seed']}"] if "seed" in run else []
    made += [f"revision {str(run['revision'])[:12]}"] if run.get("revision") else []
    known = str(data.get("_target_") or "not told").rpartition(".")[2]
    given = ", ".join(f"{k}={v}" for k, v in data.items() if k != "_target_" and isinstance(v, str))  # paths
    return {
        "artifact": str(run_folder(path)),
        "backbone": f"{denoiser.name}, {short(count)} parameters, {len(denoiser.units)} units",
        "edits": ", ".join(applied) or "none",
        "sampling": f"{brief(objective)}, {brief(sampler)}",
        "data": ", ".join([f"{known}({given})" if given else known, *made]),
    }


def brief(value: Any) -> str:
    """A dataclass with the fields that differ from their defaults: Sampler(Euler(steps=25), guidance=1.5)."""
    if not is_dataclass(value) or isinstance(value, type):
        return f"{value:g}" if isinstance(value, float) else repr(value)
    parts = []
    for f in fields(value):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if (own := getattr(value, f.name)) != default:
            parts.append(brief(own) if is_dataclass(own) else f"{f.name}={brief(own)}")
    return f"{type(value).__name__}({', '.join(parts)})"


def text(lines: Mapping[str, str]) -> str:
    """One line each, with the values in a column; all but the first, a path, are cut where they are too long."""
    first, *others = (f"{title:<9} {' '.join(value.split())}" for title, value in lines.items())
    return "\n".join([first, *(line if len(line) <= LINE else f"{line[: LINE - 3]}..." for line in others)])


# ---- in a notebook ---------------------------------------------------------------------------------------------------


def html(lines: Mapping[str, str], path: Path) -> str:
    """A card: picture, what is said, and what was measured."""
    parts = ["<div style='display:flex;flex-wrap:wrap;gap:1.2em;align-items:flex-start'>"]
    if file := picture(path):
        parts.append(image(file.read_bytes(), "image/png", f"samples of {lines['artifact']}", "max-width:22em"))
    parts += ["<div>", table(lines.items()), *measured(path), "</div></div>"]
    return "".join(parts)


def measured(path: Path) -> Iterator[str]:
    """A table of what the report of the artifact's run says, a column for each guidance weight."""
    columns = [quality_of(result) | cost_of(result) for result in results(path)[0]]
    names = list(dict.fromkeys(name for column in columns for name in column))
    if names:
        yield table((name.replace("_", " "), *(column.get(name, "") for column in columns)) for name in names)


def table(rows: Any) -> str:
    """Rows of texts, the first of each its title."""
    cells = "text-align:left;vertical-align:top;padding:.15em .8em .15em 0"
    body = "".join(
        f"<tr><th style='{cells}'>{escape(title)}</th>"
        + "".join(f"<td style='{cells}'>{escape(value)}</td>" for value in values)
        + "</tr>"
        for title, *values in rows
    )
    return f"<table style='margin:0'>{body}</table>"


def image(content: bytes, kind: str, alt: str, style: str) -> str:
    """An image inside the page; its pixels stay squares when they are enlarged."""
    source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return f"<img alt='{escape(alt, quote=True)}' style='{style};image-rendering:pixelated' src='{source}'>"
