"""Samples as pictures: grids with the class or the caption of each sample, and what is written into PNG files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from recipes.report.drawing import spaced
from recipes.runtime.files import write

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont
    from torch import Tensor

STRIP = 4  # frames of a video that a grid shows
GAP = 2  # pixels between pictures
SIDE, TOLD_SIDE = 40, 116  # pixels: least width and height of a picture, and width of a sample with a caption
SIZE, LINES = 12, 3  # pixels of a label's letters, and the most lines of one
FULL = 1100  # pixels of a grid, beyond which letters grow with it: a page shows it smaller
INK, PAPER = (40, 44, 52), (255, 255, 255)


def image_grid(frames: Tensor, columns: int = 8, scale: int | None = None, labels: Sequence[str] = ()) -> Image:
    """Samples side by side on white; of a video at most `STRIP` frames in a row, evenly spaced from first to last.

    Labels stand above the columns where all of a column are alike, else below each picture, in at most `LINES` lines.

    Args:
        frames: uint8 b f y x 3, f = 1 for images
        columns: of the grid, less where a row would hold more than twice as many pictures; rows follow
        scale: nearest-neighbour magnification; None: each side has at least `SIDE` pixels, and samples are at least
            `TOLD_SIDE` wide where labels are wider than `SIDE`
        labels: of the samples, plain text; none: pictures alone

    Raises:
        ValueError: if there are no images, they are of another type or shape, or of another number than labels
    """
    import numpy as np
    from PIL import Image

    if frames.ndim != 5 or frames.shape[-1] != 3 or str(frames.dtype) != "torch.uint8" or not len(frames):
        raise ValueError(f"a grid is made of uint8 frames b f y x 3, got {frames.dtype} of {tuple(frames.shape)}")
    if labels and len(labels) != len(frames):
        raise ValueError(f"a grid of {len(frames)} samples needs as many labels, got {len(labels)}")
    images = strip(frames)
    columns = min(len(images), max(1, min(columns, 2 * columns // min(frames.shape[1], STRIP))))
    breadth = TOLD_SIDE if any(font(SIZE).getlength(label) > SIDE for label in labels) else SIDE
    scale = scale or max(1, -(-SIDE // min(frames.shape[2:4])), -(-breadth // images.shape[2]))
    height, width = images.shape[1] * scale, images.shape[2] * scale
    large = images.cpu().repeat_interleave(scale, 1).repeat_interleave(scale, 2).numpy()
    titled = (
        bool(labels) and len(labels) > columns and all(labels[i] == labels[i % columns] for i in range(len(labels)))
    )
    written = font(max(SIZE, round(SIZE * columns * width / FULL)))
    told = [lines(label, width, written) for label in (labels[:columns] if titled else labels)]
    room = leading(written) * max(map(len, told), default=0)
    above, below = (room, 0) if titled else (0, room)
    rows, pitch = -(-len(large) // columns), height + below + GAP
    canvas = np.full((above + rows * pitch - GAP, columns * (width + GAP) - GAP, 3), PAPER, dtype=np.uint8)
    corners = [(above + i // columns * pitch, i % columns * (width + GAP)) for i in range(len(large))]
    for picture, (top, left) in zip(large, corners, strict=True):
        canvas[top : top + height, left : left + width] = picture
    grid = Image.fromarray(canvas)
    for text, (top, left) in zip(told, corners, strict=False):
        _write(grid, text, left + width / 2, 0 if titled else top + height, written)
    return grid


def _write(grid: Image, text: Sequence[str], middle: float, top: int, written: FreeTypeFont) -> None:
    from PIL import ImageDraw

    pen, height = ImageDraw.Draw(grid), leading(written)
    for i, line in enumerate(text):
        pen.text((middle, top + (i + 0.5) * height), line, fill=INK, font=written, anchor="mm")


def lines(text: str, width: int, written: FreeTypeFont) -> list[str]:
    """A label in lines of at most this many pixels; what does not fit into `LINES` of them is left out: `…`."""
    letters = max(1, int(2 * width / written.size))
    while letters > 1:
        found = wrap(text, letters, max_lines=LINES, placeholder=" …", break_on_hyphens=False)
        if all(written.getlength(line) <= width for line in found):
            return found
        letters -= 1
    return [text[:1]] if text else []


def leading(written: FreeTypeFont) -> int:
    """Pixels from one line to the next."""
    return round(1.25 * written.size)


@lru_cache(maxsize=8)
def font(size: int) -> FreeTypeFont:
    """That of plots, which has the letters of most alphabets."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def strip(frames: Tensor) -> Tensor:
    """At most `STRIP` frames of each sample in one picture, left to right: uint8 b f y x 3 -> b y (f x) 3."""
    return frames[:, spaced(frames.shape[1], STRIP)].transpose(1, 2).flatten(2, 3)


def save_grid(frames: Tensor, path: Path, columns: int, labels: Sequence[str] = ()) -> Path:
    return save_png(image_grid(frames, columns, labels=labels), path)


def save_png(image: Image, path: Path) -> Path:
    picture = io.BytesIO()
    image.save(picture, format="PNG")
    return write(path, picture.getvalue())
