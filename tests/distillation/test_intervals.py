import math
from copy import deepcopy

import pytest
import torch
from views import passed

import edit
from edit.distillation.intervals import IntervalKD, magnitude
from edit.losses import Seen
from edit.objectives import Ramp
from edit.pruning.collapse import Collapse
from edit.stream import Output


def tokens(student: torch.Tensor, teacher: torch.Tensor) -> Seen:
    out, taught = (Output(torch.zeros(len(student), 1, 2, 2), None, {"unit.0": x}) for x in (student, teacher))
    return passed(out, torch.zeros(len(student)), 0.0, taught)


DIRECTION = IntervalKD(((0, 0),), magnitude=0.0)


def test_intervals_of_one_copied_unit_have_no_loss_and_no_gradient(flux, told, see):
    term, student = IntervalKD(((0, 0), (2, 2), (5, 5))), deepcopy(flux)
    term.build(student, flux)
    loss = term.losses(see(student, flux, told, term))["interval_kd"]
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0]
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_directions_do_not_see_scale_and_see_an_angle_as_two_minus_two_cosines():
    t = torch.randn(2, 5, 2)
    for c in (0.01, 1.0, 30.0):
        # fp32 rounding of a unit vector, squared
        assert DIRECTION.losses(tokens(c * t, t))["interval_kd"].max() < 1e-12
    for angle in (0.3, 2.0):
        cos, sin = math.cos(angle), math.sin(angle)
        turned = t @ torch.tensor([[cos, sin], [-sin, cos]])
        loss = DIRECTION.losses(tokens(turned, t))["interval_kd"]
        torch.testing.assert_close(loss, torch.full((2,), 2 - 2 * cos), rtol=1e-4, atol=0)  # fp32


def test_magnitudes_count_by_their_ratio():
    t = torch.randn(2, 5, 8)
    torch.testing.assert_close(magnitude(1.5 * t, t), torch.full((2,), 0.25))
    loss = IntervalKD(((0, 0),), magnitude=0.1).losses(tokens(1.5 * t, t))["interval_kd"]
    torch.testing.assert_close(loss, torch.full((2,), 0.025))


def test_fed_by_the_teacher_intervals_train_apart_from_each_other(flux, told, see):
    intervals = ((0, 1), (3, 4), (5, 6))
    student = edit.apply(deepcopy(flux), {"short": Collapse(intervals)})
    term = IntervalKD(intervals, forcing=1.0)
    term.build(student, flux)
    assert term.taps == (0, 2, 3) and term.teacher_taps == (1, 2, 4, 6)
    assert term.forced(0.5) == ({2: 2, 3: 4}, 1.0)
    units = [set(u.parameters()) for u in student.units]
    for k, unit in enumerate(term.taps):
        alone = IntervalKD(intervals, forcing=1.0)
        alone.pairs = (alone.pairs[k],)
        student.zero_grad()
        loss = alone.losses(see(student, flux, told, term))["interval_kd"]
        assert loss.shape == (3,) and (loss > 0).all()
        loss.sum().backward()
        touched = {i for i, ps in enumerate(units) if any(p.grad is not None and p.grad.any() for p in ps)}
        assert touched == {unit}


def test_the_loss_is_the_mean_over_intervals(flux, told, see):
    intervals = ((0, 1), (3, 4), (5, 6))
    student = edit.apply(deepcopy(flux), {"short": Collapse(intervals)})
    term = IntervalKD(intervals, weight=0.5, forcing=1.0)
    seen = see(student, flux, told, term)
    whole, pairs, parts = term.losses(seen)["interval_kd"], term.pairs, []
    for pair in pairs:
        term.pairs = (pair,)
        parts.append(term.losses(seen)["interval_kd"])
    torch.testing.assert_close(whole, torch.stack(parts).mean(0))


def test_running_free_an_interval_reaches_the_units_before_it(flux, told, see):
    intervals = ((0, 1), (3, 4))
    student = edit.apply(deepcopy(flux), {"short": Collapse(intervals)})
    term = IntervalKD(intervals, forcing=0.0)
    term.pairs = term.pairs[1:]
    term.losses(see(student, flux, told, term))["interval_kd"].sum().backward()
    assert all(any(p.grad is not None and p.grad.any() for p in u.parameters()) for u in student.units[:3])


def test_forcing_fades_over_the_first_third_by_default():
    term = IntervalKD(((1, 2),))
    assert [term.forced(p)[1] for p in (0.0, 0.15, 0.3, 1.0)] == pytest.approx([1, 0.5, 0, 0])
    assert IntervalKD(((1, 2),), forcing=Ramp(0.5, 0.1)).forced(1.0) == ({1: 0}, pytest.approx(0.1))


def test_a_student_that_was_collapsed_otherwise_is_refused(flux):
    term = IntervalKD(((0, 1), (3, 4)))
    with pytest.raises(
        ValueError, match="of 7 teacher units leaves 5, the student has 7: apply Collapse with the same"
    ):
        term.build(flux, flux)
    with pytest.raises(ValueError, match="IntervalKD: intervals are .first, last., increasing and disjoint"):
        IntervalKD(((3, 4), (0, 1)))
