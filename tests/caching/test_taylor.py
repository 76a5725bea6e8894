"""The ladder of finite differences: what it is exact on, and by how much it is wrong elsewhere (oracles 3, 4)."""

import pytest
import torch

from edit.caching.taylor import Ladder
from edit.stream import Branch


def observed(ladder: Ladder, f, anchors) -> dict:
    state: dict = {}
    for s in anchors:
        ladder.observe(state, float(s), Branch(f(torch.tensor(float(s), dtype=torch.float64)).reshape(1, 1, 1)))
    return state


def predicted(ladder: Ladder, state: dict, s: float) -> float:
    return ladder.predict(state, s).image.item()


@pytest.mark.parametrize("form", ["taylor", "newton"])
@pytest.mark.parametrize("order", range(5))
def test_constants_are_exact_at_any_order_and_lines_from_order_one_on_at_any_anchors(form, order):
    ladder = Ladder(order, form)
    assert predicted(ladder, observed(ladder, lambda s: 0 * s + 3, (0, 1, 4, 6)), 9.0) == 3
    line = predicted(ladder, observed(ladder, lambda s: 2 * s - 1, (0, 1, 4, 6)), 9.0)
    # differences of fp32 numbers of about 10
    assert line == pytest.approx(17 if order else 11, abs=1e-5)


@pytest.mark.parametrize("gap", [2, 5])
def test_the_published_form_has_the_known_error_on_a_parabola_and_newtons_has_none(gap):
    """c s^2 with anchors N apart: -c N k of order two, -c k (N + k) of order one, in features less prediction."""
    c, last = 0.5, 3 * gap
    anchors = [gap, 2 * gap, last]

    def error(order, k, form="taylor"):
        ladder = Ladder(order, form)
        return predicted(ladder, observed(ladder, lambda s: c * s * s, anchors), last + k) - c * (last + k) ** 2

    for k in range(1, gap):
        assert error(1, k) == pytest.approx(-c * k * (gap + k), abs=1e-4)
        assert error(2, k) == pytest.approx(-c * gap * k, abs=1e-4)
        assert error(2, k, "newton") == pytest.approx(0, abs=1e-4)


def test_a_cubic_at_uneven_anchors_is_exact_in_newtons_form_of_order_three_alone():
    def f(s):
        return s**3 - s

    found = {
        form: predicted(Ladder(3, form), observed(Ladder(3, form), f, (0, 1, 3, 4)), 6.0)
        for form in ("taylor", "newton")
    }
    assert found["newton"] == pytest.approx(210, rel=1e-5)
    # slopes of degree 1, 2, 3 at the last anchor: 36, 24, 18; 60 + 36 * 2 + 24 * 4 / 2 + 18 * 8 / 6
    assert found["taylor"] == pytest.approx(204, rel=1e-5)


def test_degrees_build_up_and_only_the_latest_ladder_is_kept():
    ladder, state, lengths = Ladder(2), {}, []
    for s in range(5):
        ladder.observe(state, float(s), Branch(torch.ones(1, 1, 1)))
        lengths.append(len(state["ladder"]))
    assert lengths == [1, 2, 3, 3, 3] and len(state["places"]) == 3


def test_a_place_that_comes_twice_divides_by_no_gap():
    ladder, state = Ladder(1), {}
    for s, v in ((0.0, 1.0), (1.0, 2.0), (1.0, 5.0)):
        ladder.observe(state, s, Branch(torch.full((1, 1, 1), v)))
    assert ladder.predict(state, 2.0).image.item() == 6  # the new value, the slope of before


@pytest.mark.parametrize("fp32, kind", [(True, torch.float32), (False, torch.bfloat16)])
def test_differences_stay_in_fp32_where_this_is_wanted(fp32, kind):
    ladder, state = Ladder(1, fp32=fp32), {}
    for s in range(2):
        ladder.observe(state, float(s), Branch(torch.full((1, 1, 1), s + 1.0, dtype=torch.bfloat16)))
    assert state["ladder"][1].image.dtype == kind
    assert ladder.predict(state, 2.0).image.dtype == torch.bfloat16
