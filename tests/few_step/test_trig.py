import math
from dataclasses import replace

import pytest
import torch
from views import Models, view

from edit.few_step.trig import SCM, LossWeight, from_trig, to_trig, trig_velocity
from edit.losses import Draws, Seen
from edit.paths import corrupt
from edit.solvers import Euler, Grid, Heun
from edit.stream import Condition

SHAPE, SIGMA = (1, 4, 4), 0.5


def given(count: int = 64, progress: float = 1.0) -> Seen:
    condition = Condition(label=torch.zeros(count, dtype=torch.int64))
    draws = Draws(0, torch.arange(count), 0, SHAPE)
    return Seen(condition, condition, torch.ones(count), draws, progress, SIGMA * torch.randn(count, *SHAPE))


def refused(*_):
    raise AssertionError("this role is not to be asked")


def roles(student, teacher=refused) -> Models:
    return Models(student, refused, refused, teacher, refused, refused, LossWeight())


def parts(t):
    s = t.view(-1, 1, 1, 1)
    return s, ((1 - s) ** 2 * SIGMA**2 + s**2)


def gaussian(x, t, condition):
    """The velocity of data N(0, sigma^2)."""
    s, variance = parts(t)
    return x * (s - (1 - s) * SIGMA**2) / variance


def consistent(x, t, condition):
    """The velocity that leads to the end of the Gaussian's way in one step: x_0 = x sigma / sqrt(variance)."""
    s, variance = parts(t)
    return (x - x * SIGMA / variance.sqrt()) / s


# ---- the change of variables -----------------------------------------------------------------------------------------


def test_the_linear_path_becomes_the_circle_and_back():
    x, eps, t = torch.randn(5, *SHAPE), torch.randn(5, *SHAPE), torch.tensor([0.0, 0.1, 0.5, 0.99, 1.0])
    x_t = corrupt(x, eps, t)
    z, tau = to_trig(x_t, t, SIGMA)
    cos, sin = (f(tau).view(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
    torch.testing.assert_close(z, cos * x + sin * SIGMA * eps)
    assert tau[0] == 0 and tau[-1].item() == pytest.approx(math.pi / 2) and (tau.diff() > 0).all()
    back, s = from_trig(z, tau, SIGMA)
    torch.testing.assert_close(back, x_t)
    torch.testing.assert_close(s, t)
    speed = SIGMA * trig_velocity(eps - x, x_t, t, SIGMA)
    torch.testing.assert_close(speed, cos * SIGMA * eps - sin * x)
    torch.testing.assert_close(cos * z - sin * speed, x, rtol=1e-4, atol=1e-5)  # the flow model's data, x_t - t v


def test_of_a_gaussian_the_circle_stands_still_and_consistency_is_a_tangent():
    t, x_t = torch.rand(8), torch.randn(8, *SHAPE)
    z, tau = to_trig(x_t, t, SIGMA)
    still = trig_velocity(gaussian(x_t, t, None), x_t, t, SIGMA)
    torch.testing.assert_close(still, torch.zeros_like(still), rtol=0, atol=1e-5)  # of size 1 / sigma in fp32
    known = -torch.tan(tau / 2).view(-1, 1, 1, 1) * z / SIGMA
    torch.testing.assert_close(trig_velocity(consistent(x_t, t, None), x_t, t, SIGMA), known, rtol=1e-4, atol=1e-5)


# ---- the tangent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how, near", [("jvp", 1e-4), ("difference", 3e-2)])
def test_the_tangent_of_the_exact_consistency_model_vanishes(how, near):
    # |g| of 16 elements in fp32, over c = 0.1; a difference divides its rounding by 2e-3
    now, method = given(), SCM(how=how)
    loss = method.student_losses(view(roles(consistent, gaussian), now))["scm"]
    assert loss.shape == (64,) and (16 * loss).sqrt().max() < near
    teacher_itself = method.student_losses(view(roles(gaussian, gaussian), now))["scm"]
    assert (16 * teacher_itself).sqrt().mean() > 0.3


def test_the_first_half_of_the_tangent_alone_is_left_where_the_warm_up_begins():
    now = given(progress=0.0)
    t = SCM().time(now.draws.uniform(0))
    x_t = corrupt(now.x, now.draws.gaussian(1), t)
    _, tau = to_trig(x_t, t, SIGMA)
    mine, theirs = (trig_velocity(f(x_t, t, None), x_t, t, SIGMA) for f in (consistent, gaussian))
    g = -(tau.cos().view(-1, 1, 1, 1) ** 2) * SIGMA * (mine - theirs)
    g = g / (g.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 0.1)
    expected = g.flatten(1).square().mean(1)
    loss = SCM().student_losses(view(roles(consistent, gaussian), now))["scm"]
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-6)
    later = SCM().student_losses(view(roles(consistent, gaussian), given(progress=0.05)))["scm"]
    assert (later < loss).float().mean() > 0.9


def test_the_gradient_moves_the_prediction_along_the_tangent_and_the_weight_to_the_size_of_the_loss():
    shift, now = torch.zeros(64, *SHAPE, requires_grad=True), given()

    def student(x, t, condition):
        return gaussian(x, t, None) + shift

    asked = roles(student, gaussian)
    loss = SCM(how="jvp").student_losses(view(asked, now))["scm"]
    loss.sum().backward()
    t = SCM().time(now.draws.uniform(0))
    z, tau = to_trig(corrupt(now.x, now.draws.gaussian(1), t), t, SIGMA)
    both = (tau.cos() * tau.sin()).view(-1, 1, 1, 1)
    g = -both * z  # F is zero, and so are its slope and the teacher's speed
    g = g / (g.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 0.1)
    s, variance = parts(t)
    expected = -2 / 16 * g * variance.sqrt() / SIGMA  # F moves by sqrt(variance) / sigma with v
    torch.testing.assert_close(shift.grad, expected, rtol=1e-3, atol=1e-4)
    # d (L e^-u + u) / du at u = 0, through the bias
    torch.testing.assert_close(asked.own.linear.bias.grad, (1 - loss.detach()).sum().view(1))


def test_on_data_the_way_is_the_samples_own():
    now, asked = given(), []

    def student(x, t, condition):
        asked.append((x, t))
        return gaussian(x, t, None)

    SCM(target="data").student_losses(view(roles(student), now))
    (ahead, s), (behind, r), (here, t) = asked
    z, tau = to_trig(here, t, SIGMA)
    eps = now.draws.gaussian(1)
    cos, sin = (f(tau).view(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
    (there, a), (back, b) = to_trig(ahead, s, SIGMA), to_trig(behind, r, SIGMA)
    # displacements of 1e-2, recovered from numbers of size 1 in fp32
    torch.testing.assert_close(a - b, 2e-2 * tau.cos() * tau.sin(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(there - back, 2e-2 * cos * sin * (cos * SIGMA * eps - sin * now.x), rtol=1e-2, atol=2e-6)


def test_times_are_those_of_the_paper():
    # log(sigma tan tau) ~ N(-1, 1.4): 20,000 draws have a mean within 0.01 of it
    t = SCM().time(Draws(0, torch.arange(20_000), 0, SHAPE).uniform(0))
    _, tau = to_trig(torch.zeros(20_000, *SHAPE), t, SIGMA)
    s = (SIGMA * tau.tan()).log()
    assert (s.mean() + 1).abs() < 0.05 and (s.std() - 1.4).abs() < 0.05


# ---- on a real model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["difference", "jvp"])
def test_all_of_a_real_student_and_the_weight_are_trained(how, dit, make_dit, batch):
    teacher, (x, _, condition) = make_dit(seed=1), batch
    now = replace(given(4), condition=condition, x=x, draws=Draws(0, torch.arange(4), 0, (4, 8, 8)))

    def taught(x, t, c):
        with torch.no_grad():
            return teacher(x, t, c).sample

    method = SCM(how=how)
    asked = replace(roles(lambda x, t, c: dit(x, t, c).sample, taught), own=method.build(dit, teacher))
    method.student_losses(view(asked, now))["scm"].mean().backward()
    assert [n for n, p in dit.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    assert all(p.grad.any() for p in asked.own.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_weight_is_one_at_first_and_differs_over_tau_when_trained():
    weight, tau = LossWeight(), torch.linspace(0, math.pi / 2, 5)
    assert torch.equal(weight(tau), torch.zeros(5))
    torch.nn.init.normal_(weight.linear.weight)
    assert len(weight(tau).unique()) == 5


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_solvers_whose_steps_do_not_lead_to_data_are_refused():
    for good in (Grid((1.0, 0.5), renoise=True), Grid((1.0,)), Euler(1)):
        SCM().check(good)
    for bad in (Grid((1.0, 0.5)), Euler(2), Heun(1)):
        with pytest.raises(ValueError, match="SCM trains steps that all lead to data, the sampler is .*renoise=true"):
            SCM().check(bad)


def test_a_model_of_discrete_times_is_refused(make_dit):
    with pytest.raises(ValueError, match="discrete where noise is predicted, as by this dit"):
        SCM().build(make_dit(time="ddpm"), None)


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"target": "student"}, "target must be teacher or data"),
        ({"sigma": 0.0}, "sigma and c must be positive, got 0.0 and 0.1"),
        ({"warmup": 2.0}, "warmup is a part of the run, 0 to 1, got 2.0"),
        ({"how": "guess"}, "how must be difference or jvp"),
    ],
)
def test_impossible_settings_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        SCM(**settings)
    assert SCM().needs_teacher and not SCM(target="data").needs_teacher
