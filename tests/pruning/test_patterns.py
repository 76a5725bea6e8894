import pytest
import torch

from edit.backbones.flux import FluxConfig
from edit.backbones.sd3 import SD3Config
from edit.distillation.pairs import TINYFUSION_D19
from edit.pruning.patterns import aligned, groups_of, options, runs_of_one_kind


@pytest.mark.parametrize("n, m, count", [(1, 2, 2), (2, 4, 6), (3, 4, 4), (7, 14, 3432), (1, 1, 1)])
def test_options_are_all_ways_in_lexicographic_order(n, m, count):
    ways = options(n, m)
    assert ways.shape == (count, m) and (ways.sum(1) == n).all()
    kept = [tuple(way.nonzero()[:, 0].tolist()) for way in ways]
    assert kept == sorted(set(kept))


@pytest.mark.parametrize(
    "pattern, depth, kept",
    [
        ("1:2", 28, 14),
        ("2:4", 28, 14),
        ("7:14", 28, 14),
        ("1:4", 28, 7),
        ("1:2", 14, 7),
        ("2:4,2:4,3:4,2:4,3:4,2:4,2:4", 28, 16),
        ([[3, 4], [3, 4], [2, 4], [3, 4], [2, 4], [3, 4], [3, 4]], 28, 19),
    ],
)
def test_published_patterns_keep_what_they_say(pattern, depth, kept):
    groups = groups_of(pattern, (depth,))
    assert sum(m for _, m in groups) == depth and sum(n for n, _ in groups) == kept


@pytest.mark.parametrize(
    "pattern, lengths, complaint",
    [
        (",".join(["2:4"] * 7), (14,), "28 units in all, and the model has 14"),
        ("2:4", (14,), "14 units make no groups of 4"),
        ("3:2", (4,), "no choice of 1 to 2"),
        ("0:2", (4,), "no choice of 1 to 2"),
        ("half", (4,), "expected such as 2:4"),
        ("1:3,1:3", (2, 4), "units 1 and 2 are of two kinds"),
    ],
)
def test_impossible_patterns_are_refused(pattern, lengths, complaint):
    with pytest.raises(ValueError, match=complaint):
        groups_of(pattern, lengths)


def test_no_group_has_units_of_two_kinds_and_the_rest_of_a_kind_stays():
    assert groups_of("1:2", (19, 38)) == ((1, 2),) * 9 + ((1, 1),) + ((1, 2),) * 19
    assert groups_of("1:2", (23, 1)) == ((1, 2),) * 11 + ((1, 1),) * 2


def test_kinds_of_units_are_found_without_weights():
    with torch.device("meta"):
        assert runs_of_one_kind(FluxConfig().build()) == (19, 38)
        sd3 = SD3Config(num_layers=3, attention_head_dim=8, num_attention_heads=2).build()
    assert runs_of_one_kind(sd3) == (2, 1)  # the last one puts out no text


def test_the_alignment_rule_gives_every_published_table():
    d14 = tuple((i, 2 * i + 1) for i in range(14))
    assert aligned("1:2", (28,)) == d14
    assert aligned("1:2", (14,)) == d14[:7]
    assert aligned("3:4,3:4,2:4,3:4,2:4,3:4,3:4", (28,)) == TINYFUSION_D19
