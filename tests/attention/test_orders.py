import pytest
import torch
import torch.nn.functional as F
from families import CONFIGS, family, inputs

from edit.attention.orders import morton, reordered, z_codes
from edit.stream import Layout, Stream

GRIDS = [(1, 4, 4), (1, 8, 8), (1, 4, 16), (1, 32, 2), (2, 4, 8), (4, 4, 4), (1, 5, 7), (3, 5, 6), (1, 1, 1), (7, 1, 1)]


def test_the_example_of_the_paper():
    """A 4 x 4 grid, counted from 1."""
    rows = [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]
    assert (z_codes((1, 4, 4)) + 1).view(4, 4).tolist() == rows
    assert morton((1, 4, 4))[:8].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]  # the upper left square, then the one beside it


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_token_has_one_place_and_the_way_back_leads_there(grid):
    order, n = morton(grid), torch.tensor(grid).prod()
    assert order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(n))
    x = torch.randn(int(n))
    assert torch.equal(x[order][order.argsort()], x)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_code_interleaves_the_bits_of_column_row_and_frame_that_exist(grid):
    """Bit by bit, in Python integers."""
    frames, rows, columns = grid
    bits = [(s - 1).bit_length() for s in grid]

    def code(cell: tuple[int, int, int]) -> int:
        value, place = 0, 0
        for level in range(max(bits)):
            for axis in (2, 1, 0):
                if level < bits[axis]:
                    value |= (cell[axis] >> level & 1) << place
                    place += 1
        return value

    cells = [(f, y, x) for f in range(frames) for y in range(rows) for x in range(columns)]
    assert z_codes(grid).tolist() == [code(c) for c in cells]


@pytest.mark.parametrize("side, block", [(16, 4), (16, 16), (32, 64)])
def test_means_of_runs_are_average_pooling_of_the_picture(side, block):
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    patch = int(block**0.5)
    tokens = x.flatten(2)[:, :, morton((1, side, side))].unflatten(2, (-1, block)).mean(-1)
    pooled = F.avg_pool2d(x, patch).flatten(2)[:, :, morton((1, side // patch, side // patch))]
    torch.testing.assert_close(tokens, pooled, rtol=0, atol=1e-15)


@pytest.mark.parametrize("grid", [(1, 8, 8), (1, 4, 16), (2, 4, 8), (4, 8, 2)], ids=str)
@pytest.mark.parametrize("block", [2, 4, 8, 16])
def test_an_aligned_run_of_a_power_of_two_is_a_box_and_all_are_alike(grid, block):
    places = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).view(-1, 3)
    runs = places[morton(grid)].unflatten(0, (-1, block))
    sides = runs.amax(1) - runs.amin(1) + 1
    assert (sides.prod(-1) == block).all() and (sides == sides[0]).all()


def test_a_block_of_sixteen_is_a_square_of_four_and_one_of_sixty_four_in_a_video_a_cube():
    for grid, block, box in (((1, 64, 64), 16, [1, 4, 4]), ((8, 16, 16), 64, [4, 4, 4])):
        places = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).view(-1, 3)
        run = places[morton(grid)[:block]]
        assert (run.amax(0) + 1).tolist() == box


def test_a_grid_that_is_no_power_of_two_is_its_covers_curve_without_what_is_outside():
    whole, part = z_codes((1, 8, 8)).view(8, 8), z_codes((1, 5, 7)).view(5, 7)
    assert torch.equal(part, whole[:5, :7])


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_positions_of_every_family_follow_and_nobody_outside_sees_the_order(name):
    denoiser = family(name)
    batch = inputs(denoiser)
    plain = denoiser.embed(**denoiser.pack(*batch))
    turned = reordered(plain, morton(plain.layout.grid), "a test")
    one, other = denoiser.run(plain, taps=(0,)), denoiser.run(turned, taps=(0,))
    tolerance = {"rtol": 1e-6, "atol": 1e-6}  # stock RoPE is fp32
    torch.testing.assert_close(one.image, other.image, **tolerance)
    torch.testing.assert_close(one.trace["unit.0"], other.trace["unit.0"], **tolerance)
    assert other.layout.permutation is None


def test_what_cannot_be_is_refused_in_a_sentence():
    stream = Stream(torch.zeros(1, 6, 2), torch.zeros(1, 2), Layout((1, 2, 2), registers=2))
    turned = reordered(stream, morton((1, 2, 2)), "First")
    assert turned.layout.permutation.tolist() == [0, 1, 2, 3] and turned.image is stream.image
    with pytest.raises(ValueError, match="Second orders the image tokens, and another edit has done so already"):
        reordered(turned, morton((1, 2, 2)), "Second")
    with pytest.raises(ValueError, match="Third has an order of 9 image tokens and there are 4"):
        reordered(stream, morton((1, 3, 3)), "Third")
    with pytest.raises(ValueError, match=r"at least 1 each, got \[1, 0, 4\]"):
        morton((1, 0, 4))
