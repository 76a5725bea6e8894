"""Raw images in webdataset shards: jpg, png, ... with the class in cls or json and the caption in txt or json."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from data.damage import Damaged, Tolerance
from data.names import legible
from data.pixels import (
    EXTENSIONS,
    MOVING,
    Picture,
    PictureSet,
    decode_image,
    evenly,
    moving,
    tell,
    tell_moving,
    tell_unread,
)
from data.plain_text import read_text, words
from data.sets.image_folder import check_size, divide
from data.tar_index import ABSENT
from data.tars import Tars

READ = ("cls", "json", "txt")  # besides images
LOOKED_BYTES = 2**26  # of images, at most, that are read to count frames


class TarImages:
    """The images of some shards, in the order of the shards.

    Args:
        shards: a folder, file, brace or glob pattern, or a list of such
        tolerance: of damaged shards, and of samples without a usable image or label
        cache: folder for the index files; None: beside the shards
        num_classes: refuse labels from this on; None takes all

    Raises:
        FileNotFoundError, ValueError: in one sentence, for shards that cannot be used
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        tolerance: Tolerance,
        cache: str | None = None,
        num_classes: int | None = None,
    ):
        self.tars = Tars(shards, tolerance, cache)
        members = np.stack([self.tars.has(e) for e in EXTENSIONS])  # e n: which images each sample has
        whole = members.any(0)
        if not whole.any():
            wanted, found = ", ".join(EXTENSIONS), ", ".join(self.tars.extensions)
            raise ValueError(legible(f"no images in {shards}: expected members ending in {wanted}; found only {found}"))
        for i in np.flatnonzero(~whole):
            tolerance.excuse(Damaged(f"{self.tars.name(int(i))} has no image"))
        self.indices = np.flatnonzero(self._labelled(whole, tolerance, str(shards), num_classes))
        if not len(self.indices):
            raise ValueError(f"no sample in {shards} has an image and a label below num_classes={num_classes}")
        labels = self.tars.labels[self.indices]
        self._kinds = members[:, self.indices].argmax(0)  # of each sample's image: a place in EXTENSIONS
        self.names = [self.tars.key(int(i)) for i in self.indices]
        self.num_classes = int(labels.max()) + 1 if labels[0] != ABSENT else None
        self.classes: list[str] | None = None  # tar shards carry numbers only
        self._look(str(shards), members)

    def _labelled(self, whole: np.ndarray, tolerance: Tolerance, shards: str, num_classes: int | None) -> np.ndarray:
        """Samples among `whole`, n bool, whose label can be used.

        Raises:
            Damaged: if only some samples have a label, or one is beyond the classes, and damage is to be refused
        """
        labels = self.tars.labels
        absent = whole & (labels == ABSENT)
        if absent.any() and (absent != whole).any():
            which = f"{absent.sum()} of them, such as {self.tars.name(int(absent.argmax()))}"
            tolerance.excuse(Damaged(f"some samples have a label and others none, {which}: label all or none"))
            whole = whole & ~absent
        if num_classes is None:
            return whole
        beyond = whole & (labels >= num_classes)
        if beyond.any():
            first = int(beyond.argmax())
            which = f"{beyond.sum()} are too large, such as {labels[first]} of {self.tars.name(first)}"
            most = f"num_classes={num_classes}, but the labels in {shards} go up to {labels[beyond].max()}"
            tolerance.excuse(Damaged(f"{most}: {which}; correct num_classes"))
        return whole & ~beyond

    def _look(self, shards: str, members: np.ndarray) -> None:
        """Warn of members that are not read as one might expect; `members` e n: which images each sample has."""
        if unread := [e for e in self.tars.extensions if e not in (*EXTENSIONS, *READ)]:
            has = [self.tars.has(e) for e in unread]
            example = f"{self.tars.name(int(has[0].argmax()))}.{unread[0]}"
            tell_unread(shards, int(np.sum(has)), unread, example)
        if (several := members.sum(0) > 1).any():
            name, kinds = self.tars.name(int(several.argmax())), ", ".join(EXTENSIONS)
            tell(f"{shards}: {several.sum()} samples hold several images, such as {name}: read is the first of {kinds}")
        candidates = np.flatnonzero(np.isin(self._kinds, [EXTENSIONS.index(e) for e in MOVING]))
        found, looked, size = [], 0, 0
        for i in evenly(candidates):
            with suppress(Damaged):  # reported when the sample is read
                content = self._image(int(i))
                size += len(content)
                if moving(io.BytesIO(content)):
                    found.append(self.tars.name(int(self.indices[i])))
            looked += 1
            if size > LOOKED_BYTES:
                break
        tell_moving(shards, found, looked == len(candidates))

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int, captions: bool = True) -> Picture:
        """Raises Damaged if the members cannot be read; the caption is read only if `captions`."""
        i = int(self.indices[index])
        label, name = int(self.tars.labels[i]), self.tars.name(i)
        caption = self._caption(i) if captions else None
        return Picture(decode_image(self._image(index), name), name, None if label == ABSENT else label, caption)

    def _image(self, index: int) -> bytes:
        return self.tars.read(int(self.indices[index]), EXTENSIONS[self._kinds[index]]) or b""

    def _caption(self, i: int) -> str | None:
        text = self.tars.read(i, "txt")
        if text is not None:
            return read_text(text, f"{self.tars.name(i)}.txt").strip()
        caption = self.tars.json(i).get("caption")
        return None if caption is None else words(caption, f'{self.tars.name(i)}.json: "caption"')


class ImageShards(PictureSet):
    """Tar shards of images as square crops in [-1, 1].

    Args:
        shards: a folder, file, brace or glob pattern (`train-{0000..0127}.tar`), or a list of such
        size: of the square crop, in pixels
        num_classes: if more than the labels show; a label from this on counts as damage
        flip: mirror half of the training draws
        heldout: shards as above, or a fraction in (0, 1) chosen by a hash of the keys
        captions: hand captions on as strings; a sample without one, or with an empty one, then counts as damaged
        on_error: damaged shards and images: refuse or skip
        cache: folder for the index files; None: beside the shards
        seed: of the flips

    Raises:
        FileNotFoundError, ValueError: in one sentence, for what cannot be used
    """

    def __init__(
        self,
        shards: str | list[str],
        size: int,
        num_classes: int | None = None,
        flip: bool = True,
        heldout: str | list[str] | float | None = None,
        captions: bool = False,
        on_error: str = "refuse",
        cache: str | None = None,
        seed: int = 0,
    ):
        check_size(size)
        self.size, self.flip, self.captions, self.seed = size, flip, captions, seed
        self.tolerance = Tolerance(on_error)
        self._source = TarImages(shards, self.tolerance, cache, num_classes)
        if isinstance(heldout, str | list):
            self._held_source = TarImages(heldout, self.tolerance, cache, num_classes)
            trained = {os.path.realpath(path) for path in self._source.tars.paths}
            if both := [p for p in self._held_source.tars.paths if os.path.realpath(p) in trained]:
                raise ValueError(legible(f"{both[0]} is trained on and held out: name it in shards or in heldout"))
            self._indices, self._held = range(len(self._source)), range(len(self._held_source))
        else:
            self._held_source = self._source
            self._indices, self._held = divide(self._source.names, heldout)
        seen = max(self._source.num_classes or 0, self._held_source.num_classes or 0)
        if num_classes is not None and not seen:
            raise ValueError(f"num_classes={num_classes}, but the labels in {shards} are missing: correct num_classes")
        self.shape, self.num_classes, self.classes = (3, size, size), num_classes or seen or None, None
