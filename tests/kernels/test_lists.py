"""Transposition of lists."""

import pytest
import torch
from attended import lists
from torch import Tensor

from edit.kernels.lists import transposed
from edit.kernels.tiles import table


def named(starts: Tensor, rows: Tensor) -> list[tuple[int, int]]:
    """(row, block) of all entries, from the transposed lists of one batch and head."""
    return [(int(r), j) for j in range(len(starts) - 1) for r in rows[starts[j] : starts[j + 1]]]


def test_the_worked_example():
    starts, rows = transposed(torch.tensor([[1, 2], [2, 3], [0, 3], [1, 3]]).int()[None, None], 4)
    assert starts.flatten().tolist() == [0, 1, 3, 5, 8]
    assert rows.flatten().tolist() == [2, 0, 3, 0, 1, 1, 2, 3]


@pytest.mark.parametrize("shape", ((2, 3, 9, 4, 7), (1, 1, 1, 1, 1), (1, 2, 33, 5, 6)))
def test_pairs_of_row_and_block_are_the_same_and_rows_ascend(shape):
    index = lists(*shape)
    starts, rows = transposed(index, shape[-1])
    assert starts.dtype == rows.dtype == torch.int32
    for b in range(shape[0]):
        for h in range(shape[1]):
            expected = [(r, int(j)) for r, each in enumerate(index[b, h]) for j in each if j >= 0]
            found = named(starts[b, h], rows[b, h])
            assert sorted(found) == sorted(expected)
            assert found == sorted(found, key=lambda pair: pair[::-1])
            assert int(starts[b, h, -1]) == int((index[b, h] >= 0).sum())


def test_entries_below_zero_and_beyond_the_last_block_are_left_out():
    starts, rows = transposed(torch.tensor([[-1, 5, 1], [-3, 1, 9]]).int()[None, None], 2)
    assert starts.flatten().tolist() == [0, 0, 2] and rows.flatten()[:2].tolist() == [0, 1]


def test_a_table_of_tiles_holds_each_token_of_each_group_once():
    cut = torch.tensor([[[0, 5, 5, 38, 40]]]).int()
    tiles = table(cut, 40, 16)[0, 0].tolist()
    assert len(tiles) == 40 // 16 + 4
    real = [tile for tile in tiles if tile[1] < tile[2]]
    # a tile holds 16 tokens from its start, and none beyond its group's end
    held = [(group, t) for group, start, end in real for t in range(start, min(start + 16, end))]
    assert held == [(0, t) for t in range(5)] + [(2, t) for t in range(5, 38)] + [(3, 38), (3, 39)]
