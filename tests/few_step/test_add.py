"""ADD: where the student starts, what its images are compared with, what each side learns."""

from dataclasses import replace

import dino
import pytest
import torch
from torch import nn
from views import Models, view

from data.decoder import Codec
from edit.few_step.add import ADD, AGAIN, AGAIN_NOISE, NEAR
from edit.few_step.discriminator import hinge_generator, hinge_real_fake
from edit.few_step.vision import Vision
from edit.losses import Draws, Seen
from edit.paths import corrupt, mean
from edit.solvers import Euler, Grid
from edit.stream import Condition


@pytest.fixture(scope="module")
def method(tmp_path_factory):
    return ADD(Vision(str(dino.write(tmp_path_factory.mktemp("dino"))), layers=(1, 3), crop=4, hidden=8))


def given_of(x) -> Seen:
    condition = Condition(pooled=torch.zeros(len(x), 20))
    return Seen(condition, condition, torch.ones(len(x)), Draws(0, torch.arange(len(x)), 0, tuple(x.shape[1:])), 0.5, x)


def absent(*_):
    raise AssertionError("nobody is to be asked for this")


def roles_of(method, flux, student, teacher=absent) -> Models:
    heads = method.build(flux, None)
    return Models(student, absent, absent, teacher, absent, absent, heads, Codec(), method.vision.load())


def test_the_four_times_are_equally_likely_and_one_step_leads_to_data(method):
    asked, x = [], torch.randn(4000, 1, 1, 1)
    given = given_of(x)
    eps = given.draws.gaussian(1)

    def student(x_t, t, condition):
        asked.append((t, condition.end))
        return eps - x

    made = method.generate(view(Models(student, *[absent] * 5), given))
    ((t, end),) = asked
    assert [(t == time).float().mean().item() for time in method.times] == pytest.approx([0.25] * 4, abs=0.03)
    assert (
        torch.allclose(made, x, atol=1e-6) and not end.any()
    )  # three digits above: four deviations of a share of 4000


def test_the_student_is_pulled_to_what_the_teacher_predicts_at_its_noised_sample(method, flux):
    x = torch.randn(4, 12, 8, 8)
    bias, given = torch.zeros_like(x).requires_grad_(True), given_of(x)
    starts = []

    def student(x_t, t, condition):
        starts.append(t)
        return bias

    roles = roles_of(method, flux, student, lambda x_t, t, c: torch.full_like(x_t, 0.3))
    losses = method.student_losses(view(roles, given))
    fake, t = method.generate(view(roles, given)), given.draws.uniform(AGAIN)
    target = corrupt(fake, given.draws.gaussian(AGAIN_NOISE), t) - 0.3 * t.view(-1, 1, 1, 1)
    assert torch.allclose(losses["distill"], 2.5 * (1 - t) * mean((fake - target).square()))
    (slope,) = torch.autograd.grad(losses["distill"].sum(), bias)
    weight = (-starts[0] * 2.5 * (1 - t)).view(-1, 1, 1, 1)
    torch.testing.assert_close(slope, weight * 2 * (fake - target).detach() / x[0].numel())  # the target is fixed
    torch.testing.assert_close(losses["generator"], hinge_generator(method.vision.judge(view(roles, given), fake)))
    assert set(replace(method, distill=0.0).student_losses(view(roles, given))) == {"generator"}


def test_heads_see_real_and_fake_at_one_place_and_their_gradient_is_theirs_alone(method, flux):
    x, ours = torch.randn(4, 12, 8, 8), torch.zeros(1, requires_grad=True)
    given = given_of(x)
    roles = roles_of(method, flux, lambda x_t, t, c: ours * x_t)
    losses = method.critic_losses(view(roles, given))
    fake = method.generate(view(roles, given))
    expected = hinge_real_fake(*(method.vision.judge(view(roles, given), v) for v in (x, fake)))
    torch.testing.assert_close(losses["heads"], expected)
    sum(losses.values()).sum().backward()
    assert ours.grad is None and all(p.grad is None for p in roles.look.parameters())
    assert all(head.inner.weight.grad.any() for head in roles.own.heads)


def test_the_penalty_is_the_squared_gradient_with_respect_to_what_the_heads_see(method, flux):
    """Of heads that are linear in it, whatever the length of the step."""

    class Linear(nn.Module):
        def forward(self, features, t, pooled, size):
            return sum(v.flatten(1).sum(1, keepdim=True) for v in features.values())

    x = torch.randn(200, 12, 8, 8)
    given = given_of(x)
    roles = replace(roles_of(method, flux, lambda x_t, t, c: x_t), own=Linear())
    found = [replace(method, r1_noise=rho).critic_losses(view(roles, given))["r1"] for rho in (0.1, 1.0)]
    torch.testing.assert_close(*found, rtol=1e-2, atol=0)  # sums of fp32 near 100, differences near 2
    count = 2 * 16 * 16  # layers, patches, channels: the gradient is one in each
    # the mean of 200 squared normals is off by sqrt(2 / 200) = 10 % (one deviation)
    assert found[1].mean().item() == pytest.approx(1e-5 * count, rel=0.4)
    noises = [replace(given.draws, shape=(16, 16)).gaussian(NEAR + k).flatten(1).sum(1) for k in (0, 1)]
    torch.testing.assert_close(found[1], 1e-5 * sum(noises).square(), rtol=1e-2, atol=1e-6)


def test_a_sampler_with_other_steps_is_refused(method):
    method.check(Grid(renoise=True))
    method.check(Grid(times=(1.0, 0.5), renoise=True))
    method.check(Grid(times=(1.0,)))
    for solver in (Grid(), Grid(times=(1.0, 0.4), renoise=True), Euler(steps=4)):
        with pytest.raises(ValueError, match="ADD trains steps to data from the times"):
            method.check(solver)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"vision": None}, "there is none: give its folder as vision.path"),
        ({"times": (0.5, 1.0)}, "times must decrease"),
        ({"r1_noise": 0.0}, "r1_noise positive"),
        ({"distill": -1.0}, "distill and r1 must be at least 0"),
        ({"every": 1}, "leaves the heads no turn"),
    ],
)
def test_impossible_settings_are_refused(method, settings, message):
    with pytest.raises(ValueError, match=message):
        replace(method, **settings)


def test_turns_alternate(method):
    assert [method.turns(k) for k in range(3)] == [(True, False), (False, True), (True, False)]
