"""A sweep from its run folders: which settings differ, a number per run, mean and spread over seeds, the best setting.

Nothing is run and no weights are read. Swept settings are those in which the configurations differ; the seed is a
repetition. Settings that change together, as the keys of a backbone, are one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import isfinite, prod
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from data.names import legible, our_script, setting, typed
from recipes.report.columns import KEYED, Column
from recipes.report.curves import HELD, HELD_LOSS, LOSS, Curve, read_curves
from recipes.report.run_record import Record, find_runs, read
from recipes.report.values import at, dotted, number

# sections that do not decide a run's numbers, or repeat what others say
APART = {"name", "runs", "world", "logger", "debug", "before", "after", "preview", "checkpoint", "log_every", "trusted"}
APART |= {"heldout"}
SEED = "seed"
MOST = 6  # swept settings; more are no sweep
LONGER = 2  # times the steps of the best setting, in the next command
ABSENT = "–"
WORD = re.compile(r"\+{0,2}([\w.@/-]+)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Args:
        record: its folder
        place: values of the swept settings, in their order
        seed: in words
        value: the measure; None: there is none
        why: there is no value, in words
    """

    record: Record
    place: tuple[Any, ...]
    seed: str
    value: float | None
    why: str = ""

    @property
    def name(self) -> str:
        return legible(self.record.folder.name)


@dataclass(frozen=True)
class Setting:
    """All jobs with the same values of the swept settings: those that have a number."""

    place: tuple[Any, ...]
    jobs: tuple[Job, ...]

    @property
    def mean(self) -> float:
        return mean(job.value for job in self.jobs if job.value is not None)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, of a sample; None: of one seed there is none."""
        values = [job.value for job in self.jobs if job.value is not None]
        return stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Sweep:
    """A sweep, summed up.

    Args:
        root: its folder
        keys: swept settings, by which runs differ besides their seeds
        settings: with at least one number, the best first
        left: jobs without a number
        figure: by which settings are compared
        note: where the number is from
        seeds: that occur
        absent: combinations of settings and seeds that have no folder, in words
    """

    root: Path
    keys: tuple[str, ...]
    settings: tuple[Setting, ...]
    left: tuple[Job, ...]
    figure: Column
    note: str
    seeds: tuple[str, ...]
    absent: tuple[str, ...] = ()

    @property
    def best(self) -> Setting | None:
        return self.settings[0] if self.settings else None

    @property
    def runs(self) -> Path:
        """The folder of all runs, in which the sweep is."""
        return (self.settings[0].jobs if self.settings else self.left)[0].record.root

    def notes(self) -> list[str]:
        """Sentences that a reader of the table needs."""
        told = [f"{self.figure.title}: {self.note}; {'more' if self.figure.better > 0 else 'less'} is better."]
        if self.best is None:
            return [*told, "No run has a number to compare."]
        spread = self.best.spread
        if len(self.settings) > 1 and spread is not None:
            gap = abs(self.settings[1].mean - self.best.mean)
            if gap == 0:
                told.append("The second best has the same mean.")
            elif gap < max(spread, self.settings[1].spread or 0.0):
                told.append(
                    "The second best is within a standard deviation of the best: more seeds would tell them apart."
                )
        if len(self.best.jobs) < (most := max(len(s.jobs) for s in self.settings)):
            told.append(f"The best setting has {len(self.best.jobs)} runs with a number, others {most}.")
        if spread is None:
            told.append("The best setting has one seed: without repetitions its spread is not known.")
        return told


@dataclass(frozen=True)
class Measure:
    """What runs are compared by: a figure and how it is read off a run."""

    figure: Column
    note: str
    value: Callable[[Record], float | None]


def summarise(root: Path, by: str | None = None, guidance: float | None = None) -> Sweep:
    """Sum up the runs below a folder.

    Args:
        root: of the sweep
        by: the figure of a report, or the column of metrics.csv; None: quality if it was measured, else the loss on
            held-out data, else that of training
        guidance: weight at which a report's figure is read; None: the one at which the best setting is best

    Raises:
        FileNotFoundError: if there are no runs
        ValueError: if they are no sweep, or none has the figure
    """
    records = [read(folder) for folder in find_runs(root)]
    if not records:
        raise FileNotFoundError(f"runs={root} holds no runs: give the folder of a sweep, such as runs/sweep")
    whole = [r for r in records if r.config]
    keys, seed, values = swept(whole)
    if len(keys) > MOST:
        few = ", ".join(keys[:3])
        raise ValueError(
            f"the runs in {root} differ in {len(keys)} settings ({few}, ...), a sweep in {MOST} at most: give the "
            "folder of one sweep"
        )
    finished = [r for r in whole if r.finished]
    measure = choose(finished, by, guidance, lambda record: tuple(values(key, record) for key in keys))
    jobs = [_job(r, tuple(values(k, r) for k in keys) if r.config else (), values(seed, r), measure) for r in records]
    places: dict[str, list[Job]] = {}
    for job in jobs:
        if job.value is not None:
            places.setdefault(canonical(job.place), []).append(job)
    settings = [Setting(group[0].place, tuple(group)) for group in places.values()]
    settings.sort(key=lambda s: -measure.figure.better * s.mean)
    left = tuple(job for job in jobs if job.value is None)
    seeds = tuple(dict.fromkeys(job.seed for job in jobs if job.record.config))
    absent = _absent(keys, jobs, seeds) if whole else ()
    return Sweep(root, keys, tuple(settings), left, measure.figure, measure.note, seeds, absent)


def _job(record: Record, place: tuple[Any, ...], seed: Any, measure: Measure) -> Job:
    if not record.config:
        return Job(record, place, shown(seed), None, next(iter(record.faults), "it has no config.yaml"))
    if not record.finished:
        return Job(record, place, shown(seed), None, record.state)
    value = measure.value(record)
    if value is None or not isfinite(value):
        return Job(
            record, place, shown(seed), None, f"{measure.figure.title} is {'missing' if value is None else value}"
        )
    return Job(record, place, shown(seed), value)


def _absent(keys: Sequence[str], jobs: Sequence[Job], seeds: Sequence[str]) -> tuple[str, ...]:
    """Combinations of the values that occur for which there is no folder; none if there are very many."""
    places = [list({canonical(j.place[i]): j.place[i] for j in jobs if j.place}.values()) for i in range(len(keys))]
    if prod(map(len, places)) * len(seeds) > 1000:
        return ()
    there = {(canonical(job.place), job.seed) for job in jobs}
    combinations = ((place, seed) for place in product(*places) for seed in seeds)
    gone = ((place, seed) for place, seed in combinations if (canonical(place), seed) not in there)
    return tuple(", ".join((*told(keys, place), f"seed {seed}")) for place, seed in gone)


# ---- which settings differ -------------------------------------------------------------------------------------------


def swept(records: Sequence[Record]) -> tuple[tuple[str, ...], str, Callable[[str, Record], Any]]:
    """The settings in which runs differ.

    Returns:
        The swept keys without the seed; the key of the seed; and a function of key and record, the value there.
    """
    configs = {id(r): settings_of(r) for r in records}
    words = {id(r): words_of(r) for r in records}

    def value(key: str, record: Record) -> Any:
        found = configs.get(id(record), {}).get(key, ABSENT)
        unsaid = found is ABSENT or found == {}  # as of edits=none
        return words.get(id(record), {}).get(key, found) if unsaid else found

    def pattern(key: str) -> tuple[int, ...]:
        """Which runs have the same value, whatever it is."""
        texts = [canonical(value(key, r)) for r in records]
        first = {text: i for i, text in reversed(list(enumerate(texts)))}
        return tuple(first[text] for text in texts)

    known = _once(key for config in configs.values() for key in config if decides(key))
    alike: dict[tuple[int, ...], list[str]] = {}
    for key in known:
        if len(set(split := pattern(key))) > 1 and key.rpartition(".")[2] != SEED:
            alike.setdefault(split, []).append(key)
    given = [k for k in _once(key for w in words.values() for key in w) if k not in known]
    named = {split: key for key in given if (split := pattern(key)) in alike}  # a group, such as size or edits
    keys = [named.get(split) or _plainest(group, records) for split, group in alike.items()]
    order = {key: i for i, key in enumerate(_once(key for w in words.values() for key in w))}
    keys.sort(key=lambda key: order.get(key, len(order)))  # as they were typed
    return tuple(keys), SEED, value


def settings_of(record: Record) -> dict[str, Any]:
    """The settings of a run by their dotted keys; words for a stage as on a command line, before.<stage>.<key>."""
    found = dict(dotted({k: v for k, v in record.config.items() if k != "stages"}))
    stages = at(record.config, "stages")
    for stage, words in stages.items() if isinstance(stages, Mapping) else ():
        for word in words if isinstance(words, list) else ():
            if match := WORD.fullmatch(str(word)):
                found[f"before.{stage}.{match[1]}"] = _number_or_text(match[2])
    return found


def decides(key: str) -> bool:
    """Whether a setting decides a run's numbers, and no other does."""
    return key.partition(".")[0] not in APART or key.startswith("before.")


def words_of(record: Record) -> dict[str, Any]:
    """Keys and values of the command that made a run; numbers as numbers."""
    found = {}
    for word in record.command[1:]:
        if match := WORD.fullmatch(word):
            if decides(match[1]):
                found[match[1]] = _number_or_text(match[2])
    return found


def _plainest(keys: Sequence[str], records: Sequence[Record]) -> str:
    """Of settings that change together: that of a stage, whose folder others name; the one in the names of the runs'
    folders; else the shortest."""

    def rank(key: str) -> tuple[bool, bool, int, int]:
        named = all(f"{key}-" in r.folder.name for r in records)
        return not key.startswith("before."), not named, key.count("."), len(key)

    return min(keys, key=rank)


def _once(keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(keys))


def _number_or_text(text: str) -> Any:
    try:
        return json.loads(text) if re.fullmatch(r"-?\d+", text) else float(text)
    except ValueError:
        return text


def canonical(value: Any) -> str:
    """Equal texts for equal values: 1 and 1.0 are the same number."""
    if isinstance(value, tuple):
        return json.dumps([canonical(v) for v in value])
    plain = number(value)
    return repr(plain) if plain is not None else json.dumps(value, sort_keys=True, default=str)


def shown(value: Any) -> str:
    """A value for readers."""
    if (plain := number(value)) is not None:
        return f"{int(plain)}" if plain == int(plain) and abs(plain) < 1e15 else f"{plain:g}"
    if isinstance(value, str):
        return legible(value.rpartition(".")[2] if re.fullmatch(r"[a-z_]\w*(\.\w+)+", value) else value)
    return legible(
        "null" if value is None else json.dumps(value, default=str) if isinstance(value, list) else str(value)
    )


def told(keys: Sequence[str], place: Sequence[Any]) -> list[str]:
    """A setting in words: key=value."""
    return [f"{key}={shown(value)}" for key, value in zip(keys, place, strict=True)]


# ---- by which number -------------------------------------------------------------------------------------------------


def choose(
    records: Sequence[Record],
    by: str | None,
    guidance: float | None,
    place: Callable[[Record], tuple[Any, ...]],
) -> Measure:
    """The measure of a sweep. `place` tells apart runs of different settings, for the choice of the guidance weight.

    Raises:
        ValueError: if no run has the one that is asked for
    """
    curves = {id(r): _curves(r) for r in records}
    reported = {
        key: c for key, c in KEYED.items() if any(c.value(row) is not None for r in records for row in r.results)
    }
    columns = _once(name for found in curves.values() for name in found)
    loss = [n for n in columns if n.startswith(HELD) and "loss" in n] + [n for n in columns if n == LOSS]

    def measure(name: str) -> Measure:
        if name in reported:
            return _of_report(reported[name], records, guidance, place)
        return _of_column(name, {key: found.get(name) for key, found in curves.items()})

    if by is not None:
        if by not in (known := [*reported, *columns]):
            raise ValueError(f"by={by}: no finished run has it; there is {', '.join(known) or 'nothing yet'}")
        return measure(by)
    quality = [key for key in ("frechet", "prompt_accuracy", "accuracy") if key in reported]
    offered = [measure(name) for name in (*quality, *loss)]
    if not offered:
        return Measure(_logged(LOSS), "no finished run has logged one", lambda record: None)
    return max(offered, key=lambda m: sum(m.value(r) is not None for r in records))  # the first of equals


def _of_report(
    figure: Column,
    records: Sequence[Record],
    guidance: float | None,
    place: Callable[[Record], tuple[Any, ...]],
) -> Measure:
    """A figure of the reports, at one guidance weight for all runs."""
    found: dict[float, dict[str, list[float]]] = {}  # by weight and setting
    for record in records:
        for row in record.results:
            if (measured := figure.value(row)) is not None:
                group = found.setdefault(float(row["guidance"]), {})
                group.setdefault(canonical(place(record)), []).append(measured)
    if guidance is not None and guidance not in found:
        raise ValueError(f"guidance={guidance:g}: it was measured at {', '.join(f'{w:g}' for w in sorted(found))}")
    most = max(sum(map(len, groups.values())) for groups in found.values())
    common = {w: g for w, g in found.items() if sum(map(len, g.values())) == most}
    weight = guidance
    if weight is None:
        weight = min(common, key=lambda w: min(-figure.better * mean(v) for v in common[w].values()))

    def value(record: Record) -> float | None:
        return next((figure.value(row) for row in record.results if float(row["guidance"]) == weight), None)

    chosen = "" if guidance is not None or len(common) < 2 else ", at which the best setting is best"
    return Measure(figure, f"of the reports, at guidance weight {weight:g}{chosen}", value)


def _of_column(name: str, curves: Mapping[int, Curve | None]) -> Measure:
    """A column of metrics.csv: the last number on held-out data, the mean of the last tenth of the rows otherwise."""
    held = name.startswith(HELD)

    def value(record: Record) -> float | None:
        curve = curves.get(id(record))
        if curve is None:
            return None
        if name == LOSS and not isfinite(end := record.last.get(name, 0.0)):
            return end  # it diverged
        return None if not curve.values else curve.values[-1] if held else curve.end

    return Measure(_logged(name), "the last of metrics.csv" if held else "mean of the last tenth of metrics.csv", value)


def _logged(name: str) -> Column:
    """A column of metrics.csv as one of a report."""
    title = {LOSS: "training loss", HELD_LOSS: "held-out loss"}.get(name, name)
    more = name in ("images_per_second", "mfu") or "accuracy" in name
    return Column(title, "", lambda row: None, better=1 if more else -1, key=name, figures=4)


def _curves(record: Record) -> dict[str, Curve]:
    try:
        return read_curves(record.folder / "metrics.csv")
    except (OSError, ValueError):
        return {}


# ---- what next -------------------------------------------------------------------------------------------------------


def next_command(sweep: Sweep) -> tuple[str, str] | None:
    """What to do with the best setting, and the line that does it; None: there is no best.

    Without a report the best is to be measured; with one, and if it is known how the run was started, trained longer.
    """
    if sweep.best is None:
        return None
    jobs = sweep.best.jobs
    reported = sweep.figure.key in KEYED
    words, steps = jobs[0].record.command, jobs[0].record.planned
    name = f"{jobs[0].record.name.rpartition('/')[0] or sweep.root.name}_best"
    if reported and words and steps:
        dropped = ("name", "trainer.max_steps")
        kept = [w for w in words if w.partition("=")[0].lstrip("+") not in dropped]
        line = typed("python", *kept, setting("name", name), f"trainer.max_steps={LONGER * steps}")
        return f"Train the best setting for {LONGER * steps:,} steps", line
    best = [f"artifact={job.record.folder}" for job in jobs]
    if reported and len(sweep.settings) > 1:
        best = [best[0], f"artifact={sweep.settings[1].jobs[0].record.folder}"]
        return "Compare the best setting with the second", typed(
            "python", our_script("eval.py"), *best, f"out=reports/{sweep.root.name}"
        )
    out = () if len(best) == 1 else (f"out=reports/{sweep.root.name}",)
    return "Measure the best setting", typed("python", our_script("eval.py"), *best, *out)
