"""FirstBlockCache and DBCache on scripted signals: each decides as computed by hand. `test_engine` has what all caches
have in common."""

from collections import Counter

import pytest
from caches import family, paint
from gates import decided

from edit.caching.dmd import Modes
from edit.caching.engine import Latest
from edit.caching.first_block_cache import Change, DBCache, FirstBlockCache
from edit.caching.taylor import Ladder
from edit.unit import core


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


@pytest.mark.parametrize(
    "cache, gate, predictor",
    [
        (FirstBlockCache(0.3), Change(0.3), Latest()),
        (DBCache(0.3, 1, 0, 4, 5, 6, 0.7), Change(0.3, 4, 5, 6, 0.7), Latest()),
        (DBCache(front=1, order=2), Change(0.08, 8), Ladder(2)),
        (DBCache(front=1, predictor=Modes(4)), Change(0.08, 8), Modes(4)),
    ],
)
def test_settings_reach_gate_and_predictor(cache, gate, predictor):
    span = family("flux", cache=cache).units[1].span
    assert (span.gate, span.predictor) == (gate, predictor)


@pytest.mark.parametrize(
    "cache, often", [(FirstBlockCache(1e6), (6, 1, 1, 1)), (DBCache(1e6, front=2, back=1, warmup=0), (6, 6, 1, 6))]
)
def test_the_first_and_the_last_units_always_run(cache, often):
    net, calls = family("flux", cache=cache), Counter()
    for i, unit in enumerate(map(core, net.units)):
        unit.register_forward_pre_hook(lambda m, a, i=i: calls.update([i]))
    paint(net, 6)
    assert tuple(calls[i] for i in range(4)) == often
