"""Rendered shapes by class, in pixels: one thing on a dark ground, its colour and kind are the class.

The pictures are those of `data.sets.shapes` without words and without its codec: for models of pixels, and of as many
tokens as pixels.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from data.sets.captioned import APART, PALETTE
from data.sets.shape_pictures import draw
from data.sets.shape_scenes import KINDS, Scene, Thing
from data.sets.tensors import Tensors, TensorSet


class LabelledShapes(TensorSet):
    """3 x size x size in [-1, 1]; 24 classes, as often each.

    Args:
        size: pixels, at least 16
        count: training pictures
        held: held-out pictures, of other places and sizes
        seed: of the pictures

    Raises:
        ValueError: for an impossible size or count
    """

    num_classes = len(PALETTE) * len(KINDS)
    classes = [f"{colour} {kind}" for colour, kind in product(PALETTE, KINDS)]

    def __init__(self, size: int = 32, count: int = 6144, held: int = 1032, seed: int = 0):
        if size < 16:
            raise ValueError(f"size is at least 16 pixels, or a shape cannot be told from another, got {size}")
        if count < 1 or held < 1:
            raise ValueError(f"count and held are at least 1, got {count} and {held}")
        self.shape = (3, size, size)
        super().__init__(*(pictures(first + torch.arange(n), size, seed) for first, n in ((0, count), (APART, held))))


def pictures(numbers: Tensor, size: int, seed: int) -> Tensors:
    """The pictures of these numbers, each of the class that its number names modulo 24."""
    things = [Thing(colour, kind) for colour, kind in product(PALETTE, KINDS)]
    label = numbers % len(things)
    images = draw([Scene((things[k],)) for k in label.tolist()], numbers, size, seed)  # n y x 3
    return Tensors(images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous(), label)
