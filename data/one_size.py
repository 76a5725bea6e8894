"""The samples of a split that have one size, as image measures need them."""

from __future__ import annotations

import numpy as np
import torch

from data.split import Split


class OneSize:
    """The samples of a split that have one shape, in order: all, where there are no buckets.

    Args:
        split: `groups` and `shapes` are its buckets, where it has any
        shape: (c, *sizes); None: of the bucket that has most samples

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
        """A phrase for people that names this part of the split; empty for the whole split."""
        if len(self) == len(self.split):
            return ""
        return f", the {len(self)} of {len(self.split)} samples that are {'x'.join(map(str, self.shape))}"

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, index: int, draw: int) -> dict[str, torch.Tensor]:
        return self.split.sample(int(self.indices[index]), draw)
