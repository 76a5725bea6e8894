import pytest
import torch

from data.loader import EndlessLoader
from data.sets.labelled_shapes import LabelledShapes
from data.sets.shape_reader import things_in


@pytest.fixture(scope="module")
def shapes() -> LabelledShapes:
    return LabelledShapes(count=72, held=48)


@pytest.mark.parametrize("size", [32, 64])
def test_each_picture_shows_one_thing_of_the_colour_and_kind_of_its_class(size):
    data = LabelledShapes(size, count=48, held=24)
    for split in (data.train(), data.heldout()):
        seen = things_in(data.to_frames(split.x)[:, 0])
        told = [data.classes[int(k)] for k in split.label]
        assert [f"{s[0].colour} {s[0].kind}" for s in seen if len(s) == 1] == told


def test_samples_are_pixels_in_minus_one_to_one_with_a_label_and_classes_are_as_frequent(shapes):
    sample = shapes.train().sample(3, 0)
    assert sample["x"].shape == shapes.shape == (3, 32, 32) and sample["x"].dtype == torch.float32
    assert sample["label"].shape == () and sample["label"].dtype == torch.int64
    assert -1 <= shapes.train().x.min() < -0.8 and 0.9 < shapes.train().x.max() <= 1
    assert len(shapes.classes) == shapes.num_classes == 24
    assert torch.bincount(shapes.train().label).tolist() == [3] * 24


def test_a_picture_depends_on_seed_and_number_alone_and_none_is_on_both_sides(shapes):
    same, other = LabelledShapes(count=24, held=24), LabelledShapes(count=24, held=24, seed=1)
    assert torch.equal(same.train().x, shapes.train().x[:24]) and torch.equal(same.heldout().x, shapes.heldout().x[:24])
    assert not torch.equal(other.train().x, same.train().x)
    train = {tuple(x.flatten().tolist()) for x in shapes.train().x}
    assert not any(tuple(x.flatten().tolist()) in train for x in shapes.heldout().x)


def test_frames_are_the_drawn_pictures(shapes):
    frames = shapes.to_frames(shapes.train().x[:5])
    assert frames.shape == (5, 1, 32, 32, 3) and frames.dtype == torch.uint8
    assert (frames[:, 0, 0, 0] == 20).all()  # the ground


def test_the_loader_takes_it(shapes):
    batch = next(iter(EndlessLoader(shapes.train(), 8, 1, 0)))
    assert batch["x"].shape == (8, 3, 32, 32) and batch["label"].shape == (8,)


@pytest.mark.parametrize(
    "bad, complaint",
    [({"size": 8}, "size is at least 16 pixels"), ({"count": 0}, "at least 1, got 0"), ({"held": 0}, "at least 1")],
)
def test_what_cannot_be_is_refused(bad, complaint):
    with pytest.raises(ValueError, match=complaint):
        LabelledShapes(**bad)
