from dataclasses import replace

import pytest
import torch
from analytic import STD, given, networks, roles, velocity
from views import view

from edit.few_step.reflow import CachedReflow, Reflow
from edit.objectives import FlowMatching, LogitNormal
from edit.paths import column
from edit.solvers import Euler, Grid, Heun, times


def straight(end: float):
    """The velocity of the straight paths z -> end z."""

    def field(x_t, t, condition):
        return column((1 - end) / ((1 - t) * end + t), x_t) * x_t

    return field


def data_free(count: int = 8, first: int = 0):
    return replace(given(count, first=first), x=None)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_pair_is_a_noise_and_what_the_sampler_makes_of_it(shift):
    z, x = Reflow(steps=7, shift=shift).pairs(view(roles(velocity, velocity), data_free()))

    def predict(x, t, end=None):
        return velocity(x, torch.full((len(x),), t))

    expected = Euler(7, shift).integrate(predict, z, FlowMatching(), None)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)
    _, fine = Reflow(steps=400).pairs(view(roles(velocity, velocity), data_free()))
    torch.testing.assert_close(fine, STD * z, rtol=1e-2, atol=0)  # first order: an error of about 1 / 400


def test_straight_paths_to_the_teacher_s_samples_have_no_loss_and_the_teacher_s_own_paths_have_one():
    method = Reflow(steps=5, echoes=3)
    gain = 1.0
    for t, end in zip(times(5, 1.0), times(5, 1.0)[1:], strict=False):
        gain += (end - t) * velocity(torch.full((1, 1, 1, 1), gain), torch.tensor([t])).item()
    assert method.student_losses(view(roles(straight(gain), velocity), data_free()))["reflow"].max() < 1e-10
    assert method.student_losses(view(roles(velocity, velocity), data_free()))["reflow"].min() > 1e-4


def test_echoes_share_one_solve_and_each_has_times_of_its_own():
    asked = {"student": [], "teacher": []}

    def field(name):
        def ask(x_t, t, condition):
            asked[name].append(t)
            return velocity(x_t, t)

        return ask

    who = roles(field("student"), field("teacher"))
    three = Reflow(steps=4, echoes=3).student_losses(view(who, data_free()))["reflow"]
    assert [t.unique().tolist() for t in asked["teacher"]] == [[1.0], [0.75], [0.5], [0.25]]
    assert len(asked["student"]) == 3 and len(torch.cat(asked["student"]).unique()) == 24
    z, x = Reflow(steps=4).pairs(view(roles(velocity, velocity), data_free()))
    each = [
        (velocity(x_t, t) - (z - x)).square().flatten(1).mean(1)
        for t in asked["student"]
        for x_t in [torch.lerp(x, z, column(t, x))]
    ]
    torch.testing.assert_close(three, torch.stack(each).mean(0))


def test_a_sampler_that_leaves_the_path_is_refused():
    for solver in (Euler(8), Heun(4), Grid((1.0, 0.5))):
        Reflow().check(solver)
    with pytest.raises(ValueError, match="Reflow.*Grid.*renoise=false"):
        Reflow().check(Grid((1.0, 0.5), renoise=True))


def test_times_follow_their_law():
    asked = []

    def student(x_t, t, condition):
        asked.append(t)
        return velocity(x_t, t)

    Reflow(steps=1, echoes=1, time=LogitNormal(2.0, 0.1)).student_losses(view(roles(student, velocity), data_free(200)))
    assert torch.logit(asked[0]).mean().item() == pytest.approx(2.0, abs=0.03)  # 4 of 0.1 / sqrt(200)


def test_the_gradient_reaches_all_of_the_student_and_not_the_teacher(make_dit):
    student, teacher = make_dit(0).requires_grad_(True), make_dit(1).requires_grad_(True)

    who = networks(student, teacher)
    batch = replace(given(3, (4, 8, 8), label=torch.tensor([0, 3, 9])), x=None)
    Reflow(steps=2).student_losses(view(who, batch))["reflow"].sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in student.parameters() if p.requires_grad)


def test_a_sample_s_loss_depends_on_its_number_alone():
    who = roles(lambda x_t, t, condition: 0.3 * x_t, velocity)
    whole = Reflow(steps=3).student_losses(view(who, data_free(8)))["reflow"]
    half = Reflow(steps=3).student_losses(view(who, data_free(4, first=4)))["reflow"]
    assert torch.equal(whole[4:], half) and len(set(whole.tolist())) == 8


@pytest.mark.parametrize("options", [{"steps": 0}, {"echoes": 0}, {"shift": 0.0}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match=f"Reflow: {next(iter(options))} must be .* got 0"):
        Reflow(**options)


def test_stored_pairs_on_straight_paths_have_no_loss_and_ask_nobody_else():
    z = given().draws.gaussian(0)
    batch = replace(given(), x=STD * z, noise=z)
    assert CachedReflow(3).student_losses(view(roles(straight(STD)), batch))["reflow"].max() < 1e-10
    assert CachedReflow(3).student_losses(view(roles(velocity), batch))["reflow"].min() > 1e-4


def test_stored_pairs_are_refused_where_there_are_none():
    with pytest.raises(ValueError, match="CachedReflow needs to know the noise .* data.set.trajectories=true"):
        CachedReflow().student_losses(view(roles(velocity), given()))
    with pytest.raises(ValueError, match="CachedReflow: echoes must be at least 1, got 0"):
        CachedReflow(0)
    with pytest.raises(ValueError, match="CachedReflow.*Grid.*renoise=false"):
        CachedReflow().check(Grid((1.0, 0.5), renoise=True))
