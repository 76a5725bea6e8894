"""The order in which samples are trained on: a pure function of (seed, position), so that a run resumes at any step.

The run is one global sequence of samples g = 0, 1, 2, ... Epoch g // n is a permutation of the data set by a hash of
(seed, epoch). Sample g goes to rank g % world. Data in aspect-ratio buckets come in batches of one bucket each, the
same on all ranks: every rank has the same work at every step.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from edit import noise

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: multiples of it fill the circle most evenly


def permutation(seed: int, epoch: int, size: int) -> array[int]:
    """The order of one epoch: each of 0 to size - 1 once."""
    key = int(noise.hashes(seed, torch.tensor([epoch]), noise.SHUFFLE, 1))
    order = noise.hashes(key, torch.arange(size), noise.SHUFFLE, 1)[:, 0].argsort(stable=True)
    return array("q", order.numpy().tobytes())  # 8 bytes each, and read as Python integers


class EndlessBatches(Sampler):
    """Batches of (index, draw) for one rank, without end.

    Args:
        size: samples in the data set
        batch_size: per rank
        seed: of the order
        rank: this process
        world: number of processes
        start: samples of the global sequence used before the first batch
    """

    def __init__(self, size: int, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1, start: int = 0):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world, self.start = rank, world, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position, epoch, order = self.start, -1, array("q")
        while True:
            batch = []
            for draw in range(position + self.rank, position + self.batch_size * self.world, self.world):
                if draw // self.size != epoch:
                    epoch = draw // self.size
                    order = permutation(self.seed, epoch, self.size)
                batch.append((order[draw % self.size], draw))
            yield batch
            position += self.batch_size * self.world


def bucket_turns(seed: int, steps: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """The bucket of each step: n int64 -> n, a pure function of (seed, step).

    Shares follow the counts. A golden-ratio sequence keeps every bucket within a few steps of its share at all times.
    """
    phase = np.uint64(noise.hashes(seed, torch.tensor([-1]), noise.SHUFFLE, 1).item() & (2**64 - 1))
    points = (steps.astype(np.uint64) * GOLDEN + phase) >> np.uint64(32)  # wraps around; 0 to 2^32 - 1
    total = np.cumsum(counts)
    return np.searchsorted(total, points.astype(np.float64) * (total[-1] / 2**32), side="right")


class BucketBatches(Sampler):
    """Batches of (index, draw) for one rank, without end, each from one bucket.

    The step decides the bucket (`bucket_turns`), on all ranks alike. Each bucket has an endless sequence of epochs; an
    epoch is a permutation of its samples by a hash of (seed, epoch). A batch takes the next samples of its bucket and
    may span two epochs: no sample is left out, and none comes again before all of its bucket have come.

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
        whole, counts = self.batch_size * self.world, [len(m) for m in self.members]
        step = self.start // whole
        used = np.zeros(len(counts), dtype=np.int64)  # batches of each bucket before this step
        for first in range(0, step, 1 << 20):
            past = bucket_turns(self.seed, np.arange(first, min(step, first + (1 << 20))), counts)
            used += np.bincount(past, minlength=len(counts))
        orders: dict[int, tuple[int, array[int]]] = {}  # by bucket: present epoch and its permutation
        while True:
            bucket = int(bucket_turns(self.seed, np.array([step]), counts)[0])
            members, batch = self.members[bucket], []
            for place in range(self.rank, whole, self.world):
                epoch, at = divmod(int(used[bucket]) * whole + place, len(members))
                if orders.get(bucket, (-1,))[0] != epoch:
                    orders[bucket] = epoch, permutation(self.seed, epoch, len(members))
                batch.append((int(members[orders[bucket][1][at]]), step * whole + place))
            yield batch
            used[bucket] += 1
            step += 1
