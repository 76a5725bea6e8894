"""A sweep as readers see it: a table on the terminal, and a page with the table, a plot over the swept settings and the
next command."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from math import frexp
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.names import legible
from recipes.report.drawing import dress, label_of, png_of
from recipes.report.html import document, figure, image
from recipes.report.run_index import SWEEP_PAGE
from recipes.report.run_page import PAGE, STYLE, link
from recipes.report.swept import Setting, Sweep, canonical, next_command, shown, told
from recipes.report.values import number
from recipes.runtime.files import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FACETS = 6  # plots for values of a third setting, at most
LINES = 10  # for values of a second one, at most
DECADE = 10.0  # largest over smallest value of a setting, from which on its axis is logarithmic
MARKERS = "osD^vPX"  # lines are told apart without colours, too
ROWS = 12  # jobs that are listed by name, at most


# ---- terminal --------------------------------------------------------------------------------------------------------


def show(sweep: Sweep) -> None:
    """Print the sweep: settings, best first, what is left, and the next command."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    heads = (*sweep.keys, *heads_of(sweep))
    for head in heads:
        table.add_column(Text(head), justify="left" if head in sweep.keys else "right", overflow="fold")
    table.add_column("")
    for setting in sweep.settings:
        best = setting is sweep.best
        cells = [Text(cell, "bold green" if best else "") for cell in cells_of(sweep, setting)]
        table.add_row(*cells, Text("best", "bold green") if best else "")
    if sweep.settings:
        console.print(table)
    for line in (*sweep.notes(), *left_over(sweep)):
        console.print(Text(line, "dim"), soft_wrap=True)
    if found := next_command(sweep):
        print(f"next      {found[1]}")


def heads_of(sweep: Sweep) -> tuple[str, ...]:
    return (f"{sweep.figure.title} {sweep.figure.arrow}", "± over seeds", "seeds")


def cells_of(sweep: Sweep, setting: Setting) -> list[str]:
    """A row of the table: values of the swept settings, mean, spread, number of seeds."""
    spread = "–" if setting.spread is None else f"± {sweep.figure.show(setting.spread, setting.mean)}"
    values = [shown(value) for value in setting.place]
    return [*values, sweep.figure.show(setting.mean), spread, str(len(setting.jobs))]


def left_over(sweep: Sweep) -> Iterator[str]:
    """A sentence for each job without a number, and for what was never begun."""
    for job in sweep.left[:ROWS]:
        yield f"no number: {job.name} ({job.why})"
    if len(sweep.left) > ROWS:
        yield f"no number: {len(sweep.left) - ROWS} more"
    if sweep.absent:
        few = "; ".join(sweep.absent[:3]) + (f"; {len(sweep.absent) - 3} more" if len(sweep.absent) > 3 else "")
        yield f"no folder: {few}"


# ---- page ------------------------------------------------------------------------------------------------------------


def write_sweep(sweep: Sweep) -> Path:
    """Write the page of a sweep into its folder, and return its path. Raises OSError if it cannot be written."""
    return write(sweep.root / SWEEP_PAGE, html(sweep))


def html(sweep: Sweep) -> str:
    """The page of a sweep: a self-contained document."""
    jobs = sum(len(s.jobs) for s in sweep.settings) + len(sweep.left)
    up = os.path.relpath(sweep.runs / PAGE, sweep.root)
    over = ", ".join(sweep.keys) or "the seed alone"
    head = f"{jobs} runs over {over}; {len(sweep.seeds)} seed{'s' * (len(sweep.seeds) != 1)}"
    parts = [STYLE, f"<p class=dim>{escape(head)} · <a href='{link(up)}'>all runs</a></p>", *_best(sweep)]
    if sweep.settings:
        parts += ["<h2>Settings, the best first</h2><div class=wide>", *_table(sweep), "</div>"]
    parts += [f"<p class=dim>{escape(line)}</p>" for line in sweep.notes()]
    parts += [f"<p class=partial>{escape(line)}</p>" for line in left_over(sweep)]
    if (drawn := plot(sweep)) is not None:
        png, caption = drawn
        text = f"{caption}. {'; '.join(_in_words(sweep, s) for s in sweep.settings[:ROWS])}"
        one = " class=one" * (len(roles_of(sweep)["order"]) < 3)
        parts += [f"<h2>Over the settings</h2><div{one}>", figure(caption, image(png, text, "plot")), "</div>"]
    if found := next_command(sweep):
        parts.append(
            f"<h2>Next</h2><dl class=how><dt>{escape(found[0])}</dt><dd><pre>{escape(found[1])}</pre></dd></dl>"
        )
    return document(f"Sweep {legible(os.fspath(sweep.root))}", parts)


def _best(sweep: Sweep) -> Iterator[str]:
    if sweep.best is not None:
        yield f"<p class=lead>Best: {escape(_in_words(sweep, sweep.best))}.</p>"


def _in_words(sweep: Sweep, setting: Setting) -> str:
    where = ", ".join(told(sweep.keys, setting.place)) or "the only setting"
    spread = "" if setting.spread is None else f" ± {sweep.figure.show(setting.spread, setting.mean)}"
    count = f"{len(setting.jobs)} seed{'s' * (len(setting.jobs) != 1)}"
    return f"{where}: {sweep.figure.title} {sweep.figure.show(setting.mean)}{spread} ({count})"


def _table(sweep: Sweep) -> Iterator[str]:
    yield f"<table><thead><tr>{''.join(f'<th>{escape(h)}</th>' for h in (*sweep.keys, *heads_of(sweep)))}<th>runs</th>"
    yield "</tr></thead><tbody>"
    for setting in sweep.settings:
        best = " class=best" if setting is sweep.best else ""
        cells = "".join(f"<td{best}>{escape(cell)}</td>" for cell in cells_of(sweep, setting))
        runs = ", ".join(_job(sweep, job) for job in setting.jobs)
        yield f"<tr>{cells}<td>{runs}</td></tr>"
    yield "</tbody></table>"


def _job(sweep: Sweep, job: Any) -> str:
    label = escape(f"seed {job.seed}")
    where = os.path.relpath(job.record.folder / PAGE, sweep.root)
    return f"<a href='{link(where)}'>{label}</a>" if (job.record.folder / PAGE).is_file() else label


# ---- plot ------------------------------------------------------------------------------------------------------------


def plot(sweep: Sweep) -> tuple[bytes, str] | None:
    """The figure over the swept settings, with the standard deviation over seeds as bars; and what it shows, in words.

    The setting with the most numbers is the axis, the next is lines, the third is plots side by side; further ones are
    held at the best. A sweep over seeds alone is drawn over these. None: there is nothing to draw.
    """
    if sweep.best is None:
        return None
    roles = roles_of(sweep)
    kept = [s for s in sweep.settings if all(_same(s, sweep.best, i) for i in roles["held"])]
    facets = _values(kept, roles["facet"])[:FACETS]
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5.6 * min(len(facets), 3), 3.8 * -(-len(facets) // 3)), layout="constrained")
    axes = drawn.subplots(-(-len(facets) // 3), min(len(facets), 3), squeeze=False, sharey=True).flatten()
    for ax, facet in zip(axes, facets, strict=False):
        part = [s for s in kept if roles["facet"] is None or canonical(s.place[roles["facet"]]) == canonical(facet)]
        _draw(ax, sweep, part, roles)
        if roles["facet"] is not None:
            ax.set_title(label_of(f"{sweep.keys[roles['facet']]}={shown(facet)}"), fontsize=10)
    for ax in axes[len(facets) :]:
        ax.set_axis_off()
    return png_of(drawn), _caption(sweep, roles, facets)


def roles_of(sweep: Sweep) -> dict[str, Any]:
    """What each swept setting is in the plot, by its index: x, line, facet, and those held at the best."""

    def weight(i: int) -> tuple[bool, int]:
        values = [s.place[i] for s in sweep.settings]
        return all(number(v) is not None for v in values), len(set(map(canonical, values)))

    order = sorted(range(len(sweep.keys)), key=weight, reverse=True)
    x, line, facet = (*order, None, None, None)[:3]
    return {"x": x, "line": line, "facet": facet, "held": order[3:], "order": order}


def _draw(axes: Axes, sweep: Sweep, settings: Sequence[Setting], roles: Mapping[str, Any]) -> None:
    x, line = roles["x"], roles["line"]
    if x is None:  # seeds alone
        jobs = [job for s in settings for job in s.jobs]
        axes.plot(range(len(jobs)), [job.value for job in jobs], "o", color="C0")
        axes.axhline(settings[0].mean, color="C0", linewidth=1, alpha=0.6)
        axes.set_xticks(range(len(jobs)), [label_of(job.seed) for job in jobs])
        return dress(axes, "seed", label_of(sweep.figure.title))
    ticks = _values(sweep.settings, x)
    numeric = all(number(v) is not None for v in ticks)
    place = {canonical(v): float(v) if numeric else i for i, v in enumerate(ticks)}
    for i, value in enumerate(_values(settings, line)[:LINES]):
        part = [s for s in settings if line is None or canonical(s.place[line]) == canonical(value)]
        part.sort(key=lambda s: place[canonical(s.place[x])])
        at = [place[canonical(s.place[x])] for s in part]
        label = None if line is None else label_of(f"{sweep.keys[line]}={shown(value)}")
        means, spreads = [s.mean for s in part], [s.spread or 0.0 for s in part]
        look = {"fmt": f"{MARKERS[i % len(MARKERS)]}-", "color": f"C{i % 10}", "capsize": 3, "linewidth": 1.2}
        axes.errorbar(at, means, spreads, label=label, **look)
    if sweep.best in settings:
        axes.plot([place[canonical(sweep.best.place[x])]], [sweep.best.mean], "*", color="k", markersize=11, zorder=5)
    if numeric and min(place.values()) > 0 and max(place.values()) >= DECADE * min(place.values()):
        axes.set_xscale("log")
    if len(ticks) <= 8:
        axes.set_xticks([place[canonical(v)] for v in ticks], ticked(ticks))
        axes.minorticks_off()
    dress(axes, label_of(sweep.keys[x]), label_of(sweep.figure.title))
    if line is not None:
        axes.legend(frameon=False, fontsize=8)


def _values(settings: Sequence[Setting], key: int | None) -> list[Any]:
    """The values of a swept setting, in order; [None] without one."""
    if key is None:
        return [None]
    found = {canonical(s.place[key]): s.place[key] for s in settings}.values()
    return sorted(found, key=lambda v: (number(v) is None, number(v) or 0.0, natural(str(v))))


def natural(name: str) -> list[tuple[int, str]]:
    """The order of names with numbers in them: w64 is before w128."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def ticked(values: Sequence[Any]) -> list[str]:
    """Labels of values on an axis: fractions that are powers of two as such."""
    plain = [number(v) for v in values]
    if all(v is not None and 0 < v < 1 and frexp(v)[0] == 0.5 for v in plain):
        return [f"$2^{{{frexp(v)[1] - 1}}}$" for v in plain if v is not None]
    return [label_of(shown(v)) for v in values]


def _same(a: Setting, b: Setting, key: int) -> bool:
    return canonical(a.place[key]) == canonical(b.place[key])


def _caption(sweep: Sweep, roles: Mapping[str, Any], facets: Sequence[Any]) -> str:
    """What the plot shows and leaves out."""
    keys, best = sweep.keys, sweep.best
    assert best is not None
    said = f"{sweep.figure.title} over {'the seeds' if roles['x'] is None else keys[roles['x']]}"
    if roles["line"] is not None:
        lines = len(_values(sweep.settings, roles["line"]))
        said += f", a line for each {keys[roles['line']]}" + (f" ({LINES} of {lines})" if lines > LINES else "")
    if roles["facet"] is not None:
        plots = len(_values(sweep.settings, roles["facet"]))
        said += f", a plot for each {keys[roles['facet']]}" + (f" ({len(facets)} of {plots})" if plots > FACETS else "")
    if roles["held"]:
        held = [f"{keys[i]}={shown(best.place[i])}" for i in roles["held"]]
        said += f", at the best {', '.join(held)}"
    return said + ("" if roles["x"] is None else "; bars: standard deviation over seeds, star: the best")
