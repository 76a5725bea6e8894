"""Aspect-ratio buckets: a few image sizes of about equal area, so that a picture is trained on whole.

Each image goes to the bucket whose ratio is nearest to its own, is resized to cover it and centre-cropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from data.pixels import cover

Size = tuple[int, int]  # height, width
LONGEST = 100  # longer to shorter side


def sizes(side: int, step: int = 64, ratio: float = 2.0) -> list[Size]:
    """All bucket sizes in pixels, by height, then width.

    For each height that is a multiple of `step` the width whose area is nearest to side x side, and the same with
    height and width exchanged; none longer than `ratio` times its shorter side.

    Args:
        side: of the square whose area all buckets have, about
        step: heights and widths are multiples of it
        ratio: of the longer to the shorter side, at most

    Raises:
        ValueError: if side is no multiple of step, or ratio is less than 1 or more than LONGEST
    """
    if step < 1 or side < 1 or side % step:
        raise ValueError(f"buckets: the size must be a multiple of the step, got {side} and {step}: choose a multiple")
    if not 1 <= ratio <= LONGEST:
        bound = f"at most {LONGEST}" if ratio > 1 else "at least 1"
        raise ValueError(f"buckets: the ratio of the longer to the shorter side is {bound}, got {ratio}")
    found: set[Size] = set()
    for height in range(step, int(side * ratio) + step, step):
        width = max(1, round(side * side / height / step)) * step
        if max(height, width) <= ratio * min(height, width):
            found |= {(height, width), (width, height)}
    return sorted(found)


def nearest(buckets: Sequence[Size], width: int, height: int) -> Size:
    """The bucket whose ratio is nearest to an image's, by the logarithm: twice as wide is as far as twice as high."""
    return min(buckets, key=lambda b: abs(math.log(b[1] / b[0]) - math.log(width / height)))


def cover_crop(image: Image.Image, size: Size) -> Image.Image:
    """Resized to cover a bucket and centre-cropped to it: box-halve, then bicubic, as `pixels.centre_crop` does."""
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return cover(image, width, height)
