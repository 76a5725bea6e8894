"""Handwritten digits, the data of the default run: 1797 images of 8x8 that ship inside scikit-learn (UCI, 1998)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from data.sets.tensors import Tensors, TensorSet
from edit import noise


class Digits(TensorSet):
    """Digits as 1 x 8 x 8 in [-1, 1]; 1437 to train on, 360 held out."""

    shape = (1, 8, 8)
    num_classes = 10
    classes = list("0123456789")

    def __init__(self):
        from sklearn.datasets import load_digits

        digits = load_digits()
        x = torch.from_numpy(digits.images).float().div_(8).sub_(1)[:, None]  # 0 to 16 -> -1 to 1
        label = torch.from_numpy(digits.target).long()
        held = heldout_indices(label)
        kept = torch.ones(len(label), dtype=torch.bool).index_fill_(0, held, False)
        super().__init__(Tensors(x[kept], label[kept]), Tensors(x[held], label[held]))


class MovedDigits(Digits):
    """Digits, each turned, scaled and shifted in `copies` ways: too many to be memorised.

    1437 digits can be memorised: a model then improves as long as it is trained, and comparisons measure its memory.

    Args:
        copies: of each digit, all of them moved
    """

    def __init__(self, copies: int = 16):
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        super().__init__()
        first = copies * len(self._train)
        self._train, self._heldout = moved(self._train, 0, copies), moved(self._heldout, first, copies)


class DigitsAndShades(MovedDigits):
    """Moved digits, and as many cards in ten shades of grey: some need much work, some next to none.

    A card is the brightness of its class and grain. Its velocity is thus nearly linear in what is noisy, which without
    grain would have to be ever more exact near the data.

    Args:
        copies: of each digit, all of them moved
    """

    num_classes = 20
    classes = [*Digits.classes, *(f"shade {k}" for k in range(10))]

    def __init__(self, copies: int = 16):
        super().__init__(copies)
        self._train, self._heldout = with_shades(self._train, 0), with_shades(self._heldout, len(self._train))


def with_shades(digits: Tensors, first: int) -> Tensors:
    """Digits, and as many cards, numbered from `first`: the grain of a card depends on its number alone."""
    number, pixels = torch.arange(first, first + len(digits)), digits.x[0].numel()
    shade = number % 10
    at = (number[:, None] * pixels + torch.arange(pixels)).flatten()
    grain = (2 * noise.uniform(0, at, noise.GRAIN) - 1).view_as(digits.x)
    # up to 0.998; a card's mean strays by 0.025 (standard deviation) of the 0.072 to where the next shade begins
    cards = 0.144 * (shade - 4.5)[:, None, None, None] + 0.35 * grain
    return Tensors(torch.cat((digits.x, cards)), torch.cat((digits.label, 10 + shade)))


def moved(digits: Tensors, first: int, copies: int) -> Tensors:
    """All digits moved, then all of them moved otherwise: sample k by what its number, `first` + k, says.

    Turned by up to 15 degrees, 0.8 to 1.1 times the size, and shifted by up to one pixel each way; bilinear, with
    black around.
    """
    x, label = digits.x.repeat(copies, 1, 1, 1), digits.label.repeat(copies)
    number = torch.arange(first, first + len(x))
    angle, size, down, right = (2 * noise.uniform(0, 4 * number + k, noise.MOVE) - 1 for k in range(4))
    angle, size = torch.deg2rad(15 * angle), 0.95 + 0.15 * size
    cos, sin, pixel = angle.cos() / size, angle.sin() / size, 2 / x.shape[-1]
    where = torch.stack((cos, -sin, right * pixel, sin, cos, down * pixel), dim=1).view(-1, 2, 3)  # to where it was
    grid = F.affine_grid(where, list(x.shape), align_corners=False)
    return Tensors(F.grid_sample(x + 1, grid, align_corners=False) - 1, label)


def heldout_indices(label: Tensor) -> Tensor:
    """Every fifth image in an order by class and then by a hash of the index: stratified, and fixed for ever.

    Integer arithmetic of our own, because library splits have changed between releases.
    """
    by_hash = noise.hashes(0, torch.arange(len(label)), noise.SHUFFLE, 1)[:, 0].argsort(stable=True)
    by_class = by_hash[label[by_hash].argsort(stable=True)]
    return by_class[::5].sort().values
