"""Files that appear whole or not at all, and folders with a lock for one writing process."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from recipes.config.errors import UserError

LOCK = ".lock"  # in a run's folder: names the process that writes there
# environment variables with a process's rank: torchrun, Lightning, SLURM, LSF, MPI
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK")

_held: set[int] = set()  # descriptors of locks


def write(path: Path, content: str | bytes) -> Path:
    """Write a file atomically; makes its folder. Text is UTF-8; names that are not become \\u.... escapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)  # leaves no partial file on a full disk
        error.filename = error.filename or str(path)
        raise
    return path


def is_first() -> bool:
    """Whether this process is the first of its launch, or runs alone."""
    return all(os.environ.get(rank, "0") in ("", "0") for rank in RANKS)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made; the kernel releases it when this process dies.

    Its file is removed at the end.
    On a file system without locks, a warning is printed and nothing is locked.

    Raises:
        UserError: if another process holds the lock; names its number and machine
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, mine = folder / LOCK, False
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        _cannot_tell(folder, error)
        yield
        return
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(descriptor, path):  # its holder has just ended, and removed the file
                raise BlockingIOError
            mine = True
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except BlockingIOError:
            who = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"{folder} is being written by {who}: wait until it ends, stop it, or give this run another name="
            ) from None
        except OSError as error:  # ENOLCK, ENOTSUP: no locks here; ENOSPC: locked, but the name was not written
            _cannot_tell(folder, error)
        yield
    finally:
        if descriptor in _held:  # not in a forked child
            _held.remove(descriptor)
            if mine and _is_at(descriptor, path):
                path.unlink(missing_ok=True)
            os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether another process, or this one, holds the lock of a folder."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # no locks here
        return False
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _cannot_tell(folder: Path, error: OSError) -> None:
    print(
        f"warning: {folder} cannot be locked ({(error.strerror or str(error)).lower()}): see to it yourself that no "
        "second process runs under this name",
        flush=True,
    )


def _let_go() -> None:
    """Close locks in a forked child (a loader's worker), which would hold them after the run was killed."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
