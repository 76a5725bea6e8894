"""Gates on scripted signals: each decides as computed by hand."""

from typing import Any

import pytest
import torch
from torch import nn

from edit.caching.cg_taylor import Confidence
from edit.caching.first_block_cache import Change
from edit.caching.mag_cache import Budget, MagCache, Ratios, nearest
from edit.caching.taylor import Ladder
from edit.caching.tea_cache import FLUX, Accumulated, value_of
from edit.stream import Layout, Step, Stream

UNIT: Any = nn.Identity()  # one that is on no other rank


def stream(value, index: int, count: int) -> Stream:
    image = torch.as_tensor(value, dtype=torch.float32).expand(2, 3, 4).clone()
    return Stream(image, torch.zeros(2, 1), Layout((1, 1, 3)), step=Step(index, count, 1 - index / count))


def decided(gate, values, front=None) -> list[int]:
    """Evaluations that are computed."""
    state: dict = {}
    found = []
    for i, value in enumerate(values):
        if front is not None:
            state["front"] = torch.full((2, 3, 4), float(front))
        if gate.computes(UNIT, stream(value, i, len(values)), state):
            found.append(i)
    return found


# ---- FirstBlockCache, DBCache ----------------------------------------------------------------------------------------


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


# ---- TeaCache --------------------------------------------------------------------------------------------------------


def after(gate: Accumulated, values) -> list[int]:
    state: dict = {}
    steps = [Step(i, len(values), 0.5) for i in range(len(values))]
    return [i for i, v in enumerate(values) if gate.after(UNIT, torch.full((1, 2, 2), v), steps[i], state)]


def test_changes_from_evaluation_to_evaluation_add_up_until_the_threshold():
    """Of 1, 1.1, 1.21, ...: a tenth each; 0.25 is reached at the third after a computed one. First and last are."""
    values = [1.1**i for i in range(9)]
    assert after(Accumulated(0.25, (1.0, 0.0)), values) == [0, 3, 6, 8]
    assert after(Accumulated(0.0, (1.0, 0.0)), values) == list(range(9))
    assert after(Accumulated(9.0, (1.0, 0.0)), values) == [0, 8]
    assert after(Accumulated(0.25, (2.0, 0.0)), values) == [0, 2, 4, 6, 8]  # p(d) = 2 d


def test_the_published_polynomial_has_its_highest_power_first():
    assert value_of(FLUX, 0.0) == 0.264230861
    assert value_of(FLUX, 0.1) == pytest.approx(
        498.651651e-4 - 283.781631e-3 + 55.8554382e-2 - 3.82021401e-1 + 0.264230861
    )


# ---- MagCache --------------------------------------------------------------------------------------------------------


def budgeted(table, count: int, **settings) -> list[int]:
    own = Ratios(len(table))
    own.table.copy_(torch.tensor(table))
    gate, state = Budget(MagCache(length=len(table), **settings), own), {}
    return [i for i in range(count) if gate.computes(UNIT, stream(1.0, i, count), state)]


def test_the_error_of_the_magnitude_adds_up_and_runs_in_a_row_are_limited():
    """Ratios of 0.98: errors 0.02, 0.0396 more, 0.0588 more."""
    table = [1.0, *[0.98] * 9]
    assert budgeted(table, 10, threshold=0.06, most=9, retention=0.1) == [0, 3, 6, 9]
    assert budgeted(table, 10, threshold=9.0, most=4, retention=0.1) == [0, 5]
    assert budgeted(table, 10, threshold=9.0, most=9, retention=0.5) == [0, 1, 2, 3, 4]
    assert budgeted(table, 10, threshold=0.0, most=9, retention=0.0) == list(range(10))
    assert budgeted([1.0, *[1.0] * 9], 10, threshold=0.0, most=3, retention=0.0) == [0, 4, 8]


def test_a_table_is_read_at_the_nearest_place():
    assert [nearest(i, 5, 9) for i in range(5)] == [0, 2, 4, 6, 8]
    assert [nearest(i, 9, 5) for i in range(9)] == [0, 0, 1, 2, 2, 2, 3, 4, 4]
    assert nearest(0, 1, 5) == 0


def test_without_a_table_all_is_computed():
    assert budgeted([0.0] * 4, 8) == list(range(8))


# ---- CG-Taylor -------------------------------------------------------------------------------------------------------


def confident(values, tau, order=1, warmup=1, max_skip=None) -> list[int]:
    return decided(Confidence(tau, Ladder(order), warmup, max_skip), values)


def test_lines_are_trusted_after_two_anchors_and_the_ends_are_always_computed():
    line = [1.0 + 0.5 * s for s in range(10)]
    assert confident(line, 1e-5) == [0, 1, 9]
    assert confident(line, 1e-5, warmup=3) == [0, 1, 2, 3, 9]
    assert confident(line, 0.0) == list(range(10))
    assert confident(line, 1e-5, max_skip=2) == [0, 1, 4, 7, 9]


def test_infinite_tolerance_computes_the_warm_up_and_the_last():
    g = torch.Generator().manual_seed(0)
    assert confident(torch.randn(10, generator=g).tolist(), float("inf"), warmup=2) == [0, 1, 2, 9]


def test_a_kink_is_noticed_where_it_is_and_the_ladder_refreshed_there():
    """The slope changes after evaluation 5; an extrapolation from 0 and 1 is wrong from 6 on, and those from (1, 6) and
    (6, 7) are wrong at 7 and right at 8."""
    kink = [1.0 + s for s in range(6)] + [6.0 - 3 * (s - 5) / 4 for s in range(6, 12)]
    assert confident(kink, 1e-4) == [0, 1, 6, 7, 11]


def test_a_ladder_that_is_refreshed_at_every_evaluation_would_miss_a_drift():
    """A slow curve: each point is close to the line through the two before it, and far from an old one."""
    curve = [1.0 + 0.02 * s * s for s in range(12)]
    computed = confident(curve, 0.05)
    one_step = max(abs(curve[s] - (2 * curve[s - 1] - curve[s - 2])) / curve[s] for s in range(2, 12))
    assert one_step < 0.05 and len(computed) > 3


def test_decisions_do_not_depend_on_the_scale_of_features_and_loosen_with_the_tolerance():
    curve = [1.0 + 0.02 * s * s for s in range(12)]
    assert confident(curve, 0.05) == confident([1000 * v for v in curve], 0.05)
    counts = [len(confident(curve, tau)) for tau in (0.0, 0.01, 0.05, 0.2, 10.0)]
    assert counts == sorted(counts, reverse=True) and counts[0] == 12 and counts[-1] == 3
