"""From artifacts to a report: the work of eval.py, and of train.py when a run ends.

Every artifact is sampled with the same noise and labels, and measured against held-out images of its own data set.
Torch is imported inside: settings are checked before anything heavy is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.config.errors import UserError
from recipes.config.schema import Evaluation
from recipes.report.page import save_grid, show, write_report
from recipes.report.request import short_names
from recipes.report.routed import measure_decisions
from recipes.report.routing_map import drawn
from recipes.report.samples import Reference, Subject, adjusted, sample_and_measure
from recipes.report.yardstick import progress
from recipes.runtime.machine import environment, pick_device

if TYPE_CHECKING:
    import torch

FORMAT = 1  # of report.json


def run(
    paths: Sequence[Path], chosen: Evaluation, out: Path, reference: Path | None = None, debug: bool = False
) -> dict[str, Any]:
    """Measure artifacts, print the comparison, write report.json, report.html and the grids into `out`.

    With several artifacts, one that cannot be measured becomes a row with the reason.

    Args:
        paths: artifact or run folders
        chosen: what to measure, and how
        out: folder, made where it does not exist
        reference: artifact whose images, from the same noise, the others are compared with
        debug: raise the first error as it is

    Returns:
        The report, as in report.json.

    Raises:
        UserError: if no artifact could be measured
    """
    device = pick_device(chosen.device)
    names = short_names(paths)
    report: dict[str, Any] = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(device),
        "settings": asdict(chosen) | {"reference": None if reference is None else os.fspath(reference)},
        "artifacts": [],
    }
    original = None if reference is None else Reference(reference)
    for path, name in zip(paths, names, strict=True):
        try:
            report["artifacts"].append(evaluate(path, name, chosen, out, device, original))
        except Exception as error:  # of any type, from a damaged artifact; the others are still measured
            if debug:
                raise
            sentence = " ".join(str(error).split())
            if not isinstance(error, UserError | ValueError | OSError):
                sentence = f"{type(error).__name__}: {sentence}; debug=true shows the traceback"
            if len(paths) == 1:
                raise UserError(f"{path} cannot be evaluated: {sentence}") from error
            report["artifacts"].append({"name": name, "path": os.fspath(path), "error": sentence})
    if all("error" in a for a in report["artifacts"]):
        first = report["artifacts"][0]
        raise UserError(f"none of the {len(paths)} artifacts can be evaluated; {first['path']}: {first['error']}")
    files = write_report(report, out)
    show(report)
    print("report    " + "\n          ".join(map(str, files)), flush=True)
    return report


def evaluate(
    path: Path, name: str, chosen: Evaluation, out: Path, device: torch.device, reference: Reference | None
) -> dict[str, Any]:
    """Sample one artifact at every guidance weight and measure quality and cost; grids go to `out`/grids.

    Returns:
        JSON values: the artifact, how it was measured, and one entry of `results` per guidance weight.

    Raises:
        UserError, ValueError, OSError: if it cannot be measured
    """
    from edit.edits import describe as described

    subject = Subject.of(path, name, chosen, device)
    artifact, space = subject.artifact, subject.space
    real = f"grids/{subject.stem}_real.png"
    save_grid(space.some_real, out / real, space.columns)
    results = [evaluate_at(guidance, subject, out, reference) for guidance in chosen.guidance]
    denoiser = artifact.denoiser
    balanced = "balanced: sample k has class k modulo the number of classes"
    return {
        "name": name,
        "path": os.fspath(path),
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
        "results": results,
    }


def evaluate_at(guidance: float, subject: Subject, out: Path, reference: Reference | None) -> dict[str, Any]:
    """Quality and cost at one guidance weight, an entry of `results`."""
    import torch

    from edit.edits import describe as described
    from edit.measuring.cost import cost

    artifact, space, chosen = subject.artifact, subject.space, subject.chosen
    sampler = adjusted(artifact, guidance, chosen.steps, space.shape)
    grid = f"grids/{subject.stem}_w{guidance:g}.png"
    sets, seconds = [], 0.0
    for seed in chosen.seed:
        with progress(f"{subject.name} w={guidance:g} seed {seed}", chosen.n) as done:
            measured, images, took = sample_and_measure(subject, sampler, seed, reference, done)
        sets.append(measured)
        seconds += took
        if seed == chosen.seed[0]:
            save_grid(images, out / grid, space.columns)
    counted = cost(
        artifact.denoiser,
        sampler,
        artifact.objective,
        subject.condition(torch.zeros(1, dtype=torch.int64)),
        real=bool(artifact.denoiser.applied),  # decisions of an edit may depend on the image
        rounds=chosen.rounds,
    )
    parts = {"cost": counted.as_dict(), "routing": {}, "routing_maps": {}}
    if drawn(artifact.denoiser) or any(e.adaptive for e in artifact.denoiser.applied.values()):
        parts = measure_decisions(subject, sampler, counted, out, f"{subject.stem}_w{guidance:g}")
    return {
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
