"""A sweep in one table: mean and spread over seeds of each setting, the best marked, a plot, and the next command.

    python train.py -m name=sweep seed=0,1,2 optimizer.lr=1e-3,2e-3
    python -m recipes.sweep runs=runs/sweep
    python -m recipes.sweep runs=runs/sweep by=train/loss

Swept settings are those in which the configurations of the runs differ. The table is printed, sweep.html in the folder
has it with the plot. Runs that are not finished are listed, not counted.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from edit.inputs import words
from edit.inputs.command import guarded, helped
from recipes.report.run_index import write_index
from recipes.report.sweep_page import show, write_sweep
from recipes.report.swept import summarise


@dataclass(frozen=True)
class Summing:
    """Settings.

    Args:
        runs: folder of the sweep, with a run folder for each job
        by: what settings are compared by: a figure of the reports (frechet, accuracy, prompt_accuracy, precision,
            recall, macs_per_image, generation) or a column of metrics.csv, such as train/loss; null: the first of
            Fréchet distance, prompt accuracy, class accuracy, loss on held-out data and training loss that most runs
            have
        guidance: weight at which a figure of the reports is read; null: the one at which the best setting is best
    """

    runs: str
    by: str | None = None
    guidance: float | None = None


@guarded(interrupted="interrupted: no page was written")
@helped(Summing)
def main(argv: list[str]) -> int:
    chosen = words.read(Summing, argv)
    sweep = summarise(Path(chosen.runs), chosen.by, chosen.guidance)
    path = write_sweep(sweep)
    write_index(sweep.runs)  # it links the page
    show(sweep)
    print(f"page      {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
