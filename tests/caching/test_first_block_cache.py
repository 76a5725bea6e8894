"""FirstBlockCache and DBCache on scripted signals: each decides as computed by hand. `test_engine` has what all caches
have in common."""

from gates import decided

from edit.caching.first_block_cache import Change


def test_the_first_units_change_is_measured_from_the_last_computed_evaluation():
    """Residuals 1, 1.04, 1.08, 1.1, 1.16: of 1 they differ by 4, 8 %; of 1.08 by 1.9 and 7.4 %."""
    values = (11.0, 11.04, 11.08, 11.1, 11.16)
    assert decided(Change(0.05), values, front=10.0) == [0, 2, 4]
    assert decided(Change(0.0), values, front=10.0) == [0, 1, 2, 3, 4]
    assert decided(Change(1.0), values, front=10.0) == [0]


def test_limits_of_dbcache_force_evaluations():
    same = (11.0,) * 9
    assert decided(Change(1.0, warmup=3), same, 10.0) == [0, 1, 2]
    assert decided(Change(1.0, most_in_a_row=2), same, 10.0) == [0, 3, 6]
    assert decided(Change(1.0, most=3), same, 10.0) == [0, 4, 5, 6, 7, 8]
    # changes of 4, 5, 6 % of the first, which add up to 15 %
    assert decided(Change(1.0, budget=0.1), (11.0, 11.04, 11.05, 11.06, 11.06), 10.0) == [0, 3]
