"""Fields are functions; data N(0, s^2) have the velocity x_t (t - (1-t) s^2) / ((1-t)^2 s^2 + t^2)."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from views import Models, view

from edit.few_step.distribution_matching import DistributionMatching
from edit.few_step.divergence import DIVERGENCES, WeighedHeads
from edit.few_step.scores import capped, direction, rollout
from edit.losses import Draws, Seen
from edit.objectives import DDPM, LogitNormal, Shifted
from edit.paths import column, move
from edit.solvers import Euler, Grid
from edit.stream import Condition

STEPS = (1.0, 0.75, 0.5, 0.25)


def given(count=3, shape=(4, 8, 8), moment=0, x=None, condition=None) -> Seen:
    condition = condition or Condition(label=torch.zeros(count, dtype=torch.int64))
    samples = torch.arange(count) + moment * count
    return Seen(condition, condition, torch.ones(count), Draws(0, samples, moment, shape), 0.0, x)


def gaussian(variance):
    """Velocity of N(0, variance); its x0 predictor is k x_t with k = (1-t) variance / ((1-t)^2 variance + t^2)."""

    def velocity(x_t, t, condition):
        t = column(t, x_t)
        return x_t * (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)

    return velocity


def roles(student, teacher=None, critic=None, features=None, own=None) -> Models:
    def refuse(*_):
        raise AssertionError("nobody is to be asked for this")

    return Models(student, refuse, refuse, teacher or refuse, features or refuse, critic or refuse, own)


def one_step(a):
    """The generator x = a noise, as a velocity at time 1."""
    return lambda x_t, t, condition: (1 - a) * x_t


# ---- gradient -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "expected"), [(0.5, -0.1038), (1.0, 0.0), (1.5, 0.2885)])
def test_the_gradient_of_a_gaussian_generator_is_the_known_one(a, expected):
    """dL/da = (1-tau) a [k(a^2, tau) - k(1, tau)] before the normaliser, whose Gaussian mean is known as well."""
    tau, scale = 0.6, torch.tensor(a, requires_grad=True)
    method = DistributionMatching(grid=(1.0,), low=tau, high=tau, simulate=1.0)
    models = roles(one_step(scale), gaussian(1.0), gaussian(a * a))
    method.student_losses(view(models, given(64, (4, 32, 32))))["distribution"].mean().backward()
    k = (1 - tau) / ((1 - tau) ** 2 + tau**2)
    spread = math.sqrt((a * (1 - k * (1 - tau))) ** 2 + (k * tau) ** 2)  # of x - x_teacher
    # 262 144 draws: 1 % of the gradient at a = 0.5 is five of its deviations; the expected values have four digits
    assert float(scale.grad) * spread * math.sqrt(2 / math.pi) == pytest.approx(expected, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("start", [0.3, 2.0])
def test_gradient_descent_takes_a_gaussian_generator_to_the_teachers_spread(start):
    a = torch.tensor(start, requires_grad=True)
    method = DistributionMatching(grid=(1.0,), simulate=1.0)
    for moment in range(150):
        models = roles(one_step(a), gaussian(1.0), gaussian(float(a.detach()) ** 2))
        (slope,) = torch.autograd.grad(
            method.student_losses(view(models, given(16, (4, 8, 8), moment)))["distribution"].mean(), a
        )
        a = (a - 0.2 * slope).detach().requires_grad_()
    assert float(a.detach()) == pytest.approx(1.0, abs=1e-3)


def test_a_critic_that_agrees_with_the_teacher_leaves_the_student_alone():
    a = torch.tensor(0.7, requires_grad=True)
    same = gaussian(0.5)
    loss = DistributionMatching(simulate=1.0).student_losses(view(roles(one_step(a), same, same), given()))[
        "distribution"
    ]
    loss.sum().backward()
    assert float(a.grad) == 0 and torch.equal(loss, torch.zeros(3))


def test_three_copies_of_one_model_leave_the_student_alone_to_the_last_bit(dit, make_dit):
    """Oracle 1: student, critic and unguided teacher with the same weights, each asked by itself."""
    student, teacher, critic = (deepcopy(dit) for _ in range(3))

    def field(denoiser):
        return lambda x_t, t, condition: denoiser(x_t, t, condition).sample.float()

    method = DistributionMatching(simulate=1.0)
    for moment in range(4):
        told = given(3, moment=moment, condition=Condition(label=torch.tensor([1, 2, 3])))
        models = roles(field(student), field(teacher), field(critic))
        loss = method.student_losses(view(models, told))["distribution"]
        loss.sum().backward()
        assert torch.equal(loss, torch.zeros(3))
    assert all(p.grad.count_nonzero() == 0 for p in student.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in student.parameters()) > 10  # a graph there was
    other = roles(field(student), field(teacher), field(make_dit(seed=1)))
    assert (method.student_losses(view(other, told))["distribution"] > 0).all()


def test_the_gradient_is_the_weighted_difference_of_the_two_predictions():
    """Whatever the size of the sample, to the last digit: w (x_critic - x_teacher) / d."""
    v = (100 * torch.randn(3, 4, 8, 8)).requires_grad_()  # a large sample, in which small gradients would drown
    method, seen = DistributionMatching(grid=(1.0,), simulate=1.0), []

    def note(velocity):
        def ask(x_t, t, condition):
            seen.append((x_t, t))
            return velocity(x_t, t, condition)

        return ask

    models = roles(lambda x_t, t, c: v, note(gaussian(1.0)), note(gaussian(1.001)))
    method.student_losses(view(models, given()))["distribution"].sum().backward()
    x_tau, tau = seen[0]
    x = (given().draws.gaussian(0) - v).detach()
    teacher, critic = (x_tau - column(tau, x) * gaussian(s)(x_tau, tau, None) for s in (1.0, 1.001))
    weight = 1 / ((x - teacher).abs().mean((1, 2, 3), keepdim=True) + 1e-6)
    # x = noise - v, so the sign turns; the difference of two large numbers, written here as published, has lost digits
    expected = -weight * (critic - teacher) / x[0].numel()
    torch.testing.assert_close(v.grad, expected.detach(), rtol=1e-3, atol=1e-3 * float(expected.detach().abs().max()))


def test_the_normaliser_makes_the_gradient_free_of_scale_for_each_sample_alone():
    x, x_tau, teacher, critic = torch.randn(4, 3, 4, 8, 8)
    tau = torch.tensor([0.2, 0.5, 0.9])
    before = direction(x, x_tau, tau, teacher, critic)
    ten = 10 * torch.ones(3)
    ten[0] = 1
    # x, x_tau and velocities ten times as large: so are x - x_teacher and x_critic - x_teacher
    after = direction(*(column(ten, x) * v for v in (x, x_tau)), tau, *(column(ten, x) * v for v in (teacher, critic)))
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)  # the normaliser's 1e-6 does not scale


def test_the_students_times_stay_between_the_bounds_and_follow_the_law():
    seen = []

    def ask(x_t, t, condition):
        seen.append(t)
        return torch.zeros_like(x_t)

    for times in (None, Shifted(LogitNormal(), 5.0)):
        method = DistributionMatching(simulate=1.0, **({} if times is None else {"times": times}))
        method.student_losses(view(roles(lambda x, t, c: x, ask, ask), given(4000, (1, 1, 1))))
    uniform, shifted = seen[0], seen[2]
    assert 0.02 < uniform.min() < 0.03 and 0.97 < uniform.max() < 0.98
    assert abs(uniform.mean() - 0.5) < 0.015 and 0.02 < shifted.min() and shifted.mean() > 0.7 > uniform.median()


# ---- where steps begin ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renoise", [True, False])
def test_the_rollout_is_what_the_sampler_does(renoise):
    told = given()
    grid = Grid(STEPS, renoise, 2.0)
    velocity = gaussian(0.3)
    states = []

    def predict(x, t, end=None):
        states.append(x)
        return velocity(x, torch.full((len(x),), t), None)

    from edit.objectives import FlowMatching

    grid.integrate(predict, told.draws.gaussian(0), FlowMatching(), lambda k: told.draws.gaussian(10 + k))
    for k, state in enumerate(states):  # times in float64 there, in float32 here
        torch.testing.assert_close(
            rollout(replace(told, student=velocity), grid.grid[: k + 1], renoise), state, rtol=1e-5, atol=1e-5
        )


def test_only_the_last_step_of_a_rollout_has_a_gradient():
    gains = torch.full((4,), 0.3, requires_grad=True)  # one for each step

    def student(x_t, t, condition):
        return gains[(4 * (1 - t)).long()].view(-1, 1, 1, 1) * x_t

    method, steps = DistributionMatching(simulate=1.0), set()
    for moment in range(12):
        told = given(moment=moment)
        models = roles(student, gaussian(1.0), gaussian(0.5))
        (slope,) = torch.autograd.grad(method.student_losses(view(models, told))["distribution"].sum(), gains)
        (step,) = slope.nonzero().flatten().tolist()
        assert float(method.begin(replace(told, student=student))[1][0]) == STEPS[step]
        steps.add(step)
    assert steps == {0, 1, 2, 3}


def test_the_number_of_steps_is_that_of_all_ranks_and_samples_do_not_depend_on_their_batch():
    method, student = DistributionMatching(simulate=1.0), gaussian(0.3)
    for moment in range(6):
        told = given(6, moment=moment)
        whole, t, _ = method.begin(replace(told, student=student))
        halves = []
        for part in (slice(0, 3), slice(3, 6)):  # two ranks
            draws = replace(told.draws, samples=told.draws.samples[part])
            halves.append(method.begin(replace(told, student=student, draws=draws, scale=torch.ones(3)))[:2])
        assert torch.equal(torch.cat([x for x, _ in halves]), whole)
        assert torch.equal(torch.cat([at for _, at in halves]), t) and len(t.unique()) == 1


def test_steps_begin_at_noised_data_as_often_as_asked():
    data = torch.full((2, 1, 1, 1), 1e4)  # what begins there is told apart by its size
    for simulate, share in ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0)):
        method = DistributionMatching(grid=(0.5,), simulate=simulate)
        told = [replace(given(2, (1, 1, 1), m, data), student=gaussian(1.0)) for m in range(300)]
        begun = [method.begin(batch)[0].max() > 1e3 for batch in told]
        assert abs(sum(begun) / 300 - share) < 0.1  # three deviations of 300 throws


def test_data_are_needed_unless_all_is_simulated():
    assert DistributionMatching().needs_data and not DistributionMatching(simulate=1.0).needs_data
    assert DistributionMatching(simulate=1.0, taps=(1,)).needs_data  # as reals


# ---- intra-segment guidance -----------------------------------------------------------------------------------------


def segment(velocity, **options):
    method = DistributionMatching(grid=(1.0, 0.4), simulate=1.0, segment=2.0, **options)
    told = given()
    x_t, t, end = method.begin(replace(told, student=velocity))
    v = velocity(x_t, t, None)
    low, high = end + 0.02, t - 0.02
    middle = low + (high - low) * told.draws.uniform(3)
    loss = method.student_losses(view(roles(velocity, velocity, velocity), told))["segment"]
    return loss, x_t, v, t, middle, end


@pytest.mark.parametrize("charbonnier", [None, 1e-3])
def test_a_straight_path_leaves_nothing_to_guide(charbonnier):
    loss, *_ = segment(lambda x_t, t, c: torch.full_like(x_t, 0.3), charbonnier=charbonnier)
    assert float(loss.detach().max()) < 1e-6  # fp32: two steps of different lengths against one


def test_on_a_curved_path_the_segments_loss_is_the_difference_of_two_steps_and_one():
    """v = rate x: x (1 + rate (m - t)) (1 + rate (e - m)) - x (1 + rate (e - t)) = x rate^2 (m - t) (e - m)."""
    rate = -0.7
    loss, x_t, _, t, middle, end = segment(lambda x_t, t, c: rate * x_t, charbonnier=None)
    gap = x_t * column(rate**2 * (middle - t) * (end - middle), x_t)
    torch.testing.assert_close(loss, 2 * gap.square().mean((1, 2, 3)), rtol=1e-3, atol=1e-8)
    loss, *_ = segment(lambda x_t, t, c: rate * x_t)
    torch.testing.assert_close(loss, 2 * ((gap.square() + 1e-6).sqrt() - 1e-3).mean((1, 2, 3)), rtol=1e-3, atol=1e-8)


def test_the_segment_is_guided_by_the_teacher_first_and_then_by_the_student_without_a_graph():
    calls = []

    def student(x_t, t, c):
        calls.append(("student", torch.is_grad_enabled(), t))
        return x_t * weight

    def teacher(x_t, t, c):
        calls.append(("teacher", torch.is_grad_enabled(), t))
        return x_t

    weight = torch.tensor(0.5, requires_grad=True)
    method = DistributionMatching(grid=(1.0, 0.4), simulate=0.0, segment=1.0)
    method.student_losses(view(roles(student, teacher, teacher), given(x=torch.zeros(3, 4, 8, 8))))
    assert [c[:2] for c in calls] == [
        ("student", True),
        ("teacher", False),  # the two scores
        ("teacher", False),
        ("teacher", False),
        ("student", False),
    ]
    t, middle = calls[3][2], calls[4][2]
    assert torch.equal(t, calls[0][2]) and (middle < t - 0.02).all()


# ---- critic, discriminator ------------------------------------------------------------------------------------------


@pytest.fixture
def models(make_dit):
    """Student, teacher and critic, three small DiTs; the teacher is frozen, its taps are those of unit 1."""
    student, teacher, critic = (make_dit(seed) for seed in range(3))
    teacher.requires_grad_(False)
    own = DistributionMatching(taps=(1,), divergence="jensen_shannon").build(student, teacher)

    def field(denoiser):
        return lambda x_t, t, condition: denoiser(x_t, t, condition).sample.float()

    def features(x_t, t, condition):
        return teacher(x_t, t, condition, taps=(1,))

    told = roles(field(student), torch.no_grad()(field(teacher)), field(critic), features, own)
    return student, teacher, critic, own, told


def gradients(module):
    return [p.grad is not None and bool(p.grad.abs().max() > 0) for p in module.parameters()]


def test_the_students_losses_reach_the_student_and_the_critics_the_critic_and_the_heads(models):
    student, teacher, critic, own, told = models
    condition = Condition(label=torch.tensor([1, 2, 3]))
    batch = given(x=torch.randn(3, 4, 8, 8), condition=condition)
    method = DistributionMatching(taps=(1,), divergence="jensen_shannon", segment=1.0)
    assert method.teacher_taps == (1,)
    losses = method.student_losses(view(told, batch))
    assert set(losses) == {"distribution", "realism", "segment"} and all(v.shape == (3,) for v in losses.values())
    own.requires_grad_(False)  # as the recipe does on the student's turn
    sum(v.mean() for v in method.student_losses(view(told, batch)).values()).backward()
    assert any(gradients(student)) and not any(gradients(teacher)) and not any(gradients(critic))
    assert not any(gradients(own))
    own.requires_grad_(True)
    student.zero_grad()
    losses = method.critic_losses(view(told, batch))
    assert set(losses) == {"velocity", "judgement"} and all(v.shape == (3,) for v in losses.values())
    sum(v.mean() for v in losses.values()).backward()
    assert any(gradients(critic)) and any(gradients(own)) and not any(gradients(student) + gradients(teacher))


def test_the_adversarial_gradient_reaches_the_student_through_the_frozen_teacher(models):
    student, teacher, _, own, told = models
    method = DistributionMatching(taps=(1,), realism=1.0, simulate=1.0)
    batch = given(condition=Condition(label=torch.tensor([1, 2, 3])))
    method.student_losses(view(told, batch))["realism"].sum().backward()
    assert any(gradients(student)) and all(p.grad is None for p in teacher.parameters())
    with torch.no_grad():
        own.heads.heads[0].outer.weight.zero_()
        own.heads.heads[0].outer.bias.zero_()
    loss = method.student_losses(view(told, batch))["realism"]  # undecided heads
    torch.testing.assert_close(loss, torch.full((3,), math.log(2)), rtol=1e-5, atol=1e-6)


def test_the_critic_learns_the_velocity_from_noise_to_the_students_sample():
    """With the student's samples N(0, a^2) in closed form, the exact velocity beats those of other spreads."""
    a, told = 0.6, given(64, (1, 16, 16))
    method = DistributionMatching(grid=(1.0,), simulate=1.0)
    losses = {
        s: float(method.critic_losses(view(roles(one_step(a), critic=gaussian(s * s)), told))["velocity"].mean())
        for s in (0.5, 0.6, 0.7)
    }
    assert min(losses, key=losses.get) == 0.6


def test_a_critic_that_predicts_noise_has_losses_of_order_one_near_pure_noise():
    """Exact noise of the student's N(0, a^2), and beside it what a young critic errs: 0.3 of the noise's deviation."""
    a, ddpm, told = 0.6, DDPM(), given(64, (4, 8, 8))
    near = LogitNormal(6.0, 0.5)  # times from 0.99 on; the last of DDPM's indices stands at 0.9937
    assert 0.99 < float(near(told.draws.uniform(6)).min()) < 0.995

    def critic(x_t, t, condition):
        native, time = ddpm.native(x_t, t)
        alpha = torch.cumprod(1 - ddpm.betas(), 0)[ddpm.index(time)].float()
        eps = column((1 - alpha).sqrt() / (alpha * a * a + 1 - alpha), x_t) * native
        return ddpm.velocity(eps + 0.3 * told.draws.gaussian(99), x_t, t)

    models = roles(one_step(a), critic=critic)
    settings = {"grid": (1.0,), "simulate": 1.0, "times": near}
    velocity = DistributionMatching(**settings).critic_losses(view(models, told))["velocity"]
    assert (velocity > 1000).all()  # 0.09 / (1 - 0.9937)^2 is 2300
    data = DistributionMatching(**settings, critic_weight="data").critic_losses(view(models, told))["data"]
    assert (data < 1).all()
    middle = DistributionMatching(**{**settings, "times": LogitNormal(-0.5, 0.1)}, critic_weight="data")
    assert (
        0.1 < float(middle.critic_losses(view(models, told))["data"].mean()) < 1
    )  # nor does it vanish where it matters


def test_an_error_of_predicted_noise_counts_the_same_at_all_times_whose_ratio_is_below_the_cap():
    t, error = torch.tensor([0.05, 0.31, 0.5, 0.9, 0.999]), torch.randn(1, 4, 8, 8)
    loss = capped(error / column(1 - t, t.view(-1, 1, 1, 1)), t, 5.0)
    assert ((1 - t) / t).square().gt(5).tolist() == [True, False, False, False, False]
    expected = error.square().mean() * torch.tensor([5 / 19**2, 1, 1, 1, 1])  # the ratio at 0.05 is 19^2
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)  # 1 - 0.999 has lost four digits in fp32


def test_a_noise_predicting_student_is_refused_the_loss_on_velocities(make_dit):
    flow, noise = make_dit(), make_dit(time="ddpm")
    assert noise.prediction == "noise"
    with pytest.raises(ValueError, match="this dit predicts noise.*set critic_weight=data"):
        DistributionMatching().build(noise, noise)
    assert DistributionMatching(critic_weight="data").build(noise, noise) is None
    assert DistributionMatching().build(flow, flow) is None


def test_weights_of_the_divergences_are_those_of_the_table():
    r = torch.tensor([0.25, 4.0])
    expected = {
        "reverse_kl": [1, 1],
        "forward_kl": [0.25, 4],
        "jensen_shannon": [1 - 1 / 1.25, 1 - 1 / 5],
        "softened_reverse_kl": [1 / 1.25, 1 / 5],
        "neyman": [4, 0.25],
        "hellinger": [0.5, 2],
        "jeffreys": [1.25, 5],
    }
    assert set(DIVERGENCES) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(DIVERGENCES[name](r), torch.tensor(values, dtype=torch.float32))


def test_weights_have_mean_one_at_each_noise_level_and_remember_it():
    judge = WeighedHeads(nn.Identity(), levels=2, momentum=0.5)
    t = torch.tensor([0.1, 0.2, 0.9])
    assert judge.normalised(torch.tensor([1.0, 3.0, 8.0]), t).tolist() == [0.5, 1.5, 1.0]
    # the second level is not seen here and keeps its mean; the first one's is now (2 + 6) / 2
    assert judge.normalised(torch.tensor([6.0]), t[:1]).tolist() == [1.5]
    assert judge.mean_weight.tolist() == [4.0, 8.0]


def test_a_divergence_weighs_samples_by_what_the_heads_say_of_them():
    """Heads that are sure of the first sample: forward KL counts it more, and no other ratio than the clipped one."""
    logits = torch.tensor([[9.0], [0.0], [0.0]])
    method = DistributionMatching(taps=(0,), divergence="forward_kl", ratio=4.0)
    weight = method.weight(logits, torch.full((3,), 0.5), WeighedHeads(nn.Identity()))
    assert weight.tolist() == [2.0, 0.5, 0.5]  # 4, 1, 1 over their mean


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_sampler_of_other_steps_is_refused_with_both_named():
    method = DistributionMatching(grid=STEPS, shift=3.0, renoise=False)
    method.check(Grid(STEPS, False, 3.0))
    for other in (Grid(STEPS, True, 3.0), Grid(STEPS, False, 1.0), Grid((1.0, 0.5), False, 3.0), Euler(4)):
        with pytest.raises(ValueError, match=r"trains the steps of Grid\(times=\(1.0, 0.75.*the sampler is"):
            method.check(other)


def test_flux_steps_come_from_its_own_shift():
    for tokens, expected in ((4096, [1000, 904.5, 759.5, 512.8]), (1024, [1000, 849.2, 652.5, 384.9])):
        shift = math.exp(0.5 + 0.65 * (tokens - 256) / 3840)
        times = DistributionMatching(shift=shift).solver.grid[:-1]
        assert [1000 * t for t in times] == pytest.approx(expected, abs=0.1)  # published to one decimal


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"divergence": "neyman"}, "name teacher units in taps"),
        ({"divergence": "kl"}, "must be one of reverse_kl, forward_kl"),
        ({"every": 1}, "leaves the critic no turn"),
        ({"simulate": 1.5}, "simulate is a probability, got 1.5"),
        ({"low": 0.0}, "0 < low <= high < 1"),
        ({"grid": (0.5, 1.0)}, "times must decrease"),
        ({"grid": (1.0, 0.97, 0.5), "segment": 1.0}, "segments must be longer than 0.04"),
        ({"ratio": 1.0}, "ratio must be above 1"),
        ({"critic_weight": "noise"}, "critic_weight must be velocity or data .* got 'noise'"),
        ({"cap": 0.0}, "cap positive, got 'velocity', 0.0"),
    ],
)
def test_impossible_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        DistributionMatching(**options)


def test_move_to_data_is_the_generators_sample():
    """The convention all of the above rests on: x = x_t - t v."""
    x_t, v, t = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2), torch.tensor([0.3, 1.0])
    torch.testing.assert_close(move(x_t, v, t, torch.zeros(2)), x_t - column(t, v) * v)
