"""Aspect-ratio buckets: a few image sizes of about equal area, so that a picture is trained on whole.

Each image goes to the bucket whose ratio is nearest to its own, is resized to cover it and centre-cropped. A training
batch comes from one bucket, the same on all ranks: every rank has the same work at every step.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Sampler

from data.pixels import cover
from data.split import Split
from edit import noise

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
    check_ratio(ratio)
    found: set[Size] = set()
    for height in range(step, int(side * ratio) + step, step):
        width = max(1, round(side * side / height / step)) * step
        if max(height, width) <= ratio * min(height, width):
            found |= {(height, width), (width, height)}
    return sorted(found)


def check_ratio(ratio: float) -> None:
    if not 1 <= ratio <= LONGEST:
        bound = f"at most {LONGEST}" if ratio > 1 else "at least 1"
        raise ValueError(f"buckets: the ratio of the longer to the shorter side is {bound}, got {ratio}")


def nearest(buckets: Sequence[Size], width: int, height: int) -> Size:
    """The bucket whose ratio is nearest to an image's, by the logarithm: twice as wide is as far as twice as high."""
    return min(buckets, key=lambda b: abs(math.log(b[1] / b[0]) - math.log(width / height)))


def cover_crop(image: Image.Image, size: Size) -> Image.Image:
    """Resized to cover a bucket and centre-cropped to it: box-halve, then bicubic, as `pixels.centre_crop` does."""
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return cover(image, width, height)


class OneSize:
    """The samples of a split that have one shape, in order: all, where there are no buckets.

    Args:
        split: `groups` and `shapes` are its buckets, where it has any
        shape: c y x; None: of the bucket that has most samples

    Raises:
        ValueError: if no sample is of this shape
    """

    def __init__(self, split: Split, shape: tuple[int, ...] | None = None):
        self.split = split
        groups = getattr(split, "groups", None)
        if groups is None:
            self.shape, self.indices = tuple(split.sample(0, 0)["x"].shape), np.arange(len(split))
        else:
            shapes = [tuple(s) for s in split.shapes]  # type: ignore[attr-defined]
            self.shape = shapes[np.bincount(groups).argmax()] if shape is None else shape
            self.indices = np.flatnonzero(np.isin(groups, [i for i, s in enumerate(shapes) if s == self.shape]))
        if shape not in (None, self.shape) or not len(self.indices):
            wanted = "x".join(map(str, shape or self.shape))
            raise ValueError(f"none of {len(split)} samples is a {wanted}: training and held-out data need one size")

    @property
    def part(self) -> str:
        """Which part of the split this is, for people; empty: all of it."""
        if len(self) == len(self.split):
            return ""
        return f", the {len(self)} of {len(self.split)} samples that are {'x'.join(map(str, self.shape))}"

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, index: int, draw: int) -> dict[str, torch.Tensor]:
        return self.split.sample(int(self.indices[index]), draw)


# ---- the order of training ------------------------------------------------------------------------------------------

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: multiples of it fill the circle most evenly


def turns(seed: int, steps: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Whose turn it is at each step: n int64 -> n, a pure function of (seed, step).

    Shares follow the counts. A golden-ratio sequence keeps every bucket close to its share at all times: after any
    number of steps it was chosen as often as its share says, to within a few.
    """
    phase = np.uint64(noise.hashes(seed, torch.tensor([-1]), noise.SHUFFLE, 1).item() & (2**64 - 1))
    points = (steps.astype(np.uint64) * _GOLDEN + phase) >> np.uint64(32)  # wraps around; 0 to 2^32 - 1
    total = np.cumsum(counts)
    return np.searchsorted(total, points.astype(np.float64) * (total[-1] / 2**32), side="right")


class BucketBatches(Sampler):
    """Batches of (index, draw) for one rank, without end, each from one bucket.

    The step decides the bucket (`turns`), alike on all ranks. Each bucket is an endless sequence of epochs of its own,
    each a permutation of its samples by a hash of (seed, epoch); a batch takes the next ones of its bucket, over the
    end of an epoch where need be. So no sample is left out, and none comes again before all of its bucket have come.

    Args:
        groups: the bucket of each sample
        batch_size: per rank
        seed: of the order
        rank: this process
        world: number of processes
        start: samples used before the first batch, a multiple of batch_size * world
    """

    def __init__(
        self,
        groups: np.ndarray,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ):
        self.members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
        self.size, self.batch_size, self.seed = len(groups), batch_size, seed
        self.rank, self.world, self.start = rank, world, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        from data.loader import permutation

        whole, counts = self.batch_size * self.world, [len(m) for m in self.members]
        step = self.start // whole
        used = np.zeros(len(counts), dtype=np.int64)  # batches of each bucket before this step
        for first in range(0, step, 1 << 20):
            past = turns(self.seed, np.arange(first, min(step, first + (1 << 20))), counts)
            used += np.bincount(past, minlength=len(counts))
        orders: dict[int, tuple[int, array[int]]] = {}  # of each bucket's present epoch
        while True:
            bucket = int(turns(self.seed, np.array([step]), counts)[0])
            members, batch = self.members[bucket], []
            for place in range(self.rank, whole, self.world):
                epoch, at = divmod(int(used[bucket]) * whole + place, len(members))
                if orders.get(bucket, (-1,))[0] != epoch:
                    orders[bucket] = epoch, permutation(self.seed, epoch, len(members))
                batch.append((int(members[orders[bucket][1][at]]), step * whole + place))
            yield batch
            used[bucket] += 1
            step += 1
