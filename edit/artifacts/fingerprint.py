"""Whether a model is still the same: one number that changes with its weights, edits and configuration."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from edit.artifacts.description import read_description
from edit.artifacts.location import find
from edit.artifacts.reference import home
from edit.artifacts.weights import Headers, headers_of
from edit.inputs import trust

SAMPLED = 4096  # bytes of each tensor that a fingerprint reads


def fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 that changes when a model is trained further, edited or replaced; the folder's name, metrics and shards
    do not count.

    Milliseconds also for large models: of each tensor the name, type, shape and first 4 KiB are read. Training moves
    all elements of a tensor; one who changes some others on purpose is not found out.

    Args:
        path: artifact, run or `diffusers` folder, or hub id

    Raises:
        FileNotFoundError: if there is no model, or it is not whole
        ValueError: if it cannot be read
    """
    folder = find(path)
    config = {
        k: v for k, v in trust.read_json(folder / "config.json").items() if k == "_class_name" or not k.startswith("_")
    }
    described = read_description(folder)
    total = hashlib.sha256(json.dumps([config, described["edits"], described["folded"]], sort_keys=True).encode())
    weights = home(folder, described)
    own = weights / "edits.safetensors"
    tensors = sorted(t for file in [*Headers(weights).files, *([own] if own.exists() else [])] for t in _sampled(file))
    for described_as, sample in tensors:
        total.update(described_as.encode())
        total.update(sample)
    return total.hexdigest()


def _sampled(file: Path) -> Iterator[tuple[str, bytes]]:
    """Name, type and shape of each tensor in a safetensors file, with its first bytes."""
    headers_of(file)  # raises if the header promises more than the file holds
    with open(file, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            first, end = tensor["data_offsets"]
            f.seek(8 + size + first)
            yield f"{name} {tensor['dtype']} {tensor['shape']}", f.read(min(SAMPLED, end - first))
