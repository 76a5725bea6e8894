"""Times of the rows of a report: in turns, so that what slows the machine down for a while slows all of them.

Torch is imported inside: settings are checked before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from recipes.report.samples import Reference, Subject

if TYPE_CHECKING:
    from edit.measuring.cost import Timed


@dataclass(frozen=True)
class Row:
    """A row of a report, and what it takes to time it."""

    result: dict[str, Any]  # an entry of `results`, whose cost gets the times
    timed: Timed


def dense_row(dense: Reference, guidance: float, subject: Subject) -> Timed:
    """The dense model beside the rows of another artifact, one image at a time, at the guidance weight of the rows."""
    import torch

    from edit.measuring.cost import Timed, cost

    artifact, sampler = dense.artifact, dense.sampler(guidance)
    one = subject.condition(torch.zeros(1, dtype=torch.int64))
    counted = cost(artifact.denoiser, sampler, artifact.objective, one, real=bool(artifact.denoiser.applied))
    return Timed(counted, artifact.denoiser, sampler, artifact.objective, one)


def time_rows(rows: Sequence[Row], dense: Timed | None, rounds: int, first: bool = False) -> None:
    """Complete the costs of rows: seconds and memory, and `speed`, how many times faster they are than another model.

    Args:
        rows: of one artifact and one guidance weight, the plain artifact's first, then its variants'
        dense: the model that rows of all artifacts are compared with, timed with them; None: there is none
        rounds: timed forwards and generations of each
        first: the plain artifact is that model itself
    """
    from edit.measuring.cost import with_times
    from edit.measuring.timing import faster

    models = [row.timed for row in rows]
    timed = with_times([*models, dense] if dense is not None else models, rounds)
    plain, whole = timed[0], timed[-1] if dense is not None else timed[0] if first else None
    for i, (row, found) in enumerate(zip(rows, timed, strict=False)):
        measured = ("forward", "generation", "peak_memory", "resident")
        times = {k: v for k, v in found.counted.as_dict().items() if k in measured}
        if "share" in row.result["cost"]:
            times["forward"] = None  # it differs between images
        speed = {}
        if i > 0:
            speed["plain"] = asdict(faster(found.seconds, plain.seconds))
        if whole is not None and found is not whole:
            speed["dense"] = asdict(faster(found.seconds, whole.seconds))
        row.result["cost"] |= times | {"speed": speed}
