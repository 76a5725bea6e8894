"""Sentences that a reader of a report's numbers needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recipes.report.columns import UNSTEADY, Row, comparable, measured, present, rows


def partial(report: Mapping[str, Any]) -> Iterator[str]:
    """That the report is not complete, while it is not."""
    if not report.get("complete", True):
        count = report["rows"]
        yield (
            f"This report is not complete: {count['measured']} of {count['planned']} rows are measured. The evaluation "
            "is still running, or was stopped."
        )


def notes(report: Mapping[str, Any]) -> Iterator[str]:
    """All of them, plain text."""
    settings, table = report["settings"], rows(report)
    seeds = ", ".join(map(str, settings["seed"]))
    yield (
        f"{settings['n']} images per row, seed {seeds}, same noise and labels for all. w: weight of guidance, 1 is "
        "without; ±: spread."
    )
    if len(table) > 1:
        yield (
            "Green, * on a terminal: the best of its column, better than every other row by more than both spreads "
            "together. Where there is none, the rows cannot be told apart, or images/s, measured once, has no spread."
        )
    yield from _real(report)
    if table and not comparable(table):
        yield "Not all rows were measured against the same real images: their qualities cannot be compared."
    if any(a.get("variant") for a in measured(report)):
        of = settings.get("reference") or "the plain artifact"
        yield f"Variants need no training and share the plain artifact's weights; the reference of a row is {of}."
    yield from _costs(report, table)


def _real(report: Mapping[str, Any]) -> Iterator[str]:
    """The real images, once for each set of them."""
    settings = report["settings"]
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


def _costs(report: Mapping[str, Any], table: Sequence[Row]) -> Iterator[str]:
    """How costs were counted and timed."""
    if missed := sorted({op for row in table for op in row["cost"].get("uncounted", ())}):
        yield f"≥: a lower bound, {', '.join(missed)} has no FLOP formula and is not in the MACs."
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
        f"Costs on {report['environment']['device']}, one image at a time, images/s {report['settings']['batch']} at a "
        "time; times are medians ± half the distance of the quartiles."
    )
    if any(column.unsteady(row) for column in present(table) for row in table):
        yield (
            f"~: not to be relied on, a time whose spread is above {UNSTEADY:.0%} however often it was repeated. Other "
            "work was on the machine, or a call is too short for the clock."
        )
    if any(row["cost"].get("held") is not None for row in table):
        yield (
            "Held by caches: what they remember of one image between evaluations, of all guidance branches, at most. "
            "Computed by caches: of the units that a cache covers, the part that runs, a mean over evaluations."
        )
    if any(row["cost"].get("peak_memory") is not None for row in table):
        on_gpu = not report["environment"]["device"].startswith(("cpu", "mps"))
        how = "what the allocator has handed out" if on_gpu else "storages of all tensors, without operators' scratch"
        yield f"Peak memory: the most that was alive at once during a generation, {how}; weights are in it."
