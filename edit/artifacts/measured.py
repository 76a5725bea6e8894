"""What was measured of an artifact: its own entries of the report.json in its run's folder, and its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edit.inputs import trust

PICTURE = 2**23  # bytes, at most, of a picture that is shown


def run_folder(artifact: Path) -> Path:
    """The folder of the run that made an artifact, or the artifact's own."""
    return artifact.parent if artifact.name == "artifact" else artifact


def results(artifact: Path) -> tuple[list[dict[str, Any]], bool]:
    """The results of an artifact in the report of its run's folder, one per guidance weight.

    Entries of variants and of other artifacts are passed over.

    Returns:
        Results, none without a report; and whether some part was not written by `edit`, which is left out.
    """
    folder, found, foreign = run_folder(artifact), [], False
    if not (folder / "report.json").is_file():
        return [], False
    try:
        entries = trust.read_json(folder / "report.json").get("artifacts")
    except (OSError, ValueError):
        entries = None
    for entry in entries if isinstance(entries, list) else [None]:
        try:
            if entry.get("variant") or len(entries) > 1 and not _is(entry["path"], folder):  # a comparison with others
                continue
            for result in entry.get("results", []):
                quality_of(result)
                found.append(result)
        except (KeyError, TypeError, ValueError, AttributeError):
            foreign = True
    return found, foreign


def quality_of(result: Mapping[str, Any]) -> dict[str, str]:
    """What a row of a table says of a result: guidance weight, number of images, and each measure with its spread."""
    measured = {**result["quality"], **(result.get("compared") or {})}
    row = {"guidance": f"{result['guidance']:g}", "images": str(result["n"])}
    return row | {k: _number(v) for k, v in measured.items()}


def cost_of(result: Mapping[str, Any]) -> dict[str, str]:
    """MACs and forwards of an image, as far as they are numbers."""
    cost, found = result.get("cost"), {}
    names = {"MACs per image": "macs_per_image", "forwards per image": "evaluations"}
    for title, name in names.items():
        value = cost.get(name) if isinstance(cost, Mapping) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[title] = f"{value:g}" if value < 1e6 else short(value)
    return found


def short(count: float) -> str:
    """A large number with a unit: 11.9 G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"


def picture(artifact: Path) -> Path | None:
    """The last samples of the run that made an artifact, else the grid of its report; None where there is neither.

    A report is a file from outside: a picture that it names must lie below its folder.
    """
    folder = run_folder(artifact)
    if steps := sorted((folder / "samples").glob("*.png"), key=lambda file: file.name):
        return _small(steps[-1])
    found, _ = results(artifact)
    grid = found[0].get("grid") if found else None
    if not isinstance(grid, str) or not (folder / grid).resolve().is_relative_to(folder.resolve()):
        return None
    return _small(folder / grid)


def _small(file: Path) -> Path | None:
    return file if file.suffix == ".png" and file.is_file() and file.stat().st_size <= PICTURE else None


def _is(path: str, run: Path) -> bool:
    return run.resolve() in (Path(path).resolve(), Path(path).resolve().parent)


def _number(measure: Mapping[str, Any]) -> str:
    spread = measure.get("spread")
    return f"{measure['value']:.4g}" + (f" ± {spread:.2g}" if spread is not None else "")
