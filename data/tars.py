"""Random access to the samples of webdataset tar shards.

A shard is read through once to learn where each member lies; that index is kept on disk until the shard changes. A
sample is then one `pread` per member: any order, any number of workers, and resuming costs nothing. A streaming reader
would have to replay the stream, and shuffles only within its buffer.
"""

from __future__ import annotations

import hashlib
import os
import resource
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from glob import escape, glob
from pathlib import Path
from typing import Any

import numpy as np

from data.damage import Damaged, Tolerance
from data.plain_text import class_digits, class_number, read_json

FORMAT = 2  # of the index files; 1 held labels that were rounded
ABSENT = -1


class Tars:
    """The samples of many shards under one running index.

    A sample is all members whose names agree up to the first dot (`0001.jpg`, `0001.cls`), as webdataset has it. Its
    label is the number in `cls`, or "label" in `json`, where null is none.

    Args:
        shards: a folder, one file, a pattern (`train-{0000..0127}.tar`, `train-*.tar`), or a list of such
        tolerance: what happens to a damaged shard; skipping leaves the whole shard out
        cache: folder for the index files; None: beside the shards

    Raises:
        FileNotFoundError: if a shard does not exist
        Damaged: if a shard is truncated, corrupt or empty, and damage is to be refused
        ValueError: if no samples are left
    """

    def __init__(self, shards: str | Sequence[str], tolerance: Tolerance, cache: str | None = None):
        paths = expand(shards)
        open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if len(paths) + 64 > open_files:
            raise ValueError(f"{len(paths)} shards need as many open files, {open_files} are allowed: raise ulimit -n")
        self.tolerance = tolerance
        self.paths: list[Path] = []
        indices: list[dict[str, np.ndarray]] = []
        for path in _watched(paths):
            try:
                indices.append(load_index(path, cache))
                self.paths.append(path)
            except Damaged as error:
                tolerance.excuse(error)
        if not indices:
            raise ValueError(f"no samples in {shards}: every shard is damaged")
        self.counts = [len(i["key"]) for i in indices]  # samples of each shard
        self.extensions: list[str] = sorted({str(e) for i in indices for e in i["extension"]})
        columns = [[self.extensions.index(str(e)) for e in i["extension"]] for i in indices]
        self._offset, self._size = np.full((2, sum(self.counts), len(self.extensions)), ABSENT, dtype=np.int64)
        first = 0
        for index, column, count in zip(indices, columns, self.counts, strict=True):
            self._offset[first : first + count, column] = index["offset"]
            self._size[first : first + count, column] = index["size"]
            first += count
        self._shard = np.repeat(np.arange(len(self.paths)), self.counts)
        self._key = np.concatenate([i["key"] for i in indices])
        self.labels = np.concatenate([i["label"] for i in indices])  # n int64, ABSENT where a sample has none
        self._open: dict[int, int] = {}  # descriptors; pread keeps no position, so forks and threads may share them

    def __len__(self) -> int:
        return len(self._key)

    def key(self, index: int) -> str:
        return self._key[index].decode()

    def name(self, index: int) -> str:
        """For messages: shard and key."""
        return f"{self.paths[self._shard[index]]}: {self.key(index)}"

    def has(self, extension: str) -> np.ndarray:
        """n bool: which samples have such a member."""
        if extension not in self.extensions:
            return np.zeros(len(self), dtype=bool)
        return self._size[:, self.extensions.index(extension)] != ABSENT

    def read(self, index: int, extension: str) -> bytes | None:
        """A member's content; None if the sample has no such member.

        Raises:
            Damaged: if the shard can no longer be read there
        """
        if extension not in self.extensions:
            return None
        column = self.extensions.index(extension)
        size, offset = int(self._size[index, column]), int(self._offset[index, column])
        if size == ABSENT:
            return None
        try:
            content = os.pread(self._descriptor(int(self._shard[index])), size, offset)
        except OSError as error:
            raise Damaged(f"{self.name(index)}.{extension} cannot be read ({error})") from error
        if len(content) < size:
            raise Damaged(f"{self.name(index)}.{extension} ends after {len(content)} of {size} bytes: truncated")
        return content

    def json(self, index: int) -> dict[str, Any]:
        """The `json` member; empty if there is none. Raises Damaged if it is no JSON object."""
        content = self.read(index, "json")
        return {} if content is None else _object(content, self.name(index))

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            descriptor = os.open(self.paths[shard], os.O_RDONLY)
            if self._open.setdefault(shard, descriptor) != descriptor:  # another thread was faster
                os.close(descriptor)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a spawned worker opens its own

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)


def expand(shards: str | Sequence[str]) -> list[Path]:
    """The files that a folder, path, brace or glob pattern names, or a list of such.

    Raises:
        FileNotFoundError: if one is missing, or a pattern or folder has none
    """
    from braceexpand import braceexpand  # comes with webdataset

    found: list[Path] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        for name in braceexpand(str(pattern)) if "{" in str(pattern) else [str(pattern)]:
            here = sorted(glob(os.path.join(escape(name), "*.tar") if os.path.isdir(name) else name))
            if not here:
                what = "no .tar files in" if os.path.isdir(name) else "no shard"
                raise FileNotFoundError(f"{what} {name}: correct the path or the pattern")
            found += map(Path, here)
    return found


def load_index(path: Path, cache: str | None = None) -> dict[str, np.ndarray]:
    """The index of a shard, from disk if the shard has not changed since (size and time of change).

    Raises:
        Damaged: see `scan`
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error})") from error
    stamp = np.array([FORMAT, stat.st_size, stat.st_mtime_ns])
    kept = path.with_name(f".{path.name}.index.npz")
    if cache is not None:
        place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
        kept = Path(cache, f"{place}-{path.name}.index.npz")
    try:
        with open(kept, "rb") as file, np.load(file, allow_pickle=False) as stored:
            if np.array_equal(stored["stamp"], stamp):
                return {name: stored[name] for name in ("key", "extension", "offset", "size", "label")}
    except Exception:  # absent, of another format, or damaged in any of zipfile's ways: it is only a copy
        pass
    index = scan(path)
    temporary = kept.with_name(f"{kept.name}.tmp-{os.getpid()}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, stamp=stamp, **index)
        os.replace(temporary, kept)
    except OSError as error:
        warnings.warn(
            f"the index of {path} is made anew at every start, because it cannot be kept in {kept.parent} ({error}); "
            f"give a folder with cache=",
            RuntimeWarning,
            stacklevel=2,
        )
        with suppress(OSError):
            temporary.unlink()
    return index


def scan(path: Path) -> dict[str, np.ndarray]:
    """Read a shard's headers through to its end.

    Returns:
        key n bytes, extension e str, offset and size n e int64 (ABSENT: no such member), label n int64

    Raises:
        Damaged: if it is truncated, corrupt, compressed or without samples
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, base = os.path.split(member.name)
                stem, _, extension = base.partition(".")
                if not member.isreg() or not stem:
                    continue
                key, extension = os.path.join(folder, stem), extension.lower()
                members = samples.setdefault(key, {})
                if extension in members:
                    raise Damaged(f"{path} holds {member.name} twice")
                members[extension] = member.offset_data, member.size
                if extension == "cls" or extension == "json" and key not in labels:
                    tar.fileobj.seek(member.offset_data)
                    label = _label(tar.fileobj.read(member.size), extension, f"{path}: {member.name}")
                    if label is not None:
                        labels[key] = label
            # tarfile stops without a word at a corrupt or missing header; a whole archive ends in zeros
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise Damaged(f"{path} is truncated or corrupt at byte {tar.offset} (after {len(samples)} samples)")
    except (tarfile.TarError, OSError) as error:
        raise Damaged(f"{path} is truncated, corrupt or no uncompressed tar file ({error})") from error
    if not samples:
        raise Damaged(f"{path} holds no samples")
    extensions = sorted({e for members in samples.values() for e in members})
    nowhere = (ABSENT, ABSENT)
    spans = np.array([[m.get(e, nowhere) for e in extensions] for m in samples.values()], dtype=np.int64)
    return {
        "key": np.array([key.encode() for key in samples]),
        "extension": np.array(extensions),
        "offset": spans[..., 0],
        "size": spans[..., 1],
        "label": np.array([labels.get(key, ABSENT) for key in samples], dtype=np.int64),
    }


def _label(content: bytes, extension: str, name: str) -> int | None:
    if extension == "cls":
        return class_digits(content, name)
    value = _object(content, name).get("label")
    return None if value is None else class_number(value, name)


def _object(content: bytes, name: str) -> dict[str, Any]:
    value = read_json(content, name)
    if not isinstance(value, dict):
        raise Damaged(f"{name} holds a JSON {type(value).__name__}, expected an object")
    return value


def _watched(paths: Sequence[Path]) -> Iterator[Path]:
    """With a progress bar: the first pass over a large data set takes minutes."""
    from rich.progress import track

    yield from track(paths, "indexing shards", transient=True, disable=len(paths) < 8)
