"""Random access to the samples of webdataset tar shards.

A shard is read through once to learn where each member lies; that index is kept on disk until the shard changes. A
sample is then one `pread` per member: any order, any number of workers, and resuming costs nothing. A streaming reader
would have to replay the stream, and shuffles only within its buffer.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import resource
import tarfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from glob import escape, glob
from pathlib import Path
from typing import Any

import numpy as np

from data.damage import Damaged, Tolerance, plain
from data.names import legible, matching
from data.plain_text import class_digits, class_number, read_json

FORMAT = 3  # of the index files; 1 held labels that were rounded
ABSENT = -1
TICK = 0.02  # seconds: files that change twice within one may keep their times
LABELS = (b"V",)  # members that GNU tar puts in for itself: the archive's label
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}

Span = tuple[int, int]  # offset and size


class Tars:
    """The samples of many shards under one running index.

    A sample is all members whose names agree up to the first dot (`0001.jpg`, `0001.cls`), as webdataset has it. Its
    label is the number in `cls`, or "label" in `json`, where null is none.

    Args:
        shards: a folder, one file, a pattern (`train-{0000..0127}.tar`, `train-*.tar`), or a list of such
        tolerance: what happens to damage: skipping goes on with the whole samples of a shard
        cache: folder for the index files; None: beside the shards
        counts: how many samples a shard of this name has; one that has more or fewer is damaged, and not used

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
        """For messages: shard and key."""
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
    """The files that a folder, path, brace or glob pattern names, or a list of such; each file once.

    What exists under a name is taken as it stands; only else the name is a pattern.

    Raises:
        FileNotFoundError: if one is missing, or a pattern or folder has none
    """
    from braceexpand import UnbalancedBracesError, braceexpand  # comes with webdataset

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


_keeps = ContextVar("keeps", default=True)  # whether an index that was made is written down


@contextmanager
def unkept() -> Iterator[None]:
    """Shards that are opened inside are only read: an index that is there is used, one that is made is not kept."""
    before = _keeps.set(False)
    try:
        yield
    finally:
        _keeps.reset(before)


def load_index(path: Path, cache: str | None = None) -> dict[str, np.ndarray]:
    """The index of a shard, from disk if the shard has not changed since (size, times of change, inode).

    Raises:
        Damaged: if it is no file that can be read; what else is wrong with it is in the index, see `scan`
    """
    about = plain(path)
    # a change within the same tick of the clock that stamps files would not show
    time.sleep(min(TICK, max(0.0, about.st_ctime + TICK - time.time())))
    stamp = np.array([FORMAT, about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino])
    kept = path.with_name(f".{path.name}.index.npz")
    if cache is not None:
        place = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
        kept = Path(cache, f"{place}-{path.name}.index.npz")
    try:
        plain(kept)
        with open(kept, "rb") as file, np.load(file, allow_pickle=False) as stored:
            if np.array_equal(stored["stamp"], stamp):
                return {name: stored[name] for name in ("key", "extension", "offset", "size", "label", "wrong")}
    except Exception:  # absent, of another format, or damaged in any of zipfile's ways: it is only a copy
        pass
    index = scan(path)
    if not _keeps.get():
        return index
    temporary = kept.with_name(f"{kept.name}.tmp-{os.getpid()}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, stamp=stamp, **index)
        os.replace(temporary, kept)
    except OSError as error:
        warnings.warn(
            legible(
                f"the index of {path} is made anew at every start, because it cannot be kept in {kept.parent} "
                f"({error}); give a folder with cache="
            ),
            RuntimeWarning,
            stacklevel=2,
        )
        with suppress(OSError):
            temporary.unlink()
    return index


def scan(path: Path) -> dict[str, np.ndarray]:
    """Read a shard's headers through to its end, over the ends of archives that were joined into one file.

    A link counts as the member of the same archive that it leads to. A sample with a member that cannot be used is left
    out. Of an archive that ends too early all whole samples stay: the last one only if it has all kinds of members
    that the others have, and where the members of a sample do not follow each other, all only on this condition.

    Returns:
        key n bytes, extension e str, offset and size n e int64 (ABSENT: no such member), label n int64; wrong: what is
        damaged, str, each to be read after the shard's path
    """
    samples: dict[str, dict[str, Span | None]] = {}  # None: a link, whose member may be yet to come
    labels: dict[str, int] = {}
    spans: dict[str, Span] = {}  # by normalised name
    links: dict[str, tuple[str, str, str]] = {}  # by normalised name: where it leads, key and extension
    folders: set[str] = set()
    wrong: list[str] = []
    bad: set[str] = set()  # keys of samples that are left out
    key, scattered, cut = "", False, ""

    def label(file: Any, key: str, extension: str, span: Span, name: str) -> None:
        if extension != "cls" and (extension != "json" or key in labels):
            return
        file.seek(span[0])
        try:
            number = _label(file.read(span[1]), extension, f": {name}")
        except Damaged as error:
            wrong.append(str(error))
            bad.add(key)
        else:
            if number is not None:
                labels[key] = number

    with open(path, "rb") as file:
        for member in _members(file):
            if isinstance(member, str):
                cut = member
                break
            name = posixpath.normpath(member.name)
            folders.add(name if member.isdir() else posixpath.dirname(name))
            folder, base = os.path.split(member.name)
            stem, _, extension = base.partition(".")
            if member.isreg() and not member.issparse():
                spans[name] = member.offset_data, member.size
            if member.isdir() or member.type in LABELS or not stem:
                continue
            previous, key, extension = key, os.path.join(folder, stem), extension.lower()
            scattered |= key in samples and key != previous
            members = samples.setdefault(key, {})
            if extension in members or name in links:
                wrong.append(f" holds {member.name} twice")
                bad.add(key)
            elif member.issym() or member.islnk():
                members[extension] = None
                start = folder if member.issym() else ""
                links[name] = posixpath.normpath(posixpath.join(start, member.linkname)), key, extension
            elif name not in spans:
                kind = "sparse, which is not read: pack it without --sparse" if member.isreg() else "no file"
                wrong.append(f": {member.name} is {kind}")
                bad.add(key)
            else:
                members[extension] = spans[name]
                label(file, key, extension, spans[name], member.name)
        for name, (first, owner, extension) in links.items():
            target, passed = first, {name}
            while target in links and target not in passed:
                passed.add(target)
                target = links[target][0]
            if target in spans:
                samples[owner][extension] = spans[target]
                label(file, owner, extension, spans[target], name)
            else:
                del samples[owner][extension]
                if target not in folders:  # whose samples are there under their own names
                    wrong.append(f": {name} is a link to {first}, which is no member of this archive")
                    bad.add(owner)
    if cut:
        full = {e for members in samples.values() for e in members}
        bad |= {k for k, members in samples.items() if (scattered or k == key) and set(members) != full}
        bad |= {key} if len(samples) < 2 else set()
        samples_left = sum(bool(members) for k, members in samples.items() if k not in bad)
        wrong.append(f"{cut} (after {samples_left} whole samples)")
    whole = {k: members for k, members in samples.items() if members and k not in bad}
    if not whole and not wrong:
        wrong.append(" holds no samples")
    extensions = sorted({e for members in whole.values() for e in members})
    nowhere = (ABSENT, ABSENT)
    found = np.array([[m.get(e, nowhere) for e in extensions] for m in whole.values()], dtype=np.int64)
    found = found.reshape(len(whole), len(extensions), 2)
    return {
        "key": np.array([key.encode(errors="surrogateescape") for key in whole], dtype=None if whole else "S1"),
        "extension": np.array(extensions, dtype=str),
        "offset": found[..., 0],
        "size": found[..., 1],
        "label": np.array([labels.get(key, ABSENT) for key in whole], dtype=np.int64),
        "wrong": np.array([legible(fault) for fault in wrong], dtype=str),
    }


def _members(file: Any) -> Iterator[tarfile.TarInfo | str]:
    """The headers of all archives in a file; at last, if there is one, why it cannot be read to its end."""
    length = os.fstat(file.fileno()).st_size
    begin = file.read(6)
    if packed := next((kind for magic, kind in PACKED.items() if begin.startswith(magic)), None):
        yield f" is packed with {packed}, expected a plain tar: unpack it first"
        return
    place: int | None = 0
    while place is not None:
        file.seek(place)
        try:
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                for member in tar:
                    if member.size < 0 or tar.offset <= place:  # would be read for ever
                        yield f" is corrupt at byte {place}: {member.name} has a size below 0"
                        return
                    if member.isreg() and not member.issparse() and member.offset_data + member.size > length:
                        yield f" is truncated or corrupt at byte {place}: {member.name} is longer than the file"
                        return
                    yield member
                    place = tar.offset
            # tarfile stops without a word at a corrupt or missing header; a whole archive ends in zeros
            place = tar.offset
            file.seek(place)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                yield f" is truncated or corrupt at byte {place}"
                return
        except Exception as error:  # a header of random bytes takes tarfile anywhere
            reason = f"{type(error).__name__}: {error}".removeprefix("ReadError: ")
            yield f" is truncated, corrupt or no tar file at byte {place} ({reason})"
            return
        place = _next_archive(file, place)


def _next_archive(file: Any, place: int) -> int | None:
    """Where the zeros from a place on end; None: with the file."""
    file.seek(place)
    while block := file.read(2**20):
        if rest := block.lstrip(b"\0"):
            return place + (len(block) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        place += len(block)
    return None


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
