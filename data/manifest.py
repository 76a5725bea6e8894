"""The manifest of a folder of latents: the settings they were made with, the shards, and checksums of both.

settings.json         what the folder is made with; written first, so that a restart with other settings is refused
shard-000000.tar      <key>.moments.npy, .moments_flip.npy, .text.npy, .pooled.npy, .json (label, caption, name);
                      with a vision encoder .features.npy, n d float16, and .features_flip.npy, of the mirrored image;
                      generated: <key>.latent.npy, as a model sees it, .text.npy, .pooled.npy, .json (caption, prompt,
                      number, seed), with points .trajectory.npy, k c *sizes, the solver's states at the manifest's k
                      times (1 = noise); with taps .predictions.npy, s c *sizes, guided, of all s evaluations, and
                      .tap<unit>.npy, s k n d, of their k guidance branches, cond first; with buckets, <key> is
                      <height>x<width>-<index>
records/000000.json   a finished shard: count, size, sha256
null.safetensors      text and pooled of the empty prompt, for guidance
manifest.json         settings, classes, all records, and a checksum of these; written last
samples.png           of generated data: the first images, where they could be decoded
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data.damage import Damaged, file_status

FORMAT = 1
MANIFEST, SETTINGS, NULL = "manifest.json", "settings.json", "null.safetensors"
# settings that latents must share to be trained on, or judged, together
ENCODING = ("format", "vae", "latent_shape", "text", "pooled")


def identity(settings: Mapping[str, Any]) -> str:
    """Hash of the encoding: encoders, scaling and shape, but not of paths, images or shard sizes."""
    encoding = {k: settings[k] for k in ENCODING}
    return hashlib.sha256(json.dumps(encoding, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError if there is none."""
    try:
        file_status(path)
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError, OSError) as error:
        if isinstance(error, Damaged):
            raise
        raise ValueError(f"{path} is no JSON ({error}): remove it and run data.precompute again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its checksum."""
    said = {k: v for k, v in manifest.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, if it is consistent and fits the null text; `check_shard` checks shards.

    Raises:
        FileNotFoundError: if there is none, or the null text is missing
        ValueError: if it is damaged, of another format, was edited, or does not fit the null text
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        if folder.exists() and not folder.is_dir():
            raise FileNotFoundError(f"{folder} is a file: expected a folder made by python -m data.precompute")
        if (folder / SETTINGS).exists():
            maker = "data.generate" if read(folder / SETTINGS).get("generated") else "data.precompute"
            raise FileNotFoundError(f"{folder} is unfinished: give the same python -m {maker} command again")
        raise FileNotFoundError(
            f"{path} does not exist: expected a folder made by python -m data.precompute or data.generate"
        )
    manifest = read(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')}, this version reads {FORMAT}: make it anew")
    needed = (*ENCODING, "identity", "shards", "count", "flips", "null", "num_classes", "classes", "sources")
    if missing := [k for k in needed if k not in manifest]:
        raise ValueError(f"{path} lacks {missing[0]}: run data.precompute again to write it anew")
    if wrong := _misfit(manifest):
        raise ValueError(f"{path} is damaged: {wrong}; run data.precompute again to write it anew")
    if manifest["identity"] != identity(manifest):
        raise ValueError(f"{path} was edited: its encoders, scaling or shape differ from its identity")
    total = sum(s["count"] for s in manifest["shards"])
    if manifest["count"] != total:
        raise ValueError(f"{path} counts {manifest['count']} samples, its shards {total}: run data.precompute again")
    if manifest.get("checksum", sums := checksum(manifest)) != sums:  # older ones have none
        raise ValueError(f"{path} is damaged or was edited: its checksum differs; run data.precompute again")
    if manifest["null"] is not None:
        null = folder / NULL
        if not os.path.lexists(null):
            raise FileNotFoundError(f"{null} is missing: run data.precompute again")
        file_status(null)
        if digest(null) != manifest["null"]["sha256"]:
            raise ValueError(f"{null} differs from the manifest: remove it and run data.precompute again")
    return manifest


# ---- what a manifest may say -----------------------------------------------------------------------------------------

MOST = 2**40  # samples, numbers of a latent, ...: more is damage, and must not be allocated
SHARD = re.compile(r"shard-\d{6,}\.tar")
SHA = re.compile("[0-9a-f]{64}")


def _whole(value: Any, least: int = 0, most: int = MOST) -> bool:
    return type(value) is int and least <= value <= most


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MOST  # compared exactly: 10**400 is no float


def _list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


def _integer(value: Any) -> bool:
    return type(value) is int


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _hash(value: Any) -> bool:
    return isinstance(value, str) and SHA.fullmatch(value) is not None


def _shape(value: Any) -> bool:
    """Channels and one to four sizes: c n of a sound, c y x of an image, c t y x of a video."""
    return _list(value, lambda n: _whole(n, 1)) and 2 <= len(value) <= 5 and math.prod(value) <= 2**31


def _grid(value: Any) -> bool:
    """Rows and columns of patch tokens."""
    return _list(value, lambda n: _whole(n, 1, 2**15)) and len(value) == 2


def _object(**keys: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A test for objects that have these keys with fitting values."""
    return lambda value: isinstance(value, dict) and all(k in value and fits(value[k]) for k, fits in keys.items())


def _maybe(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _shard_name(value: Any) -> bool:
    return isinstance(value, str) and SHARD.fullmatch(value) is not None


# a finished shard, in a manifest and in its record
_shard = _object(name=_shard_name, count=lambda n: _whole(n, 1), size=_whole, sha256=_hash)
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "vae": (
        "null, or name, sha256, and shift and scale as lists of numbers",
        _maybe(_object(name=_text, sha256=_hash, shift=lambda v: _list(v, _number), scale=lambda v: _list(v, _number))),
    ),
    "latent_shape": ("two to five whole numbers above 0", _shape),
    "text": (
        "null, or the width and max_tokens of an encoder",
        _maybe(_object(width=lambda n: _whole(n, 1, 2**24), max_tokens=lambda n: _whole(n, 1, 2**24))),
    ),
    "pooled": ("null, or the width of an encoder", _maybe(_object(width=lambda n: _whole(n, 1, 2**24)))),
    "flips": ("true or false", _flag),
    "count": ("a whole number", _whole),
    "num_classes": ("null, or a whole number above 0", _maybe(lambda n: _whole(n, 1, 2**31))),
    "classes": ("null, or a list of names", _maybe(lambda v: _list(v, _text))),
    "null": ("null, or a sha256", _maybe(_object(sha256=_hash))),
    "shards": ("a list of shards with name, count, size and sha256", lambda v: _list(v, _shard)),
    "sources": ("an object", _object(vae=_maybe(_text))),
    "dtype": ("float16 or float32", lambda v: v in ("float16", "float32")),
    "shard_size": ("a whole number above 0", lambda n: _whole(n, 1)),
    "features": (
        "name, sha256, width and grid of a vision encoder",
        _object(name=_text, sha256=_hash, width=lambda n: _whole(n, 1, 2**24), grid=_grid),
    ),
    "buckets": (
        "a list of buckets with size, latent_shape and count",
        lambda v: _list(
            v,
            _object(size=lambda s: _list(s, lambda n: _whole(n, 1)) and len(s) == 2, latent_shape=_shape, count=_whole),
        ),
    ),
    "generated": (
        "how a teacher made it, in numbers",
        _object(
            teacher=_hash, guidance=_number, steps=lambda n: _whole(n, 1), solver=_text, shift=_number, seed=_integer
        ),
    ),
}


# keys that are not interpreted, or compared elsewhere
_FREE = ("format", "identity", "checksum", "size", "precision", "images", "skipped")


def _misfit(manifest: Mapping[str, Any]) -> str | None:
    """The first fault of a manifest; None if there is none."""
    if other := sorted({*manifest} - {*_KINDS, *_FREE}):
        return f"it has a key {other[0]!r}, which none has"
    for key, (expected, fits) in _KINDS.items():
        if key in manifest and not fits(manifest[key]):
            return f"{key} is {json.dumps(manifest[key]):.60}, expected {expected}"
    shape, shards, classes = manifest["latent_shape"], manifest["shards"], manifest["classes"]
    channels = shape[0]
    names = [shard["name"] for shard in shards]
    if len(set(names)) < len(names):
        return "it lists a shard twice"
    if classes is not None and len(classes) != manifest["num_classes"]:
        return f"it names {len(classes)} classes and counts {manifest['num_classes']}"
    vae = manifest["vae"]
    if vae is None and not manifest.get("generated"):
        return "vae is null, though no teacher generated it"
    if vae is not None and not all(len(vae[k]) in (1, channels) for k in ("shift", "scale")):
        return f"the VAE's shift and scale are not of one or {channels} channels"
    if (made := manifest.get("generated")) and not _list(made.get("times", []), _number):
        return "the times of the stored states are no numbers"
    buckets = manifest.get("buckets")
    if "features" in manifest and not all(_grid(b.get("grid")) for b in buckets or ()):
        return "a bucket has no grid of features, rows and columns"
    if buckets is not None and any(
        len(b["latent_shape"]) != len(shape) or b["latent_shape"][0] != channels for b in buckets
    ):
        return "a bucket has latents of other channels, or of another number of sizes"
    if buckets is not None and sum(bucket["count"] for bucket in buckets) != sum(s["count"] for s in shards):
        return "its buckets and its shards count differently"
    return None


def read_record(path: Path) -> dict[str, Any]:
    """The record of a finished shard.

    Raises:
        ValueError: if the record is damaged, or of another shard than its file name says
    """
    record = read(path)
    empty = _object(name=_shard_name, count=lambda n: n == 0)(record)
    buckets = record.get("buckets", {})
    counted = isinstance(buckets, dict) and all(map(_whole, buckets.values()))
    if not ((empty or _shard(record)) and _list(record.get("skipped"), _text) and counted):
        raise ValueError(f"{path} is damaged: remove it, and the same command makes its shard anew")
    if record["name"] != f"shard-{path.stem}.tar":
        raise ValueError(f"{path} is of {record['name']}: remove it, and the same command makes its shard anew")
    return record


def check_shard(folder: Path, record: Mapping[str, Any], full: bool) -> str | None:
    """The fault of a shard; None if it is as recorded. `full` compares the checksum too, else only the size counts."""
    path = folder / record["name"]
    if not os.path.lexists(path):
        return f"{path} is missing"
    try:
        size = file_status(path).st_size
    except Damaged as error:
        return str(error)
    if size != record["size"]:
        return f"{path} has {size} bytes, the manifest says {record['size']}"
    if full and digest(path) != record["sha256"]:
        return f"{path} has changed: its checksum differs from the manifest"
    return None


def teacher_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a teacher's configuration, edits and weight files: all that decides its output.

    Reads all weights once: some seconds for every 10 GB.

    Args:
        path: artifact, run or `diffusers` folder, or hub id

    Raises:
        FileNotFoundError: if there is no model
        ValueError: if its configuration is no JSON
    """
    from edit.artifacts.location import find
    from edit.artifacts.reference import home

    folder = find(path)
    config = {k: v for k, v in read(folder / "config.json").items() if k == "_class_name" or not k.startswith("_")}
    described = read(folder / "edits.json") if (folder / "edits.json").exists() else {}
    edits = {k: described.get(k) or None for k in ("edits", "folded", "objective")}
    total = hashlib.sha256(json.dumps([config, edits], sort_keys=True).encode())
    weights = sorted(home(folder, described).glob("*.safetensors"))
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
    """Compare a cache with expectations; None expects nothing.

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


def encoder_facts(path: str, side: int | None = None) -> dict[str, Any]:
    """What a manifest says of a vision encoder: its name, and what `Encoder.identity` gives.

    Args:
        path: folder or hub id
        side: as of `edit.alignment.encoder.Encoder`

    Raises:
        FileNotFoundError, ValueError: if there is no encoder
    """
    from edit.alignment.encoder import Encoder

    name = os.path.basename(os.path.abspath(path)) if os.path.isdir(path) else path  # a folder may be moved
    return Encoder(path, side).identity() | {"name": name}


def check_encoder(folder: Path, described: Mapping[str, Any], encoder: str | None) -> None:
    """Compare a cache's features with an expectation.

    Args:
        folder: of the cache, for messages
        described: its manifest
        encoder: sha256 of the vision encoder, or its folder or hub id; None expects nothing

    Raises:
        FileNotFoundError: if the encoder is given as a folder that is not there
        ValueError: if the cache has no features, or those of another encoder
    """
    if encoder is None:
        return
    made = described.get("features")
    if not made:
        raise ValueError(
            f"{folder} has no features of a vision encoder, and those of {encoder} are expected: make it anew with "
            "data.precompute --features, or leave out encoded_by"
        )
    wanted = encoder if SHA.fullmatch(encoder) else encoder_facts(encoder)["sha256"]
    if made["sha256"] != wanted:
        raise ValueError(
            f"{folder} has features of another encoder, {made['name']} {made['sha256']:.12}..., expected is "
            f"{wanted:.12}...: give that encoder, or make the folder anew with data.precompute --features"
        )


def _alike(a: Any, b: Any) -> bool:
    """Whether values are equal, numbers to 6 digits."""
    return a == b if isinstance(a, str) else math.isclose(float(a), float(b), rel_tol=1e-6)
