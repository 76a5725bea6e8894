"""A launch that fails before it has trained leaves no folder behind, and none that was there before is touched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from recipes.runtime.files import LOCK, is_first, is_locked

# what a launch writes before its first result; a logger's folder counts with all that is in it
FILES = {LOCK, "config.yaml", "env.json", "teacher.json", "wandb_id", "metrics.csv", "multirun.yaml", "index.html"}
LOGS = {"tensorboard", "wandb"}


class Before:
    """The folders that were there before a launch.

    Args:
        place: where its run, or all runs of a sweep, will be; None: not known, so nothing is ever removed
    """

    def __init__(self, place: Path | None):
        self.place = None if place is None else place.absolute()
        if self.place is None:
            return
        self.there = {folder for folder in (self.place, *self.place.parents) if os.path.lexists(folder)}
        self.there |= {Path(folder) for folder, _, _ in os.walk(self.place)}

    @contextmanager
    def watched(self, out: Path) -> Iterator[None]:
        """Remove a run's folder when the block ends, if it is new, holds no result, and nobody writes there."""
        try:
            yield
        finally:
            if is_first():
                with suppress(OSError):  # what cannot be removed stays
                    self._remove(out.absolute())

    def _remove(self, out: Path) -> None:
        if self.place is None or not out.is_dir() or out in self.there or not out.is_relative_to(self.place):
            return
        if is_locked(out) or not _empty(out):
            return
        for folder, folders, files in os.walk(out, topdown=False):
            for name in files:
                os.unlink(os.path.join(folder, name))
            for name in folders:
                os.rmdir(os.path.join(folder, name))
        os.rmdir(out)
        for parent in out.parents:  # those that the launch has made
            if parent in self.there or not _empty(parent):
                return
            for left in parent.iterdir():
                left.unlink()
            parent.rmdir()


def _empty(out: Path) -> bool:
    """Whether a folder holds only what is there before the first result."""
    for folder, folders, files in os.walk(out):
        if Path(folder) == out:
            folders[:] = [name for name in folders if name not in LOGS]
        if set(files) - FILES or (files and Path(folder) != out):
            return False
    log = out / "metrics.csv"
    return not log.exists() or log.read_text(errors="replace").count("\n") < 2  # its columns alone
