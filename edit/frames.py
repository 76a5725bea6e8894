"""Samples b c *sizes as images: rows and columns are the last two sizes, all sizes before them count frames.

What knows images alone (a codec, a vision model, a checker) is given the frames as a batch.
"""

import math

from torch import Tensor


def folded(x: Tensor) -> Tensor:
    """Frames as a batch of images: b c *sizes -> (b f) c y x; images b c y x stay as they are."""
    return x if x.ndim == 4 else x.movedim(1, -3).flatten(0, -4)


def unfolded(images: Tensor, x: Tensor) -> Tensor:
    """The inverse for images made of the frames of x, of any size and channels: (b f) c y x -> b c *frames y x."""
    return images.unflatten(0, (len(x), *x.shape[2:-2])).movedim(-3, 1)


def by_sample(rows: Tensor, x: Tensor) -> Tensor:
    """One row per frame of x -> the rows of each sample: (b f) ... -> b f ..., f = 1 for images."""
    return rows.unflatten(0, (len(x), math.prod(x.shape[2:-2])))
