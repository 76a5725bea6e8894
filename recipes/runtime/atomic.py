"""How Lightning writes a checkpoint file: whole or not at all, with its checksum."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from recipes.config.errors import UserError
from recipes.runtime.checkpoint_files import checksum_of
from recipes.runtime.files import write


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
