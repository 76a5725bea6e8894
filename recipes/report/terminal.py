"""The comparison on a terminal: a line per row of the report, in as many tables as the width asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recipes.report.columns import Column, Row, best, failures, measured, present, rows
from recipes.report.notes import notes

BETWEEN = 2  # spaces between columns
LABEL = 36  # most letters of a line's name, beyond which it is folded


def show(report: Mapping[str, Any]) -> None:
    """Print the comparison, what variants change, what failed, and the notes."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, table = Console(), rows(report)
    label = min(LABEL, max((len(row["label"]) for row in table), default=0))
    for columns in tables(table, console.width - label - BETWEEN - 2):
        view = Table(box=box.SIMPLE_HEAD, padding=(0, BETWEEN, 0, 0), pad_edge=False, header_style="bold")
        view.add_column("", min_width=label, max_width=label, overflow="fold")
        tops = [best(c, table) for c in columns]
        for c in columns:
            view.add_column(Text("\n".join(head(c)), justify="right"), justify="right", vertical="bottom", no_wrap=True)
        for i, row in enumerate(table):
            cells = [cell(c, row, i in top) for c, top in zip(columns, tops, strict=True)]
            texts = [Text(text, "bold green" if i in top else "") for text, top in zip(cells, tops, strict=True)]
            view.add_row(Text(row["label"]), *texts)
        console.print(view)
    for a in measured(report):
        if a.get("changes"):
            console.print(Text.assemble((a["name"], "bold"), f": {a['changes']}"), soft_wrap=True)
    for a in failures(report):
        console.print(Text(f"{a['name']}: {a['error']}", "red"), soft_wrap=True)
    for note in notes(report):
        console.print(Text(note, "dim"))


def tables(table: Sequence[Row], width: int) -> Iterator[list[Column]]:
    """The columns of each table, as many as fit into `width` letters, at least one."""
    part, used = [], 0
    for column in present(table):
        size = breadth(column, table)
        if part and used + size > width:
            yield part
            part, used = [], 0
        part.append(column)
        used += size
    if part:
        yield part


def breadth(column: Column, table: Sequence[Row]) -> int:
    """Letters of a column with the space beside it."""
    return BETWEEN + max(*map(len, head(column)), *(len(cell(column, row, False)) + 1 for row in table))


def cell(column: Column, row: Row, is_best: bool) -> str:
    return " ".join(filter(None, column.texts(row))) + ("*" if is_best else "")


def head(column: Column) -> list[str]:
    """A column's title in lines, the words of which are short; unit and direction stand last."""
    lines: list[str] = []
    for word in [*column.name.split(), " ".join(filter(None, (column.unit, column.arrow)))]:
        if lines and len(lines[-1]) + 1 + len(word) <= 11:
            lines[-1] = f"{lines[-1]} {word}".strip()
        else:
            lines.append(word)
    return lines
