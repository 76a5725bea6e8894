import pytest
import torch

from edit.pruning.importance import candidates, draw, even, influence, only, strongest

GROUPS = ((1, 2), (2, 4))


def test_every_way_of_a_group_is_equally_likely():
    generator = torch.Generator().manual_seed(0)
    drawn = [tuple(draw(GROUPS, generator)) for _ in range(3000)]
    counts = [drawn.count(way) for way in set(drawn)]
    assert len(counts) == 12 and min(counts) > 180  # 250 each, standard deviation 15
    assert all(way == tuple(sorted(way)) and len([i for i in way if i < 2]) == 1 for way in drawn)


def test_even_spacing_keeps_both_ends_of_a_group():
    assert even(((6, 12),)) == [0, 2, 4, 7, 9, 11]
    assert even(GROUPS) == [0, 2, 5]


def test_the_strongest_of_each_group_stay():
    assert strongest([3.0, 1.0, 9.0, 8.0, 0.0, 8.5], GROUPS) == [0, 2, 5]


def test_few_patterns_are_all_tried_and_of_many_distinct_ones_are_drawn():
    assert candidates(GROUPS, 12, 0) == sorted(candidates(GROUPS, 12, 0)) and len(candidates(GROUPS, 12, 0)) == 12
    many = candidates(((7, 14),), 100, 0)
    assert len(set(many)) == 100 and many == candidates(((7, 14),), 100, 0) != candidates(((7, 14),), 100, 1)


@torch.no_grad()
def test_a_unit_without_influence_is_the_identity(make_dit, batch):
    dit = make_dit()
    for p in dit.units[1].adaLN_modulation.parameters():
        p.zero_()
    found = influence(dit, *batch)
    assert found.shape == (3, 4)
    assert found[1].abs().max() < 1e-6 < found[[0, 2]].min()  # fp32 rounding of a cosine


@torch.no_grad()
def test_left_out_units_come_back(make_dit, batch):
    dit = make_dit()
    before = dit(*batch).sample
    with pytest.raises(RuntimeError, match="in the middle"), only(dit, [0]):
        assert not torch.equal(dit(*batch).sample, before)
        raise RuntimeError("in the middle")
    assert torch.equal(dit(*batch).sample, before)
