"""Flash Diffusion in a world that is known: data N(0, STD^2), see `analytic`."""

from dataclasses import replace

import dino
import pytest
import torch
from analytic import flow, given, velocity
from torch import nn
from views import Models, view

from edit.few_step.discriminator import square_generator, square_real_fake
from edit.few_step.flash import LEAST, NOISE, Flash
from edit.few_step.scores import direction
from edit.few_step.vision import Vision, feature_distance
from edit.objectives import Ramp
from edit.paths import column, corrupt, mean
from edit.solvers import Grid
from edit.stream import Output


class Linear(nn.Module):
    """A head that can be written down: logits are the tokens' first channel."""

    def forward(self, features, t, pooled, grid):
        return features["unit.0"][:, :, 0]


def tokens(x_t, t, condition):
    return Output(x_t, None, {"unit.0": x_t.flatten(2).transpose(1, 2)})


def absent(*_):
    raise AssertionError("nobody is to be asked for this")


def roles_of(student, teacher=velocity, **more) -> Models:
    return Models(student, absent, absent, teacher, tokens, absent, Linear(), **more)


def jump(x_t, t, condition):
    """The velocity whose straight step leads where the ODE does."""
    return (x_t - flow(x_t, t, torch.zeros_like(t))) / column(t, x_t)


def test_the_teachers_steps_approach_the_end_of_its_path_from_wherever_they_begin():
    batch = given(400)
    x_t, t = Flash().begin(batch)
    end = flow(x_t, t, torch.zeros_like(t))
    coarse, fine = (
        (Flash(steps=n).solve(view(roles_of(absent), batch), x_t, t) - end).abs().mean().item() for n in (16, 64)
    )
    assert 3 < coarse / fine < 5  # Euler's method is of first order
    calls = []
    Flash(steps=3, shift=2.0).solve(view(roles_of(absent, lambda x, t, c: calls.append(t) or x), batch), x_t, t)
    torch.testing.assert_close(torch.stack(calls) / t, torch.tensor([1.0, 0.8, 0.5])[:, None].expand(3, 400))


def test_a_student_that_jumps_as_the_teacher_walks_is_left_alone_and_another_is_pulled():
    batch, method = given(100), Flash(steps=200)
    exact = method.student_losses(view(roles_of(jump), batch))["distill"]
    x_t, t = method.begin(batch)
    off = method.student_losses(view(roles_of(lambda x, t, c: jump(x, t, c) + 0.1), batch))["distill"]
    assert exact.max() < 1e-3 < off.mean()  # 200 steps of the first order, squared
    torch.testing.assert_close(off.mean(), mean((0.1 * column(t, x_t)).square()).mean(), rtol=0.1, atol=0)


@pytest.mark.parametrize("progress, scale", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_matching_and_discriminator_come_in_by_ramps(progress, scale):
    batch, method = given(8, progress=progress), Flash(steps=2)
    losses = method.student_losses(view(roles_of(jump), batch))
    if not scale:
        assert set(losses) == {"distill"}
        return
    x = method.generate(view(roles_of(jump), batch), *method.begin(batch))
    tau = method.times(batch)
    x_tau = corrupt(x, batch.draws.gaussian(NOISE), tau)
    logits = x_tau.flatten(1)
    torch.testing.assert_close(losses["generator"], scale * 0.5 * square_generator(logits))
    gradient = direction(x, x_tau, tau, velocity(x_tau, tau), jump(x_tau, tau, None))
    torch.testing.assert_close(losses["distribution"], scale * 0.7 * 0.5 * mean(gradient.square()))


def test_the_difference_of_scores_is_over_the_distance_of_data_and_has_a_gradient_at_the_sample_alone():
    """w (x_own - x_teacher) / d with w = 1 / mean |x - x_teacher|, where the public code divides by a velocity."""
    batch = given(4, shape=(1, 4, 4), progress=1.0)
    bias = torch.zeros(4, 1, 4, 4, requires_grad=True)
    student = lambda x_t, t, c: jump(x_t, t, c) + bias  # noqa: E731
    method = Flash(steps=1, realism=0.0, match=1.0)
    roles, (x_t, t) = roles_of(student), method.begin(batch)
    method.student_losses(view(roles, batch))["distribution"].sum().backward()
    with torch.no_grad():
        x, tau = method.generate(view(roles, batch), x_t, t), method.times(batch)
        x_tau = corrupt(x, batch.draws.gaussian(NOISE), tau)
        ours, theirs = (x_tau - column(tau, x) * f(x_tau, tau, None) for f in (jump, velocity))
        slope = (ours - theirs) / column(mean((x - theirs).abs()), x) / 16
    torch.testing.assert_close(bias.grad, -column(t, x) * slope, rtol=1e-3, atol=1e-6)


def test_on_the_heads_turn_real_and_fake_are_judged_by_least_squares_without_the_student():
    batch, ours = given(8), torch.zeros(1, requires_grad=True)
    seen = []

    def look(x_t, t, condition):
        seen.append((x_t, t))
        return tokens(x_t, t, condition)

    roles = replace(roles_of(lambda x_t, t, c: ours * x_t), features=look)
    loss = Flash().critic_losses(view(roles, batch))["heads"]
    (real, t), (fake, t_fake) = seen
    torch.testing.assert_close(loss, square_real_fake(real.flatten(1), fake.flatten(1)))
    assert torch.equal(t, t_fake) and not loss.requires_grad
    nothing = torch.zeros(2, 3)
    assert square_real_fake(nothing, nothing).tolist() == [0.5, 0.5] == square_generator(nothing).tolist()


@pytest.mark.parametrize(
    "progress, odds", [(0.0, (0, 0, 0.5, 0.5)), (0.3, (0.1, 0.3, 0.3, 0.3)), (1.0, (0.4, 0.2, 0.2, 0.2))]
)
def test_starts_lie_around_the_modes_as_often_as_the_stage_says(progress, odds):
    batch = given(4000, shape=(1, 1, 1), progress=progress)
    _, t = Flash().begin(batch)
    nearest = (t[:, None] - torch.tensor(Flash().modes)).abs().argmin(1)
    shares = nearest.bincount(minlength=4) / 4000
    assert shares.tolist() == pytest.approx(odds, abs=0.03)  # four deviations of a share of 4000
    assert t.max() <= 1 and (t[nearest == 3] - 0.25).std().item() == pytest.approx(0.022, rel=0.1)


def test_judged_times_keep_off_both_ends():
    t = Flash().times(given(4000, shape=(1, 1, 1)))
    assert LEAST <= t.min() < 0.03 and 0.97 < t.max() <= 1 - LEAST


def test_the_distance_can_be_that_of_pictures(tmp_path):
    vision = Vision(str(dino.write(tmp_path)), layers=(1, 3))
    eye, batch = vision.load(), given(3, shape=(3, 8, 8))
    method = Flash(steps=2, vision=vision)
    roles = roles_of(lambda x_t, t, c: 0.5 * x_t, decode=nn.Identity(), look=eye)
    x_t, t = method.begin(batch)
    x, target = method.generate(view(roles, batch), x_t, t), method.solve(view(roles, batch), x_t, t)
    found = method.student_losses(view(roles, batch))["distill"]
    torch.testing.assert_close(found, feature_distance(eye(x), eye(target)))
    shift = torch.zeros(3, requires_grad=True)
    shifted = replace(roles, student=lambda x_t, t, c: 0.5 * x_t + column(shift, x_t))
    method.student_losses(view(shifted, batch))["distill"].sum().backward()
    assert (shift.grad != 0).all()


def test_what_it_does_not_train_is_refused(flux):
    Flash().check(Grid(renoise=True))
    with pytest.raises(ValueError, match="Flash trains steps to data"):
        Flash().check(Grid())
    with pytest.raises(ValueError, match="there is none"):
        Flash().build(flux, None)
    for settings, message in (
        ({"modes": (0.5, 1.0)}, "modes are times that decrease"),
        ({"stages": ((0.5, 0.5),)}, "a probability for each of the 4 modes"),
        ({"stages": ()}, "a probability for each"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"every": 1}, "leaves the heads no turn"),
    ):
        with pytest.raises(ValueError, match=message):
            Flash(**settings)


def test_defaults_are_the_published_ones():
    assert (Flash().match, Flash().realism, Flash().steps) == (Ramp(0, 0.7), Ramp(0, 0.5), 32)
