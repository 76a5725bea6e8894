"""Pyramid Attention Broadcast: when an attention is computed. `test_engine` has what all caches have in common."""

import pytest
from caches import executed, family

from edit.caching.pab import PAB
from edit.stream import Step
from edit.unit import core

TIMES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def computed(cache: PAB, branch: str) -> list[int]:
    steps = [Step(i, 10, t, times=(*TIMES, 0.0)) for i, t in enumerate(TIMES)]
    return [step.index for step in steps if cache.due(step, branch)]


def test_each_kind_of_attention_has_its_interval_inside_the_window_and_runs_outside_of_it():
    cache = PAB(attention=2, second=4, cross=3, window=(150, 850))  # evaluations 2 to 8
    assert computed(cache, "attention") == [0, 1, 2, 4, 6, 8, 9]
    assert computed(cache, "cross") == [0, 1, 2, 5, 8, 9]
    assert computed(cache, "second") == [0, 1, 2, 6, 9]
    assert computed(PAB(1, 1, 1), "attention") == list(range(10))


def test_both_ends_of_the_window_are_outside():
    assert computed(PAB(attention=9, window=(100, 800)), "attention") == [0, 1, 2, 3, 9]


@pytest.mark.parametrize(
    "name, fused, branches", [("flux", (2, 3), {"attention"}), ("pixart", (), {"attention", "cross"})]
)
def test_fused_units_and_feed_forwards_always_run_and_the_edit_stays_as_it_was_written(name, fused, branches):
    net = family(name, cache=PAB())
    cache = net.applied["cache"]
    alone = [i for i in range(len(net.units)) if i not in fused]
    assert set(cache.covers(net)) == {(i, branch) for i in alone for branch in branches}
    assert [i for i, unit in enumerate(net.units) if "branch" in core(unit).slots] == alone
    assert vars(cache) == vars(PAB()) | {"name": "cache"}
    assert 0.0 in [s for row in executed(net, 8, "cache")["joint"] for s in row]


def test_a_window_that_is_none_is_refused():
    with pytest.raises(ValueError, match="PAB: window must be a list of 2 numbers"):
        PAB(window=(1,))
    for window in ((800, 100), (0, 1001)):
        with pytest.raises(ValueError, match="PAB: window is two timesteps from 0 to 1000, the smaller first"):
            PAB(window=window)
