from dataclasses import replace

import pytest
import torch
from analytic import average, roles
from views import view
from weights import randomise

import edit
from edit.few_step.flow_map import IntervalInput
from edit.few_step.mean_flow import MeanFlow
from edit.losses import Draws, Seen
from edit.objectives import Uniform
from edit.paths import corrupt
from edit.stream import Condition

SHAPE = (1, 2, 2)


def given(count: int = 64, x=None, null=None) -> Seen:
    condition = Condition(label=torch.ones(count, dtype=torch.int64))
    x = torch.randn(count, *SHAPE) if x is None else x
    draws = Draws(0, torch.arange(count), 0, tuple(x.shape[1:]))
    return Seen(condition, condition if null is None else null, torch.ones(count), draws, 0.5, x)


@pytest.mark.parametrize("how, near", [("jvp", 1e-10), ("difference", 1e-6)])
def test_the_exact_mean_velocity_has_no_loss(how, near):
    # squares of errors as in test_flow_map: 1e-6 and 2e-4 per element, four elements of size 1
    method = MeanFlow(apart=1.0, p=0.0, how=how)
    loss = method.student_losses(view(roles(average(-0.7), lambda x, t, c: -0.7 * x), given()))["mean_flow"]
    wrong = method.student_losses(view(roles(average(-0.5), lambda x, t, c: -0.7 * x), given()))["mean_flow"]
    assert loss.shape == (64,) and loss.max() < near and wrong.mean() > 1e-3


def test_where_both_times_are_one_it_is_flow_matching():
    seen, now = [], given()
    loss = MeanFlow(target="data", apart=0.0, p=0.0).student_losses(view(roles(average(0.3, seen)), now))["mean_flow"]
    t, end = seen[-1]
    assert torch.equal(t, end)
    eps = now.draws.gaussian(3)
    expected = (0.3 * corrupt(now.x, eps, t) - (eps - now.x)).flatten(1).square().sum(1)
    torch.testing.assert_close(loss, expected)


def test_times_are_the_later_and_the_earlier_of_two_and_apart_as_often_as_asked():
    seen = []
    MeanFlow(apart=0.25, time=Uniform()).student_losses(view(roles(average(0.3, seen), lambda x, t, c: x), given(4000)))
    t, end = seen[-1]
    assert (end <= t).all() and (0 < end).all() and (t < 1).all()
    # of 4000 draws, 0.25 has a standard error of 0.007; the later of two uniform numbers has the mean 2/3, error 0.004
    assert ((end < t).float().mean() - 0.25).abs() < 0.03 and (t.mean() - 2 / 3).abs() < 0.02
    assert (end[end < t].mean() - 1 / 3).abs() < 0.03


def test_samples_are_weighed_by_their_own_loss():
    now = given()
    plain, weighed = (
        MeanFlow(p=p).student_losses(view(roles(average(0.3), lambda x, t, c: -x), now))["mean_flow"]
        for p in (0.0, 0.75)
    )
    torch.testing.assert_close(weighed, plain / (plain + 1e-3) ** 0.75)


def test_the_weight_and_the_target_carry_no_gradient():
    scale, now = torch.tensor(0.3, requires_grad=True), given()
    v = torch.randn(64, *SHAPE)

    def student(x, t, condition):
        return scale * x

    loss = MeanFlow(apart=0.0).student_losses(view(roles(student, lambda x, t, c: v), now))["mean_flow"]
    (slope,) = torch.autograd.grad(loss.sum(), scale)
    a, b = MeanFlow().time(now.draws.uniform(0)), MeanFlow().time(now.draws.uniform(1))
    x_t = corrupt(now.x, now.draws.gaussian(3), torch.maximum(a, b))
    delta = (0.3 * x_t - v).flatten(1)
    by_hand = 2 * (delta * x_t.flatten(1)).sum(1) / (delta.square().sum(1) + 1e-3)
    torch.testing.assert_close(slope, by_hand.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_a_guided_target_mixes_the_sample_with_what_the_student_knows(kappa):
    null = Condition(label=torch.zeros(64, dtype=torch.int64))
    now, asked = given(null=null), []

    def student(x, t, condition):  # 2 where conditioned, 1 where not
        asked.append((t, condition))
        return (1.0 + condition.label.float()).view(-1, 1, 1, 1).expand_as(x)

    method = MeanFlow(target="data", apart=0.0, p=0.0, omega=0.4, kappa=kappa, interval=(0.0, 0.5))
    loss = method.student_losses(view(roles(student), now))["mean_flow"]
    t = asked[-1][0]
    v = now.draws.gaussian(3) - now.x
    inside = (t <= 0.5).view(-1, 1, 1, 1)
    target = torch.where(inside, 0.4 * v + (0.6 - kappa) * 1 + kappa * 2, v)
    torch.testing.assert_close(loss, (2 - target).flatten(1).square().sum(1))
    assert 5 < inside.sum() < 59
    assert all(torch.equal(t, c.end) for _, c in asked)
    assert len(asked) == (4 if kappa == 0 else 5)  # a difference, the prediction, and the guidance


def test_guidance_needs_a_null_condition():
    with pytest.raises(ValueError, match="needs an unconditional student: set label_drop=0.1"):
        MeanFlow(target="data", omega=2.0).student_losses(view(roles(average(0.3)), given()))


def test_a_guided_teacher_and_guidance_in_the_target_exclude_each_other():
    for guidance in ({"omega": 0.5}, {"kappa": 0.5}):
        with pytest.raises(ValueError, match="a teacher is guided by teacher.guidance: leave out omega and kappa"):
            MeanFlow(target="teacher", **guidance)


def test_a_teacher_is_needed_where_it_is_the_target():
    assert MeanFlow().needs_teacher and not MeanFlow(target="data").needs_teacher
    assert MeanFlow().needs_data and not MeanFlow().adversarial


@pytest.mark.parametrize("how", ["difference", "jvp"])
def test_all_of_a_real_student_is_trained_and_nothing_else(how, dit, make_dit, batch):
    edit.apply(dit, {"flow_map": IntervalInput()})
    randomise(dit.edits["flow_map"])
    dit.train().gradient_checkpointing = True
    teacher = make_dit(seed=1)
    x, _, condition = batch
    now = replace(given(4, x), condition=condition)
    MeanFlow().build(dit, teacher)

    def taught(x, t, c):
        assert c.end is None
        with torch.no_grad():
            return teacher(x, t, c).sample

    method = MeanFlow(apart=1.0, how=how)
    loss = method.student_losses(view(roles(lambda x, t, c: dit(x, t, c).sample, taught), now))["mean_flow"]
    loss.mean().backward()
    assert [n for n, p in dit.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_without_an_end_is_refused(dit):
    with pytest.raises(ValueError, match="MeanFlow trains a flow map.*IntervalInput"):
        MeanFlow().build(dit, None)


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"target": "student"}, "target must be teacher or data, got 'student'"),
        ({"apart": 1.5}, "apart is a probability, got 1.5"),
        ({"c": 0.0}, "c must be positive"),
        ({"how": "guess"}, "how must be difference or jvp, got 'guess'"),
        ({"step": 0.0}, "step must be positive"),
        ({"target": "data", "kappa": 1.0}, "kappa below 1"),
    ],
)
def test_impossible_settings_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        MeanFlow(**settings)
