"""From files to pixels in [-1, 1] and back to something to look at."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.damage import Damaged, Tolerance
from data.split import Split, flipped

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")


@dataclass(frozen=True)
class Picture:
    """One image as its source stores it."""

    image: Image.Image  # RGB, any size
    name: str  # to name it in messages
    label: int | None = None
    caption: str | None = None


def decode(content: bytes, name: str) -> Image.Image:
    """An encoded image as RGB; `name` is for the message.

    Raises:
        Damaged: if it is no whole image
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders of foreign bytes raise almost anything
        reason = "no image" if isinstance(error, Image.UnidentifiedImageError) else error
        raise Damaged(f"{name} cannot be decoded ({reason})") from error


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre crop of ADM, which published ImageNet numbers use: box-halve, bicubic to the short side, crop.

    Source: guided diffusion, arXiv 2105.05233.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """3 y x float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1).contiguous()


def to_uint8(x: Tensor) -> Tensor:
    """Pixels in [-1, 1], b c y x with 1 or 3 channels, as uint8 b y x 3. The rounding of DiT: clamp(127.5 x + 128)."""
    pixels = (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()


class PictureSource(Protocol):
    """Where images come from: a folder, or tar shards."""

    def load(self, index: int) -> Picture: ...


class Pictures:
    """Some of a source's images as a split, cropped and perhaps flipped.

    Args:
        load: the source's image at an index
        indices: of the source's images that belong to this split
        size: of the square crop, in pixels
        flip: mirror half of the draws
        captions: hand the caption on as a string
        tolerance: what happens to damaged images
        seed: of the flips
    """

    def __init__(
        self,
        load: Callable[[int], Picture],
        indices: Sequence[int],
        size: int,
        flip: bool,
        captions: bool,
        tolerance: Tolerance,
        seed: int,
    ):
        self._load, self.indices, self.size, self.flip = load, indices, size, flip
        self.captions, self.tolerance, self.seed = captions, tolerance, seed

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, index: int, draw: int) -> dict:
        picture = self.tolerance.first_good(self._picture, index, len(self))
        x = to_tensor(centre_crop(picture.image, self.size))
        sample: dict = {"x": x.flip(-1) if self.flip and flipped(self.seed, draw) else x}
        if picture.label is not None:
            sample["label"] = torch.tensor(picture.label)
        if self.captions:
            sample["caption"] = picture.caption
        return sample

    def _picture(self, index: int) -> Picture:
        picture = self._load(int(self.indices[index]))
        if self.captions and picture.caption is None:
            raise Damaged(f"{picture.name} has no caption")
        return picture


class PictureSet:
    """The two splits of a data set of images; a subclass says where the images come from and which are held out."""

    _source: PictureSource
    _held_source: PictureSource
    _indices: Sequence[int]
    _held: Sequence[int]
    size: int
    flip: bool
    captions: bool
    tolerance: Tolerance
    seed: int

    def train(self) -> Split:
        return Pictures(
            self._source.load, self._indices, self.size, self.flip, self.captions, self.tolerance, self.seed
        )

    def heldout(self) -> Split | None:
        """Never flipped."""
        if not self._held:
            return None
        return Pictures(self._held_source.load, self._held, self.size, False, self.captions, self.tolerance, self.seed)

    def to_images(self, x: Tensor) -> Tensor:
        """b 3 y x in [-1, 1] -> uint8 b y x 3."""
        return to_uint8(x)
