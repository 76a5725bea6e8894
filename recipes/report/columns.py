"""The columns of a report: which number of a row each one is, its unit and digits, and which of its values is the best.

A report is a dict of JSON values, made by `recipes.report.evaluate`; one that is read from a file may be damaged, and a
number that is none is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor, isfinite, log10
from typing import Any

from recipes.report.values import at, number

Row = Mapping[str, Any]  # one result of one artifact, with "label" and "reference" added by `rows`
UNSTEADY = 0.2  # spread of a time, as a share of it, from which on it is marked


@dataclass(frozen=True)
class Column:
    """A number of each row.

    Args:
        name: without the unit
        unit: of what is shown; "" without
        pick: a number, a measure {"value", "spread"}, or None
        digits: after the point; None: three figures that count
        better: -1: less, 1: more, 0: neither
        judged: depends on the real images and the extractor
        counted: a lower bound if an operator without a FLOP formula ran
        timed: by a clock
        once: measured once, so that its spread is not known and none is the best
        key: by which a command line asks for it and runs are compared; "": they are not compared by it
        figures: that count, where `digits` does not tell
    """

    name: str
    unit: str
    pick: Callable[[Row], Any]
    digits: int | None = None
    better: int = 0
    judged: bool = False
    counted: bool = False
    timed: bool = False
    once: bool = False
    key: str = ""
    figures: int = 3

    @property
    def title(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name

    @property
    def arrow(self) -> str:
        """The direction of better values."""
        return ("", "↑", "↓")[self.better]

    def at_least(self, row: Row) -> bool:
        """Whether a row's value is only a lower bound."""
        return self.counted and bool(at(row, "cost", "uncounted"))

    def value(self, row: Row) -> float | None:
        picked = self.pick(row)
        return picked["value"] if isinstance(picked, Mapping) else picked

    def spread(self, row: Row) -> float | None:
        picked = self.pick(row)
        return picked.get("spread") if isinstance(picked, Mapping) else None

    def unsteady(self, row: Row) -> bool:
        """Whether a time has a spread above `UNSTEADY`."""
        value, spread = self.value(row), self.spread(row)
        return self.timed and bool(value and spread) and spread > UNSTEADY * abs(value)  # type: ignore[operator]

    def texts(self, row: Row) -> tuple[str, str]:
        """The value, with `≥` or `~` before it where these apply, and its spread, with as many digits, or ""."""
        value, spread = self.value(row), self.spread(row)
        if value is None:
            return "–", ""
        sign = "≥ " if self.at_least(row) else "~" if self.unsteady(row) else ""
        return sign + self.show(value), "" if spread is None else f"± {self.show(spread, value)}"

    def show(self, value: float, beside: float | None = None) -> str:
        """A value in words, or its spread with as many digits as the value `beside` it has."""
        size, digits = abs(value if beside is None else beside), self.digits
        if digits is None:
            digits = max(0, self.figures - 1 - floor(log10(size))) if size and isfinite(size) else 0
        return f"{value:,.{digits}f}"


def _quality(name: str, factor: float = 1.0) -> Callable[[Row], Any]:
    return lambda row: _measure(at(row, "quality", name), factor)


def _compared(name: str) -> Callable[[Row], Any]:
    return lambda row: _measure(at(row, "compared", name), 1.0)


def _measure(found: Any, factor: float) -> dict[str, Any] | None:
    """A measure in another unit."""
    value, spread = (number(at(found, part)) for part in ("value", "spread"))
    return None if value is None else {"value": value * factor, "spread": None if spread is None else spread * factor}


def _cost(name: str, factor: float = 1.0) -> Callable[[Row], Any]:
    def pick(row: Row) -> float | None:
        value = number(at(row, "cost", name))
        return None if value is None else value * factor

    return pick


def _computed(row: Row) -> float | None:
    """Part of what caches cover that is computed, not predicted, in percent: a mean over evaluations and units."""
    shares = [found["executed"]["mean"] for found in (row.get("routing") or {}).values() if "executed" in found]
    return 100 * sum(shares) / len(shares) if shares else None


def _working(row: Row) -> float | None:
    """Peak memory without the weights, in MiB."""
    peak, resident = (number(at(row, "cost", part)) for part in ("peak_memory", "resident"))
    return None if peak is None or resident is None else max(0, peak - resident) * 2**-20


def _speed(other: str) -> Callable[[Row], Any]:
    """How many times faster than another model; the spread is half the distance between the quartiles."""
    return lambda row: _half(at(row, "cost", "speed", other), 1.0)


def _time(name: str) -> Callable[[Row], Any]:
    """Milliseconds; the spread is half the distance between the quartiles."""
    return lambda row: _half(at(row, "cost", name), 1e3)


def _half(found: Any, factor: float) -> dict[str, Any] | None:
    value, low, high = (number(at(found, part)) for part in ("median", "low", "high"))
    spread = None if low is None or high is None else factor * (high - low) / 2
    return None if value is None else {"value": factor * value, "spread": spread}


PROMPTED = ("count", "colour", "kind", "digit", "size", "place", "relation")
REAL, REFERENCE, COUNTED, TIMED = "against real images", "against the reference", "work and memory", "time"
GROUPS: dict[str, tuple[Column, ...]] = {
    REAL: (
        Column("Fréchet distance", "", _quality("frechet"), 2, -1, judged=True, key="frechet"),
        Column("class accuracy", "%", _quality("accuracy", 100), 1, 1, judged=True, key="accuracy"),
        Column("prompt accuracy", "%", _quality("prompt_accuracy", 100), 1, 1, judged=True, key="prompt_accuracy"),
        *(
            Column(f"{p} as prompted", "%", _quality(f"prompt_{p}", 100), 1, 1, judged=True, key=f"prompt_{p}")
            for p in PROMPTED
        ),
        Column("precision", "", _quality("precision"), 3, 1, judged=True, key="precision"),
        Column("recall", "", _quality("recall"), 3, 1, judged=True, key="recall"),
        Column("distance to training set", "", _quality("nearest_train"), 2),
    ),
    REFERENCE: (
        Column("PSNR to reference", "dB", _compared("psnr"), 1, 1),
        Column("SSIM to reference", "", _compared("ssim"), 3, 1),
        Column("feature distance to reference", "", _compared("perceptual"), 3, -1),
    ),
    COUNTED: (
        Column("forwards per image", "", _cost("evaluations"), 0, -1),
        Column("parameters", "M", _cost("parameters", 1e-6), None, -1),
        Column("activated per token", "M", _cost("per_token", 1e-6), None, -1),
        Column("activated", "M", _cost("activated", 1e-6), None, -1),
        Column("MACs per image", "G", _cost("macs_per_image", 1e-9), None, -1, counted=True, key="macs_per_image"),
        Column("share of MACs run", "%", _cost("share", 100), 1),
        Column("computed by caches", "%", _computed, 1),
        Column("held by caches per image", "MiB", _cost("held", 2**-20), None, -1),
        Column("peak memory", "MiB", _cost("peak_memory", 2**-20), None, -1),
        Column("of it not weights", "MiB", _working, None, -1),
    ),
    TIMED: (
        Column("ms per forward", "", _time("forward"), None, -1, timed=True),
        Column("ms per image", "", _time("generation"), None, -1, timed=True, key="generation"),
        Column("times as fast as plain", "", _speed("plain"), 2, 1, timed=True),
        Column("times as fast as dense", "", _speed("dense"), 2, 1, timed=True),
        Column("images/s", "", _cost("images_per_second"), None, 1, once=True),
    ),
}
COLUMNS = tuple(column for columns in GROUPS.values() for column in columns)
KEYED = {column.key: column for column in COLUMNS if column.key}
# what the pages of runs show
QUALITIES = tuple(KEYED[key] for key in ("frechet", "prompt_accuracy", "accuracy", "precision", "recall"))
COSTS = tuple(KEYED[key] for key in ("macs_per_image", "generation"))
WHOLE = {"activated", "activated per token"}  # told only where it is not all parameters


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


def own_results(report: Mapping[str, Any]) -> list[Row]:
    """The rows of the artifact itself, one per guidance weight; variants and artifacts with an error have none."""
    entries = report.get("artifacts")
    for entry in entries if isinstance(entries, Sequence) else ():
        if isinstance(entry, Mapping) and "of" not in entry and isinstance(entry.get("results"), Sequence):
            return [
                row for row in entry["results"] if isinstance(row, Mapping) and number(row.get("guidance")) is not None
            ]
    return []


def best_of(column: Column, results: Sequence[Row]) -> float | None:
    """The best value over guidance weights; None: no row has one."""
    found = [v for row in results if (v := column.value(row)) is not None]
    return min(found, key=lambda v: -column.better * v) if found else None


def measured(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The artifacts and variants that have rows."""
    return [a for a in report["artifacts"] if a.get("results")]


def failures(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [a for a in report["artifacts"] if "error" in a]


def comparable(table: Sequence[Row]) -> bool:
    """Whether all rows have the same real images and the same extractor."""
    return len({row["reference"]["hash"] for row in table}) == 1


def groups(table: Sequence[Row]) -> Iterator[tuple[str, list[Column]]]:
    """Columns for which some row has a value, by group; activated parameters only where they are not all."""
    for name, columns in GROUPS.items():
        shown = [c for c in columns if any(c.value(row) is not None for row in table)]
        shown = [c for c in shown if c.name not in WHOLE or not all(_all_parameters(c, row) for row in table)]
        if shown:
            yield name, shown


def _all_parameters(column: Column, row: Row) -> bool:
    return column.pick(row) in (None, row["cost"].get("parameters", 0) * 1e-6)


def present(table: Sequence[Row]) -> list[Column]:
    """The columns of all groups."""
    return [column for _, columns in groups(table) for column in columns]


def best(column: Column, table: Sequence[Row]) -> set[int]:
    """Rows, by number, whose value is better than that of every other row by more than both spreads together.

    Rows that share a value without a spread, such as a count, may be the best together. Empty where no direction is
    better, values cannot be compared, or all rows are alike; lower bounds are left out.
    """
    if not column.better or column.once or (column.judged and not comparable(table)):
        return set()
    seen = {i: v for i, row in enumerate(table) if (v := column.value(row)) is not None and not column.at_least(row)}
    if len(seen) < 2:
        return set()
    top = max(seen.values(), key=lambda v: v * column.better)
    spread = {i: column.spread(table[i]) or 0.0 for i in seen}
    first = {i for i, v in seen.items() if v == top and (column.spread(table[i]) is None)}
    first = first or {next(i for i, v in seen.items() if v == top)}
    others = seen.keys() - first
    ahead = all(abs(top - seen[k]) > spread[k] + max(spread[i] for i in first) for k in others)
    return first if others and ahead else set()
