"""Images in folders: one subfolder per class, or all in one folder with captions in .txt files beside them.

Hidden files (`.DS_Store`, `._a.jpg`) and those that Windows leaves in folders are ignored. One warning names files of
other kinds, one animations, of which the first frame is taken.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.damage import Damaged, Tolerance, file_status, kernel_devices
from data.names import legible
from data.pixels import (
    EXTENSIONS,
    MOVING,
    Picture,
    PictureSet,
    decode_image,
    evenly,
    moving,
    suffix,
    tell,
    tell_moving,
    tell_unread,
)
from data.plain_text import read_text
from data.split import held_out

LEFT_BY_WINDOWS = ("thumbs.db", "desktop.ini")


class Folder:
    """The images below a folder, sorted by name.

    Args:
        path: with one subfolder per class (whose images may lie deeper), or with the images themselves
        classes: names that fix the numbering; None: the subfolders with images in them, sorted
        without: a folder to leave out, inside or linked: of the held-out images, or of the training images

    Raises:
        FileNotFoundError: if there is no such folder
        ValueError: if it holds no images, mixes both layouts, has a class that `classes` does not name, or cannot be
            listed
    """

    def __init__(self, path: str | os.PathLike, classes: Sequence[str] | None = None, without: Path | None = None):
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{path} is no folder of images: correct the path")
        if self.path.stat().st_dev in kernel_devices():
            raise ValueError(f"{path} is a folder that the kernel makes up: correct the path")
        files = sorted(_files(self.path, without))
        found = [name for name in files if suffix(name) in EXTENSIONS]
        if not found:
            raise ValueError(f"no images in {path}: expected files ending in .{', .'.join(EXTENSIONS)}")
        folders = [legible(name.split("/")[0]) if "/" in name else None for name in found]
        names = sorted({f for f in folders if f is not None})
        if names and None in folders:
            loose = found[folders.index(None)]
            raise ValueError(
                f"{path} holds images both directly ({loose}) and in subfolders ({names[0]}): "
                f"use one subfolder per class, or one folder for all"
            )
        if classes is not None and (unknown := [n for n in names if n not in classes]):
            raise ValueError(f"{path} has the class {unknown[0]}, which is not among the training classes")
        self.names = found
        self.classes: list[str] | None = list(classes) if classes is not None else names or None
        self.num_classes = len(self.classes) if self.classes else None
        numbers = {name: i for i, name in enumerate(self.classes or [])}
        self._labels = [None if f is None else numbers[f] for f in folders]
        self._captions = self._look(files)

    def _look(self, files: list[str]) -> dict[str, list[str]]:
        """Warn of files that are not read as one might expect.

        Returns:
            Caption files other than <stem>.txt, by the stem: .TXT, or several that differ in case
        """
        images: dict[str, list[str]] = {}
        for name in self.names:
            images.setdefault(_stem(name), []).append(name)
        captions: dict[str, list[str]] = {}
        for name in files:
            if suffix(name) == "txt" and _stem(name) in images:
                captions.setdefault(_stem(name), []).append(name)
        where = str(self.path)
        read = {name for names in captions.values() for name in names}
        if unread := [n for n in files if suffix(n) not in EXTENSIONS and n not in read]:
            tell_unread(where, len(unread), {suffix(n) for n in unread}, unread[0])
        if same := [names for names in images.values() if len(names) > 1]:
            tell(
                f"{where}: {sum(map(len, same))} images share their name but for the suffix, such as "
                f"{' and '.join(same[0])}: each is a sample, and their caption is that of all"
            )
        candidates = [n for n in self.names if suffix(n) in MOVING]
        looked = evenly(candidates)
        found = [n for n in looked if _stored(self.path / n) and moving(self.path / n)]
        tell_moving(where, found, len(looked) == len(candidates))
        return {stem: names for stem, names in captions.items() if names != [f"{stem}.txt"]}

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int, captions: bool = True) -> Picture:
        """Raises Damaged if the file cannot be read as an image, or its caption, unless that is not asked for."""
        path = self.path / self.names[index]
        name = legible(str(path))
        file_status(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error})") from error
        caption = self._caption(self.names[index]) if captions else None
        return Picture(decode_image(content, name), name, self._labels[index], caption)

    def _caption(self, name: str) -> str | None:
        beside = self._captions.get(_stem(name), [f"{_stem(name)}.txt"])
        if len(beside) > 1:
            raise Damaged(f"{self.path / name} has several captions: keep one of {' and '.join(beside)}")
        path = self.path / beside[0]
        if not os.path.lexists(path):
            return None
        file_status(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise Damaged(legible(f"{path} cannot be read ({error})")) from error
        return read_text(content, legible(str(path))).strip()


def _stored(path: Path) -> bool:
    """Whether this is a regular file, which has an end."""
    try:
        file_status(path)
    except Damaged:
        return False
    return True


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _files(path: Path, without: Path | None = None) -> Iterator[str]:
    """Names of the files below that are not hidden, relative, with forward slashes.

    Linked folders are walked after the real ones, each real folder once: a link to a folder that is counted already,
    that holds the link or all images, or that lies in `without`, is left out, and said so.

    Raises:
        ValueError: if a folder cannot be listed
    """
    root, seen, left = os.path.realpath(path), set[str](), list[str]()
    apart = None if without is None else os.path.realpath(without)
    waiting = [("", root)]  # names and real places of folders to walk
    while waiting:
        links = list[tuple[str, str]]()
        while waiting:
            name, real = waiting.pop()
            if real == apart:
                continue
            if real in seen:
                left.append(name)
                continue
            seen.add(real)
            for entry in _listed(real):
                below, inner = f"{name}/{entry.name}".lstrip("/"), os.path.join(real, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((below, inner))
                elif entry.is_symlink() and os.path.isdir(inner):
                    links.append((below, os.path.realpath(inner)))
                    if any(_inside(held, links[-1][1]) for held in (real, root)):
                        left.append(links.pop()[0])
                elif suffix(entry.name) in (*EXTENSIONS, "txt") or os.path.exists(inner):
                    if entry.name.lower() not in LEFT_BY_WINDOWS:
                        yield below
                elif entry.is_symlink():
                    left.append(below)  # it may be a class
        for name, real in sorted(links, reverse=True):  # the first is walked first
            if real != apart and _inside(real, apart) or os.stat(real).st_dev in kernel_devices():
                left.append(name)
            else:
                waiting.append((name, real))
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        warnings.warn(
            legible(
                f"{path}: left out {', '.join(sorted(left)[:3])}{more}: links to folders that are counted already, "
                "hold the link itself, are of the other one of training and held-out part, or are not there"
            ),
            RuntimeWarning,
            stacklevel=2,
        )


def _listed(folder: str) -> list[os.DirEntry[str]]:
    """The entries of a folder that are not hidden."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(
            legible(f"{folder} cannot be listed ({error.strerror}): correct its permissions, or move it away")
        ) from error


def _inside(place: str, folder: str | None) -> bool:
    """Whether a real path is a folder, or below it."""
    return folder is not None and f"{place.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")


class ImageFolder(PictureSet):
    """A folder of images as square crops in [-1, 1].

    Args:
        path: the folder (see `Folder` for the two layouts)
        size: of the square crop, in pixels
        flip: mirror half of the training draws
        heldout: a folder, by itself or inside `path`; or a fraction in (0, 1), chosen by a hash of the file names
        captions: hand captions on as strings; an image without one, or with an empty one, then counts as damaged
        on_error: damaged images: refuse or skip
        seed: of the flips

    Raises:
        FileNotFoundError, ValueError: in one sentence, for what cannot be used
    """

    def __init__(
        self,
        path: str,
        size: int,
        flip: bool = True,
        heldout: str | float | None = None,
        captions: bool = False,
        on_error: str = "refuse",
        seed: int = 0,
    ):
        check_size(size)
        self.size, self.flip, self.captions, self.seed = size, flip, captions, seed
        self.tolerance = Tolerance(on_error)
        if isinstance(heldout, str):
            inside = Path(path, heldout)
            apart = inside if inside.is_dir() else Path(heldout)
            if _inside(os.path.realpath(path), os.path.realpath(apart)):
                raise ValueError(
                    f"heldout={heldout!r} is the folder of the training images, or holds it: give one that does not"
                )
            self._source = Folder(path, without=apart)
            self._held_source = Folder(apart, self._source.classes or [], without=self._source.path)
            self._indices, self._held = range(len(self._source)), range(len(self._held_source))
        else:
            self._source = self._held_source = Folder(path)
            self._indices, self._held = divide(self._source.names, heldout)
        self.shape, self.num_classes, self.classes = (3, size, size), self._source.num_classes, self._source.classes


def check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size is the crop's width in pixels, at least 1, got {size}")


def divide(names: Sequence[str], fraction: float | None) -> tuple[Sequence[int], Sequence[int]]:
    """Indices to train on and to hold out.

    Raises:
        ValueError: if the fraction is not in (0, 1) or leaves one part empty
    """
    if fraction is None:
        return range(len(names)), []
    if not 0 < fraction < 1:
        raise ValueError(f"heldout is a path or a fraction between 0 and 1, got {fraction!r}")
    parts: tuple[list[int], list[int]] = [], []
    for i, name in enumerate(names):
        parts[held_out(name, fraction)].append(i)
    if not all(parts):
        raise ValueError(f"heldout={fraction} of {len(names)} images leaves one part empty: choose another fraction")
    return parts
