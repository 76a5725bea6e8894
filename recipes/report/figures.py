"""The numbers of a report that runs are compared by: their names, which direction is better, how they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One number of a row of report.json.

    Args:
        name: its key under `quality` or `cost`
        title: for readers
        better: -1: less is better, 1: more is
        form: of the number, for str.format
        factor: to the unit that the title names
    """

    name: str
    title: str
    better: int
    form: str
    factor: float = 1.0

    def show(self, value: float) -> str:
        return self.form.format(value)

    def of(self, result: Mapping[str, Any]) -> float | None:
        """The number in a row of the report, in this figure's unit; None: the row has none."""
        found = at(result, "quality", self.name, "value")
        cost = at(result, "cost", self.name)
        value = number(found if found is not None else at(cost, "median") if isinstance(cost, Mapping) else cost)
        return None if value is None else value * self.factor


PROMPTED = ("count", "colour", "kind", "digit", "size", "place", "relation")
QUALITIES = (
    Figure("frechet", "Fréchet distance", -1, "{:.2f}"),
    Figure("prompt_accuracy", "prompt accuracy", 1, "{:.1%}"),
    Figure("accuracy", "class accuracy", 1, "{:.1%}"),
    Figure("precision", "precision", 1, "{:.3f}"),
    Figure("recall", "recall", 1, "{:.3f}"),
)
COSTS = (
    Figure("macs_per_image", "MACs per image, G", -1, "{:,.3g}", 1e-9),
    Figure("generation", "ms per image", -1, "{:,.2f}", 1e3),
)
FIGURES = (*QUALITIES, *COSTS, *(Figure(f"prompt_{p}", f"{p} as prompted", 1, "{:.1%}") for p in PROMPTED))


def own_results(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of the artifact itself, one per guidance weight; variants and artifacts with an error have none."""
    entries = report.get("artifacts")
    for entry in entries if isinstance(entries, Sequence) else ():
        if isinstance(entry, Mapping) and "of" not in entry and isinstance(entry.get("results"), Sequence):
            return [
                row for row in entry["results"] if isinstance(row, Mapping) and number(row.get("guidance")) is not None
            ]
    return []


def present(results: Sequence[Mapping[str, Any]], figures: Sequence[Figure] = FIGURES) -> list[Figure]:
    """Figures that some row has."""
    return [f for f in figures if any(f.of(row) is not None for row in results)]


def best_of(figure: Figure, results: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """The best value over guidance weights, and its weight; None: no row has the figure."""
    found = [(v, float(row["guidance"])) for row in results if (v := figure.of(row)) is not None]
    return min(found, key=lambda pair: -figure.better * pair[0]) if found else None


# ---- values of files that may be damaged -----------------------------------------------------------------------------


def at(node: Any, *path: str) -> Any:
    """The value at a path of keys; None where there is none."""
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


def number(value: Any) -> float | None:
    """A number; None for anything else, truth values included."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def dotted(node: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings; a list is one value, and so is an empty mapping."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from dotted(value, f"{before}.{key}" if before else str(key))
    elif before:
        yield before, node
