"""The plots of a report: quality against cost, and the losses of the runs that made its artifacts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

from recipes.report.columns import Column, Row, present, rows
from recipes.report.drawing import dress, label_of, png_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X"
SIZE = (5.6, 3.9)  # inches


def plots(report: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Quality against each cost: what is shown, and a PNG; none where no row has both."""
    table = rows(report)
    qualities = [c for c in present(table) if c.title in ("Fréchet distance", "PSNR to reference, dB")]
    costs = [c for c in present(table) if c.title in ("MACs per image, G", "ms per image")]
    for quality, cost in product(qualities, costs):
        if any(cost.value(row) and quality.value(row) is not None for row in table):
            yield f"{quality.title} {quality.arrow} against {cost.title} {cost.arrow}", _against(quality, cost, table)


def _against(quality: Column, cost: Column, table: list[Row]) -> bytes:
    drawn, axes = _axes(cost.title, quality.title)
    names, weights = (list(dict.fromkeys(row[key] for row in table)) for key in ("artifact", "guidance"))
    for i, name in enumerate(names):
        colour = f"C{i}" if len(names) <= 10 else ("tab20", i / 20)
        colour = colour if isinstance(colour, str) else _of_map(*colour)
        mine = [row for row in table if row["artifact"] == name]
        points = [(x, y, row) for row in mine if (x := cost.value(row)) and (y := quality.value(row)) is not None]
        points = sorted(points, key=lambda p: p[0])
        if not points:
            continue
        axes.plot([p[0] for p in points], [p[1] for p in points], "-", color=colour, linewidth=1, label=label_of(name))
        for x, y, row in points:
            marker = MARKERS[weights.index(row["guidance"]) % len(MARKERS)]
            across = cost.spread(row)
            axes.errorbar(x, y, quality.spread(row), across, marker, color=colour, capsize=3, elinewidth=1)
    if len(weights) > 1:
        for w, marker in zip(weights, MARKERS, strict=False):
            axes.plot([], [], marker, color="0.4", label=f"w = {w:g}")
    floors = {row["reference"]["floor"] for row in table}
    if quality.name == "Fréchet distance" and len(floors) == 1 and (floor := floors.pop()) is not None:
        axes.axhline(floor, color="0.6", linestyle="--", linewidth=1, label="training images")
    if quality.better < 0:
        axes.set_ylim(bottom=0)
    if cost.better < 0:
        axes.set_xlim(left=0)
    _legend(drawn)
    return png_of(drawn)


def losses(report: Mapping[str, Any]) -> bytes | None:
    """The training losses of the artifacts' runs as PNG; None where no run wrote any down."""
    told = {a["name"]: a["origin"]["losses"] for a in report["artifacts"] if (a.get("origin") or {}).get("losses")}
    if not told:
        return None
    drawn, axes = _axes("optimiser step", "training loss")
    for name, curve in told.items():
        axes.plot(curve["step"], curve["loss"], linewidth=1.2, label=label_of(name))
    low, high = (pick(v for curve in told.values() for v in curve["loss"]) for pick in (min, max))
    if low > 0 and high / low > 20:
        axes.set_yscale("log")
    if len(told) > 1:
        _legend(drawn)
    return png_of(drawn)


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=SIZE, layout="constrained")
    axes = drawn.subplots()
    axes.margins(x=0.08, y=0.1)
    dress(axes, x, y)
    return drawn, axes


def _legend(drawn: Figure) -> None:
    """Below the axes, so that it hides no point; the picture grows with it."""
    handles, names = drawn.axes[0].get_legend_handles_labels()
    columns = 3 if max(map(len, names)) < 18 else 2 if max(map(len, names)) < 32 else 1
    drawn.set_figheight(SIZE[1] + 0.21 * -(-len(names) // columns))
    drawn.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _of_map(name: str, place: float) -> Any:
    from matplotlib import colormaps

    return colormaps[name](place)
