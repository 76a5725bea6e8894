import pytest
import torch

from data import pixel_codec
from data.pixel_codec import basis, decode, encode
from data.sets.captioned import shuffled
from data.sets.shape_pictures import draw
from data.sets.shape_scenes import grammar
from edit.measuring.quality import psnr


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """400 scenes of each family."""
    scenes = [family[caption] for family in grammar().values() for caption in (shuffled(list(family)) * 4)[:400]]
    return draw(scenes, torch.arange(len(scenes)), 32, seed=2)


def test_the_channels_are_an_orthonormal_basis():
    flat = basis().flatten(1)
    assert flat.shape == (12, 48)
    assert torch.allclose(flat @ flat.T, torch.eye(12), atol=1e-6)  # float32 rounding


def test_a_flat_image_of_any_size_comes_back():
    colours = torch.randint(0, 256, (20, 1, 1, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = colours.expand(-1, 64, 48, -1)
    assert encode(images).shape == (20, 12, 16, 12)
    # the decoder rounds as DiT does: up to one level of 255 aside
    assert (decode(encode(images)).int() - images.int()).abs().max() <= 1


def test_encoding_what_was_decoded_changes_little():
    x = encode(torch.randint(60, 190, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    again = encode(decode(x))
    # only rounding to 255 levels lies between: half a level on each of 48 numbers, times the largest scale
    assert (again - x).abs().max() < 0.5 / 127.5 * 48**0.5 * max(pixel_codec.SCALE)


def test_over_the_shapes_each_channel_has_mean_zero_and_variance_one(images):
    x = encode(images)
    # measured over other pictures, rounded to two digits: over these, 1200 of them, means stray by some 0.01
    assert x.mean((0, 2, 3)).abs().max() < 0.05
    assert (x.std((0, 2, 3)) - 1).abs().max() < 0.05


def test_shapes_survive_with_28_decibels(images):
    assert psnr(images, decode(encode(images))).mean() > 28  # measured 28.5


def test_a_side_that_is_no_multiple_of_the_block_is_refused():
    with pytest.raises(ValueError, match="multiples of 4 pixels, got 30 x 32"):
        encode(torch.zeros(1, 30, 32, 3, dtype=torch.uint8))
