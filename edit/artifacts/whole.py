"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when it is whole; after an error the former content stays."""
    temporary, old = path.with_name(f"{path.name}.tmp-{os.getpid()}"), replaced(path)
    for left in path.parent.glob(f"{escape(path.name)}.tmp-*"):  # by a process that was killed
        shutil.rmtree(left)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk is not left fuller
        raise
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


def replaced(path: Path) -> Path:
    """Where the folder that `replacing` is about to replace is kept until the new one has its name."""
    return path.parent / f"{path.name}.old"  # "/" and "." have no name
