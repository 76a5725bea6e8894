"""Checkpoint files: written whole or not at all, each with its checksum; those of single ranks beside the common one.

step_00000500.ckpt                  weights, average, optimiser, schedule, places in the data: written by rank 0
step_00000500.ckpt.rank_0_of_2      what a rank alone knows (`Recipe.kept`): written before it, where there is any
*.sha256                            of each

Torch is imported inside: what a folder holds is told without it. `recipes.runtime.atomic` writes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from recipes.config.errors import UserError
from recipes.runtime.files import is_first

NAME = r"step_(\d+)\.ckpt"
# parts of a checkpoint that resuming needs
NEEDED = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step")

WHOLE = "whole"  # file of checksums in a checkpoint folder (DeepSpeed), written when all ranks have finished
CHECKSUM = ".sha256"  # suffix to the name of a checkpoint file
RANKS = "ranks"  # key of a checkpoint: how many files of ranks belong to it; absent: none


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
        import torch

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
    from edit.artifacts.checksums import of_file

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


# ---- whole ones ------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [p for p in folder.glob("step_*.ckpt") if re.fullmatch(NAME, p.name)]
    return sorted((p for p in found if p.is_file() or (p / WHOLE).exists()), key=step_of)


def step_of(checkpoint: Path) -> int:
    match = re.fullmatch(NAME, checkpoint.name)
    assert match, checkpoint
    return int(match.group(1))


def files_in(checkpoint: Path) -> list[str]:
    """All files of a checkpoint folder except WHOLE."""
    names = (str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file())
    return sorted(name for name in names if name != WHOLE)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; damaged ones are named and skipped. None: there are no checkpoints.

    Every rank reads and hashes the files, and so all choose the same.

    Raises:
        UserError: if there are checkpoints, and all are damaged
    """
    damaged: list[str] = []
    for path in reversed(checkpoints(folder)):
        if (complaint := damage(path)) is None:
            return path
        damaged.append(f"{path.name}: {complaint}")
        if is_first():
            print(f"warning: {path} is damaged ({complaint}); trying an older checkpoint", flush=True)
    if damaged:
        raise UserError(
            f"no checkpoint in {folder} is whole ({'; '.join(damaged)}): bring one back from a copy, or delete them to "
            "train from the start"
        )
    return None


def unchanged(path: Path) -> bool:
    """Whether a checkpoint file is what was saved, by its checksum; torch is not needed for that. False: it is not, or
    `damage` must tell."""
    kept = read_checksums(checksum_of(path)).get(path.name) if path.is_file() else None
    if kept is None:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == kept


def damage(path: Path) -> str | None:
    """The damage of a checkpoint, in words; None: it is whole.

    A checkpoint without a checksum (of an earlier version, or after a kill) must be readable.

    Raises:
        PermissionError: if it may not be read, which is no damage
    """
    import torch

    from edit.artifacts.checksums import of_file

    try:
        if path.is_dir():
            kept = read_checksums(path / WHOLE)
            wrong = [name for name, sum in kept.items() if not (path / name).is_file() or of_file(path / name) != sum]
            return f"{wrong[0]} is not what was saved" if wrong else None
        if (kept := read_checksums(checksum_of(path)).get(path.name)) and kept != of_file(path):
            return "its bytes are not those that were saved"
        if not kept and (torn := torn_record(path)):
            return f"{torn} in it is torn"
        mapped = str(path).isprintable()  # torch maps no file whose name is no UTF-8
        content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        missing = [key for key in NEEDED if not isinstance(content, dict) or key not in content]
        if missing:
            return f"it has no {missing[0]}"
        if content["global_step"] != step_of(path):
            return f"it holds step {content['global_step']}"
        return rank_damage(path, content.get(RANKS, 0))
    except Exception as error:  # damaged files raise whatever they run into
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
            raise
        return f"it cannot be read, {type(error).__name__}"


def torn_record(path: Path) -> str | None:
    """The first part of a checkpoint file that fails the zip archive's own, weaker checksums; None: there is none."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()
