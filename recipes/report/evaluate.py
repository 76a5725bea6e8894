"""From artifacts to a report: the work of eval.py, and of train.py when a run ends.

Every artifact, and every variant of it, is sampled with the same noise and labels, and measured against held-out images
of its own data set. Torch is imported inside: settings are checked before anything heavy is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.config.errors import UserError
from recipes.config.schema import Evaluation
from recipes.report.grids import save_grid
from recipes.report.origin import methods, origin
from recipes.report.page import write_report
from recipes.report.request import run_folder, short_names
from recipes.report.routed import measure_decisions, tells
from recipes.report.samples import Reference, Subject, picture_key, sample_and_measure
from recipes.report.terminal import show
from recipes.report.turns import Row, dense_row, time_rows
from recipes.report.yardstick import progress
from recipes.runtime.machine import environment, pick_device
from recipes.variants import Variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from edit.artifacts.checkpoint import Artifact

FORMAT = 1  # of report.json


def run(
    paths: Sequence[Path],
    chosen: Evaluation,
    out: Path,
    reference: Path | None = None,
    debug: bool = False,
    variants: Sequence[Variant] = (),
    record: Callable[[dict[str, Any]], object] = lambda report: None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure artifacts and variants of them, print the comparison, write report.json, report.html and the grids into
    `out`.

    With several rows, one that cannot be measured has the reason in its place.

    Args:
        paths: artifact or run folders
        chosen: what to measure, and how
        out: folder, made where it does not exist
        reference: artifact whose images, from the same noise, the others are compared with; None: variants are compared
            with the artifact that they are made from
        debug: raise the first error as it is
        variants: training-free changes, each of every artifact
        record: called with the report so far whenever something was added to it
        command: words after `python` that asked for this report

    Returns:
        The report, as in report.json.

    Raises:
        UserError: if no artifact could be measured, or the reference cannot be loaded
    """
    device = pick_device(chosen.device)
    report: dict[str, Any] = {
        "format": FORMAT,
        "command": list(command),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(device),
        "settings": asdict(chosen) | {"reference": None if reference is None else os.fspath(reference)},
        "complete": False,
        "rows": {"measured": 0, "planned": len(paths) * (1 + len(variants)) * len(chosen.guidance)},
        "dense": None,
        "artifacts": [],
    }
    work = Work(report, chosen, out, device, debug, tuple(variants), record)
    if reference is not None:
        work.load_reference(reference)
    work.measure(paths)
    first = report["artifacts"][0]
    if len(paths) == 1 and "error" in first:
        raise UserError(f"{first['path']} cannot be evaluated: {first['error']}")
    if all("error" in a for a in report["artifacts"]):
        raise UserError(f"none of the {len(paths)} artifacts can be evaluated; {first['path']}: {first['error']}")
    report["complete"] = True
    files = write_report(report, out)
    show(report)
    print("report    " + "\n          ".join(map(str, files)), flush=True)
    return report


@dataclass
class Work:
    """An evaluation in progress.

    Args:
        report: grows row by row
        chosen: what to measure, and how
        out: folder of the report
        device: to measure on
        debug: raise the first error as it is
        variants: of every artifact
        record: called with the report when it has grown
    """

    report: dict[str, Any]
    chosen: Evaluation
    out: Path
    device: torch.device
    debug: bool
    variants: tuple[Variant, ...]
    record: Callable[[dict[str, Any]], object]
    reference: Reference | None = None  # that was asked for
    dense: Reference | None = None  # with which rows of other artifacts are timed in turns: it, or the first artifact
    kept: list[Artifact] = field(default_factory=list)  # whose weights others share

    def load_reference(self, path: Path) -> None:
        """Raises a UserError if it cannot be loaded."""
        import edit

        try:
            artifact = edit.load(path, self.device, tuple(self.chosen.trusted))
        except (ValueError, OSError) as error:
            raise UserError(f"the reference cannot be loaded: {error}") from error
        (name,) = short_names([path])
        self.reference = self.dense = Reference(artifact, name, guidance=self.chosen.reference_guidance)
        self.report["dense"] = name

    def measure(self, paths: Sequence[Path]) -> None:
        """All artifacts, each with its variants."""
        identities = list(map(identity, paths))
        for i, (path, name) in enumerate(zip(paths, short_names(paths), strict=True)):
            entry: dict[str, Any] = {"name": name, "path": os.fspath(path)}
            with self.told(entry):
                beside = [*self.kept, *(r.artifact for r in (self.reference, self.dense) if r is not None)]
                subject = Subject.of(path, name, self.chosen, self.device, beside)
                self.kept = [a for a in (*self.kept, subject.artifact) if a.identity in identities[i + 1 :]]
                self.compare(subject, entry, first=self.dense is None and len(paths) > 1)

    def compare(self, subject: Subject, entry: dict[str, Any], first: bool) -> None:
        """One artifact and its variants: qualities row by row, then times in turns.

        Args:
            subject: the artifact
            entry: of the report, to be filled
            first: the rows of all further artifacts are timed with this one
        """
        plain = Reference(subject.artifact, subject.name, subject.steps)
        groups: dict[float, list[Row]] = {w: [] for w in self.chosen.guidance}
        keep = plain.keep if self.variants and self.reference is None else None
        self.add(subject, entry, groups, self.reference, keep)
        if first:
            self.dense, self.report["dense"] = plain, subject.name
        for variant in self.variants:
            entry = {"name": f"{subject.name} + {variant.name}", "path": entry["path"], "of": subject.name}
            with self.told(entry):
                self.add(subject.changed(variant), entry, groups, self.reference or plain)
        for w, group in groups.items():
            if self.chosen.rounds:
                print(f"times in turns, w={w:g}: {len(group)} rows, {self.chosen.rounds} rounds", flush=True)
                dense = None if first or self.dense is None else self.dense
                time_rows(group, dense and dense_row(dense, w, subject), self.chosen.rounds, first)
                self.record(self.report)

    def add(
        self,
        subject: Subject,
        entry: dict[str, Any],
        groups: Mapping[float, list[Row]],
        reference: Reference | None,
        keep: Callable[[str, Tensor, int], None] | None = None,
    ) -> None:
        """Measure one artifact or variant at each guidance weight, and put its entry into the report.

        Args:
            subject: to measure
            entry: of the report, to be filled
            groups: rows by guidance weight, to be timed; those of the subject are added
            reference: to compare its images with
            keep: takes its images, by the keys of a `Reference`, n of them
        """
        entry |= describe(subject, self.out) | {"results": []}
        self.report["artifacts"].append(entry)
        for w, rows in groups.items():
            count = self.report["rows"]
            title = f"{count['measured'] + 1} of {count['planned']}: {subject.name} w={w:g}"
            row = evaluate_at(w, subject, self.out, reference, title, keep)
            rows.append(row)
            entry["results"].append(row.result)
            count["measured"] += 1
            self.record(self.report)

    @contextmanager
    def told(self, entry: dict[str, Any]) -> Iterator[None]:
        """An error, of any type, becomes the reason in the entry: what else there is is still measured."""
        try:
            yield
        except Exception as error:
            if self.debug:
                raise
            sentence = " ".join(str(error).split())
            if not isinstance(error, UserError | ValueError | OSError):
                sentence = f"{type(error).__name__}: {sentence}; debug=true shows the traceback"
            entry["error"] = sentence
            if not any(a is entry for a in self.report["artifacts"]):
                self.report["artifacts"].append(entry)
            self.record(self.report)


def identity(path: Path) -> str:
    """Of the files of an artifact's stock weights; "" if they cannot be told, and loading will say why."""
    from edit.artifacts import checksums
    from edit.artifacts.description import read_description

    try:
        return checksums.identity(path, read_description(path))
    except (OSError, ValueError):
        return ""


def describe(subject: Subject, out: Path) -> dict[str, Any]:
    """What an entry of the report says besides its results; saves the grid of real images.

    Returns:
        JSON values: the artifact, how it is measured, and for a variant, how it was made.
    """
    from edit.catalogue import papers_of
    from edit.edits import describe as described

    artifact, space = subject.artifact, subject.space
    real = f"grids/{subject.plain_stem}_real.png"
    if subject.variant is None:
        save_grid(space.some_real, out / real, space.columns, space.some_told)
    denoiser = artifact.denoiser
    balanced = "balanced: sample k has class k modulo the number of classes"
    entry = {
        "backbone": denoiser.name,
        "config": denoiser.config,
        "dtype": str(next(denoiser.parameters()).dtype).removeprefix("torch."),
        "edits": {k: described(e) for k, e in denoiser.applied.items()},
        "folded": denoiser.folded,
        "data": artifact.data,
        "run": artifact.run,
        "labels": balanced if space.data.num_classes else "of the data",
        "extractor": space.identity(),
        "reference": space.description | {"grid": real, "world": subject.world},
    }
    if subject.variant is None:
        entry["origin"] = origin(run_folder(artifact.path))
    run = (entry.get("origin") or {}).get("config", {})
    ways = [run.get(key) for key in ("matching", "terms", "backbone")] if run else []
    entry["papers"] = papers_of(methods(entry["edits"], *ways, described(artifact.sampler)))
    if artifact.home not in (None, artifact.path):
        entry["weights"] = os.fspath(artifact.home)
    if (made := subject.variant) is not None:
        entry |= {"variant": made.name, "changes": made.changes}
    return entry


def evaluate_at(
    guidance: float,
    subject: Subject,
    out: Path,
    reference: Reference | None,
    title: str,
    keep: Callable[[str, Tensor, int], None] | None = None,
) -> Row:
    """Quality and counted cost at one guidance weight: an entry of `results`, to be timed.

    Args:
        guidance: the weight
        subject: to measure
        out: folder of the report
        reference: to compare images with
        title: of the progress
        keep: takes the images, by the keys of a `Reference`, n of them
    """
    import torch

    from edit.data_set import told
    from edit.edits import describe as described
    from edit.measuring.cost import Timed, cost

    artifact, space, chosen = subject.artifact, subject.space, subject.chosen
    sampler = subject.sampler(guidance)
    grid = f"grids/{subject.stem}_w{guidance:g}.png"
    sets, seconds = [], 0.0
    for seed in chosen.seed:

        def seen(frames: Tensor, seed: int = seed) -> None:
            if keep is not None:
                keep(picture_key(guidance, seed, artifact.data), frames, chosen.n)

        with progress(f"{title} seed {seed}", chosen.n) as done:
            measured, images, took = sample_and_measure(subject, sampler, seed, reference, done, seen)
        sets.append(measured)
        seconds += took
        if seed == chosen.seed[0]:
            save_grid(images, out / grid, space.columns, told(space.checked or space.data, len(images)))
    one = subject.condition(torch.zeros(1, dtype=torch.int64))
    real = bool(artifact.denoiser.applied)  # decisions of an edit may depend on the image
    counted = cost(artifact.denoiser, sampler, artifact.objective, one, real=real)
    parts = {"cost": counted.as_dict(), "routing": {}, "routing_maps": {}}
    if tells(artifact.denoiser):
        parts = measure_decisions(subject, sampler, counted, out, f"{subject.stem}_w{guidance:g}")
    result = {
        "guidance": guidance,
        "sampler": described(sampler),
        "n": chosen.n,
        "seed": chosen.seed,
        "quality": space.quality(sets),
        "compared": space.compared(sets),
        **parts,
        "cost": parts["cost"] | {"images_per_second": chosen.n * len(chosen.seed) / seconds},
        "grid": grid,
    }
    return Row(result, Timed(counted, artifact.denoiser, sampler, artifact.objective, one))
