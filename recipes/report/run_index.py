"""The list of all runs, index.html in their common folder, and the writing of it beside a run's own page."""

from __future__ import annotations

import fcntl
import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from types import TracebackType

from data.names import legible, typed
from recipes.report.columns import COSTS, QUALITIES, Column, best_of
from recipes.report.curves import HELD_LOSS, LOSS
from recipes.report.html import document, image
from recipes.report.run_page import PAGE, link, write_page
from recipes.report.run_record import Record, find_runs, is_run, read
from recipes.report.values import at
from recipes.runtime.files import write

SWEEP_PAGE = "sweep.html"  # in the folder of a sweep
SMALL = 150  # px of a picture in the list
LARGE = 2_000_000  # pixels from which on the small picture is kept beside the run, not made anew each time
KEPT = ".picture.png"
LOSSES = {"training loss": LOSS, "held-out loss": HELD_LOSS}  # by the titles of their columns
PATIENCE = 10.0  # seconds to wait for another process that writes the list
STYLE = f"""<style>
table.runs td {{ vertical-align: top; white-space: normal; max-width: 22rem }}
table.runs td.number {{ white-space: nowrap }}
table.runs th, table.runs td + td {{ overflow-wrap: normal }} table.runs td + td.text {{ min-width: 4.5rem }}
table.runs td:first-child {{ min-width: {SMALL + 24}px }}
table.runs td.text, table.runs th.text {{ text-align: left }}
table.runs img {{ max-height: 7rem; width: auto; display: block; margin-bottom: .3rem; image-rendering: auto }}
</style>"""


# ---- pages of a run that has just ended ------------------------------------------------------------------------------


def renew_pages(folder: Path) -> None:
    """Write the pages of a run anew whose folder has another report by now; a folder that is no run's is left alone.

    The list is written, too, where the run is still in the folder of all runs that it was made in: a copy of a run may
    lie beside anything.
    """
    if not is_run(folder):
        return
    record = read(folder)
    home = at(record.config, "runs")
    whole = isinstance(home, str) and Path(home).absolute().name == record.root.absolute().name
    write_pages(folder, record.root if whole else None)


def write_pages(folder: Path, root: Path | None) -> None:
    """Write the page of a run and the list of all runs; print where. A failure is printed, not raised.

    Args:
        folder: of the run
        root: folder of all runs; None: there is no list
    """
    try:
        page = write_page(read(folder), [] if root is None else [read(f) for f in find_runs(root)])
        if root is not None:
            write_index(root)
        said = os.fspath(page)
    except Exception as error:  # the run is done and saved: a page must not take that away
        said = f"not written: {legible(' '.join(f'{type(error).__name__}: {error}'.split()))}"
    with suppress(OSError):  # the terminal may be gone
        print(f"page      {said}", flush=True)


def at_failure(folder: Path, root: Path) -> Callable[[type | None, BaseException | None, TracebackType | None], bool]:
    """For `ExitStack.push`: writes the pages of a run that is stopped or fails; what has stopped it goes on."""

    def leave(kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if kind is not None and read(folder).steps:  # a run without a step is not kept
            write_pages(folder, root)
        return False

    return leave


# ---- the list --------------------------------------------------------------------------------------------------------


def write_index(root: Path) -> Path:
    """Write the list of all runs below a folder, and return its path; one process at a time.

    Raises:
        OSError: if it cannot be written
    """
    with _in_turn(root):
        return write(root / PAGE, html(root, [read(folder) for folder in find_runs(root)]))


@contextmanager
def _in_turn(root: Path) -> Iterator[None]:
    """Wait for other processes that read the runs and write the list, so that the last list is the newest; where there
    are no locks, or one is held for long, go on all the same: a list is written whole."""
    try:
        file = open(root / ".index.lock", "w")  # noqa: SIM115 - closed below
    except OSError:
        yield
        return
    with file:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        yield


def html(root: Path, records: Sequence[Record]) -> str:
    """The list as a page.

    Args:
        root: its folder
        records: of the runs
    """
    ordered = sorted(records, key=lambda r: r.date.timestamp() if r.date else 0.0, reverse=True)
    title = f"Runs in {legible(os.fspath(root))}"
    if not ordered:
        return document(title, [STYLE, "<p>There are no runs yet: <code>python train.py</code> makes the first.</p>"])
    figures = [f for f in (*QUALITIES, *COSTS) if any(best_of(f, r.results) is not None for r in ordered)]
    titles = [f"<th>{escape(f.title)} {f.arrow}</th>" for f in figures]
    losses = [(name, key) for name, key in LOSSES.items() if any(key in r.last for r in ordered)]
    titles += [f"<th>{name}</th>" for name, _ in losses]
    heads = ("<th>run</th>", *(f"<th class=text>{h}</th>" for h in ("model", "method", "state")), "<th>steps</th>")
    rows = [row for record in ordered for row in _rows(record, root, figures, [key for _, key in losses])]
    count = "1 run" if len(ordered) == 1 else f"{len(ordered)} runs"
    parts = [
        STYLE,
        f"<p class=dim>{count}, newest first. Figures are the best over guidance weights, losses the last that "
        "were logged; of different data they cannot be compared.</p>",
        *_sweeps(root, ordered),
        f"<div class=wide><table class=runs><thead><tr>{''.join(heads)}{''.join(titles)}<th>date</th>"
        f"<th class=text>more</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>",
    ]
    return document(title, parts)


def _rows(record: Record, root: Path, figures: Sequence[Column], losses: Sequence[str]) -> Iterator[str]:
    """A run's row, and one more for each damaged file."""
    where = os.path.relpath(record.folder, root)
    label = escape(legible(where))
    page = (record.folder / PAGE).is_file()
    name = f"<a href='{link(os.path.join(where, PAGE))}'>{label}</a>" if page else label
    png = record.picture and thumbnail(record.picture, record.folder)
    picture = image(png, f"picture of {legible(where)}") if png else ""
    told = (record.backbone, ", ".join(record.methods) or "–", record.state)
    cells = [f"<td>{picture}{name}</td>", *(f"<td class=text>{escape(text)}</td>" for text in told)]
    numbers = ["–" if record.steps is None else f"{record.steps:,}"]
    numbers += ["–" if (best := best_of(f, record.results)) is None else f.show(best) for f in figures]
    numbers += ["–" if (loss := record.last.get(key)) is None else f"{loss:.4g}" for key in losses]
    cells += [f"<td class=number>{escape(text)}</td>" for text in numbers]
    cells.append(f"<td class=number>{f'{record.date:%Y-%m-%d<br>%H:%M}' if record.date else '–'}</td>")
    more = [("report", "report.html"), ("configuration", "config.yaml"), ("numbers", "metrics.csv")]
    links = [f"<a href='{link(os.path.join(where, f))}'>{n}</a>" for n, f in more if (record.folder / f).is_file()]
    yield f"<tr>{''.join(cells)}<td class=text>{', '.join(links) or '–'}</td></tr>"
    for fault in record.faults:
        yield f"<tr class=error><td>{label}</td><td colspan={len(cells)}>{escape(fault)}</td></tr>"


def _sweeps(root: Path, records: Sequence[Record]) -> Iterator[str]:
    """Folders with several runs: their pages, or the command that writes them."""
    counts: dict[Path, int] = {}
    for record in records:
        if record.folder.parent != root and not is_run(record.folder.parent):
            counts[record.folder.parent] = counts.get(record.folder.parent, 0) + 1
    several = {folder: n for folder, n in counts.items() if n > 1}
    if several:
        yield "<h2>Sweeps</h2><ul>"
    for folder, n in several.items():
        where = os.path.relpath(folder, root)
        label = escape(legible(where))
        if (folder / SWEEP_PAGE).is_file():
            label = f"<a href='{link(os.path.join(where, SWEEP_PAGE))}'>{label}</a>"
        else:
            label += f": <code>{escape(typed('python', '-m', 'recipes.sweep', f'runs={folder}'))}</code>"
        yield f"<li>{label} ({n} runs)</li>"
    if several:
        yield "</ul><h2>Runs</h2>"


def thumbnail(path: Path, folder: Path) -> bytes | None:
    """A small copy of a picture as PNG; None: it is no picture. That of a large one is kept in the run's folder."""
    from PIL import Image, UnidentifiedImageError

    kept = folder / KEPT
    with suppress(OSError):
        if kept.stat().st_mtime >= path.stat().st_mtime:
            return kept.read_bytes()
    try:
        with Image.open(path) as picture:
            large = picture.width * picture.height > LARGE
            small = picture.convert("RGB")
            small.thumbnail((2 * SMALL, 2 * SMALL), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    out = io.BytesIO()
    small.save(out, format="PNG", optimize=True)
    if large:
        with suppress(OSError):
            write(kept, out.getvalue())
    return out.getvalue()
