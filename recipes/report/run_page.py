"""The page of a run, index.html in its folder: what came out, what was trained, how it went, how to go on.

The page needs no other file, no script and no server. It can be written at any time, of a run in any state.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from data.names import legible, our_script, typed
from edit.inputs.trust import named
from recipes.report.amounts import duration, short
from recipes.report.columns import COSTS, QUALITIES
from recipes.report.curves import HELD_LOSS, Curve, Plot, others, plots, read_curves, seconds
from recipes.report.html import details, document, figure, image
from recipes.report.run_record import Record, parameters, writer
from recipes.report.values import at, number
from recipes.runtime.files import write

PAGE = "index.html"
WIDEST = 1600  # px of a picture in a page; larger ones are scaled down
SHOWN = 5  # grids of samples over time
# beside the look of all pages: plots side by side, small pictures, commands with what they are for
STYLE = """<style>
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1.2rem;
  max-width: 110rem } .small.plots { grid-template-columns: repeat(auto-fit, minmax(min(16rem, 100%), 1fr)) }
.lead { font-size: 1.05rem; margin: .8rem 0 } .first { margin-top: 1.2rem } .first img { max-height: 28rem;
  width: auto } .over img { max-height: 16rem; width: auto }
.wide table:not(.told) :is(th, td + td) { overflow-wrap: normal }
.one img.plot { max-width: min(42rem, 100%) }
dl.how dt { margin-top: .8rem } dl.how dd { margin: .2rem 0 0 } dl.how pre { margin: 0 }
</style>"""


def write_page(record: Record, beside: Sequence[Record] = ()) -> Path:
    """Write the page of a run into its folder, and return its path.

    Args:
        record: of the run
        beside: other runs, one of which a command on the page may compare it with

    Raises:
        OSError: if it cannot be written
    """
    return write(record.folder / PAGE, html(record, beside))


def html(record: Record, beside: Sequence[Record] = ()) -> str:
    """The page; takes what `write_page` takes."""
    faults = list(record.faults)
    try:
        curves = read_curves(record.folder / "metrics.csv")
    except (OSError, ValueError) as error:
        curves = {}
        faults.append(legible(f"metrics.csv cannot be read: {error}"))
    parts = [STYLE, *_head(record, faults), *_first_picture(record)]
    parts += [f"<p class=lead>{escape(sentence(record, curves))}</p>", *_figures(record), *_curves(curves)]
    parts += [*_over_time(record), *_own_pictures(record), *_commands(record, beside), *_details(record)]
    return document(record.name, parts)


def _head(record: Record, faults: Sequence[str]) -> Iterator[str]:
    up = os.path.relpath(record.root / PAGE, record.folder)
    when = f"{record.date:%Y-%m-%d %H:%M}" if record.date else "no date"
    yield f"<p class=dim>{escape(record.state)} · {when} · <a href='{link(up)}'>all runs</a></p>"
    if not record.finished:
        elsewhere = f" It was last written on {host}." if (host := writer(record.folder)) else ""
        yield f"<p class=partial>This run is not finished: {escape(record.state)}.{escape(elsewhere)} The same command "
        yield "goes on from its last checkpoint.</p>"
    yield from (f"<p class=partial>{escape(fault)}</p>" for fault in faults)


def _first_picture(record: Record) -> Iterator[str]:
    path = record.picture
    png = path and scaled(path)
    if not path or not png:
        yield "<p class=dim>There is no picture of this run: preview.every and evaluate make some.</p>"
        return
    if record.samples:
        caption = f"samples at step {record.samples[-1][0]:,}, always of the same noise"
    else:
        caption = "samples of the evaluation" if path.name != "pruning.png" else "how the units were chosen"
    text = f"{caption}, of {record.name}"
    yield f"<div class=first>{figure(caption, image(png, text))}</div>"


def sentence(record: Record, curves: Mapping[str, Curve]) -> str:
    """What was trained, in one sentence."""
    count = parameters(record)
    size = f" of {short(count)} parameters" if count else ""
    data = _name(at(record.config, "data", "set") or at(record.told, "data"))
    if record.pruning:
        kept = at(record.pruning, "kept")
        units = f"{len(kept)} units stay" if isinstance(kept, list) else "some units stay"
        by, model = at(record.pruning, "settings", "by"), at(record.pruning, "model")
        return legible(f"{record.backbone}{size}, pruned from {model} by {by}: {units}.")
    if (changed := at(record.told, "run", "applied", "to")) is not None:
        return legible(
            f"{record.backbone}{size}: {changed} with edits that need no training, {', '.join(record.methods)}."
        )
    steps = record.steps
    parts = ["made without training steps"] if steps is None else [f"trained for {steps:,} steps"]
    if steps and record.images:
        parts[0] += f" of {record.images:,} images ({steps * record.images:,} in all)"
    parts[0] += f" on {data}" if data else ""
    start, teacher = at(record.config, "init"), at(record.config, "teacher", "path")
    parts += [f"starting from {start}"] if start else []
    parts += [f"taught by {teacher}"] if teacher else []
    if steps is not None and not at(record.config, "matching") and (objective := _name(at(record.config, "objective"))):
        parts.append(f"objective {objective}")
    parts += [f"with {', '.join(record.methods)}"] if record.methods else []
    if steps is not None and (rate := number(at(record.config, "optimizer", "lr"))) is not None:
        parts.append(f"learning rate {rate:g}")
    devices = (number(at(record.config, "trainer", "devices")) or 1) * (
        number(at(record.config, "trainer", "num_nodes")) or 1
    )
    device = at(record.environment, "device") or at(record.told, "run", "device")
    if device:
        parts.append(f"on {f'{devices:g} x ' * (devices != 1)}{device}")
    if (took := seconds(curves, record.images)) is not None:
        parts.append(f"in {duration(took)} of training")
    return legible(f"{record.backbone}{size}, {', '.join(parts)}.")


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _figures(record: Record) -> Iterator[str]:
    results = record.results
    figures = [f for f in (*QUALITIES, *COSTS) if any(f.value(row) is not None for row in results)]
    if figures:
        yield "<h2>Quality and cost</h2><div class=wide><table><thead><tr><th>guidance weight</th>"
        yield from (f"<th>{escape(f.title)} {f.arrow}</th>" for f in figures)
        yield "</tr></thead><tbody>"
        for row in results:
            cells = ("–" if (value := f.value(row)) is None else f.show(value) for f in figures)
            yield f"<tr><td>{float(row['guidance']):g}</td>{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>"
        yield "</tbody></table></div>"
        n = number(at(results[0], "n"))
        yield f"<p class=dim>{f'{n:,.0f} images per row. ' if n else ''}"
        yield "<a href='report.html'>The whole report</a>: samples, spreads, all costs.</p>"
    elif (record.folder / "report.html").is_file():
        yield "<p><a href='report.html'>The report of its evaluation</a></p>"


def _curves(curves: Mapping[str, Curve]) -> Iterator[str]:
    lost = sum(curve.lost for name, curve in curves.items() if name == "train/loss")
    if main := plots(curves):
        yield "<h2>How it went</h2>"
        if lost:
            yield f"<p class=partial>The loss was not finite in {lost:,} logged steps.</p>"
        yield f"<div class=plots>{''.join(map(_plotted, main))}</div>"
    if HELD_LOSS in curves:
        yield "<p class=dim>On held-out data: the objective's loss of the averaged weights, the artifact's, of samples "
        yield "that are not trained on, with the same noise and times at each step and in every run. The training loss "
        yield "is of the weights under way, of other samples at each step, and has every term in it.</p>"
    if more := others(curves):
        yield "<details><summary>what else was logged</summary>"
        yield f"<div class='small plots'>{''.join(map(_plotted, more))}</div></details>"


def _plotted(plot: Plot) -> str:
    return figure(plot.title, image(plot.png, f"{plot.title} over the steps: {plot.text}", "plot"))


# ---- pictures --------------------------------------------------------------------------------------------------------


def _over_time(record: Record) -> Iterator[str]:
    grids = record.samples
    if len(grids) < 2:
        return
    chosen = sorted({round(i * (len(grids) - 1) / (SHOWN - 1)) for i in range(SHOWN)})
    pictures = [(step, png) for step, path in (grids[i] for i in chosen) if (png := scaled(path, WIDEST // 2))]
    if pictures:
        yield "<h2>Samples over time</h2><div class='grids over'>"
        yield from (figure(f"step {s:,}", image(png, f"samples at step {s:,}")) for s, png in pictures)
        yield "</div>"


def _own_pictures(record: Record) -> Iterator[str]:
    """What runs of some kinds have: how units were chosen, what routers decided."""
    found = [("pruning", record.folder / "pruning.png", "how the units were chosen")]
    newest: dict[str, Path] = {}
    for kind in ("routing", "experts"):
        for path in sorted((record.folder / "samples").glob(f"{kind}_*.png")):
            newest[path.stem.rpartition("_")[0]] = path  # the last step of each edit
    for name, path in newest.items():
        kind, _, edit = name.partition("_")
        found.append((kind, path, f"decisions of {edit}" if kind == "routing" else f"loads of the experts of {edit}"))
    for title, path, caption in found:
        if path != record.picture and path.is_file() and (png := scaled(path)):
            caption = legible(caption)
            yield f"<h2>{title.capitalize()}</h2>{figure(caption, image(png, caption, 'plot'))}"


def scaled(path: Path, widest: int = WIDEST) -> bytes | None:
    """A picture's file, scaled down where it is wider than a page shows it; None: it is no picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            if picture.width <= widest:
                picture.verify()
                return path.read_bytes()
        with Image.open(path) as picture:
            small = picture.convert("RGB")
            small.thumbnail((widest, 4 * widest), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    out = io.BytesIO()
    small.save(out, format="PNG")
    return out.getvalue()


# ---- how to go on ----------------------------------------------------------------------------------------------------


def _commands(record: Record, beside: Sequence[Record]) -> Iterator[str]:
    yield "<h2>How to go on</h2><dl class=how>"
    for what, line in commands(record, beside):
        yield f"<dt>{escape(what)}</dt><dd><pre>{escape(line)}</pre></dd>"
    yield "</dl>"
    if not record.command:
        yield "<p class=dim>The command that started this run was not written down; the configuration below is all "
        yield "that it was made with.</p>"


def commands(record: Record, beside: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """What can be done with a run, and the line that does it.

    Args:
        record: of the run
        beside: other runs, of which it may be compared with one
    """
    run = f"artifact={record.folder}"
    if record.command:
        again = "Reproduce (in this folder it answers that the run is complete; another name= makes a new one)"
        yield again if record.finished else "Go on from the last checkpoint", typed("python", *record.command)
    if record.artifact:
        slug = record.name.replace("/", "-")
        yield (
            "Sample: 60 images, without measuring",
            typed(
                "python", our_script("eval.py"), run, "n=60", "features=none", "rounds=0", f"out=reports/{slug}_samples"
            ),
        )
        yield (
            "Measure quality and cost, with a spread over seeds",
            typed("python", our_script("eval.py"), run, "seed=[0,1,2]", f"out=reports/{slug}"),
        )
        if other := _other(record, beside):
            pair = f"out=reports/{slug}_beside_{Path(other).name}"
            yield "Compare", typed("python", our_script("eval.py"), run, f"artifact={other}", pair)
        if folds(record):
            yield "Export for diffusers", typed("python", "-m", "recipes.export", run, f"out=exported/{slug}")
        yield (
            "Load in Python",
            typed("python", "-c", f"import edit; print(edit.load({json.dumps(os.fspath(record.folder))}))"),
        )
    yield "Write this page again", typed("python", "-m", "recipes.page", f"run={record.folder}")


def _other(record: Record, beside: Sequence[Record]) -> str | None:
    """The run to compare with: what it started from, its teacher, or a run on the same data, of the same folder
    before others, the newest before older ones."""
    for key in (("init",), ("teacher", "path")):
        start = at(record.config, *key)
        if isinstance(start, str) and (Path(start) / "artifact").is_dir():
            return start
    same = [r for r in beside if r.finished and r.folder != record.folder and _data(r) and _data(r) == _data(record)]

    def nearness(other: Record) -> tuple[bool, float]:
        return other.folder.parent == record.folder.parent, other.date.timestamp() if other.date else 0.0

    return os.fspath(max(same, key=nearness).folder) if same else None


def _data(record: Record) -> Any:
    return at(record.told, "data", "_target_")


def folds(record: Record) -> bool:
    """Whether `recipes.export` takes the artifact: its edits are folded into the weights, or can be."""
    live = _nodes(at(record.told, "edits"))
    if not live:
        return True
    from edit.denoiser import Edit  # brings torch, for runs with edits alone

    try:
        return all(named(at(node, "_target_"), ("edit",), (Edit,)).fold is not Edit.fold for node in live)
    except ValueError:  # of a package that is not ours, whose code is not run for a page
        return False


def _nodes(section: Any) -> list[Any]:
    return list(section.values()) if isinstance(section, Mapping) else []


# ---- details ---------------------------------------------------------------------------------------------------------


def _details(record: Record) -> Iterator[str]:
    yield "<h2>Details</h2>"
    for title, told in (
        ("configuration", record.config),
        ("revision and versions", {k: v for k, v in record.environment.items() if k != "command"}),
        ("artifact", {k: v for k, v in record.told.items() if k != "checksums"}),
        ("pruning", record.pruning),
    ):
        if told:
            yield details(title, told)
    files = ("config.yaml", "env.json", "metrics.csv", "report.json", "report.html", "pruning.json", "artifact")
    links = [f"<a href='{link(name)}'>{name}</a>" for name in files if (record.folder / name).exists()]
    if links:
        yield f"<p>Files: {', '.join(links)}</p>"


def link(path: str | os.PathLike) -> str:
    """A relative path as the address of a link, for single quotes."""
    return escape(quote(os.fsencode(path)), quote=True)


def _name(node: Any) -> str:
    """The class that a node of a configuration names."""
    target = at(node, "_target_")
    return target.rpartition(".")[2] if isinstance(target, str) else ""
