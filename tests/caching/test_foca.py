"""FoCa: the paper's three equations, and where they lead. `test_engine` has what all caches have in common."""

import pytest
import torch
from caches import paint

import edit
from edit.caching.foca import Calibrated, FoCa
from edit.caching.reuse import Reuse
from edit.stream import Branch


def value(v: float) -> Branch:
    return Branch(torch.full((1, 1, 1), v, dtype=torch.float64))


def run(computed: dict[float, float], until: int) -> list[float]:
    """The values of evaluations 0, ..., until - 1, those that are given computed."""
    predictor, state, found = Calibrated(), {}, []
    for s in range(until):
        if s in computed:
            predictor.observe(state, float(s), value(computed[s]))
            found.append(computed[s])
        else:
            found.append(predictor.predict(state, float(s)).image.item())
    return found


def by_the_paper(latest, older, place, before, at, anchor_slope) -> float:
    """Equations 7, 6 and 8 as they stand."""
    h, present = at - place, (latest - older) / (place - before)
    forecast = 4 / 3 * latest - 1 / 3 * older + 2 / 3 * h * present
    ahead = (3 * forecast - 4 * latest + older) / (2 * h)
    return latest + h / 2 * (anchor_slope + ahead)


def test_a_prediction_is_that_of_the_papers_equations_at_any_steps():
    predictor, state = Calibrated(), {}
    predictor.observe(state, 0.0, value(1.0))
    predictor.observe(state, 2.0, value(4.0))
    first = predictor.predict(state, 3.0).image.item()
    assert first == pytest.approx(by_the_paper(4.0, 1.0, 2.0, 0.0, 3.0, 1.5))
    predictor.observe(state, 4.0, value(4.0))  # falls behind its prediction: slope 0 of the anchor, -1.5 at present
    second = predictor.predict(state, 6.0).image.item()
    assert second == pytest.approx(by_the_paper(4.0, first, 4.0, 3.0, 6.0, 0.0)) == pytest.approx(2.5)
    assert predictor.predict(state, 7.0).image.item() == pytest.approx(by_the_paper(second, 4.0, 6.0, 4.0, 7.0, 0.0))


def test_constants_and_lines_are_exact_from_the_second_computed_value_on_at_any_places():
    assert run({0: 3.0, 1: 3.0, 5: 3.0}, 9) == [3.0] * 9
    line = run({0: 1.0, 3: 2.5, 7: 4.5}, 10)
    assert line[3:] == pytest.approx([1 + s / 2 for s in range(3, 10)])
    assert line[:3] == [1.0, 1.0, 1.0]  # one value is repeated


def test_the_slope_goes_half_of_the_way_to_the_anchors_at_every_prediction():
    """A kink of 0.5 is found at evaluation 4: behind it the slope is -0.5 less than the anchor's, then half of that."""
    found = run({0: 0.0, 2: 2.0, 4: 3.5}, 10)
    assert found[3] == pytest.approx(3.0)
    slopes = [b - a for a, b in zip(found[3:], found[4:], strict=False)]
    anchor = (3.5 - 2.0) / 2
    assert [s - anchor for s in slopes] == pytest.approx([-0.25 / 2**k for k in range(6)])


def test_predictions_are_remembered_and_computed_values_take_their_place():
    predictor, state = Calibrated(), {}
    for s, v in ((0.0, 0.0), (1.0, 1.0)):
        predictor.observe(state, s, value(v))
    predictor.predict(state, 2.0)
    assert [pair[0] for pair in state["latest"]] == [1.0, 2.0] and state["anchor"][0] == 1.0
    predictor.observe(state, 3.0, value(5.0))
    assert [pair[0] for pair in state["latest"]] == [2.0, 3.0]
    predictor.observe(state, 3.0, value(6.0))  # Heun comes to a time twice: no difference can be taken
    assert [pair[0] for pair in state["latest"]] == [2.0, 3.0] and state["latest"][1][1].image.item() == 6
    assert state["slope"].image.item() == 2


def test_image_and_text_are_predicted_and_keep_their_type():
    predictor, state = Calibrated(), {}
    for s in (0.0, 1.0):
        predictor.observe(state, s, Branch(torch.full((1, 2, 1), s).bfloat16(), torch.full((1, 3, 1), -s).bfloat16()))
    image, text = predictor.predict(state, 2.0)
    assert image.dtype == text.dtype == torch.bfloat16 and image.shape == (1, 2, 1) and text.shape == (1, 3, 1)
    assert image.unique().item() == 2 and text.unique().item() == -2


def test_settings_that_cannot_be_are_refused(make_dit):
    with pytest.raises(ValueError, match="FoCa: interval must be at least 1, got 0"):
        FoCa(0)
    with pytest.raises(ValueError, match="FoCa: spare is two numbers of units, for site=span alone"):
        FoCa(spare=(1, 0))
    with pytest.raises(ValueError, match=r"FoCa\): a slope needs 2 computed evaluations, .* of this sampler 1 is"):
        paint(edit.apply(make_dit(), {"cache": FoCa(9, first=1)}), 4)
    net = edit.apply(make_dit(), {"reuse": Reuse(units=(1,))})
    with pytest.raises(ValueError, match="FoCa: 'reuse' caches attention of unit 1 already"):
        edit.apply(net, {"cache": FoCa()})
