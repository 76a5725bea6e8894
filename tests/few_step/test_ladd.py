"""LADD: where the student starts, what is judged, what each side learns."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from views import Models, view

from edit.few_step.discriminator import Heads
from edit.few_step.ladd import LADD
from edit.losses import Draws, Seen
from edit.paths import corrupt, mean
from edit.solvers import Euler, Grid, Heun
from edit.stream import Condition, Output


def given_of(x, condition=None, progress=1.0, seed=0) -> Seen:
    condition = Condition() if condition is None else condition
    draws = Draws(seed, torch.arange(len(x)), 0, tuple(x.shape[1:]))
    return Seen(condition, condition, torch.ones(len(x)), draws, progress, x)


def absent(*_):
    raise AssertionError("this model is not asked")


def zero(x_t, t, condition):
    return torch.zeros_like(x_t)


def tokens(x_t, t, condition):
    """The elements themselves, as a model with one token per place and one unit."""
    return Output(x_t, None, {"unit.0": x_t.flatten(2).transpose(1, 2)}, (1, *x_t.shape[2:]))


class Linear(nn.Module):
    """A head that can be written down: logits are the tokens' first channel."""

    def forward(self, features, t, pooled, grid):
        return features["unit.0"][:, :, 0]


def plain_roles(**changes) -> Models:
    return replace(Models(zero, absent, absent, absent, tokens, absent, Linear()), **changes)


@pytest.mark.parametrize("progress, odds", [(0.0, (0, 0, 0.5, 0.5)), (0.5, (0.7, 0.1, 0.1, 0.1))])
def test_the_student_starts_where_it_is_said_to(progress, odds):
    asked = []

    def student(x_t, t, condition):
        asked.append((t, condition.end))
        return torch.zeros_like(x_t)

    x = torch.zeros(4000, 1, 1, 1)
    LADD().generate(view(plain_roles(student=student), given_of(x, progress=progress)))
    ((t, end),) = asked
    shares = [(t == time).float().mean().item() for time in (1.0, 0.75, 0.5, 0.25)]
    assert shares == pytest.approx(odds, abs=0.03)  # four deviations of a share of 4000
    assert not end.any()  # a flow map is asked for data


def test_the_student_goes_to_data_in_one_step():
    x = torch.randn(64, 1, 2, 2)
    eps = given_of(x).draws.gaussian(1)
    made = LADD().generate(view(plain_roles(student=lambda x_t, t, c: eps - x), given_of(x)))
    assert torch.allclose(made, x, atol=1e-6)  # the true velocity leads to the data itself


def test_fakes_are_judged_noised_and_move_the_student_towards_what_the_heads_like():
    x, method = torch.randn(8, 1, 2, 2), LADD()
    bias = torch.zeros(1, requires_grad=True)
    given = given_of(x)
    roles = plain_roles(student=lambda x_t, t, c: bias.expand_as(x_t))
    losses = method.student_losses(view(roles, given))
    fake, t = method.generate(view(roles, given)), method.law(given.draws.uniform(2))
    assert torch.allclose(losses["generator"], -mean(corrupt(fake, given.draws.gaussian(3), t)))
    losses["generator"].sum().backward()
    assert bias.grad > 0  # logits rise with the sample, which falls with the velocity


def test_heads_see_noised_reals_and_detached_fakes():
    x, method = torch.randn(8, 1, 2, 2), LADD()
    bias = torch.zeros(1, requires_grad=True)
    seen = []

    def features(x_t, t, condition):
        seen.append((x_t, t))
        return tokens(x_t, t, condition)

    given = given_of(x)
    method.critic_losses(view(plain_roles(student=lambda x_t, t, c: bias.expand_as(x_t), features=features), given))
    (real, t), (fake, t_fake) = seen
    assert torch.equal(real, corrupt(x, given.draws.gaussian(6), t)) and torch.equal(t, t_fake)
    assert not fake.requires_grad


def test_the_penalty_perturbs_what_has_been_noised_first():
    x, method = torch.zeros(8, 1, 2, 2), LADD(r1=0.5, r1_noise=0.2)
    given = given_of(x)
    losses = method.critic_losses(view(plain_roles(), given))
    expected = 0.5 * mean((0.2 * given.draws.gaussian(7)).square())  # whatever the time
    assert torch.allclose(losses["r1"], expected, atol=1e-6)
    still = replace(method, r1_noise=0.0).critic_losses(view(plain_roles(), given))
    assert not still["r1"].any()
    assert "r1" not in LADD().critic_losses(view(plain_roles(), given))


def test_the_distance_to_the_teacher_is_that_of_its_prediction_at_the_noised_fake():
    x, given = torch.randn(8, 1, 2, 2), given_of(torch.randn(8, 1, 2, 2))
    bias = torch.zeros_like(x).requires_grad_(True)
    roles = plain_roles(student=lambda x_t, t, c: bias, teacher=lambda x_t, t, c: torch.full_like(x_t, 0.3))
    method = LADD(distill=2.5)
    loss = method.student_losses(view(roles, given))["distill"]
    fake, t = method.generate(view(roles, given)).detach(), given.draws.uniform(4)
    gap = fake - (corrupt(fake, given.draws.gaussian(5), t) - 0.3 * t.view(-1, 1, 1, 1))
    weight = 2.5 * (1 - t)
    assert torch.allclose(loss, weight * mean(gap.square()))
    loss.sum().backward()
    start = torch.tensor([1.0, 0.75, 0.5, 0.25])[torch.bucketize(given.draws.uniform(0), torch.tensor([0.7, 0.8, 0.9]))]
    expected = -(start * weight).view(-1, 1, 1, 1) * 2 * gap / 4  # through the fake alone: the target is fixed
    assert torch.allclose(bias.grad, expected, atol=1e-6)


def test_a_teacher_that_agrees_costs_nothing():
    x = torch.randn(8, 1, 2, 2)
    method, given = LADD(distill=2.5), given_of(x)
    fake = method.generate(view(plain_roles(), given))
    agreeing = plain_roles(teacher=lambda x_t, t, c: (x_t - fake) / t.view(-1, 1, 1, 1))
    assert method.student_losses(view(agreeing, given))["distill"].max() < 1e-9  # rounding, squared


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_each_side_learns_from_its_own_loss_alone(family, make_dit, make_flux, batch, told):
    make, (x, _, condition) = {"dit": (make_dit, batch), "flux": (make_flux, told)}[family]
    student, teacher = make(seed=0), make(seed=1)
    teacher.requires_grad_(False)
    method = LADD(teacher_taps=(0, -1), hidden=16)
    heads = method.build(student, teacher)

    def features(x_t, t, condition):
        return teacher(x_t, t, condition, taps=method.teacher_taps)

    roles = Models(lambda *a: student(*a).sample, absent, absent, absent, features, absent, heads)
    heads.requires_grad_(False)  # as the recipe does
    sum(method.student_losses(view(roles, given_of(x, condition))).values()).sum().backward()
    assert sum(p.grad.abs().sum() for p in student.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in (*teacher.parameters(), *heads.parameters()))
    student.zero_grad()
    heads.requires_grad_(True)
    sum(method.critic_losses(view(roles, given_of(x, condition))).values()).sum().backward()
    assert sum(p.grad.abs().sum() for p in heads.parameters()) > 0
    assert all(p.grad is None for p in (*teacher.parameters(), *student.parameters()))


@pytest.mark.parametrize("loss", ["hinge", "softplus"])
def test_taking_turns_brings_the_students_samples_to_the_data(loss):
    """Data N(1, 0.1^2) in 32 channels; the student adds a learned number to every second channel of it."""
    method = LADD((0,), times=(1.0,), p=(1.0,), first=(1.0,), loss=loss, r1=0.1, hidden=8, kernel=1)
    heads, shift = Heads((0,), 32, hidden=8, kernel=1), torch.full((1,), 1.5, requires_grad=True)
    # the norm hides what all channels of a group share: every second one is shifted
    mask = (torch.arange(32) % 2).float().view(1, 32, 1, 1)
    optimizer = torch.optim.Adam([{"params": heads.parameters()}, {"params": [shift]}], lr=0.02, betas=(0.0, 0.99))
    for step in range(160):
        x = 1 + 0.1 * torch.randn(32, 32, 2, 2, generator=torch.Generator().manual_seed(step))
        given = given_of(x, seed=step)
        eps = given.draws.gaussian(1)
        roles = plain_roles(student=lambda x_t, t, c, e=eps, x=x: e - x - shift * mask, own=heads)
        mine, theirs = method.turns(step)
        heads.requires_grad_(theirs)
        losses = method.student_losses(view(roles, given)) if mine else method.critic_losses(view(roles, given))
        optimizer.zero_grad()
        sum(losses.values()).mean().backward()
        optimizer.step()
    assert abs(shift.item()) < 0.3  # it began at 1.5, and wavers about 0 by 0.05


def test_turns_alternate():
    assert [LADD().turns(k) for k in range(3)] == [(True, False), (False, True), (True, False)]
    assert LADD(every=1, together=True).turns(0) == (True, True)


def test_a_sampler_with_other_steps_is_refused():
    LADD().check(Grid())
    LADD().check(Grid(times=(1.0, 0.5), renoise=True))
    LADD().check(Euler(steps=4))
    for solver in (Grid(times=(1.0, 0.4)), Grid(shift=3.0), Euler(steps=5), Heun(steps=4)):
        with pytest.raises(ValueError, match="LADD trains steps from the times"):
            LADD().check(solver)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"times": (0.5, 1.0)}, "times must decrease"),
        ({"times": (1.5, 1.0)}, "times must decrease"),
        ({"p": (0.5, 0.5)}, "a probability for each of the 4 times"),
        ({"first": (0.5, 0.5, 0.5, 0.5)}, "first holds a probability"),
        ({"warm": 500}, "warm is a part of the run"),
        ({"loss": "square"}, "loss must be one of hinge, softplus"),
        ({"r1": -1.0}, "must be at least 0"),
        ({"every": 1}, "leaves the heads no turn"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LADD(**settings)


def test_a_teacher_is_needed(dit):
    with pytest.raises(ValueError, match="there is none"):
        LADD().build(dit, None)
