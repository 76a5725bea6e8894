"""Damaged files: named, then refused or skipped. Never a hang, never silent."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from data.names import legible

T = TypeVar("T")
TRIES = 100  # damaged samples in a row after which the whole data set counts as broken


class Damaged(ValueError):
    """A file, shard or member cannot be used. The message names it and the fault."""

    def __init__(self, message: str):
        super().__init__(legible(message))


def file_status(path: Path) -> os.stat_result:
    """The status of a regular file.

    Reading a pipe, a socket, a device or a file of the kernel might never end.

    Raises:
        Damaged: if the file is missing, a folder or one of these
    """
    try:
        about = path.stat()
    except OSError as error:
        link = f" is a link to {os.readlink(path)}, which" if os.path.islink(path) else ""
        raise Damaged(f"{path}{link} cannot be read ({error.strerror})") from error
    if stat.S_ISDIR(about.st_mode):
        raise Damaged(f"{path} is a folder, expected a file")
    if not stat.S_ISREG(about.st_mode):
        kinds = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
        raise Damaged(f"{path} is a {kinds.get(stat.S_IFMT(about.st_mode), 'special file')}, expected a file")
    if about.st_dev in kernel_devices():
        raise Damaged(f"{path} is no stored file: the kernel makes it up")
    return about


@cache
def kernel_devices() -> frozenset[int]:
    """The device numbers (st_dev) of /proc and /sys."""
    return frozenset(os.stat(place).st_dev for place in ("/proc", "/sys") if os.path.ismount(place))


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
        self.skipped: set[str] = set()  # the messages of this process

    def excuse(self, error: Damaged) -> None:
        """Warn once that the damaged thing is skipped.

        Raises:
            Damaged: if damage is to be refused
        """
        if self.on_error == "refuse":
            raise Damaged(f"{error}; repair or remove it, or set on_error=skip to go on without it") from error
        if str(error) not in self.skipped:
            self.skipped.add(str(error))
            warnings.warn(f"{error}; skipped, {len(self.skipped)} so far", RuntimeWarning, stacklevel=2)

    def first_good(self, load: Callable[[int], T], index: int, count: int) -> T:
        """`load(index)`, or the next undamaged sample: the substitute depends on the index alone.

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
