import numpy as np
import pytest
import torch
from PIL import Image

from recipes.report.grids import SIDE, TOLD_SIDE, font, image_grid, lines, save_grid


def test_a_grid_enlarges_tiny_images_without_smoothing():
    images = torch.randint(0, 256, (5, 1, 8, 8, 3), dtype=torch.uint8)
    grid = image_grid(images, columns=3)
    assert grid.size == (3 * 40 + 2 * 2, 2 * 40 + 2)  # 5 pixels per pixel, gaps of 2
    assert grid.getpixel((42 + 5 * 3 + 2, 5 * 6 + 1)) == tuple(images[1, 0, 6, 3].tolist())
    assert grid.getpixel((2 * 42 + 7, 42 + 7)) == (255, 255, 255)  # the missing sixth
    assert image_grid(images.repeat_interleave(8, 2).repeat_interleave(8, 3), columns=5).size == (5 * 64 + 4 * 2, 64)


def test_a_grid_shows_a_few_frames_of_a_video_from_first_to_last():
    frames = torch.arange(2 * 10, dtype=torch.uint8).view(2, 10, 1, 1, 1).expand(-1, -1, 40, 40, 3)
    grid = image_grid(frames, columns=8)
    assert grid.size == (2 * 160 + 2, 40)  # four frames each
    assert [grid.getpixel((40 * k + 20, 20))[0] for k in range(4)] == [0, 3, 6, 9]
    assert grid.getpixel((160, 20)) == (255, 255, 255) and grid.getpixel((162, 20)) == (10, 10, 10)


@pytest.mark.parametrize("images", [torch.zeros(2, 1, 8, 8, 3), torch.zeros(0, 1, 8, 8, 3, dtype=torch.uint8)])
def test_a_grid_refuses_what_is_no_image(images):
    with pytest.raises(ValueError, match="uint8 frames b f y x 3"):
        image_grid(images)


def dark(grid: Image.Image, box: tuple[int, int, int, int]) -> int:
    """Dark pixels, of letters on white, inside (left, top, right, bottom)."""
    return int((np.asarray(grid.crop(box)).max(-1) < 160).sum())


def test_labels_that_columns_share_stand_above_them_and_change_no_pixel_of_the_pictures():
    images = torch.randint(0, 256, (6, 1, 8, 8, 3), dtype=torch.uint8)
    plain = image_grid(images, columns=3)
    told = image_grid(images, columns=3, labels=[*"012", *"012"])
    head = told.height - plain.height
    assert told.width == plain.width and 10 < head < 20
    assert told.crop((0, head, *told.size)).tobytes() == plain.tobytes()
    assert all(dark(told, (42 * k, 0, 42 * k + SIDE, head)) > 5 for k in range(3))


def test_labels_of_single_pictures_stand_below_them():
    images = torch.full((4, 1, 8, 8, 3), 255, dtype=torch.uint8)
    grid = image_grid(images, columns=2, labels=["1", "2", "3", ""])
    pitch = (grid.height + 2) // 2
    assert dark(grid, (0, SIDE, SIDE, pitch)) > 5 and dark(grid, (0, pitch + SIDE, SIDE, grid.height)) > 5
    assert dark(grid, (42, pitch + SIDE, 82, grid.height)) == 0  # the empty one
    assert dark(grid, (0, 0, 82, SIDE)) == 0


def test_captions_get_room_and_are_shortened_to_three_lines_that_fit():
    images = torch.zeros(2, 1, 8, 8, 3, dtype=torch.uint8)
    grid = image_grid(images, labels=["a small purple square", "left of a large yellow triangle " * 4])
    assert grid.width == 2 * 120 + 2 and 120 >= TOLD_SIDE  # 15 pixels per pixel
    found = lines("left of a large yellow triangle " * 4, 120, font(12))
    assert len(found) == 3 and found[-1].endswith("…") and all(font(12).getlength(line) <= 120 for line in found)
    assert lines("square", 200, font(12)) == ["square"] and lines("", 9, font(12)) == []
    assert lines("unbreakablewordwithoutspaces", 1, font(12)) == ["u"]


def test_letters_grow_with_a_grid_that_a_page_will_shrink():
    small, large = (torch.zeros(8, 1, side, side, 3, dtype=torch.uint8) for side in (64, 512))
    rooms = [image_grid(x, labels=[str(k) for k in range(8)]).height - x.shape[2] for x in (small, large)]
    assert rooms[0] == 15 and rooms[1] > 3 * rooms[0]


def test_a_grid_refuses_other_numbers_of_labels():
    with pytest.raises(ValueError, match="a grid of 2 samples needs as many labels, got 1"):
        image_grid(torch.zeros(2, 1, 8, 8, 3, dtype=torch.uint8), labels=["a"])


def test_a_saved_grid_is_a_png_with_its_labels(tmp_path):
    images = torch.zeros(2, 1, 8, 8, 3, dtype=torch.uint8)
    file = save_grid(images, tmp_path / "grids/a.png", 2, ["cat", "dog"])
    assert (
        Image.open(file).format == "PNG" and Image.open(file).size == image_grid(images, 2, labels=["cat", "dog"]).size
    )
