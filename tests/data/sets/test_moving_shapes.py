import pytest
import torch

from data.sets.moving_shapes import MovingShapes, centroids, grammar


@pytest.fixture(scope="module")
def world() -> MovingShapes:
    return MovingShapes(count=40, held=40)


@pytest.fixture(scope="module")
def real(world) -> tuple[torch.Tensor, list[str]]:
    split = world.heldout()
    return world.to_frames(torch.stack([split.sample(i, i)["x"] for i in range(len(split))])), split.captions


def test_a_sample_depends_on_seed_and_index_alone(world):
    small, other = MovingShapes(count=3, held=2), MovingShapes(count=3, held=2, seed=1)
    for split, same, changed in zip(*((w.train(), w.heldout()) for w in (small, world, other)), strict=True):
        for i in range(len(split)):
            # the codec's sums may run in another order in a batch of another size
            assert torch.allclose(split.sample(i, 0)["x"], same.sample(i, 9)["x"], atol=1e-5)
            assert split.captions[i] == same.captions[i]
            assert not torch.equal(split.sample(i, 0)["x"], changed.sample(i, 0)["x"])


def test_samples_are_videos_with_embedded_captions(world):
    sample = world.train().sample(0, 0)
    assert sample["x"].shape == world.shape == (12, 8, 8, 8) and sample["text"].shape == (16, 64)
    assert 0 <= sample["kind"] < world.judged and world.train().captions[0] in grammar()
    assert not set(world.train().captions) & set(world.heldout().captions)


def test_held_out_videos_follow_their_captions_and_no_other_motion(world, real):
    frames, captions = real
    assert world.follows(frames, captions).float().mean() > 0.95  # measured 0.99 of 256
    for a, b in (("moving", "bouncing"), ("left", "right"), ("up", "down"), ("left", "up"), ("right", "down")):
        swapped = [c.replace(a, "?").replace(b, a).replace("?", b) for c in captions]
        wrong = torch.tensor([c != s for c, s in zip(captions, swapped, strict=True)])
        assert wrong.any() and not world.scores(frames, swapped)["motion"][wrong].any()
    others = [c.replace("red", "blue") if "red" in c else c.replace(c.split()[-3], "star") for c in captions]
    red = torch.tensor(["red" in c for c in captions])
    assert not world.follows(frames[red], [o for o, r in zip(others, red, strict=True) if r]).any()


def test_a_picture_that_stands_still_an_empty_one_and_backwards_time_show_no_motion(world, real):
    frames, captions = real
    still = frames[:, :1].expand_as(frames)
    empty = torch.full_like(frames, 20)
    assert not world.scores(still, captions)["motion"].any() and not world.scores(empty, captions)["motion"].any()
    moving = torch.tensor(["moving" in c for c in captions])
    told = [c for c in captions if "moving" in c]
    assert not world.scores(frames[moving].flip(1), told)["motion"].any()


def test_a_thing_that_moves_right_does_and_one_that_bounces_comes_back(world, real):
    frames, captions = real
    way = centroids(frames).diff(dim=1)  # b f-1 2
    for k, caption in enumerate(captions):
        if caption.endswith("moving right"):
            assert (way[k, :, 0] > 0).all() and way[k, :, 1].abs().max() < 0.02
        if caption.endswith("bouncing up"):
            assert (way[k, :3, 1] < 0).all() and (way[k, 4:, 1] > 0).all()


def test_what_makes_no_videos_is_refused(world, real):
    with pytest.raises(ValueError, match="frames are 4 to 1024, got 3"):
        MovingShapes(frames=3)
    with pytest.raises(ValueError, match="multiple of 4 pixels"):
        MovingShapes(size=30)
    with pytest.raises(ValueError, match="no sentence about moving shapes"):
        world.follows(real[0][:1], ["a red circle"])
    with pytest.raises(ValueError, match="1 videos and 2 captions"):
        world.follows(real[0][:1], real[1][:2])
