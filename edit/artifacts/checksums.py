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
from edit.artifacts.reference import CONFIG, home, parts, weight_files

DESCRIPTION = "edits.json"
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
    described = {**description, "checksums": of_files(folder, [CONFIG, *weight_files(folder)])}
    described["checksums"][DESCRIPTION] = of_description(described)
    return described


def reference(folder: Path, to: Path) -> dict[str, Any]:
    """The reference of an artifact to the weights in another folder: see `edit.artifacts.reference`.

    Args:
        folder: of the artifact, where it will be
        to: folder with the weights
    """
    path = os.path.relpath(os.path.realpath(to), os.path.realpath(folder))
    return {"path": path, "files": of_files(to, [CONFIG, *weight_files(to)])}


def identity(folder: Path, description: Mapping[str, Any]) -> str:
    """A text that is the same for artifacts whose stock weights are the same files, as far as that can be told without
    reading them: by their checksums; for a folder that has none, by its place.

    Args:
        folder: of the artifact
        description: content of its edits.json; compared with the files by `verify`

    Raises:
        FileNotFoundError, ValueError: as `home`
    """
    at = home(folder, description)
    known = description.get("checksums")
    if description.get("refers") is not None:
        known = parts(folder, description)[1] if (at / DESCRIPTION).is_file() else None
    if not isinstance(known, dict):
        return str(at.resolve())
    stock = {k: v for k, v in known.items() if k not in (DESCRIPTION, "edits.safetensors")}
    return json.dumps(stock, sort_keys=True)


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
    if weights and description.get("refers") is not None:
        _verify_reference(folder, description)
    kept = description.get("checksums")
    if kept is None:
        return
    where = folder / DESCRIPTION
    if not isinstance(kept, dict) or any(Path(k).name != k or not isinstance(v, str) for k, v in kept.items()):
        raise ValueError(f"{where}: its checksums are not one for each file beside it: the file is damaged")
    if kept.get(DESCRIPTION) != of_description(description):
        raise ValueError(differs(where))
    files = {CONFIG} | (set(kept) - {DESCRIPTION} | weight_files(folder) if weights else set())
    if missing := sorted(name for name in files if not (folder / name).is_file()):
        index = next((name for name in missing if name.endswith(".json")), missing[0])
        raise FileNotFoundError(f"{folder / index} is missing: the artifact is not whole")
    for name, found in of_files(folder, files).items():
        if found != kept.get(name):
            raise ValueError(differs(folder / name))


def _verify_reference(folder: Path, description: Mapping[str, Any]) -> None:
    """Compare the files that an artifact refers to with the checksums in its reference."""
    at, (_, kept) = home(folder, description), parts(folder, description)
    there = {CONFIG, *weight_files(at)}
    found = of_files(at, there & set(kept))
    if changed := sorted(name for name in there | set(kept) if name not in kept or found.get(name) != kept[name]):
        raise ValueError(
            f"{folder} refers to {at / changed[0]}, which is not what it was then: restore it, make this artifact "
            f"again with python -m recipes.apply, or accept the change with `python -m recipes.checksums {folder}`"
        )


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
    if description.get("refers") is not None:
        description["refers"] = reference(folder, home(folder, description))
    temporary = folder / f".{DESCRIPTION}.tmp-{os.getpid()}"
    temporary.write_text(json.dumps(signed(description, folder), indent=2) + "\n")
    os.replace(temporary, folder / DESCRIPTION)
    return folder
