import math

import pytest
import torch
from views import Models, view

from edit.few_step.trajectory_matching import TrajectoryMatching, renoise
from edit.losses import Draws, Seen
from edit.paths import column, corrupt
from edit.solvers import Euler, Grid
from edit.stream import Condition


def given(count=3, shape=(4, 8, 8), moment=0) -> Seen:
    condition = Condition(label=torch.zeros(count, dtype=torch.int64))
    samples = torch.arange(count) + moment * count
    return Seen(condition, condition, torch.ones(count), Draws(0, samples, moment, shape), 0.0)


def gaussian(variance):
    """Velocity of N(0, variance)."""

    def velocity(x_t, t, condition):
        t = column(t, x_t)
        return x_t * (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)

    return velocity


def roles(student, teacher=None, critic=None) -> Models:
    def refuse(*_):
        raise AssertionError("nobody is to be asked for this")

    return Models(student, refuse, refuse, teacher or refuse, refuse, critic or refuse)


def rho_of(tau, end):
    return end * (1 - tau) / (tau * (1 - end))


def test_noise_inside_a_segment_is_the_published_one():
    """x_tau = a x_s + b noise with a = (1 - tau) / (1 - s), b = sqrt(tau^2 - a^2 s^2), in fp64."""
    x, eps, noise = torch.randn(3, 5, 4, 8, 8, dtype=torch.float64)
    end = torch.tensor([0.0, 0.25, 0.25, 0.5, 0.75], dtype=torch.float64)
    tau = torch.tensor([0.2, 0.26, 0.5, 0.6, 1.0], dtype=torch.float64)
    x_tau, n = renoise(x, eps, noise, tau, rho_of(tau, end))
    a = (1 - tau) / (1 - end)
    b = (tau.square() - (a * end).square()).sqrt()
    x_s = column(1 - end, x) * x + column(end, x) * eps
    torch.testing.assert_close(x_tau, column(a, x) * x_s + column(b, x) * noise)
    torch.testing.assert_close(n, (x_tau - column(1 - tau, x) * x) / column(tau, x))


def test_at_the_lower_end_nothing_is_added_and_above_it_the_noise_is_that_of_tau():
    x, eps, noise = torch.randn(2, 4, 64, 64), torch.randn(2, 4, 64, 64), torch.randn(2, 4, 64, 64)
    end = torch.tensor([0.25, 0.5])
    x_tau, _ = renoise(x, eps, noise, end, rho_of(end, end))
    # fp32: rho comes out as 1 - 1e-7 at worst, and the root of twice that is 5e-4 of the noise
    torch.testing.assert_close(x_tau, torch.lerp(x, eps, column(end, x)), rtol=0, atol=3e-3)
    tau = torch.tensor([0.4, 0.7])
    x_tau, n = renoise(x, eps, noise, tau, rho_of(tau, end))
    # mean (1 - tau) x and variance tau^2, over 16 384 elements: a deviation of the estimates is 1 %
    left = x_tau - column(1 - tau, x) * x
    assert left.flatten(1).mean(1).abs().max() < 0.03
    torch.testing.assert_close(left.flatten(1).var(1), tau.square(), rtol=0.05, atol=0)
    assert n.var() == pytest.approx(1.0, rel=0.05)


def test_a_critic_that_agrees_with_the_teacher_leaves_the_student_alone():
    a = torch.tensor(0.7, requires_grad=True)
    same = gaussian(0.5)
    loss = TrajectoryMatching().student_losses(view(roles(lambda x, t, c: a * x, same, same), given()))["trajectory"]
    (slope,) = torch.autograd.grad(loss.sum(), a)
    assert float(slope) == 0 and torch.equal(loss, torch.zeros(3))


def test_the_students_loss_is_elementwise_hubers_of_the_difference_over_the_normaliser():
    v, seen = torch.randn(3, 4, 8, 8, requires_grad=True), []

    def teacher(x_t, t, condition):
        seen.append((x_t, t))
        return gaussian(1.0)(x_t, t, condition)

    method = TrajectoryMatching(grid=(1.0,), c=0.5)
    loss = method.student_losses(view(roles(lambda x, t, c: v, teacher, gaussian(0.25)), given()))["trajectory"]
    loss.sum().backward()
    x_tau, tau = seen[0]
    x = (given().draws.gaussian(0) - v).detach()
    x_teacher, x_critic = (x_tau - column(tau, x) * gaussian(s)(x_tau, tau, None) for s in (1.0, 0.25))
    scale = (x - x_teacher).abs().mean((1, 2, 3))
    delta = x_critic - x_teacher  # from the target to x
    length = (delta.square() + 0.25).sqrt()
    # 1e-6 in the normaliser, and the published root loses digits that ours does not
    torch.testing.assert_close(loss, (length - 0.5).mean((1, 2, 3)) / scale, rtol=1e-4, atol=1e-6)
    slope = delta / length / delta[0].numel() / column(scale, x)  # x = noise - v: the sign turns
    torch.testing.assert_close(-v.grad, slope, rtol=1e-4, atol=1e-8)


def test_gradients_shrink_near_the_goal_and_are_bounded_far_from_it():
    def length(variance):
        v = torch.zeros(3, 4, 8, 8, requires_grad=True)  # x is the noise, N(0, 1)
        models = roles(lambda x, t, c: v, gaussian(variance), gaussian(1.0))
        TrajectoryMatching(grid=(1.0,)).student_losses(view(models, given()))["trajectory"].sum().backward()
        return float(v.grad.flatten(1).norm(dim=1).mean())

    far, near, nearer = length(0.25), length(1 + 1e-4), length(1 + 1e-5)
    assert near < 0.2 * far and nearer == pytest.approx(0.1 * near, rel=0.1)  # below c = 1e-3 as the difference does
    assert length(0.1) == pytest.approx(far, rel=0.2)  # signs, over a distance to the teacher that hardly changes


def test_data_and_noise_of_a_view_are_on_the_straight_path_through_what_the_student_saw():
    """x = x_t - t v and eps = x_t + (1 - t) v: noised to t again they are x_t, and they are v apart, at every step."""
    for moment in range(8):
        seen = []

        def student(x_t, t, condition, seen=seen):
            seen.append((x_t, t))
            return 0.5 * x_t + 1

        method = TrajectoryMatching(grid=(0.9, 0.6, 0.2))
        batch = view(roles(student), given(moment=moment))
        x, eps, *_ = method.step(batch, 2)
        x_t, t = seen[-1]
        torch.testing.assert_close(corrupt(x, eps, t), x_t)
        torch.testing.assert_close(eps - x, 0.5 * x_t + 1)


def test_noise_stays_inside_the_segment_below_the_step_and_all_segments_come():
    segments, grid = set(), Grid((1.0, 0.75, 0.5, 0.25), shift=2.0).grid
    for moment in range(12):
        asked = []

        def student(x_t, t, condition, asked=asked):
            asked.append((t, torch.is_grad_enabled()))
            return x_t

        def teacher(x_t, t, condition, asked=asked):
            asked.append((t, torch.is_grad_enabled()))
            return x_t

        TrajectoryMatching(shift=2.0).student_losses(view(roles(student, teacher, gaussian(1.0)), given(moment=moment)))
        *steps, (tau, graph) = asked
        k = len(steps) - 1
        assert [float(t[0]) for t, _ in steps] == pytest.approx(grid[: k + 1])
        assert [with_graph for _, with_graph in steps] == [False] * k + [True] and not graph
        assert (grid[k + 1] <= tau).all() and (tau <= grid[k]).all()
        segments.add(k)
    assert segments == {0, 1, 2, 3}


def test_the_critics_loss_is_that_of_predicted_data_with_its_two_weights():
    method, seen = TrajectoryMatching(grid=(1.0, 0.5)), []
    told = next(g for g in (given(moment=m) for m in range(9)) if g.draws.shared(1) < 0.5)  # the upper segment

    def critic(x_t, t, condition):
        seen.append((x_t, t))
        return gaussian(0.25)(x_t, t, condition)

    student = gaussian(0.5)
    loss = method.critic_losses(view(roles(student, critic=critic), told))["data"]
    x_tau, tau = seen[0]
    x, _, again, rho = method.step(view(roles(student), told), 4)
    assert torch.equal(tau, again) and float(rho.min()) > 0  # part of the noise is the student's
    n = (x_tau - column(1 - tau, x) * x) / column(tau, x)
    noise = told.draws.gaussian(5)
    importance = (-0.5 * n.square().mean((1, 2, 3))).exp() / (-0.5 * noise.square().mean((1, 2, 3))).exp()
    snr = ((1 - tau) / tau).square().clamp(max=5.0)
    data = x_tau - column(tau, x) * gaussian(0.25)(x_tau, tau, None)
    torch.testing.assert_close(loss, snr * importance * (data - x).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_the_two_turns_draw_times_and_noise_of_their_own():
    method, told, seen = TrajectoryMatching(together=True), given(64), []

    def note(x_t, t, condition):
        seen.append((x_t, t))
        return gaussian(1.0)(x_t, t, condition)

    models = roles(gaussian(0.5), gaussian(1.0), note)
    method.student_losses(view(models, told))
    method.critic_losses(view(models, told))
    (x, t), (x_own, t_own) = seen
    assert not (t == t_own).any() and not torch.equal(told.draws.gaussian(3), told.draws.gaussian(5))
    assert float(torch.corrcoef(torch.stack((t, t_own)))[0, 1].abs()) < 0.4  # 64 pairs: three deviations
    assert not torch.equal(x, x_own)


def test_descent_takes_a_gaussian_student_to_the_teachers_spread():
    """One step, x = a noise, beside the exact critic; with c = 1 nearly squares, so the way ends at the goal itself."""
    a, method = torch.tensor(0.4, requires_grad=True), TrajectoryMatching(grid=(1.0,), c=1.0)
    for moment in range(150):

        def student(x_t, t, condition, a=a):
            return (1 - a) * x_t

        models = roles(student, gaussian(1.0), gaussian(float(a.detach()) ** 2))
        loss = method.student_losses(view(models, given(16, (4, 8, 8), moment)))["trajectory"].mean()
        (slope,) = torch.autograd.grad(loss, a)
        a = (a - 0.5 * slope).detach().requires_grad_()
    assert float(a.detach()) == pytest.approx(1.0, abs=1e-3)


def test_the_critics_loss_gives_the_student_nothing_and_the_students_the_critic_nothing(make_dit):
    student, teacher, critic = (make_dit(seed) for seed in range(3))

    def field(denoiser):
        return lambda x_t, t, condition: denoiser(x_t, t, condition).sample.float()

    models, method = roles(field(student), field(teacher), field(critic)), TrajectoryMatching()
    method.student_losses(view(models, given()))["trajectory"].sum().backward()
    assert any(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for m in (teacher, critic) for p in m.parameters())
    student.zero_grad()
    method.critic_losses(view(models, given()))["data"].sum().backward()
    assert any(p.grad is not None for p in critic.parameters())
    assert all(p.grad is None for m in (teacher, student) for p in m.parameters())


def test_neither_data_nor_other_steps_than_the_samplers_are_wanted():
    method = TrajectoryMatching(shift=math.e)
    assert not method.needs_data and [method.turns(k) for k in range(3)] == [(True, False), (False, True)] + [
        (True, False)
    ]
    method.check(Grid(shift=math.e))
    for other in (Grid(renoise=True, shift=math.e), Grid(), Euler(4, math.e)):
        with pytest.raises(ValueError, match="TrajectoryMatching trains the steps of Grid.*the sampler is"):
            method.check(other)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"c": 0.0}, "c and cap must be positive"), ({"every": 1}, "no turn"), ({"grid": ()}, "times must decrease")],
)
def test_impossible_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TrajectoryMatching(**options)
