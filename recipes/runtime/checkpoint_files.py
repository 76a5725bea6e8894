"""Checkpoint files: written whole or not at all, each with its checksum; those of single ranks beside the common one.

step_00000500.ckpt                  weights, average, optimiser, schedule, places in the data: written by rank 0
step_00000500.ckpt.rank_0_of_2      what a rank alone knows (`Recipe.kept`): written before it, where there is any
*.sha256                            of each
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from edit.artifacts.checksums import of_file
from recipes.config.errors import UserError
from recipes.runtime.files import write

WHOLE = "whole"  # file of checksums in a checkpoint folder (DeepSpeed), written when all ranks have finished
CHECKSUM = ".sha256"  # suffix to the name of a checkpoint file
RANKS = "ranks"  # key of a checkpoint: how many files of ranks belong to it; absent: none


class Hashed:
    """A file to write to, and the SHA-256 of its content."""

    def __init__(self, file: IO[bytes]):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, content: Any) -> int:
        self.sha256.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


class AtomicIO(TorchCheckpointIO):
    """Write a checkpoint to a temporary file and move it when whole, so that a kill leaves the previous one.

    A kill corrupts Lightning's own write where TMPDIR is another file system. The checksum is computed while writing,
    2 GB/s, and stored in a file of its own. A failed write is kept in `error` and not raised: other ranks wait at a
    barrier, and `Checkpoints` tells them.
    """

    error: UserError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        try:
            with open(temporary, "wb") as f:
                hashed = Hashed(f)
                torch.save(checkpoint, hashed)
                f.flush()
                os.fsync(f.fileno())
            # between these a kill leaves a checkpoint without a checksum, which is taken, never one with another's
            checksum_of(path).unlink(missing_ok=True)
            os.replace(temporary, path)
            write(checksum_of(path), f"{hashed.sha256.hexdigest()}  {path.name}\n")
        except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
            temporary.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError) and "write" not in str(error):
                raise
            reason = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else str(error)
            full = shutil.disk_usage(path.parent).free < 2**20 or "space" in reason
            cure = "free some space" if full else "check the disk and its limits"
            self.error = UserError(
                f"could not write {path} ({reason.lower()}): earlier checkpoints are whole; {cure} and give the same "
                "command, which resumes from them"
            )


def checksum_of(checkpoint: Path) -> Path:
    """The path of a checkpoint file's checksum, which `sha256sum -c` reads."""
    return checkpoint.with_name(checkpoint.name + CHECKSUM)


def read_checksums(path: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint, by name; empty: there are none, or they cannot be read."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    if path.name == WHOLE:
        kept = json.loads(text or "{}")  # of an earlier version: empty
        return {str(name): str(sum) for name, sum in kept.items()}
    match = re.fullmatch(r"([0-9a-f]{64})  (\S+)\n", text)
    return {match[2]: match[1]} if match else {}


# ---- files of single ranks ------------------------------------------------------------------------------------------


def rank_file(checkpoint: Path, rank: int, world: int) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.rank_{rank}_of_{world}")


def read_rank(checkpoint: Path, rank: int, world: int) -> dict[str, Any] | None:
    """What this rank alone knew at a checkpoint; None: ranks kept nothing.

    Raises:
        UserError: if it is of another number of ranks, each of which was in the middle of a generation
    """
    if (path := rank_file(checkpoint, rank, world)).is_file():
        return torch.load(path, map_location="cpu", weights_only=True)
    if others := sorted(checkpoint.parent.glob(f"{checkpoint.name}.rank_0_of_*")):
        before = others[0].name.removesuffix(CHECKSUM).rpartition("_")[2]
        raise UserError(
            f"{checkpoint} is in the middle of a generation on each of {before} ranks, and this command has {world}: "
            f"go on with {before} of them"
        )
    return None


def rank_damage(checkpoint: Path, world: int) -> str | None:
    """The first file of a rank that is not what was saved, in words; None: all are whole."""
    for path in (rank_file(checkpoint, rank, world) for rank in range(world)):
        if not path.is_file():
            return f"{path.name} is missing"
        if (kept := read_checksums(checksum_of(path)).get(path.name)) != of_file(path):
            return f"{path.name} is not what was saved" if kept else f"{path.name} has no checksum"
    return None


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint with all that belongs to it."""
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink()
    for path in (checksum_of(checkpoint), *checkpoint.parent.glob(f"{checkpoint.name}.rank_*")):
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Delete what a kill has left: temporary files, unfinished folders, and what belonged to checkpoints now gone."""
    for left in folder.glob("*.tmp-*"):  # of a write that was killed
        left.unlink()
    for left in folder.glob("step_*.ckpt"):
        if left.is_dir() and not (left / WHOLE).exists():
            shutil.rmtree(left)
    for left in (*folder.glob(f"step_*.ckpt{CHECKSUM}"), *folder.glob("step_*.ckpt.rank_*")):
        if not left.with_name(left.name.partition(".ckpt")[0] + ".ckpt").exists():
            left.unlink()
