"""Raw images in webdataset shards: jpg, png, ... with the class in cls or json and the caption in txt or json."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from data.damage import Damaged, Tolerance
from data.image_folder import check_size, divide
from data.names import legible
from data.pixels import EXTENSIONS, Picture, PictureSet, decode
from data.tars import ABSENT, Tars


class TarImages:
    """The images of some shards, in the order of the shards.

    Args:
        shards: a folder, file, brace or glob pattern, or a list of such
        tolerance: what happens to damaged shards, and to samples without an image
        cache: folder for the index files; None: beside the shards

    Raises:
        FileNotFoundError, ValueError: in one sentence, for shards that cannot be used
    """

    def __init__(self, shards: str | Sequence[str], tolerance: Tolerance, cache: str | None = None):
        self.tars = Tars(shards, tolerance, cache)
        whole = np.logical_or.reduce([self.tars.has(e) for e in EXTENSIONS])
        if not whole.any():
            wanted, found = ", ".join(EXTENSIONS), ", ".join(self.tars.extensions)
            raise ValueError(legible(f"no images in {shards}: expected members ending in {wanted}; found only {found}"))
        for i in np.flatnonzero(~whole):
            tolerance.excuse(Damaged(f"{self.tars.name(int(i))} has no image"))
        self.indices = np.flatnonzero(whole)
        labels = self.tars.labels[self.indices]
        if (labels == ABSENT).any() and not (labels == ABSENT).all():
            first = self.tars.name(int(self.indices[np.argmax(labels == ABSENT)]))
            raise ValueError(f"some samples have a label and others none, such as {first}: label all or none")
        self.names = [self.tars.key(int(i)) for i in self.indices]
        self.num_classes = int(labels.max()) + 1 if labels[0] != ABSENT else None
        self.classes: list[str] | None = None  # tar shards carry numbers only

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> Picture:
        """Raises Damaged if the members cannot be read."""
        i = int(self.indices[index])
        content = next(c for e in EXTENSIONS if (c := self.tars.read(i, e)) is not None)
        label = int(self.tars.labels[i])
        name = self.tars.name(i)
        return Picture(decode(content, name), name, None if label == ABSENT else label, self._caption(i))

    def _caption(self, i: int) -> str | None:
        text = self.tars.read(i, "txt")
        if text is not None:
            return text.decode(errors="replace").strip()
        caption = self.tars.json(i).get("caption")
        return caption.strip() if isinstance(caption, str) else None


class ImageShards(PictureSet):
    """Tar shards of images as square crops in [-1, 1].

    Args:
        shards: a folder, file, brace or glob pattern (`train-{0000..0127}.tar`), or a list of such
        size: of the square crop, in pixels
        num_classes: if more than the labels show
        flip: mirror half of the training draws
        heldout: shards as above, or a fraction in (0, 1) chosen by a hash of the keys
        captions: hand captions on as strings; a sample without one then counts as damaged
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
        self._source = TarImages(shards, self.tolerance, cache)
        if isinstance(heldout, str | list):
            self._held_source = TarImages(heldout, self.tolerance, cache)
            trained = {os.path.realpath(path) for path in self._source.tars.paths}
            if both := [p for p in self._held_source.tars.paths if os.path.realpath(p) in trained]:
                raise ValueError(legible(f"{both[0]} is trained on and held out: name it in shards or in heldout"))
            self._indices, self._held = range(len(self._source)), range(len(self._held_source))
        else:
            self._held_source = self._source
            self._indices, self._held = divide(self._source.names, heldout)
        seen = max(self._source.num_classes or 0, self._held_source.num_classes or 0)
        if num_classes is not None and not 0 < seen <= num_classes:
            labels = f"go up to {seen - 1}" if seen else "are missing"
            raise ValueError(f"num_classes={num_classes}, but the labels in {shards} {labels}: correct num_classes")
        self.shape, self.num_classes, self.classes = (3, size, size), num_classes or seen or None, None
