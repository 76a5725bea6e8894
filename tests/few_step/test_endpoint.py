from dataclasses import replace

import pytest
import torch
from analytic import STD, flow, given, jump, networks, roles, velocity
from views import view

from edit.few_step.endpoint import CachedEndpoint, Endpoint
from edit.paths import column
from edit.solvers import Euler, Grid, Heun, times


def data_free(count: int = 8, first: int = 0, shape=(1, 2, 2), **condition):
    return replace(given(count, shape, first=first, **condition), x=None)


def gain(steps: int, shift: float = 1.0) -> float:
    """What Euler's method makes of a noise of one; STD in the limit."""
    x, grid = torch.ones(1, 1, 1, 1), torch.tensor(times(steps, shift))[:, None]
    for t, end in zip(grid, grid[1:], strict=False):
        x = x + column(end - t, x) * velocity(x, t)
    return x.item()


@pytest.mark.parametrize("steps, shift", [(1, 1.0), (10, 1.0), (10, 3.0)])
def test_the_loss_is_half_the_square_of_what_lies_between_two_ends_of_one_noise(steps, shift):
    batch = data_free()
    found = Endpoint(steps, shift=shift).student_losses(view(roles(lambda x, t, c: 0.7 * x, velocity), batch))[
        "endpoint"
    ]
    z = batch.draws.gaussian(0)
    expected = 0.5 * (0.3 - gain(steps, shift)) ** 2 * z.square().flatten(1).mean(1)  # one step makes 0.3 z
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("starts", [1, 4])
def test_the_exact_map_has_a_loss_that_vanishes_with_the_square_of_the_solve_s_steps(starts):
    # ends are off by O(step), so their squares fall by 16 and 16
    coarse, middle, fine = (
        Endpoint(steps, starts).student_losses(view(roles(jump(), velocity), data_free(400)))["endpoint"].mean().item()
        for steps in (16, 64, 256)
    )
    assert 10 < coarse / middle < 25 and 10 < middle / fine < 25
    wrong = Endpoint(256, starts).student_losses(view(roles(velocity, velocity), data_free(400)))["endpoint"]
    assert wrong.mean() > 100 * fine


def test_a_student_of_one_step_learns_where_the_teacher_s_path_ends():
    slope = torch.zeros((), requires_grad=True)
    method, optimizer = Endpoint(8), torch.optim.Adam([slope], lr=0.1)
    for k in range(150):
        loss = method.student_losses(view(roles(lambda x, t, c: slope * x, velocity), data_free(16, 16 * k)))[
            "endpoint"
        ]
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert 1 - slope.item() == pytest.approx(gain(8), abs=1e-3)
    assert gain(8) == pytest.approx(STD, abs=0.1)  # Euler's 8 steps themselves


def test_later_starts_lie_on_the_teacher_s_path_and_all_lead_to_data():
    asked, solved = [], {}

    def student(x_t, t, condition):
        asked.append((x_t, t, condition.end))
        return torch.zeros_like(x_t)

    def teacher(x_t, t, condition):
        solved[round(t[0].item(), 4)] = x_t
        return velocity(x_t, t)

    method = Endpoint(steps=6, starts=3, shift=2.0)
    method.student_losses(view(roles(student, teacher), data_free(300)))
    ((x_t, t, end),) = asked
    assert not end.any() and len(solved) == 6
    for time in times(3, 2.0)[:-1]:
        here = (t - time).abs() < 1e-6
        assert 60 < here.sum() < 140  # a third of 300, standard deviation 8
        assert torch.equal(x_t[here], solved[round(time, 4)][here])


def test_the_gradient_reaches_all_of_the_student_and_not_the_teacher(make_dit):
    student, teacher = make_dit(0).requires_grad_(True), make_dit(1).requires_grad_(True)

    who = networks(student, teacher)
    batch = data_free(3, shape=(4, 8, 8), label=torch.tensor([0, 3, 9]))
    Endpoint(2).student_losses(view(who, batch))["endpoint"].sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in student.parameters() if p.requires_grad)


def test_a_sample_s_loss_depends_on_its_number_alone():
    who = roles(lambda x_t, t, condition: 0.3 * x_t, velocity)
    whole = Endpoint(4, 2).student_losses(view(who, data_free(8)))["endpoint"]
    half = Endpoint(4, 2).student_losses(view(who, data_free(4, first=4)))["endpoint"]
    assert torch.equal(whole[4:], half) and len(set(whole.tolist())) == 8


def test_samplers_whose_steps_lead_to_data_from_its_times_are_accepted_and_others_refused():
    assert not Endpoint.needs_data and Endpoint.needs_teacher
    for solver in (Euler(1, 3.0), Grid((1.0,)), Grid((1.0,), renoise=True)):
        Endpoint().check(solver)
    Endpoint(10, 2).check(Grid((1.0, 0.5), renoise=True))
    Endpoint(10, 2, shift=3.0).check(Grid((1.0, 0.5), renoise=True, shift=3.0))
    for solver in (Grid((1.0, 0.5)), Grid((1.0, 0.4), renoise=True), Euler(2), Heun(1)):
        with pytest.raises(ValueError, match=r"from the times \[1.0, 0.5\], the sampler is .*Grid with these times"):
            Endpoint(10, 2).check(solver)


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"starts": 0}, "starts must be at least 1, got 0"),
        ({"starts": 4}, "steps must be a multiple of starts.* got 10 and 4"),
        ({"shift": 0.0}, "shift must be positive, got 0"),
    ],
)
def test_impossible_settings_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=f"Endpoint: .*{complaint}"):
        Endpoint(**settings)


# ---- stored paths ---------------------------------------------------------------------------------------------------


def stored(points: int, count: int = 300):
    """Samples with their exact paths, at the times that an evenly spaced solver passes."""
    z, grid = given(count).draws.gaussian(0), torch.tensor(times(points + 1, 1.0))[1:-1].expand(count, -1)
    one, states = torch.ones(count), [flow(z, torch.ones(count), t) for t in grid.unbind(1)]
    trajectory = torch.stack(states, 1) if points else z[:, None][:, :0]
    return replace(given(count), x=flow(z, one, 0 * one), noise=z, trajectory=trajectory, times=grid)


@pytest.mark.parametrize("points, starts", [(0, 1), (3, 4), (3, 2), (3, 1)])
def test_from_stored_paths_the_exact_map_has_no_loss_and_nobody_else_is_asked(points, starts):
    method = CachedEndpoint(starts)
    assert method.student_losses(view(roles(jump()), stored(points)))["endpoint"].max() < 1e-10
    assert method.student_losses(view(roles(velocity), stored(points)))["endpoint"].mean() > 1e-4


def test_stored_starts_are_drawn_evenly_and_asked_at_their_own_times():
    asked = []

    def student(x_t, t, condition):
        asked.append((x_t, t, condition.end))
        return torch.zeros_like(x_t)

    batch = stored(5)
    CachedEndpoint(3).student_losses(view(roles(student), batch))
    ((x_t, t, end),) = asked
    assert not end.any()
    torch.testing.assert_close(x_t, flow(batch.noise, torch.ones(300), t))
    for time in times(3, 1.0)[:-1]:
        assert 60 < ((t - time).abs() < 1e-6).sum() < 140  # a third of 300, standard deviation 8


def test_paths_that_were_stored_at_other_times_are_refused():
    CachedEndpoint(4, shift=5.0).check_stored([0.9375, 0.833333, 0.625])
    CachedEndpoint(2).check_stored([0.75, 0.5, 0.25])
    with pytest.raises(ValueError, match=r"the stored paths have \[1.0, 0.9375, 0.8333, 0.625\]: set matching.shift"):
        CachedEndpoint(4).check_stored([0.9375, 0.833333, 0.625])
    with pytest.raises(ValueError, match="starts=3 does not divide"):
        CachedEndpoint(3).check_stored([0.75, 0.5, 0.25])


def test_data_without_the_paths_that_are_asked_for_are_refused():
    with pytest.raises(ValueError, match="CachedEndpoint needs to know the noise .* data.set.trajectories=true"):
        CachedEndpoint().student_losses(view(roles(velocity), given()))
    with pytest.raises(ValueError, match="starts=4 does not divide the noise and the 4 states .* points=3"):
        CachedEndpoint(4).student_losses(view(roles(velocity), stored(4)))


def test_stored_paths_train_the_steps_of_a_sampler_with_their_times():
    CachedEndpoint(4, 5.0).check(Grid((1.0, 0.75, 0.5, 0.25), renoise=True, shift=5.0))
    with pytest.raises(ValueError, match="CachedEndpoint trains steps to data from the times .*renoise=true"):
        CachedEndpoint(4).check(Grid((1.0, 0.75, 0.5, 0.25), renoise=True, shift=5.0))
    for options in ({"starts": 0}, {"shift": 0.0}):
        with pytest.raises(ValueError, match="CachedEndpoint: .* must be .*, got 0"):
            CachedEndpoint(**options)
