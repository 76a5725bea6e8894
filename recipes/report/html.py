"""HTML pages of reports: one look, light and dark, from 400 to 2000 px; a page needs no other file and no script."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --dim: #5c6370; --page: #fff; --card: #f5f6f8; --line: #dfe2e7;
  --good: #0a6b2c; --good-page: #e9f7ee; --bad: #b3261e; --warn: #fff4e0; --edge: #b86e00; --link: #0b57c2 }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8ec; --dim: #a2a9b6; --page: #14161a; --card: #1e2127;
  --line: #343944; --good: #6fdc97; --good-page: #14301f; --bad: #ff8a80; --warn: #3a2c10; --edge: #e0a040;
  --link: #8ab8ff } img.plot { filter: invert(.92) hue-rotate(180deg) } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 2rem auto;
  max-width: 110rem; padding: 0 clamp(.8rem, 3vw, 2.5rem); overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem } a { color: var(--link) }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem } .dim, figcaption { color: var(--dim) } p { max-width: 80rem }
.wide { overflow-x: auto; max-width: 100%; margin-bottom: 1.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem }
th, td { padding: .35rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line);
  background: var(--page) }
th { font-weight: 600; vertical-align: bottom } thead th { white-space: normal; min-width: 4.2rem }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; white-space: normal; min-width: 7rem;
  max-width: 40vw }
td.best { font-weight: 700; color: var(--good); background: var(--good-page) }
tr.variant td:first-child { padding-left: 1.6rem }
table.figures td { vertical-align: top; padding: .3rem .5rem }
table.figures td:first-child { min-width: min(12rem, 36vw) }
table.figures thead th { min-width: 0; max-width: 7rem; padding: .35rem .5rem; overflow-wrap: normal;
  line-height: 1.25 }
table.figures small { display: block; color: var(--dim); font-weight: 400; font-size: .92em; line-height: 1.2 }
table.figures .unit { display: block; white-space: nowrap; font-weight: 400; color: var(--dim) }
table.figures .first { border-left: 2px solid var(--line) }
table.figures tr.groups th { text-align: left; color: var(--dim); max-width: none; font-weight: 400 }
table.figures tbody tr:hover td { background: var(--card) } .failed { color: var(--bad) }
table.told td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top }
.partial { background: var(--warn); border-left: 4px solid var(--edge); padding: .5rem .8rem }
.grids { display: flex; flex-wrap: wrap; gap: 1.6rem } figure { margin: 0; max-width: 100% }
figcaption { font-size: .88rem; margin-bottom: .3rem }
img { max-width: 100%; height: auto; image-rendering: pixelated }
img.plot, img.map { image-rendering: auto; width: 100%; background: #fff; border-radius: 4px }
img.plot { max-width: min(38rem, 100%) } .grids > figure:has(img.plot) { flex: 1 1 22rem; max-width: 38rem }
figure:has(img.map), figure:has(img.broad) { overflow-x: auto } img.broad { max-width: max(100%, 58rem) }
img.map { min-width: 50rem; max-width: 72rem } figcaption { position: sticky; left: 0 }
details { margin: .6rem 0 } summary { cursor: pointer } pre { background: var(--card); padding: .7rem .8rem;
  white-space: pre-wrap; font-size: .82rem; max-width: 80rem; border-radius: 4px }
.captions { columns: 17rem; font-size: .82rem; color: var(--dim) }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page; `title` is plain text, `parts` are HTML."""
    head = "<!doctype html><html lang=en><meta charset=utf-8>"
    head += "<meta name=viewport content='width=device-width, initial-scale=1'>"
    head += f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>"
    return "\n".join((head, *parts)) + "\n"


def image(png: bytes, text: str, kind: str = "grid") -> str:
    """A picture inside the page; `text` is read where it cannot be seen.

    Args:
        png: the picture
        text: plain
        kind: "grid"; "plot" scales smoothly, and is dark on dark pages; "map" and "broad" are scrolled in a narrow
            window rather than shrunk beyond what can be read, "broad" without smoothing
    """
    data = base64.b64encode(png).decode()
    return f'<img class={kind} alt="{escape(text)}" src="data:image/png;base64,{data}">'


def figure(caption: str, picture: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{picture}</figure>"


def details(title: str, told: Mapping[str, Any]) -> str:
    """Nested values as a folded table of two columns: dotted key, value."""
    cells = "".join(f"<tr><td>{escape(key)}</td><td>{escape(text)}</td></tr>" for key, text in flat(told))
    return (
        f"<details><summary>{escape(title)}</summary><div class=wide><table class=told><tbody>{cells}</tbody></table>"
        "</div></details>"
    )


def flat(told: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    """Dotted keys and values of nested mappings; a list of plain values is one value."""
    for key, value in told.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{name}.")
        elif isinstance(value, Sequence) and any(isinstance(v, Mapping) for v in value):
            yield from flat({str(i): v for i, v in enumerate(value)}, f"{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield name, ", ".join(map(str, value)) or "–"
        else:
            yield name, "–" if value is None or value == {} else str(value)
