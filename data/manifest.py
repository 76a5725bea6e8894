"""The manifest of a folder of precomputed latents: what made them, what is there, and how to tell.

settings.json         what the folder is made with; written first, so that a restart with other settings is refused
shard-000000.tar      <key>.moments.npy, .moments_flip.npy, .text.npy, .pooled.npy, .json (label, caption, name)
records/000000.json   a finished shard: count, size, sha256
null.safetensors      text and pooled of the empty prompt, for guidance
manifest.json         settings, classes, all records; written last
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST, SETTINGS, NULL = "manifest.json", "settings.json", "null.safetensors"
# what latents must share to be trained on, or judged, together
ENCODING = ("format", "vae", "latent_shape", "text", "pooled")


def identity(settings: Mapping[str, Any]) -> str:
    """Hash of the encoding: encoders, scaling and shape, but not of paths, images or shard sizes."""
    encoding = {k: settings[k] for k in ENCODING}
    return hashlib.sha256(json.dumps(encoding, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path) -> dict[str, Any]:
    """Raises ValueError if the file is no JSON object."""
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): remove it and run data.precompute again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Atomically: the file is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after comparing it with itself and with the null text; shards are checked by `check_shard`.

    Raises:
        FileNotFoundError: if there is none, or the null text is missing
        ValueError: if it is of another format, was edited, or does not fit the null text
    """
    path = folder / MANIFEST
    if not path.exists():
        if (folder / SETTINGS).exists():
            raise FileNotFoundError(f"{folder} is unfinished: give the same python -m data.precompute command again")
        raise FileNotFoundError(f"{path} does not exist: expected a folder made by python -m data.precompute")
    manifest = read(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')}, this version reads {FORMAT}: make it anew")
    needed = (*ENCODING, "identity", "shards", "count", "flips", "null", "num_classes", "classes")
    if missing := [k for k in needed if k not in manifest]:
        raise ValueError(f"{path} lacks {missing[0]}: run data.precompute again to write it anew")
    if manifest["identity"] != identity(manifest):
        raise ValueError(f"{path} was edited: its encoders, scaling or shape differ from its identity")
    total = sum(s["count"] for s in manifest["shards"])
    if manifest["count"] != total:
        raise ValueError(f"{path} counts {manifest['count']} samples, its shards {total}: run data.precompute again")
    if manifest["null"] is not None:
        null = folder / NULL
        if not null.exists():
            raise FileNotFoundError(f"{null} is missing: run data.precompute again")
        if digest(null) != manifest["null"]["sha256"]:
            raise ValueError(f"{null} differs from the manifest: remove it and run data.precompute again")
    return manifest


def check_shard(folder: Path, record: Mapping[str, Any], full: bool) -> str | None:
    """What is wrong with a shard; None if it is as recorded. `full` reads it through, else only its size counts."""
    path = folder / record["name"]
    if not path.exists():
        return f"{path} is missing"
    if path.stat().st_size != record["size"]:
        return f"{path} has {path.stat().st_size} bytes, the manifest says {record['size']}"
    if full and digest(path) != record["sha256"]:
        return f"{path} has changed: its checksum differs from the manifest"
    return None
