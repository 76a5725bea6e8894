import hashlib

import pytest
import torch

from data.loader import EndlessLoader
from data.sets.digits import Digits, DigitsAndShades, MovedDigits, heldout_indices, moved
from data.sets.tensors import Tensors


def test_the_split_is_1437_to_360_stratified_and_fixed():
    digits = Digits()
    assert (len(digits.train()), len(digits.heldout())) == (1437, 360)
    label = torch.cat((digits.train().label, digits.heldout().label))
    share = torch.bincount(digits.heldout().label) / torch.bincount(label)
    assert (share - 0.2).abs().max() < 0.01  # one image of some 180 more or less
    from sklearn.datasets import load_digits

    held = heldout_indices(torch.from_numpy(load_digits().target))
    # pinned: published numbers are on these 360 images
    assert hashlib.sha256(held.numpy().astype("<i8").tobytes()).hexdigest()[:16] == "6c7f4c287433cf53"


def test_no_image_is_on_both_sides():
    digits = Digits()
    train = {tuple(x.flatten().tolist()) for x in digits.train().x}
    assert not any(tuple(x.flatten().tolist()) in train for x in digits.heldout().x)


def test_samples_are_1x8x8_in_minus_one_to_one_with_a_label():
    digits = Digits()
    sample = digits.train().sample(3, 0)
    assert sample["x"].shape == digits.shape and sample["x"].dtype == torch.float32
    assert sample["label"].shape == () and sample["label"].dtype == torch.int64
    assert (digits.train().x.min(), digits.train().x.max()) == (-1, 1)
    assert digits.classes[digits.num_classes - 1] == "9"


def test_images_go_back_to_sixteen_grey_levels():
    digits = Digits()
    x = digits.train().x[:50]
    images = digits.to_frames(x)[:, 0]
    assert images.shape == (50, 8, 8, 3) and images.dtype == torch.uint8
    assert torch.equal((images[..., 0].float() / 15.9375).round(), (x[:, 0] + 1) * 8)  # 255 / 16 per level


def test_a_batch_of_digits_holds_what_a_recipe_needs():
    batch = next(iter(EndlessLoader(Digits().train(), batch_size=32, total=1)))
    assert {k: tuple(v.shape) for k, v in batch.items()} == {"x": (32, 1, 8, 8), "label": (32,), "draw": (32,)}


def test_half_of_digits_and_shades_are_cards_of_the_grey_of_their_class_and_grain():
    digits, both = MovedDigits(copies=1), DigitsAndShades(copies=1)
    assert len(both.classes) == both.num_classes == 20 and both.classes[10] == "shade 0"
    cards = []
    for plain, split in ((digits.train(), both.train()), (digits.heldout(), both.heldout())):
        assert len(split) == 2 * len(plain)
        assert torch.equal(split.x[: len(plain)], plain.x) and torch.equal(split.label[: len(plain)], plain.label)
        x, label = split.x[len(plain) :].flatten(1), split.label[len(plain) :]
        grain = x - 0.144 * (label - 14.5)[:, None]
        assert -0.35 <= grain.min() < -0.34 and 0.34 < grain.max() <= 0.35 and x.abs().max() <= 1
        assert (grain.std() - 0.35 / 3**0.5).abs() < 0.005 and grain.mean().abs() < 0.005  # uniform
        pairs = torch.corrcoef(grain.T).fill_diagonal_(0)
        assert pairs.abs().max() < 5 / len(x) ** 0.5  # 2016 pairs of pixels, none of which tells of the other
        assert (((x.mean(1) / 0.144 + 4.5).round() + 10) == label).float().mean() > 0.98  # beyond 2.85 deviations
        share = torch.bincount(label)[10:] / len(plain)
        assert (share - 0.1).abs().max() < 0.003  # in turn
        cards.append(x)
    every = torch.cat(cards)
    assert len(every.unique(dim=0)) == len(every)  # no two alike, nor across the splits
    assert torch.equal(both.train().x, DigitsAndShades(copies=1).train().x)


def test_moved_digits_are_the_digits_copies_times_each_moved_otherwise():
    digits, many = Digits(), MovedDigits(copies=3)
    for plain, split in ((digits.train(), many.train()), (digits.heldout(), many.heldout())):
        assert len(split) == 3 * len(plain) and torch.equal(split.label, plain.label.repeat(3))
        assert split.x.shape[1:] == many.shape and split.x.min() == -1 and split.x.max() <= 1
        every = split.x.flatten(1).unique(dim=0)
        assert len(every) == len(split)  # no two alike
        assert not (every[:, None] == plain.x[:40].flatten(1)).all(2).any()
        ink = (split.x + 1).sum((1, 2, 3)) / (plain.x.repeat(3, 1, 1, 1) + 1).sum((1, 2, 3))
        assert 0.8**2 * 0.9 < ink.median() < 1.1**2  # as large as it is scaled, less what leaves the picture
    both = torch.cat((many.train().x, many.heldout().x)).flatten(1)
    assert len(both.unique(dim=0)) == len(both)  # nor across the splits
    assert torch.equal(many.train().x, MovedDigits(copies=3).train().x)


def test_a_moved_digit_is_turned_scaled_and_shifted_about_its_centre(monkeypatch):
    x = torch.full((1, 1, 8, 8), -1.0)
    x[0, 0, 3:5, 3:5] = 1.0  # four pixels in the middle
    middle = torch.arange(8.0) - 3.5
    drawn = [[0.5] * 4, [1.0, 0.5, 0.5, 0.5], [0.5, 0.5, 1.0, 0.5], [0.5, 0.5, 0.5, 0.0]]
    found = []
    for numbers in drawn:  # angle, size, down, right: 0.5 is none of it, but for the size
        given = iter(torch.tensor([numbers]).T)
        monkeypatch.setattr("data.sets.digits.noise.uniform", lambda *_, given=given: next(given))
        found.append(moved(Tensors(x, torch.tensor([7])), 0, 1).x[0, 0] + 1)
    still, turned, down, right = found
    assert torch.allclose(still, still.flip(0)) and torch.allclose(still, still.mT)
    assert not torch.allclose(turned, turned.mT) and torch.allclose(turned, turned.rot90(2), atol=1e-6)
    for picture, axis, by in ((down, 0, -1.0), (right, 1, 1.0)):  # what is read lies where the number says
        centre = (picture.sum(1 - axis) * middle).sum() / picture.sum()
        assert abs(centre - by) < 0.05  # bilinear


def test_moved_digits_without_copies_are_refused():
    with pytest.raises(ValueError, match="copies must be at least 1, got 0"):
        MovedDigits(copies=0)
