"""Checksums of an artifact: `edit.load` reads exactly the files that `edit.save` wrote.

`edits.json` keeps the SHA-256 of every other file beside it, and of its own content. A folder that was changed on
purpose, by a tool that saved the weights again or by hand, is accepted as it is with

    python -m recipes.checksums runs/digits
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from edit.artifacts.description import read_description
from edit.artifacts.location import find

DESCRIPTION = "edits.json"
CONFIG = "config.json"
WEIGHTS = ("*.safetensors.index.json", "diffusion_pytorch_model*.safetensors", "edits.safetensors")
THREADS = 8  # files that are read at once: one is hashed at about 2 GB/s, a core each


def of_file(path: Path) -> str:
    """SHA-256 of a file, which is never held in memory whole."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def of_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    names = sorted(names)
    with ThreadPoolExecutor(THREADS) as threads:  # hashing releases the interpreter's lock
        return dict(zip(names, threads.map(lambda name: of_file(folder / name), names), strict=True))


def of_description(description: Mapping[str, Any]) -> str:
    """SHA-256 of the content of edits.json, however it is laid out, without this number itself."""
    kept = {k: v for k, v in description.get("checksums", {}).items() if k != DESCRIPTION}
    return hashlib.sha256(json.dumps({**description, "checksums": kept}, sort_keys=True).encode()).hexdigest()


def signed(description: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The description with the checksums of the files beside it and of itself."""
    described = {**description, "checksums": of_files(folder, [CONFIG, *_weights(folder)])}
    described["checksums"][DESCRIPTION] = of_description(described)
    return described


def _weights(folder: Path) -> set[str]:
    return {f.name for pattern in WEIGHTS for f in folder.glob(pattern)}


def verify(folder: Path, description: Mapping[str, Any], weights: bool = True) -> None:
    """Compare files with their checksums. A description without checksums (older version, stock folder) passes.

    Args:
        folder: of the artifact
        description: content of its edits.json
        weights: False: compare the descriptions alone

    Raises:
        FileNotFoundError: if one is missing
        ValueError: naming the first that differs, or was not there when the artifact was saved
    """
    kept = description.get("checksums")
    if kept is None:
        return
    where = folder / DESCRIPTION
    if not isinstance(kept, dict) or any(Path(k).name != k or not isinstance(v, str) for k, v in kept.items()):
        raise ValueError(f"{where}: its checksums are not one for each file beside it: the file is damaged")
    if kept.get(DESCRIPTION) != of_description(description):
        raise ValueError(differs(where))
    files = {CONFIG} | (set(kept) - {DESCRIPTION} | _weights(folder) if weights else set())
    if missing := sorted(name for name in files if not (folder / name).is_file()):
        index = next((name for name in missing if name.endswith(".json")), missing[0])
        raise FileNotFoundError(f"{folder / index} is missing: the artifact is not whole")
    for name, found in of_files(folder, files).items():
        if found != kept.get(name):
            raise ValueError(differs(folder / name))


def differs(file: Path) -> str:
    return (
        f"{file} is not what was saved there: if it is damaged, restore it; if it was changed on purpose, accept it "
        f"with `python -m recipes.checksums {file.parent}`"
    )


def accept(path: str | os.PathLike) -> Path:
    """Make an artifact's checksums those of its files as they are now.

    Returns:
        The artifact's folder.

    Raises:
        FileNotFoundError: if there is none
        ValueError: if it has no edits.json, or that cannot be read
    """
    folder = find(path)
    if not (folder / DESCRIPTION).is_file():
        raise ValueError(f"{folder} has no {DESCRIPTION}: only artifacts have checksums, a stock folder is just loaded")
    description = {k: v for k, v in read_description(folder).items() if k != "checksums"}
    temporary = folder / f".{DESCRIPTION}.tmp-{os.getpid()}"
    temporary.write_text(json.dumps(signed(description, folder), indent=2) + "\n")
    os.replace(temporary, folder / DESCRIPTION)
    return folder
