"""A report as readers see it: image grids, a terminal table, `report.json` and a self-contained HTML page.

A report is a dict of JSON values, made by `recipes.report.evaluate`. Nothing here measures.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.report.html import details, document, figure, image
from recipes.runtime.files import write

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

STRIP = 4  # frames of a video that a grid shows
Row = Mapping[str, Any]  # one result of one artifact, with "label" and "reference" added by `rows`


def image_grid(frames: Tensor, columns: int = 8, scale: int | None = None) -> Image:
    """Samples side by side on white; of a video at most `STRIP` frames in a row, evenly spaced from first to last.

    Args:
        frames: uint8 b f y x 3, f = 1 for images
        columns: of the grid, less where a row would hold more than twice as many pictures; rows follow
        scale: nearest-neighbour magnification; None: each side has at least 40 pixels

    Raises:
        ValueError: if there are no images, or they are of another type or shape
    """
    import numpy as np
    from PIL import Image

    if frames.ndim != 5 or frames.shape[-1] != 3 or str(frames.dtype) != "torch.uint8" or not len(frames):
        raise ValueError(f"a grid is made of uint8 frames b f y x 3, got {frames.dtype} of {tuple(frames.shape)}")
    images = strip(frames)
    columns = max(1, min(columns, 2 * columns // min(frames.shape[1], STRIP)))
    height, width = images.shape[1:3]
    scale = scale or max(1, -(-40 // min(height, width)))
    height, width, gap = height * scale, width * scale, 2
    large = images.cpu().repeat_interleave(scale, 1).repeat_interleave(scale, 2).numpy()
    columns = min(columns, len(large))
    rows = -(-len(large) // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, picture in enumerate(large):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    return Image.fromarray(canvas)


def strip(frames: Tensor) -> Tensor:
    """At most `STRIP` frames of each sample in one picture, left to right: uint8 b f y x 3 -> b y (f x) 3."""
    count = min(frames.shape[1], STRIP)
    shown = [round(i * (frames.shape[1] - 1) / max(1, count - 1)) for i in range(count)]
    return frames[:, shown].transpose(1, 2).flatten(2, 3)


def save_grid(frames: Tensor, path: Path, columns: int) -> Path:
    return save_png(image_grid(frames, columns), path)


def save_png(image: Image, path: Path) -> Path:
    picture = io.BytesIO()
    image.save(picture, format="PNG")
    return write(path, picture.getvalue())


# ---- columns and rows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    title: str
    pick: Callable[[Row], Any]  # a number, a measure {"value", "spread"}, or None
    show: Callable[[float], str]
    better: int = 0  # -1: less, 1: more, 0: neither
    judged: bool = False  # depends on the real images and the extractor
    counted: bool = False  # a lower bound if an operator without a FLOP formula ran

    def at_least(self, row: Row) -> bool:
        """Whether a row's value is only a lower bound."""
        return self.counted and bool(row["cost"].get("uncounted"))


def _quality(name: str) -> Callable[[Row], Any]:
    return lambda row: row["quality"].get(name)


def _compared(name: str) -> Callable[[Row], Any]:
    return lambda row: (row.get("compared") or {}).get(name)


def _cost(name: str, factor: float = 1.0) -> Callable[[Row], Any]:
    def pick(row: Row) -> float | None:
        value = row["cost"].get(name)
        return None if value is None else value * factor

    return pick


def _speed(other: str) -> Callable[[Row], Any]:
    """How many times faster than another model; the spread is half the distance between the quartiles."""

    def pick(row: Row) -> dict[str, float] | None:
        speed = (row["cost"].get("speed") or {}).get(other)
        return speed and {"value": speed["median"], "spread": (speed["high"] - speed["low"]) / 2}

    return pick


def _time(name: str) -> Callable[[Row], Any]:
    """Milliseconds; the spread is half the distance between the quartiles."""

    def pick(row: Row) -> dict[str, float] | None:
        time = row["cost"].get(name)
        return time and {"value": 1e3 * time["median"], "spread": 500 * (time["high"] - time["low"])}

    return pick


COLUMNS = (
    Column("Fréchet distance", _quality("frechet"), "{:.2f}".format, -1, judged=True),
    Column("class accuracy", _quality("accuracy"), "{:.1%}".format, 1, judged=True),
    Column("prompt accuracy", _quality("prompt_accuracy"), "{:.1%}".format, 1, judged=True),
    *(
        Column(f"{part} as prompted", _quality(f"prompt_{part}"), "{:.1%}".format, 1, judged=True)
        for part in ("count", "colour", "kind", "digit", "size", "place", "relation")
    ),
    Column("precision", _quality("precision"), "{:.3f}".format, 1, judged=True),
    Column("recall", _quality("recall"), "{:.3f}".format, 1, judged=True),
    Column("distance to training set", _quality("nearest_train"), "{:.2f}".format),
    Column("PSNR to reference, dB", _compared("psnr"), "{:.1f}".format, 1),
    Column("SSIM to reference", _compared("ssim"), "{:.3f}".format, 1),
    Column("feature distance to reference", _compared("perceptual"), "{:.3f}".format, -1),
    Column("forwards per image", _cost("evaluations"), "{:.0f}".format, -1),
    Column("parameters, M", _cost("parameters", 1e-6), "{:,.2f}".format, -1),
    Column("activated per token, M", _cost("per_token", 1e-6), "{:,.2f}".format, -1),
    Column("activated, M", _cost("activated", 1e-6), "{:,.2f}".format, -1),
    Column("MACs per image, G", _cost("macs_per_image", 1e-9), "{:,.3g}".format, -1, counted=True),
    Column("share of MACs run", _cost("share"), "{:.1%}".format),
    Column("ms per forward", _time("forward"), "{:,.2f}".format, -1),
    Column("ms per image", _time("generation"), "{:,.2f}".format, -1),
    Column("times as fast as plain", _speed("plain"), "{:.2f}".format, 1),
    Column("times as fast as dense", _speed("dense"), "{:.2f}".format, 1),
    Column("images/s", _cost("images_per_second"), "{:,.3g}".format, 1),
    Column("peak memory, MiB", _cost("peak_memory", 2**-20), "{:,.1f}".format, -1),
)


def rows(report: Mapping[str, Any]) -> list[Row]:
    """One row per artifact or variant, and guidance weight."""
    return [
        {
            **result,
            "artifact": a["name"],
            "label": f"{a['name']} w={result['guidance']:g}",
            "reference": a["reference"],
            "changes": a.get("changes"),
        }
        for a in measured(report)
        for result in a["results"]
    ]


def measured(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The artifacts and variants that have rows."""
    return [a for a in report["artifacts"] if a.get("results")]


def failures(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [a for a in report["artifacts"] if "error" in a]


def comparable(table: Sequence[Row]) -> bool:
    """Whether all rows have the same real images and the same extractor."""
    return len({row["reference"]["hash"] for row in table}) == 1


def value_of(picked: Any) -> float | None:
    return picked["value"] if isinstance(picked, Mapping) else picked


def best(column: Column, table: Sequence[Row]) -> float | None:
    """The best value of a column, lower bounds aside; None if neither direction is better or rows do not differ."""
    values = {v for row in table if (v := value_of(column.pick(row))) is not None and not column.at_least(row)}
    if not column.better or len(values) < 2 or (column.judged and not comparable(table)):
        return None
    return max(values) if column.better > 0 else min(values)


def shown(column: Column) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        picked = column.pick(row)
        value = value_of(picked)
        if value is None:
            return "–"
        spread = picked.get("spread") if isinstance(picked, Mapping) else None
        return (
            ("≥ " if column.at_least(row) else "")
            + column.show(value)
            + (f" ± {column.show(spread)}" if spread is not None else "")
        )

    return text


def present(table: Sequence[Row]) -> list[Column]:
    """Columns for which some row has a value."""
    return [c for c in COLUMNS if any(c.pick(row) is not None for row in table)]


def partial(report: Mapping[str, Any]) -> Iterator[str]:
    """That the report is not complete, while it is not."""
    if not report.get("complete", True):
        count = report["rows"]
        yield (
            f"This report is not complete: {count['measured']} of {count['planned']} rows are measured. The evaluation "
            "is still running, or was stopped."
        )


def notes(report: Mapping[str, Any]) -> Iterator[str]:
    """Sentences that a reader of the numbers needs."""
    settings, table = report["settings"], rows(report)
    seeds = ", ".join(map(str, settings["seed"]))
    yield f"{settings['n']} images per row, seed {seeds}, same noise and labels for all; w: guidance; ±: spread."
    for key, a in {a["reference"]["hash"]: a for a in measured(report)}.items():
        real, extractor = a["reference"], a["extractor"]
        text = f"Real images: {real['n']} of {a['data'].get('_target_', 'unknown data')}, {real['split']} ({key})."
        if extractor:
            name, width = f"{extractor['name']} {extractor['hash']}", extractor["width"]
            text += f" Features: {name}, {width} numbers, {extractor['rule']}."
        else:
            text += " No Fréchet distance: set features=<folder of a transformers image model>."
        if real["floor"] is not None:
            text += f" The training images themselves have a Fréchet distance of {real['floor']:.2f}."
        if real["nearest"] is not None:
            text += f" Real images are {real['nearest']:.2f} from the training set; much less means copies."
        if real["judge"]:
            text += (
                f" Classes: by judge {real['judge']['hash']}, right on {real['judge']['accuracy']:.1%} of real images."
            )
        if prompts := real.get("prompts"):
            text += (
                f" Prompts: image k has caption k of {prompts['count']} held-out ones; real images follow theirs in "
                f"{prompts['real']:.1%}, captions of other images in {prompts['chance']:.1%} (chance)."
            )
        yield text
        if extractor and settings["n"] <= extractor["width"]:
            yield f"n = {settings['n']} is no more than the {extractor['width']} features: Fréchet distances are rough."
    if table and not comparable(table):
        yield "Not all rows were measured against the same real images: their qualities cannot be compared."
    if missed := sorted({op for row in table for op in row["cost"].get("uncounted", ())}):
        yield f"≥: a lower bound, {', '.join(missed)} has no FLOP formula and is not in the MACs."
    if any(a.get("variant") for a in measured(report)):
        of = settings.get("reference") or "the plain artifact"
        yield f"Variants need no training and share the plain artifact's weights; the reference of a row is {of}."
    told = {other for row in table for other in row["cost"].get("speed") or ()}
    for other, name in (("plain", "the plain artifact of a variant"), ("dense", report.get("dense"))):
        if other in told:
            yield (
                f"Times as fast as {other}: time of one image by {name}, over the row's own, round by round; they were "
                "timed in turns."
            )
    if counts := {count for row in table if (count := row["cost"].get("counted"))}:
        yield (
            "Where a share of MACs run is given, an edit decides for each image what is run: MACs are means over a "
            f"generation of the first {max(counts)} images, the share is of what the model needs without that edit."
        )
    yield (
        f"Costs on {report['environment']['device']}, one image at a time, images/s {settings['batch']} at a time; "
        "times are medians ± half the distance of the quartiles."
    )


# ---- terminal -------------------------------------------------------------------------------------------------------


def show(report: Mapping[str, Any]) -> None:
    """Print the comparison, one column per row of the report, in several tables if the terminal is narrow."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, table = Console(), rows(report)
    across = max(1, (console.width - 30) // 18)
    for start in range(0, len(table), across):
        part = table[start : start + across]
        view = Table("", box=None, padding=(0, 1))
        for row in part:
            view.add_column(Text(row["label"]), justify="right")
        if any(row["changes"] for row in table):
            view.add_row("changes", *(Text(row["changes"] or "–") for row in part))
        for column in present(table):
            top = best(column, table)
            texts = [Text(shown(column)(row), "bold green" if _is(column, row, top) else "") for row in part]
            view.add_row(column.title, *texts)
        console.print(view)
    for a in failures(report):
        console.print(Text(f"{a['name']}: {a['error']}", "red"), soft_wrap=True)
    for note in notes(report):
        console.print(Text(note, "dim"), soft_wrap=True)


def _is(column: Column, row: Row, top: float | None) -> bool:
    return top is not None and value_of(column.pick(row)) == top and not column.at_least(row)


# ---- plot -----------------------------------------------------------------------------------------------------------


def plot(report: Mapping[str, Any]) -> bytes | None:
    """Quality against cost as PNG; None where no row has both."""
    table = rows(report)
    quality = next((c for c in present(table) if c.title in ("Fréchet distance", "PSNR to reference, dB")), None)
    costs = [c for c in present(table) if c.title in ("MACs per image, G", "ms per image")]
    if quality is None or not costs:
        return None
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5.2 * len(costs), 3.8), layout="constrained")
    names = list(dict.fromkeys(row["artifact"] for row in table))
    for axes, cost in zip(drawn.subplots(1, len(costs), squeeze=False)[0], costs, strict=True):
        for i, name in enumerate(names):
            points = [(cost.pick(row), quality.pick(row), row) for row in table if row["artifact"] == name]
            points = sorted(((value_of(x), y, row) for x, y, row in points if x is not None and y), key=lambda p: p[0])
            if not points:
                continue
            x, y, error = [p[0] for p in points], [p[1]["value"] for p in points], [p[1]["spread"] or 0 for p in points]
            axes.errorbar(x, y, error, fmt="o-", capsize=3, linewidth=1, color=f"C{i % 10}", label=_label(name))
            for a, b, row in zip(x, y, (p[2] for p in points), strict=True):
                axes.annotate(f"w={row['guidance']:g}", (a, b), textcoords="offset points", xytext=(7, 5), fontsize=8)
        floors = {row["reference"]["floor"] for row in table}
        if quality.title == "Fréchet distance" and len(floors) == 1 and (floor := floors.pop()) is not None:
            axes.axhline(floor, color="0.6", linestyle="--", linewidth=1, label="training images")
        axes.set(xlabel=cost.title, ylabel=quality.title)
        if quality.better < 0:
            axes.set_ylim(bottom=0)
        axes.margins(x=0.18)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    drawn.axes[0].legend(frameon=False, fontsize=8)
    out = io.BytesIO()
    drawn.savefig(out, format="png", dpi=130)
    return out.getvalue()


def _label(name: str) -> str:
    """Escape a name for matplotlib, which reads $ as mathematics and hides labels that begin with an underscore."""
    shown = name.replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{shown}" if shown.startswith("_") else shown


# ---- files ----------------------------------------------------------------------------------------------------------


def html(report: Mapping[str, Any], folder: Path) -> str:
    """The report as one page that needs no other file; grids are read from `folder`."""
    table = rows(report)
    title = ", ".join(a["name"] for a in report["artifacts"])
    made = f"{report['created']} &middot; edit {escape(report['environment']['edit'])}"
    parts = [
        f"<p class=dim>{made}</p>",
        *(f"<p class=partial>{escape(text)}</p>" for text in partial(report)),
        "<h2>Quality and cost</h2><div class=wide>" + "".join(_table(report, table)) + "</div>",
        *(f"<p class=dim>{escape(note)}</p>" for note in notes(report)),
    ]
    if picture := plot(report):
        parts.append("<h2>Quality against cost</h2>" + image(picture, "quality against cost", "plot"))
    parts += ["<h2>Samples</h2><p class=dim>The same place is the same noise and label.</p><div class=grids>"]
    parts += [figure(text, image((folder / path).read_bytes(), text)) for text, path in _pictures(report)]
    parts += ["</div>", *_captions(report), *_routing(table, folder), "<h2>Details</h2>"]
    parts.append(details("environment and settings", {k: report[k] for k in ("environment", "settings")}))
    parts += [details(a["name"], a) for a in report["artifacts"]]
    return document(title, parts)


def _table(report: Mapping[str, Any], table: Sequence[Row]) -> Iterator[str]:
    columns = present(table)
    yield "<table><thead><tr><th></th>"
    for c in columns:
        yield f"<th>{escape(c.title)}{('', ' ↑', ' ↓')[c.better]}</th>"
    yield "</tr></thead><tbody>"
    tops = [best(c, table) for c in columns]
    for row in table:
        made = f"<br><span class=dim>{escape(row['changes'])}</span>" if row["changes"] else ""
        yield f"<tr{' class=variant' if made else ''}><td>{escape(row['label'])}{made}</td>"
        for c, top in zip(columns, tops, strict=True):
            yield f"<td{' class=best' if _is(c, row, top) else ''}>{escape(shown(c)(row))}</td>"
        yield "</tr>"
    for a in failures(report):
        name, text = escape(a["name"]), escape(a["error"])
        yield f"<tr class=error><td>{name}</td><td colspan={max(1, len(columns))}>{text}</td></tr>"
    yield "</tbody></table>"


def _pictures(report: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Captions and files of all grids, each file once: real images first."""
    pictures = {}
    for a in measured(report):
        caption = f"real images, {a['reference']['split']} of {a['data'].get('_target_', 'data')}"
        pictures.setdefault(a["reference"]["hash"], (caption, a["reference"]["grid"]))
    return [*pictures.values(), *((row["label"], row["grid"]) for row in rows(report))]


def _captions(report: Mapping[str, Any]) -> Iterator[str]:
    """The captions of the grids' images, once for each set of captions."""
    told = [(a["reference"].get("prompts") or {}).get("shown") for a in measured(report)]
    for captions in dict.fromkeys(tuple(t) for t in told if t):
        items = "".join(f"<li>{escape(caption)}</li>" for caption in captions)
        yield f"<p class=dim>Captions, row by row:</p><ol class=captions>{items}</ol>"


def _routing(table: Sequence[Row], folder: Path) -> Iterator[str]:
    """The decisions of edits: a sentence per quantity, and the map."""
    found = [(row, name, path) for row in table for name, path in row.get("routing_maps", {}).items()]
    if found:
        yield "<h2>Routing</h2><p class=dim>What edits decided for the images whose cost was counted: shares of each "
        yield "unit at each time, from noise to data. Small maps: a class or prompt each, conditional branch.</p>"
    for row, name, path in found:
        said = " ".join(sentence(quantity, n) for quantity, n in row["routing"][name].items())
        caption = f"{row['label']}, {name}"
        yield figure(f"{caption}: {said}", image((folder / path).read_bytes(), f"routing of {caption}", "plot"))


def sentence(quantity: str, n: Mapping[str, Any]) -> str:
    """One quantity of `recipes.report.routing_map.numbers` as a sentence."""
    branches = ", ".join(f"{name} {b['mean']:.1%}" for name, b in n["branches"].items())
    return (
        f"{quantity} {n['mean']:.1%} ({branches}), standard deviation {n['std_samples']:.1%} between samples and "
        f"{n['std_timesteps']:.1%} between timesteps, units from {min(n['units']):.1%} to {max(n['units']):.1%}."
    )


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write report.json and report.html; returns their paths.

    Raises:
        ValueError: if the report holds values that are not JSON, NaN included
    """
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    return [write(folder / "report.json", text + "\n"), write(folder / "report.html", html(report, folder))]
