"""Where each member of a tar shard lies: read from its headers once, and kept on disk until the shard changes."""

from __future__ import annotations

import hashlib
import os
import posixpath
import tarfile
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.damage import Damaged, file_status
from data.names import legible
from data.plain_text import class_digits, class_number, read_json
from edit.data_set import NOWHERE

FORMAT = 3  # of the index files; 1 held labels that were rounded
ABSENT = -1
TICK = 0.02  # seconds: files that change twice within one may keep their times
LABELS = (b"V",)  # members that GNU tar puts in for itself: the archive's label
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}

Span = tuple[int, int]  # offset and size


def load_index(path: Path, cache: str | None = None) -> dict[str, np.ndarray]:
    """The index of a shard, from disk if the shard has not changed since (size, times of change, inode).

    Args:
        path: of the shard
        cache: folder for the index; None: beside the shard; NOWHERE: an index beside the shard is used, none is written

    Raises:
        Damaged: if the file cannot be read; other faults are in the index, see `scan`
    """
    about = file_status(path)
    # a change within one tick of the clock that stamps files would not show
    time.sleep(min(TICK, max(0.0, about.st_ctime + TICK - time.time())))
    stamp = np.array([FORMAT, about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino])
    kept = path.with_name(f".{path.name}.index.npz")
    if cache not in (None, NOWHERE):
        place = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
        kept = Path(cache, f"{place}-{path.name}.index.npz")
    try:
        file_status(kept)
        with open(kept, "rb") as file, np.load(file, allow_pickle=False) as stored:
            if np.array_equal(stored["stamp"], stamp):
                return {name: stored[name] for name in ("key", "extension", "offset", "size", "label", "wrong")}
    except Exception:  # absent, of another format, or damaged in one of zipfile's many ways: it is made anew
        pass
    index = scan(path)
    if cache == NOWHERE:
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
        key n bytes, extension e str, offset and size n e int64 (ABSENT: no such member), label n int64; wrong: the
        faults, str, each written to follow the shard's path
    """
    with open(path, "rb") as file:
        found = _Scan(file)
        cut = ""
        for member in members_of(file):
            if isinstance(member, str):
                cut = member
            else:
                found.add(member)
        found.follow_links()
    if cut:
        found.end_early(cut)
    return found.index()


class _Scan:
    """What the headers of a shard have told so far.

    Args:
        file: the shard, from which labels are read
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.samples: dict[str, dict[str, Span | None]] = {}  # by key and extension; None: a link not yet followed
        self.labels: dict[str, int] = {}  # by key
        self.spans: dict[str, Span] = {}  # of files, by normalised name
        self.links: dict[str, tuple[str, str, str]] = {}  # by normalised name: target, key and extension
        self.folders: set[str] = set()
        self.wrong: list[str] = []
        self.bad: set[str] = set()  # keys of samples that are left out
        self.key = ""  # of the last member
        self.scattered = False  # whether other members lie between those of a sample

    def add(self, member: tarfile.TarInfo) -> None:
        name = posixpath.normpath(member.name)
        self.folders.add(name if member.isdir() else posixpath.dirname(name))
        folder, base = os.path.split(member.name)
        stem, _, extension = base.partition(".")
        if member.isreg() and not member.issparse():
            self.spans[name] = member.offset_data, member.size
        if member.isdir() or member.type in LABELS or not stem:
            return
        previous, self.key, extension = self.key, os.path.join(folder, stem), extension.lower()
        self.scattered |= self.key in self.samples and self.key != previous
        members = self.samples.setdefault(self.key, {})
        if extension in members or name in self.links:
            self.leave_out(self.key, f" holds {member.name} twice")
        elif member.issym() or member.islnk():
            members[extension] = None
            start = folder if member.issym() else ""
            self.links[name] = posixpath.normpath(posixpath.join(start, member.linkname)), self.key, extension
        elif name not in self.spans:
            kind = "sparse, which is not read: pack it without --sparse" if member.isreg() else "no file"
            self.leave_out(self.key, f": {member.name} is {kind}")
        else:
            members[extension] = self.spans[name]
            self.read_label(self.key, extension, self.spans[name], member.name)

    def leave_out(self, key: str, fault: str) -> None:
        self.wrong.append(fault)
        self.bad.add(key)

    def read_label(self, key: str, extension: str, span: Span, name: str) -> None:
        """The label of a sample, from its `cls`, else from its `json`."""
        if extension != "cls" and (extension != "json" or key in self.labels):
            return
        self.file.seek(span[0])
        try:
            number = _label(self.file.read(span[1]), extension, f": {name}")
        except Damaged as error:
            self.leave_out(key, str(error))
        else:
            if number is not None:
                self.labels[key] = number

    def follow_links(self) -> None:
        """Links become the members that they lead to; links to folders vanish, whose samples are there by name."""
        for name, (first, key, extension) in self.links.items():
            target, passed = first, {name}
            while target in self.links and target not in passed:
                passed.add(target)
                target = self.links[target][0]
            if target in self.spans:
                self.samples[key][extension] = self.spans[target]
                self.read_label(key, extension, self.spans[target], name)
                continue
            del self.samples[key][extension]
            if target not in self.folders:
                self.leave_out(key, f": {name} is a link to {first}, which is no member of this archive")

    def end_early(self, fault: str) -> None:
        """Leave out the samples that the missing rest may have parts of."""
        full = {e for members in self.samples.values() for e in members}
        for key, members in self.samples.items():
            if (self.scattered or key == self.key) and set(members) != full:
                self.bad.add(key)
        if len(self.samples) < 2:
            self.bad.add(self.key)
        left = sum(bool(members) for key, members in self.samples.items() if key not in self.bad)
        self.wrong.append(f"{fault} (after {left} whole samples)")

    def index(self) -> dict[str, np.ndarray]:
        whole = {k: members for k, members in self.samples.items() if members and k not in self.bad}
        if not whole and not self.wrong:
            self.wrong.append(" holds no samples")
        extensions = sorted({e for members in whole.values() for e in members})
        nowhere = (ABSENT, ABSENT)
        found = np.array([[m.get(e, nowhere) for e in extensions] for m in whole.values()], dtype=np.int64)
        found = found.reshape(len(whole), len(extensions), 2)
        return {
            "key": np.array([key.encode(errors="surrogateescape") for key in whole], dtype=None if whole else "S1"),
            "extension": np.array(extensions, dtype=str),
            "offset": found[..., 0],
            "size": found[..., 1],
            "label": np.array([self.labels.get(key, ABSENT) for key in whole], dtype=np.int64),
            "wrong": np.array([legible(fault) for fault in self.wrong], dtype=str),
        }


def members_of(file: Any) -> Iterator[tarfile.TarInfo | str]:
    """The headers of all archives in a file; last, where reading ends early, the reason."""
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
        except Exception as error:  # random bytes in a header can raise anything
            reason = f"{type(error).__name__}: {error}".removeprefix("ReadError: ")
            yield f" is truncated, corrupt or no tar file at byte {place} ({reason})"
            return
        place = _next_archive(file, place)


def _next_archive(file: Any, place: int) -> int | None:
    """The position after the zeros that begin at a place; None: only zeros follow."""
    file.seek(place)
    while block := file.read(2**20):
        if rest := block.lstrip(b"\0"):
            return place + (len(block) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        place += len(block)
    return None


def _label(content: bytes, extension: str, name: str) -> int | None:
    if extension == "cls":
        return class_digits(content, name)
    value = json_object(content, name).get("label")
    return None if value is None else class_number(value, name)


def json_object(content: bytes, name: str) -> dict[str, Any]:
    value = read_json(content, name)
    if not isinstance(value, dict):
        raise Damaged(f"{name} holds a JSON {type(value).__name__}, expected an object")
    return value
