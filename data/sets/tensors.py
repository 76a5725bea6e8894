"""Labelled pictures in memory, and a set of two splits of them."""

from __future__ import annotations

from torch import Tensor

from data.pixels import frames_of
from data.split import Split


class Tensors:
    """A split held in memory: x b c y x, label b."""

    def __init__(self, x: Tensor, label: Tensor):
        self.x, self.label = x, label
        self._rows = [{"x": a, "label": b} for a, b in zip(x, label, strict=True)]

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int, draw: int) -> dict[str, Tensor]:
        return dict(self._rows[index])


class TensorSet:
    """A set of pixels in [-1, 1]. Subclasses make the splits, and tell shape and classes."""

    def __init__(self, train: Tensors, heldout: Tensors):
        self._train, self._heldout = train, heldout

    def train(self) -> Split:
        return self._train

    def heldout(self) -> Split:
        return self._heldout

    def to_frames(self, x: Tensor) -> Tensor:
        """b c y x in [-1, 1] -> uint8 b 1 y x 3."""
        return frames_of(x)
