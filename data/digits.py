"""Handwritten digits, the data of the default run: 1797 images of 8x8 that ship inside scikit-learn (UCI, 1998)."""

from __future__ import annotations

import torch
from torch import Tensor

from data.pixels import to_uint8
from data.split import Split
from edit import noise


class Tensors:
    """A split held in memory: x b c y x, label b."""

    def __init__(self, x: Tensor, label: Tensor):
        self.x, self.label = x, label
        self._rows = [{"x": a, "label": b} for a, b in zip(x, label, strict=True)]

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int, draw: int) -> dict[str, Tensor]:
        return dict(self._rows[index])


class Digits:
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
        self._train, self._heldout = Tensors(x[kept], label[kept]), Tensors(x[held], label[held])

    def train(self) -> Split:
        return self._train

    def heldout(self) -> Split:
        return self._heldout

    def to_images(self, x: Tensor) -> Tensor:
        """b 1 8 8 in [-1, 1] -> uint8 b 8 8 3."""
        return to_uint8(x)


class DigitsAndShades(Digits):
    """Digits, and as many cards of one brightness in ten classes: samples that need much work, and ones that need none.

    A card's class tells a tenth of [-1, 1], in whose inner half its brightness is: so a judge cannot mistake it.
    """

    num_classes = 20
    classes = [*Digits.classes, *(f"shade {k}" for k in range(10))]

    def __init__(self):
        super().__init__()
        self._train, self._heldout = with_shades(self._train, 0), with_shades(self._heldout, len(self._train))


def with_shades(digits: Tensors, first: int) -> Tensors:
    """Digits, and as many cards, numbered from `first`: what is on a card depends on its number alone."""
    number = torch.arange(first, first + len(digits))
    shade = number % 10
    brightness = (shade + 0.25 + 0.5 * noise.uniform(0, number, noise.SHUFFLE)) / 5 - 1
    cards = brightness[:, None, None, None].expand_as(digits.x)
    return Tensors(torch.cat((digits.x, cards)), torch.cat((digits.label, 10 + shade)))


def heldout_indices(label: Tensor) -> Tensor:
    """Every fifth image in an order by class and then by a hash of the index: stratified, and fixed for ever.

    Integer arithmetic of our own, because library splits have changed between releases.
    """
    by_hash = noise.hashes(0, torch.arange(len(label)), noise.SHUFFLE, 1)[:, 0].argsort(stable=True)
    by_class = by_hash[label[by_hash].argsort(stable=True)]
    return by_class[::5].sort().values
