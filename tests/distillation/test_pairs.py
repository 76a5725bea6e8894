import pytest

from edit.distillation.pairs import (
    FLUX_MINI_DOUBLE,
    FLUX_MINI_DOUBLE_RELEASED,
    FLUX_MINI_KEPT,
    FLUX_MINI_SINGLE,
    as_intervals,
    as_pairs,
    check_pairs,
    collapsed,
    grouped,
    interval_ends,
    same,
)


def test_a_kept_unit_is_compared_with_the_end_of_what_it_replaces():
    assert interval_ends([0, 2, 5], [7]) == ((0, 1), (1, 4), (2, 6))
    assert interval_ends(range(7), [7]) == same(0, 6)


def test_no_unit_replaces_units_of_another_list():
    ends = dict(interval_ends(FLUX_MINI_KEPT, (19, 38)))
    assert [ends[j] for j in range(5)] == [0, 1, 9, 17, 18]
    assert [ends[j] - 19 for j in range(5, 15)] == [6, 10, 14, 18, 22, 26, 30, 34, 36, 37]


def test_groups_end_where_the_published_ones_do():
    assert grouped(14, 28) == tuple((j, 2 * j + 1) for j in range(14))  # TinyFusion D14
    assert [t for _, t in grouped(19, 28, 7)] == [3, 7, 11, 15, 19, 23, 27]  # the teacher's side of its D19
    assert grouped(7, 7) == same(0, 6) and grouped(5, 9, 1) == ((4, 8),)


def test_flux_mini_compares_doubles_with_later_units_and_singles_with_their_origin():
    assert [t for _, t in FLUX_MINI_DOUBLE] == [3, 7, 11, 15, 18]
    assert [s for s, _ in FLUX_MINI_SINGLE] == list(range(5, 15))
    assert [t - 19 for _, t in FLUX_MINI_SINGLE] == [3, 7, 11, 15, 19, 23, 27, 31, 35, 37]
    assert [t for _, t in FLUX_MINI_DOUBLE_RELEASED] == list(FLUX_MINI_KEPT[:5])


def test_a_collapsed_interval_ends_at_its_last_unit_and_the_rest_stays():
    assert collapsed([(1, 3), (5, 5)], 7) == ((0, 0), (1, 3), (2, 4), (3, 5), (4, 6))


def test_every_fourth_unit_is_compared_with_itself():
    assert same(19, 56, every=4)[:2] == ((19, 19), (23, 23)) and len(same(19, 56, every=4)) == 10


@pytest.mark.parametrize(
    "call, complaint",
    [
        (lambda: interval_ends([2, 0], [7]), r"increasing and in 0 to 6, got \[2, 0\]"),
        (lambda: interval_ends([0, 7], [3, 4]), "in 0 to 6"),
        (lambda: interval_ends([], [3]), r"in 0 to 2, got \[\]"),
        (lambda: grouped(4, 8, 5), "cannot make 5 groups of 4 student and 8 teacher units"),
        (lambda: as_pairs("KD", []), r"KD: pairs are \(student unit, teacher unit\)"),
        (lambda: as_pairs("KD", [(0, -1)]), "counted from 0"),
        (lambda: as_pairs("KD", [(0, 1, 2)]), "at least one; got"),
        (lambda: as_intervals("C", []), "at least one; got"),
        (lambda: as_intervals("C", [(3, 2)]), "increasing and disjoint"),
        (lambda: as_intervals("C", [(0, 2), (2, 3)]), "increasing and disjoint"),
        (lambda: as_intervals("C", [(0,), (1, 2, 3)]), "increasing and disjoint"),
        (lambda: as_intervals("C", [(-2, 1)]), "increasing and disjoint"),
    ],
)
def test_impossible_pairs_are_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()


def test_pairs_that_do_not_fit_the_models_are_refused(flux, make_dit):
    with pytest.raises(ValueError, match="KD: pairs: the student has units 0 to 2, got 3"):
        check_pairs("KD", ((0, 0), (3, 0)), make_dit(), flux)
    with pytest.raises(ValueError, match="KD: pairs: the teacher has units 0 to 6, got 7"):
        check_pairs("KD", ((0, 7),), make_dit(), flux)
    with pytest.raises(ValueError, match="tokens of the student are 64 wide, those of the teacher 32"):
        check_pairs("KD", ((0, 0),), make_dit(hidden_size=64), flux)
    with pytest.raises(ValueError, match="KD compares with a teacher and there is none"):
        check_pairs("KD", ((0, 0),), flux, None)
