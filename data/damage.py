"""Damaged files: named, then refused or skipped. Never a hang, never silent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
TRIES = 100  # neighbours tried before a data set counts as broken altogether


class Damaged(ValueError):
    """A file, shard or member that cannot be used. The message names it and says what is wrong."""


class Tolerance:
    """What happens to damaged samples and shards.

    Args:
        on_error: `refuse` stops with the error; `skip` warns with the name, counts, and goes on without

    Raises:
        ValueError: if on_error is neither
    """

    def __init__(self, on_error: str):
        if on_error not in ("refuse", "skip"):
            raise ValueError(f"on_error is refuse or skip, got {on_error!r}")
        self.on_error = on_error
        self.skipped: set[str] = set()  # what was skipped in this process, as told

    def excuse(self, error: Damaged) -> None:
        """Say once that what the error names is skipped.

        Raises:
            Damaged: if damage is to be refused
        """
        if self.on_error == "refuse":
            raise Damaged(f"{error}; repair or remove it, or set on_error=skip to go on without it") from error
        if str(error) not in self.skipped:
            self.skipped.add(str(error))
            warnings.warn(f"{error}; skipped, {len(self.skipped)} so far", RuntimeWarning, stacklevel=2)

    def first_good(self, load: Callable[[int], T], index: int, count: int) -> T:
        """`load(index)`, or that of the next sample that is whole: the substitute depends on the index alone.

        Raises:
            Damaged: if damage is to be refused, or if as many as 100 samples in a row are damaged
        """
        tries = min(count, TRIES)
        for k in range(tries):
            try:
                return load((index + k) % count)
            except Damaged as error:
                self.excuse(error)
        raise Damaged(f"{tries} samples in a row are damaged, from sample {index} of {count}: check the data set")
