import math
from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch
from analytic import STD, flow, given, jump, networks, roles, velocity
from torch import Tensor, nn
from views import view

from edit.few_step.consistency import Consistency, PhasedConsistency, TruncatedConsistency
from edit.few_step.method import pseudo_huber
from edit.few_step.progressive import time_grid
from edit.losses import Draws
from edit.objectives import FlowMatching
from edit.paths import column, corrupt, mean
from edit.solvers import Euler, Grid, Heun, times
from edit.stream import Output

ALL = (Consistency(average=False), PhasedConsistency(), TruncatedConsistency())


def total(method, who, batch):
    (loss,) = method.student_losses(view(who, batch)).values()
    return loss


# ---- what is learned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phases", [1, 4])
def test_the_exact_map_has_a_loss_that_vanishes_with_the_square_of_the_grid(phases):
    # c far below every difference: the distance is their mean size, of which a step of Euler's makes O(step^2)
    found = []
    for steps in (16, 64, 256):
        student, batch = jump(phases), given(400)
        methods = [PhasedConsistency((phases,), steps, c=1e-12)]
        if phases == 1:
            methods.append(Consistency(steps, scaling=None, c=1e-12))
        losses = [total(m, roles(student, velocity, student), batch).mean().item() for m in methods]
        assert losses[0] == pytest.approx(losses[-1])  # one phase is a consistency model
        found.append(losses[0])
    # a factor of 16; the samples' times are drawn, and fp32 leaves 1e-7 of what is 1e-5 at last
    assert 10 < found[0] / found[1] < 25 and 10 < found[1] / found[2] < 25
    inexact = total(PhasedConsistency((phases,), 256, c=1e-12), roles(velocity, velocity), given(400)).mean()
    assert inexact > 20 * found[2]


@pytest.mark.parametrize("phases", [1, 2, 4])
def test_straight_steps_from_phase_to_phase_lead_where_one_jump_leads(phases):
    z = torch.randn(6, 1, 2, 2)
    solver = Grid(tuple(k / phases for k in range(phases, 0, -1)))
    PhasedConsistency((phases,)).check(solver)

    def predict(x, t, end=None):
        return jump(phases)(x, torch.full((len(x),), t))

    found = solver.integrate(predict, z, FlowMatching(), lambda k: pytest.fail("fresh noise on the ODE"))
    torch.testing.assert_close(found, flow(z, torch.ones(6), torch.zeros(6)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, STD * z, rtol=1e-5, atol=1e-6)


def test_it_learns_in_one_step_what_the_teacher_s_steps_make_of_noise():
    steps, slopes = 8, torch.zeros(9, requires_grad=True)  # v = slope(t) x at each time of the grid

    def student(x_t, t, condition):
        return column(slopes[(steps * t).round().long()], x_t) * x_t

    # c = 1 makes the distance a square, whose minimum a constant rate reaches
    method, optimizer = Consistency(steps, average=False, scaling=None, c=1.0), torch.optim.Adam([slopes], lr=0.2)
    for _ in range(400):
        optimizer.zero_grad()
        total(method, roles(student, velocity), given(64)).mean().backward()
        optimizer.step()
    x = torch.ones(1, 1, 1, 1)
    grid = torch.tensor(times(steps, 1.0))[:, None]
    for t, end in zip(grid, grid[1:], strict=False):
        x = x + column(end - t, x) * velocity(x, t)
    assert 1 - slopes[steps].item() == pytest.approx(x.item(), abs=1e-3)
    assert x.item() == pytest.approx(STD, abs=0.1)  # Euler's 8 steps themselves


@pytest.mark.parametrize("average", [False, True])
def test_a_grid_of_one_step_compares_with_the_teacher_s_data(average):
    # the target at t = 0 is the point itself, whatever the model says there
    def student(x_t, t, condition):
        return 0.3 * x_t + 1

    batch = given(5)
    z = batch.draws.gaussian(1)
    found = total(Consistency(1, average=average), roles(student, velocity, student), batch)
    expected = pseudo_huber(student(z, None, None) - velocity(z, torch.ones(5)), 1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_average_is_asked_for_the_target_and_only_where_wanted():
    asked = {"student": [], "average": []}

    def field(name):
        def ask(x_t, t, condition):
            asked[name].append((t, torch.is_grad_enabled()))
            return velocity(x_t, t)

        return ask

    who = roles(field("student"), velocity, field("average"))
    total(Consistency(10), who, given())
    (begin, graph), (end, _) = *asked["student"], *asked["average"]
    torch.testing.assert_close(begin - end, torch.full((8,), 0.1))
    assert graph
    asked["student"].clear()
    total(Consistency(10, average=False), roles(field("student"), velocity), given())
    assert sorted(graph for _, graph in asked["student"]) == [False, True]


# ---- distance and scalings -------------------------------------------------------------------------------------------


def test_the_distance_is_of_each_element_whatever_their_number():
    for shape in ((3, 1, 1, 1), (3, 4, 8, 8)):
        prediction = torch.tensor([0.0, 1e-3, 2.0]).view(3, 1, 1, 1).expand(shape)
        found = pseudo_huber(prediction, 1e-3).tolist()
        assert found == pytest.approx([0, 1e-3 * (math.sqrt(2) - 1), math.sqrt(4 + 1e-6) - 1e-3], rel=1e-5)


def test_the_boundary_scalings_matter_near_data_only():
    def student(x_t, t, condition):
        return 0.3 * x_t + 1

    def losses(steps, scaling):
        return total(Consistency(steps, average=False, scaling=scaling), roles(student, velocity), given(200))

    # 10 on the grid of 50: c_skip below 1e-5, of samples of size 1, in a difference
    torch.testing.assert_close(losses(50, 10.0), losses(50, None), rtol=0, atol=3e-5)
    assert (losses(5000, 1.0) - losses(5000, None)).abs().max() > 1e-4


def test_near_data_a_prediction_is_mixed_by_the_published_scalings():
    """With s = 1 and 5000 steps r goes from 0.4 to 4 over the last ten; the student's velocity is 1."""

    def mixed(x, t):
        r = 1000 * t / 0.5
        return column(1 / (1 + r**2), x) * x + column(r / (1 + r**2) ** 0.5, x) * (x - column(t, x))

    grid, batch = time_grid(5000, 1.0, torch.device("cpu")), given(64)
    batch = replace(batch, draws=Near(batch.draws, 1 - batch.draws.uniform(0) / 500))
    k = (batch.draws.uniform(0) * 5000).long()
    x_t = corrupt(batch.x, batch.draws.gaussian(1), grid[k])
    x_next = x_t + column(grid[k + 1] - grid[k], x_t) * velocity(x_t, grid[k], batch.condition)
    wanted = pseudo_huber(mixed(x_t, grid[k]) - mixed(x_next, grid[k + 1]), 1e-3)
    ones = roles(lambda x, t, condition: torch.ones_like(x), velocity)
    found = total(Consistency(5000, average=False, scaling=1.0), ones, batch)
    torch.testing.assert_close(found, wanted)


@dataclass(frozen=True)
class Near:
    """Draws whose first uniform numbers are given."""

    draws: Draws
    first: Tensor

    def uniform(self, stream):
        return self.first if stream == 0 else self.draws.uniform(stream)

    def gaussian(self, stream):
        return self.draws.gaussian(stream)


# ---- phases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("progress", "phases"), [(0.0, 1), (0.34, 2), (0.99, 4), (1.0, 4)])
def test_points_lead_to_the_end_of_their_phase_and_phases_follow_the_run(progress, phases):
    times_asked = []

    def student(x_t, t, condition):
        times_asked.append(t)
        return velocity(x_t, t)

    method = PhasedConsistency((1, 2, 4), steps=8, shift=3.0)
    _, _, start, end = method.predictions(view(roles(student, velocity), given(200, progress=progress)))
    ends = torch.tensor(times(phases, 3.0)[1:])
    assert (end[:, None] - ends).abs().min(1).values.max() < 1e-6 and len(end.unique()) == phases
    after, t = times_asked  # of the target, of the prediction
    assert (end <= after).all() and (after < t).all() and (t <= start).all()
    torch.testing.assert_close(start.unique(), torch.tensor(times(phases, 3.0)[-2::-1]))
    assert ((end[:, None] < ends) & (ends < t[:, None] - 1e-6)).sum() == 0  # no other end lies on the way


def test_what_is_predicted_at_the_end_of_a_phase_has_a_graph_and_its_target_none():
    scale = torch.ones((), requires_grad=True)

    def student(x_t, t, condition):
        return scale * velocity(x_t, t)

    prediction, target, _, _ = PhasedConsistency().predictions(view(roles(student, velocity), given()))
    assert prediction.requires_grad and not target.requires_grad


# ---- phases that are judged ------------------------------------------------------------------------------------------


class Gain(nn.Module):
    """A head that can be written down: logits are so many times the first channel of the tokens."""

    def __init__(self, gain: float):
        super().__init__()
        self.gain = gain

    def forward(self, features, t, pooled, grid):
        return self.gain * features["unit.0"][:, :, 0]


def judged(student, gain: float = 1.0, seen: list | None = None):
    """Models whose features are the elements themselves."""

    def features(x_t, t, condition):
        if seen is not None:
            seen.append((x_t, t))
        return Output(x_t, None, {"unit.0": x_t.flatten(2).transpose(1, 2)})

    return replace(roles(student, velocity), features=features, own=Gain(gain))


def slow(x_t, t, condition):
    return 0.5 * velocity(x_t, t)


def test_ends_are_judged_at_one_time_of_their_phase_noised_along_a_straight_path():
    seen, batch, method = [], given(200), PhasedConsistency((2,), taps=(0,))
    who = judged(slow, seen=seen)
    fake, real, start, end = method.predictions(view(who, batch))
    assert not torch.equal(fake, real)
    method.critic_losses(view(who, batch))
    method.student_losses(view(who, batch))
    for (x_t, t), x_e, stream in zip(seen, (real, fake, fake), (4, 3, 3), strict=True):
        assert torch.equal(t, seen[0][1]) and (end <= t).all() and (t <= start).all()
        s, e = column(t, x_e), column(end, x_e)
        expected = ((1 - s) * x_e + (s - e) * batch.draws.gaussian(stream)) / (1 - e)
        torch.testing.assert_close(x_t, expected, rtol=1e-5, atol=1e-6)
    # uniform: the mean of 200 places within a phase is known to 0.02
    assert ((seen[0][1] - end) / (start - end)).mean().item() == pytest.approx(0.5, abs=0.08)


def test_the_adversarial_losses_are_the_hinge_s():
    batch, method = given(50), PhasedConsistency(taps=(0,), adversarial_weight=0.3)
    blind = judged(slow, gain=0.0)
    assert method.critic_losses(view(blind, batch))["heads"].tolist() == [2.0] * 50
    assert not method.student_losses(view(blind, batch))["generator"].any()
    seen = []
    generator = method.student_losses(view(judged(slow, 5.0, seen), batch))["generator"]
    heads = method.critic_losses(view(judged(slow, 5.0, seen), batch))["heads"]
    own, real, fake = (x_t for x_t, _ in seen)
    torch.testing.assert_close(generator, -0.3 * 5 * mean(own))
    torch.testing.assert_close(heads, mean((1 - 5 * real).relu()) + mean((1 + 5 * fake).relu()))


@pytest.mark.parametrize("every", [2, 5])
def test_without_taps_the_discriminator_leaves_nothing_behind(every, dit):
    off, on, batch = PhasedConsistency(every=every), PhasedConsistency(taps=[-1], every=every), given()
    plain = off.student_losses(view(roles(slow, velocity), batch))  # whose features refuse to be asked
    assert list(plain) == ["phased"]
    assert torch.equal(plain["phased"], on.student_losses(view(judged(slow), batch))["phased"])
    assert off.build(dit, dit) is None and not off.adversarial and off.teacher_taps == ()
    assert [off.turns(k) for k in range(3)] == [(True, False)] * 3
    assert on.adversarial and on.teacher_taps == (-1,)
    assert [on.turns(k) for k in range(every + 1)] == [(True, False), *[(False, True)] * (every - 1), (True, False)]


def test_each_side_of_the_discriminator_learns_from_its_own_loss_through_frozen_features(make_dit):
    student, teacher = make_dit(0).requires_grad_(True), make_dit(1).requires_grad_(False)
    method = PhasedConsistency(taps=(0, -1))
    heads = method.build(student, teacher)
    assert method.judges(heads) == list(heads.parameters())

    def features(x_t, t, condition):
        return teacher(x_t, t, condition, taps=method.teacher_taps)

    plain = networks(student, teacher)
    who, batch = replace(plain, features=features, own=heads), given(3, (4, 8, 8), label=torch.tensor([0, 3, 9]))
    heads.requires_grad_(False)  # as the recipe does
    method.student_losses(view(who, batch))["generator"].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in student.parameters() if p.requires_grad)
    student.zero_grad()
    heads.requires_grad_(True)
    method.critic_losses(view(who, batch))["heads"].sum().backward()
    assert all(p.grad is None for p in (*student.parameters(), *teacher.parameters()))
    assert sum(p.grad.abs().sum() for p in heads.parameters()) > 0


# ---- truncated -------------------------------------------------------------------------------------------------------


def to(value: float, asked: list):
    """A model whose data is one value everywhere."""

    def field(x_t, t, condition):
        asked.append(t)
        return (x_t - value) / column(t, x_t).clamp_min(1e-6)

    return field


def test_the_first_stage_is_the_target_at_the_boundary_and_the_student_above_it():
    kept, own = [], []
    method = TruncatedConsistency(until=0.5, share=0.25, steps=20)
    loss = total(method, roles(to(1.0, own), to(3.0, kept)), given(4000))
    target_at, t = own
    boundary = kept[0] <= 0.5 + 1e-6
    assert torch.equal(target_at, kept[0]) and (t > 0.5 + 1e-6).all() and len(t.unique()) == 10
    # its data 2 away at the boundary, none from itself above; fp32: x - t (x - c) / t with t >= 0.45
    torch.testing.assert_close(loss, torch.where(boundary, 2.0, 0.0), rtol=0, atol=2e-3)
    # a quarter, and a tenth of the rest; 4 standard deviations of 4000 draws
    assert boundary.float().mean().item() == pytest.approx(0.325, abs=4 * math.sqrt(0.325 * 0.675 / 4000))


def test_neighbours_of_the_truncated_stage_share_data_and_noise():
    seen = []

    def student(x_t, t, condition):
        seen.append((x_t, t))
        return torch.zeros_like(x_t)

    batch = given(50)
    total(TruncatedConsistency(steps=10), roles(student, student), batch)
    eps = batch.draws.gaussian(1)
    for x_t, t in seen:
        torch.testing.assert_close(x_t, torch.lerp(batch.x, eps, column(t, eps)))


# ---- real models, plumbing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
def test_the_gradient_reaches_all_of_the_student_and_nobody_else(method, dit):
    student, teacher = deepcopy(dit).requires_grad_(True), deepcopy(dit).requires_grad_(True)
    labels = torch.tensor([0, 3, 9])

    who = networks(student, teacher)
    loss = total(method, who, given(3, (4, 8, 8), label=labels))
    assert loss.shape == (3,) and (loss > 0).all()
    loss.sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    moved = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name, p in student.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
def test_a_sample_s_loss_depends_on_its_number_alone(method):
    who = roles(lambda x_t, t, condition: 0.3 * x_t, velocity)
    whole = total(method, who, given(8))
    assert torch.equal(whole[4:], total(method, who, given(4, first=4))) and len(set(whole.tolist())) == 8


# ---- refusals --------------------------------------------------------------------------------------------------------

FOUR = (1.0, 0.75, 0.5, 0.25)
SOLVERS = {
    "sampler.solver to edit.solvers.Grid with renoise=true": [
        (Consistency(), Euler(4)),
        (Consistency(), Grid(FOUR)),
        (TruncatedConsistency(), Grid((1.0, 0.75))),
    ],
    "steps=4 and shift=2": [
        (PhasedConsistency(shift=2.0), Grid(FOUR)),
        (PhasedConsistency((1, 4), shift=2.0), Grid(FOUR, True, 2.0)),
        (PhasedConsistency(shift=2.0), Euler(8, 2.0)),
        (PhasedConsistency(shift=2.0), Heun(4, 2.0)),
    ],
    "up to 0.5, the sampler asks at 0.25": [(TruncatedConsistency(), Grid(FOUR, True))],
}


@pytest.mark.parametrize(("cure", "method", "solver"), [(c, *pair) for c, pairs in SOLVERS.items() for pair in pairs])
def test_a_solver_that_samples_otherwise_is_refused_with_what_to_set(cure, method, solver):
    with pytest.raises(ValueError, match=f"{type(method).__name__}.*{cure}"):
        method.check(solver)


def test_the_solver_of_each_method_is_accepted():
    Consistency().check(Grid((1.0, 0.3), renoise=True))
    TruncatedConsistency().check(Grid((1.0, 0.6), renoise=True))
    PhasedConsistency(shift=2.0).check(Grid(FOUR, shift=2.0))
    PhasedConsistency((2, 4), shift=2.0).check(Euler(4, 2.0))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Consistency(steps=0), "Consistency: steps must be at least 1, got 0"),
        (lambda: Consistency(scaling=0.1), "scaling must be at least 1, got 0.1.* null is none"),
        (lambda: Consistency(c=0.0), "c must be positive, got 0"),
        (lambda: PhasedConsistency(shift=0.0), "shift must be positive, got 0"),
        (lambda: PhasedConsistency([3]), r"numbers that divide the 100 steps, got \[3\]"),
        (lambda: PhasedConsistency([]), r"numbers that divide the 100 steps, got \[\]"),
        (lambda: PhasedConsistency(taps=[0], every=1), "every=1 leaves the heads no turn: set every to 2 or more"),
        (lambda: PhasedConsistency(adversarial_weight=-0.1), "adversarial_weight must be at least 0, got -0.1"),
        (lambda: TruncatedConsistency(until=1.0), "until must lie between 0 and 1, got 1"),
        (lambda: TruncatedConsistency(share=0.0), "share must lie between 0 and 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()
