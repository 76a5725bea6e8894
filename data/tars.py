"""Random access to the samples of webdataset tar shards.

With the index of a shard (`data.tar_index`) a sample is one `pread` per member: any order, any number of workers, and
resuming costs nothing. A streaming reader would have to replay the stream, and shuffles only within its buffer.
"""

from __future__ import annotations

import os
import resource
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from glob import escape, glob
from pathlib import Path
from typing import Any

import numpy as np

from data.damage import Damaged, Tolerance
from data.names import legible, matching
from data.tar_index import ABSENT, json_object, load_index


class Tars:
    """The samples of many shards under one running index.

    A sample is all members whose names agree up to the first dot (`0001.jpg`, `0001.cls`), as webdataset has it. Its
    label is the number in `cls`, or "label" in `json`, where null is none.

    Args:
        shards: a folder, one file, a pattern (`train-{0000..0127}.tar`, `train-*.tar`), or a list of such
        tolerance: of damage: with `skip` the undamaged samples of a shard are used
        cache: folder for the index files; None: beside the shards; see `tar_index.load_index`
        counts: samples of each shard, by its name; a shard with more or fewer is damaged, and not used

    Raises:
        FileNotFoundError: if a shard does not exist
        Damaged: if a shard is truncated, corrupt or empty, and damage is to be refused
        ValueError: if no samples are left
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        tolerance: Tolerance,
        cache: str | None = None,
        counts: Mapping[str, int] | None = None,
    ):
        paths = expand(shards)
        open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if len(paths) + 64 > open_files:
            raise ValueError(f"{len(paths)} shards need as many open files, {open_files} are allowed: raise ulimit -n")
        self.tolerance = tolerance
        self.paths: list[Path] = []
        indices: list[dict[str, np.ndarray]] = []
        for path in _watched(paths):
            try:
                index = load_index(path, cache)
            except Damaged as error:
                tolerance.excuse(error)
                continue
            for fault in index["wrong"]:
                tolerance.excuse(Damaged(f"{path}{fault}"))
            count = len(index["key"])
            if counts is not None and count != counts[path.name]:
                said = f"holds {count} samples, the manifest says {counts[path.name]}"
                tolerance.excuse(Damaged(f"{path} {said}: make it anew"))
            elif count:
                indices.append(index)
                self.paths.append(path)
        if not indices:
            raise ValueError(legible(f"no samples in {shards}: every shard is damaged"))
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

    def path(self, index: int) -> Path:
        """The shard that holds a sample."""
        return self.paths[self._shard[index]]

    def key(self, index: int) -> str:
        return self._key[index].decode(errors="surrogateescape")

    def name(self, index: int) -> str:
        """Shard and key, for messages."""
        return legible(f"{self.path(index)}: {self.key(index)}")

    def has(self, extension: str) -> np.ndarray:
        """n bool: which samples have such a member."""
        return self.size(extension) != ABSENT

    def size(self, extension: str) -> np.ndarray:
        """n int64: bytes of such a member, ABSENT where a sample has none."""
        if extension not in self.extensions:
            return np.full(len(self), ABSENT)
        return self._size[:, self.extensions.index(extension)]

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
        return {} if content is None else json_object(content, self.name(index))

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
    """The files that a folder, path, brace or glob pattern names, or a list of such; each file once.

    A path that exists is taken as it stands; any other is a pattern.

    Raises:
        FileNotFoundError: if one is missing, or a pattern or folder has none
    """
    from braceexpand import UnbalancedBracesError, braceexpand  # installed with webdataset

    found: list[Path] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        names = [str(pattern)]
        if "{" in names[0] and not os.path.lexists(names[0]):
            with suppress(UnbalancedBracesError):
                names = list(braceexpand(names[0]))
        for name in names:
            inside = os.path.isdir(name)
            here = sorted(glob(os.path.join(escape(name), "*.tar"))) if inside else matching(name)
            if not here:
                what = "no .tar files in" if inside else "no shard"
                raise FileNotFoundError(legible(f"{what} {name}: correct the path or the pattern"))
            found += map(Path, here)
    once, again = dict[str, Path](), list[Path]()
    for path in found:
        if once.setdefault(os.path.realpath(path), path) is not path:
            again.append(path)
    if again:
        warnings.warn(
            legible(f"{again[0]} is named twice, by a link, a pattern or a list: each shard is read once"),
            RuntimeWarning,
            stacklevel=2,
        )
    return list(once.values())


def _watched(paths: Sequence[Path]) -> Iterator[Path]:
    """With a progress bar: the first pass over a large data set takes minutes."""
    from rich.progress import track

    yield from track(paths, "indexing shards", transient=True, disable=len(paths) < 8)
