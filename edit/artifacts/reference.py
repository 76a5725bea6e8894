"""Artifacts without weights of their own: `edits.json` names the folder whose weights they use.

    refers: {path: ../../digits/artifact, files: {config.json: <SHA-256>, diffusion_pytorch_model.safetensors: ...}}

A reference comes from outside, like all of an artifact. Its path is relative to the artifact's folder and leads to an
artifact or `diffusers` folder that holds its weights itself, in safetensors. Only files with the names of weights are
read there, and each has its checksum in the reference: whoever wrote it has had these very files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edit.inputs import trust

CONFIG = "config.json"
WEIGHTS = ("*.safetensors.index.json", "diffusion_pytorch_model*.safetensors", "edits.safetensors")


def weight_files(folder: Path) -> set[str]:
    """Names of the files that hold weights, and of the index of shards."""
    return {f.name for pattern in WEIGHTS for f in folder.glob(pattern)}


def home(folder: Path, description: Mapping[str, Any]) -> Path:
    """The folder that holds an artifact's weights: the artifact's own, or the one it refers to.

    Args:
        folder: of the artifact
        description: content of its edits.json

    Raises:
        FileNotFoundError: if the folder that it refers to is gone
        ValueError: if the reference is damaged, or leads to something that may not be referred to
    """
    if description.get("refers") is None:
        return folder
    path, _ = parts(folder, description)
    found = (folder.resolve() / path).resolve()
    if not (found / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} refers to the weights in {found}, where there is no artifact any more: put it back, or make "
            "this one again with python -m recipes.apply"
        )
    told = found / "edits.json"
    if told.is_file() and trust.read_json(told).get("refers") is not None:
        raise ValueError(f"{folder} refers to {found}, which has no weights itself: refer to the one that has them")
    if not any(name.endswith(".safetensors") for name in weight_files(found)):
        raise FileNotFoundError(f"{folder} refers to {found}, which holds no weights in safetensors any more")
    return found


def parts(folder: Path, description: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Path and checksums of a reference.

    Raises:
        ValueError: if it is not what `edit.artifacts.checksums.reference` writes
    """
    refers, where = description["refers"], folder / "edits.json"
    path, files = (refers.get("path"), refers.get("files")) if isinstance(refers, dict) else (None, None)
    if not isinstance(path, str) or not isinstance(files, dict):
        raise ValueError(f"{where} holds {trust.cut(refers)} for refers: expected the path and files of other weights")
    if not path or "\0" in path or os.path.isabs(path):
        raise ValueError(f"{where} refers to {trust.cut(path)}: expected a path relative to {folder}")
    if odd := [k for k, v in files.items() if k != CONFIG and not _names_weights(k) or not isinstance(v, str)]:
        raise ValueError(f"{where} refers to {trust.cut(odd[0])}: expected names of files with weights, and checksums")
    return path, files


def _names_weights(name: str) -> bool:
    return Path(name).name == name and any(Path(name).match(pattern) for pattern in WEIGHTS)
