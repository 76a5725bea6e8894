"""The pages of runs: index.html in a run's folder, and in the folder of all runs their list.

    python -m recipes.page run=runs/digits     # one run, finished or not, and the list
    python -m recipes.page runs=runs           # all runs, and the list

train.py writes them at the end of a run, and when it is stopped. No GPU and no weights are needed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from data.names import legible
from edit.inputs import words
from edit.inputs.command import Failed, guarded, helped, working
from recipes.report.run_index import write_index
from recipes.report.run_page import write_page
from recipes.report.run_record import Record, find_runs, is_run, read


@dataclass(frozen=True)
class Paging:
    """Settings.

    Args:
        run: run folder whose page is written; may be given several times
        runs: folder of all runs, whose list is written; without run=, the page of each, too; null: that of the run
    """

    run: tuple[str, ...] = ()
    runs: str | None = None


@guarded(interrupted="interrupted: pages that were written are whole")
@helped(Paging)
def main(argv: list[str]) -> int:
    chosen = words.read(Paging, argv)
    folders = chosen_folders(chosen)
    with working(OSError):
        failed = write_all(folders, None if chosen.runs is None else Path(chosen.runs))
    if failed:
        raise Failed(f"{len(failed)} of {len(folders)} pages were not written: {'; '.join(failed)}")
    return 0


def chosen_folders(chosen: Paging) -> list[Path]:
    """The folders of the runs whose pages are asked for.

    Raises:
        FileNotFoundError: if one is no run, or there is none
    """
    folders = [Path(text) for text in chosen.run]
    if wrong := next((f for f in folders if not is_run(f)), None):
        raise FileNotFoundError(
            f"run={wrong} is no run: expected a folder with config.yaml, metrics.csv, checkpoints or artifact"
        )
    if chosen.runs is not None and not Path(chosen.runs).is_dir():
        raise FileNotFoundError(f"runs={chosen.runs}: there is no such folder; give the one that holds the runs")
    if not folders and chosen.runs is not None and not (folders := list(find_runs(Path(chosen.runs)))):
        raise FileNotFoundError(f"runs={chosen.runs} holds no runs: give one run with run=, or the folder of several")
    return folders


def write_all(folders: list[Path], root: Path | None) -> list[str]:
    """Write the pages of runs and the lists that they are in; print their paths.

    Args:
        folders: of the runs
        root: folder of all runs; None: that of each run

    Returns:
        A sentence for each page that could not be made.
    """
    failed, lists = list[str](), dict[Path, list[Record]]()
    for folder in folders:
        record = read(folder)
        place = root or record.root
        if place not in lists:
            lists[place] = [read(f) for f in find_runs(place)]
        try:
            print(f"page      {write_page(record, lists[place])}", flush=True)
        except Exception as error:  # one page must not keep the others from being written
            failed.append(legible(f"{folder}: {' '.join(f'{type(error).__name__}: {error}'.split())}"))
    for place in lists:
        print(f"list      {write_index(place)}", flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
