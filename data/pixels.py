"""Image files to pixels in [-1, 1], and pixels to uint8 images."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from data.damage import Damaged, Tolerance
from data.names import legible
from data.split import Split, flipped
from edit.frames import by_sample, folded

T = TypeVar("T")
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")  # in any case of letters
# formats with several frames or pages; the second view or the depth map of a JPEG does not count
MOVING = ("gif", "png", "webp", "tif", "tiff")
LOOKED_AT = 1000  # files of a data set at most that are opened to count frames
THIN = 16  # longer to shorter side, from which on a picture is cropped before it is resized; see `cover`
# EXIF's orientation: what makes the picture upright. 1 is upright already
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLES = 258, 262, 339  # tags: bits per sample, meaning of 0, kind of number


@dataclass(frozen=True)
class Picture:
    """One image as its source stores it."""

    image: Image.Image  # RGB, any size
    name: str  # to name it in messages
    label: int | None = None
    caption: str | None = None

    def words(self) -> str:
        """The caption. Raises Damaged if it is missing or empty: an empty one would train the empty prompt."""
        if not self.caption:
            raise Damaged(f"{self.name} has {'no' if self.caption is None else 'an empty'} caption")
        return self.caption


def decode_image(content: bytes, name: str) -> Image.Image:
    """Decode an image to RGB, upright and on white.

    EXIF's orientation is applied. 16-bit grey becomes 8-bit by its whole range; of 16-bit colours the decoders keep the
    upper byte. The first frame of an animation is taken. Colour profiles (ICC) are ignored: numbers count as sRGB.

    Args:
        content: of the file
        name: for messages

    Raises:
        Damaged: if the image is not whole, has far too many pixels, or greys of an unknown range
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            depth = content[24] if image.format == "PNG" else 8  # bits of a sample; a PNG begins with its header
            tags = dict(getattr(image, "tag_v2", {}))  # of a TIFF; loading closes them
            image.load()
            turn = TURNS.get(_orientation(image))  # after loading: PNG may say it at its end, and TIFF is turned then
            image = _rgb(image, depth, tags)
            return image if turn is None else image.transpose(turn)
    except Exception as error:  # decoders of foreign bytes raise almost anything
        reason = f"{error}".rstrip(".") or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "no image"
        elif isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            reason = f"more pixels than PIL takes for harmless, which is {Image.MAX_IMAGE_PIXELS:,}: scale it down"
        raise Damaged(f"{name} cannot be decoded ({reason})") from error


def _orientation(image: Image.Image) -> object:
    """EXIF's orientation, 1 to 8 if valid; None where EXIF is absent or broken, which all viewers ignore."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as any decoder
        return None
    return found if isinstance(found, int) else None


def _rgb(image: Image.Image, depth: int, tags: dict[int, Any]) -> Image.Image:
    """Any mode as RGB on white.

    Args:
        image: loaded
        depth: bits of a sample in the file, of PNG
        tags: of TIFF
    """
    clear = image.info.pop("transparency", None) if image.mode in ("1", "L", "RGB") else None
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _grey(image, tags)
    if image.mode in ("P", "PA", "LA", "La", "RGBa", "RGBA"):
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    if clear is None:
        return image.convert("RGB")
    # one colour is transparent, told in the file's depth; PIL stretches samples of 2 and 4 bits, and cuts those of 16
    clear = np.array(clear) >> 8 if depth == 16 else np.array(clear) * 255 // (2**depth - 1)
    pixels = np.array(image.convert("RGB"))
    pixels[(pixels == clear).all(-1)] = 255
    return Image.fromarray(pixels)


def _grey(image: Image.Image, tags: dict[int, Any]) -> Image.Image:
    """Greys of more than 8 bits: black is 0, white the largest number of the file's depth.

    Raises:
        ValueError: for fractions, signed numbers, or numbers beyond 16 bits
    """
    pixels, bits = np.array(image), tags.get(TIFF_BITS, (16,))[0]
    if image.mode == "F" or tags.get(TIFF_SAMPLES, (1,))[0] == 2 and bits == 16:
        kind = "fractions" if image.mode == "F" else "signed 16-bit numbers"
        raise ValueError(f"greys of mode {image.mode}, {kind} whose black and white are not known: save it with 8 bits")
    low, high = int(pixels.min()), int(pixels.max())
    white = 2 ** min(bits, 16) - 1
    if low < 0 or high > white:
        raise ValueError(
            f"greys of mode {image.mode} from {low} to {high}, whose black and white are not known: save it with 8 bits"
        )
    eight = ((pixels.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    if tags.get(TIFF_PHOTOMETRIC) == 0:
        eight = 255 - eight  # this TIFF says that 0 is white
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        eight[pixels == clear] = 255
    return Image.fromarray(eight).convert("RGB")


def tell_unread(where: str, count: int, kinds: Iterable[str], example: str) -> None:
    """Warn of files whose kind is not read; `kinds` are suffixes without the dot."""
    named = ", ".join(f".{kind}" if kind else "no suffix" for kind in sorted(kinds))
    files = "1 file" if count == 1 else f"{count} files"
    tell(f"{where}: {files} of kinds that are not read ({named}), such as {example}")


def tell_moving(where: str, found: Sequence[str], whole: bool) -> None:
    """Warn of files with several frames or pages.

    Args:
        where: the data set
        found: their names
        whole: whether all files were looked at
    """
    if found:
        number = f"{len(found)} animated" if whole else f"at least {len(found)} animated"
        their = "file: its" if len(found) == 1 else "files: their"
        tell(f"{where}: {number} {their} first frame is taken, such as that of {found[0]} (pages count as frames)")


def evenly(items: Sequence[T]) -> Sequence[T]:
    """At most LOOKED_AT items, evenly spaced."""
    return items[:: math.ceil(len(items) / LOOKED_AT) or 1]


def moving(file: str | os.PathLike | BinaryIO) -> bool:
    """Whether an image has several frames or pages. False for a file that cannot be opened: reading it will tell."""
    try:
        with Image.open(file) as image:
            return bool(getattr(image, "is_animated", False))
    except Exception:  # as in `decode_image`
        return False


def tell(what: str) -> None:
    warnings.warn(legible(what), RuntimeWarning, stacklevel=3)


def suffix(name: str) -> str:
    """The end of a file's name after its last dot, in small letters; empty if it has none."""
    return os.path.splitext(name)[1][1:].lower()


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre crop of ADM, which published ImageNet numbers use: box-halve, bicubic to the short side, crop.

    Source: guided diffusion, arXiv 2105.05233.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return cover(image, size, size)


def cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resized by bicubic to cover width x height, and centre-cropped to it.

    A picture longer than THIN times its shorter side is cropped first: 1 x 2000 pixels would grow to 256 x 512000. Then
    PIL's two passes may round and clip in another order. All other pictures are resized whole, which gives the pixels
    that published numbers were measured with.
    """
    scale = max(width / image.width, height / image.height)
    wide, high = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = (wide - width) // 2, (high - height) // 2
    if max(image.size) > THIN * min(image.size):
        x, y = image.width / wide, image.height / high
        part = (left * x, top * y, (left + width) * x, (top + height) * y)
        return image.resize((width, height), Image.Resampling.BICUBIC, box=part)
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Tensor:
    """3 y x float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1).contiguous()


def to_uint8(x: Tensor) -> Tensor:
    """Pixels in [-1, 1], b c y x with 1 or 3 channels, as uint8 b y x 3. The rounding of DiT: clamp(127.5 x + 128)."""
    pixels = (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()


def frames_of(x: Tensor) -> Tensor:
    """Pixels in [-1, 1], b c *sizes with 1 or 3 channels, as uint8 b f y x 3; f = 1 for images."""
    return by_sample(to_uint8(folded(x)), x)


class PictureSource(Protocol):
    """Where images come from: a folder, or tar shards."""

    def load(self, index: int, captions: bool = True) -> Picture: ...


class Pictures:
    """Some of a source's images as a split, cropped and perhaps flipped.

    Args:
        load: the source's image at an index, with its caption or without
        indices: of the source's images that belong to this split
        size: of the square crop, in pixels
        flip: mirror half of the draws
        captions: hand the caption on as a string
        tolerance: what happens to damaged images
        seed: of the flips
    """

    def __init__(
        self,
        load: Callable[[int, bool], Picture],
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
        picture = self._load(int(self.indices[index]), self.captions)
        if self.captions:
            picture.words()
        return picture


class PictureSet:
    """The two splits of a data set of images; a subclass gives the sources and the indices of each."""

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

    def to_frames(self, x: Tensor) -> Tensor:
        """b 3 y x in [-1, 1] -> uint8 b 1 y x 3."""
        return frames_of(x)
