"""The manifest of a folder of precomputed or generated latents: what made them, what is there, and how to tell.

settings.json         what the folder is made with; written first, so that a restart with other settings is refused
shard-000000.tar      <key>.moments.npy, .moments_flip.npy, .text.npy, .pooled.npy, .json (label, caption, name);
                      generated: <key>.latent.npy, as a model sees it, .text.npy, .pooled.npy, .json (caption, prompt,
                      number, seed), with points .trajectory.npy, k c y x, the solver's states at the manifest's k times
                      (1 = noise); with buckets, <key> is <height>x<width>-<index>
records/000000.json   a finished shard: count, size, sha256
null.safetensors      text and pooled of the empty prompt, for guidance
manifest.json         settings, classes, all records; written last
samples.png           of generated data: the first images, where they could be decoded
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
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
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): remove it and run data.precompute again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Atomically: the file is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
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
            maker = "data.generate" if read(folder / SETTINGS).get("generated") else "data.precompute"
            raise FileNotFoundError(f"{folder} is unfinished: give the same python -m {maker} command again")
        raise FileNotFoundError(
            f"{path} does not exist: expected a folder made by python -m data.precompute or data.generate"
        )
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


def teacher_hash(path: str | os.PathLike) -> str:
    """SHA-256 of what decides a teacher's output: its configuration, its edits, the bytes of its weight files.

    Not of its folder's name, its metrics or its data set. Reads all weights once: some seconds for every 10 GB.

    Args:
        path: artifact, run or `diffusers` folder, or hub id

    Raises:
        FileNotFoundError: if there is no model
        ValueError: if its configuration is no JSON
    """
    from edit.checkpoint import find

    folder = find(path)
    config = {k: v for k, v in read(folder / "config.json").items() if k == "_class_name" or not k.startswith("_")}
    described = read(folder / "edits.json") if (folder / "edits.json").exists() else {}
    edits = {k: described.get(k) or None for k in ("edits", "folded", "objective")}
    total = hashlib.sha256(json.dumps([config, edits], sort_keys=True).encode())
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"{folder} holds no .safetensors file: expected an artifact or a diffusers folder")
    for file in weights:
        total.update(digest(file).encode())
    return total.hexdigest()


def check_teacher(
    folder: Path,
    described: Mapping[str, Any],
    teacher: str | None,
    guidance: float | None,
    steps: int | None,
    shift: float | None,
) -> None:
    """Compare a cache with what is expected of it; None expects nothing.

    Args:
        folder: of the cache, for messages
        described: its manifest
        teacher: hash of the teacher, or where it is
        guidance: scale
        steps: of the solver
        shift: of the solver's times

    Raises:
        FileNotFoundError: if the teacher is given as a folder that is not there
        ValueError: naming the first difference
    """
    expected = {"teacher": teacher, "guidance": guidance, "steps": steps, "shift": shift}
    expected = {name: value for name, value in expected.items() if value is not None}
    made = described.get("generated")
    if expected and not made:
        raise ValueError(f"{folder} holds no generated data: leave out what is expected of it, or run data.generate")
    for name, value in expected.items():
        if name == "teacher":
            value = value if re.fullmatch("[0-9a-f]{64}", str(value)) else teacher_hash(value)
        if not _alike(made[name], value):
            told = (f"{made[name]:.12}...", f"{value:.12}...") if name == "teacher" else (made[name], value)
            raise ValueError(
                f"{folder} was generated with {name}={told[0]}, expected is {told[1]}: choose another folder, or "
                f"generate it anew"
            )


def _alike(a: Any, b: Any) -> bool:
    """Equal; numbers to 6 digits, as people write them."""
    return a == b if isinstance(a, str) else math.isclose(float(a), float(b), rel_tol=1e-6)
