import pytest
import torch
from analytic import STD, given, roles, velocity
from views import view

from edit.few_step.progressive import Progressive
from edit.objectives import DDPM
from edit.paths import column, corrupt, mean, move
from edit.solvers import Euler, Grid, Heun, times


def slope(x_t, t, condition=None):
    """A velocity of time alone."""
    return column(t * t, x_t).expand_as(x_t)


def chord(steps: int, shift: float, weighted: bool = True):
    """What one step has to do for two steps along `slope`, by hand."""
    grid = torch.tensor(times(2 * steps, shift))

    def field(x_t, t, condition):
        k = (grid[:, None] - t).abs().argmin(0)
        first, second = (grid[k + 1] - grid[k], grid[k + 2] - grid[k + 1]) if weighted else (1, 1)
        return column((first * grid[k] ** 2 + second * grid[k + 1] ** 2) / (first + second), x_t).expand_as(x_t)

    return field


def loss(method: Progressive, student, teacher=velocity, count: int = 64):
    return method.student_losses(view(roles(student, teacher), given(count)))["progressive"]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_target_is_the_mean_of_two_velocities_weighted_by_the_lengths_of_their_steps(shift):
    method = Progressive(4, shift)
    assert loss(method, chord(4, shift), slope).max() < 1e-10  # fp32: differences of 1e-7, divided by steps of 0.1
    assert (loss(method, chord(4, shift, weighted=False), slope).max() < 1e-10) == (shift == 1)
    assert loss(method, slope, slope).min() > 1e-4  # the first of the two alone


def test_a_constant_velocity_is_its_own_target():
    def constant(x_t, t, condition):
        return torch.full_like(x_t, 0.7)

    assert loss(Progressive(8, 2.0), constant, constant).max() < 1e-9


def test_the_weighted_loss_is_the_paper_s_on_a_variance_preserving_path():
    # alpha^2 + sigma^2 = 1 at the same ratio of data to noise; the target in data of the paper's appendix, after two
    # exact steps z -> z'', and a student that predicts no velocity, hence x_t as its data
    method, batch = Progressive(4, weighting="snr"), given(64)
    seen = []

    def student(x_t, t, condition):
        seen.append((x_t, t))
        return torch.zeros_like(x_t)

    found = method.student_losses(view(roles(student, velocity), batch))["progressive"]
    ((x_t, t),) = seen
    middle, end = t - 0.125, t - 0.25
    ahead = move(x_t, velocity(x_t, t), t, middle)
    ahead = move(ahead, velocity(ahead, middle), middle, end)

    def path(at):
        length = ((1 - at) ** 2 + at**2).sqrt()
        return column((1 - at) / length, x_t), column(at / length, x_t), column(length, x_t)

    (alpha, sigma, scale), (alpha_end, sigma_end, scale_end) = path(t), path(end)
    z, z_end, ratio = x_t / scale, ahead / scale_end, sigma_end / sigma
    target = (z_end - ratio * z) / (alpha_end - ratio * alpha)
    expected = ((alpha / sigma) ** 2).clamp_min(1).flatten() * mean((x_t - target).square())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # fp32 differences over steps of 0.25


def test_a_step_of_ddim_is_an_euler_step_in_our_coordinates():
    from diffusers import DDIMScheduler

    objective = DDPM()
    scheduler = DDIMScheduler(trained_betas=objective.betas().tolist(), clip_sample=False)
    scheduler.set_timesteps(10)  # 900, 800, .. 0
    alpha = torch.cumprod(1 - objective.betas(), 0)
    line = ((1 - alpha).sqrt() / (alpha.sqrt() + (1 - alpha).sqrt())).float()
    x, eps = STD * torch.randn(5, 1, 2, 2), torch.randn(5, 1, 2, 2)
    for i in (900, 500, 100):
        t, end = line[i].expand(5), line[i - 100].expand(5)
        x_t = corrupt(x, eps, t)
        z, _ = objective.native(x_t, t)
        noise = (1 - alpha[i]).sqrt() * z / (alpha[i] * STD**2 + 1 - alpha[i])  # E[noise | z]
        v = objective.velocity(noise, x_t, t)
        torch.testing.assert_close(v, velocity(x_t, t), rtol=1e-4, atol=1e-4)  # 1 - t is as small as 0.02
        stepped, _ = objective.native(move(x_t, v, t, end), end)
        expected = scheduler.step(noise, i, z).prev_sample
        torch.testing.assert_close(stepped, expected.float(), rtol=1e-4, atol=1e-4)


def test_a_sample_s_loss_depends_on_its_number_alone():
    method, who = Progressive(4, 3.0), roles(torch.zeros_like, velocity)
    who = roles(lambda x_t, t, condition: 0.3 * x_t, velocity)
    whole = method.student_losses(view(who, given(8)))["progressive"]
    half = method.student_losses(view(who, given(4, first=4)))["progressive"]
    assert torch.equal(whole[4:], half) and len(set(whole.tolist())) == 8


def test_the_gradient_reaches_the_student_and_descends_to_the_chord():
    weight = torch.zeros(4, requires_grad=True)  # of slope's target at the four times where a student's step begins
    method = Progressive(4)

    def student(x_t, t, condition):
        return column(weight[(4 * t).round().long() - 1], x_t).expand_as(x_t)

    for _ in range(60):
        (gradient,) = torch.autograd.grad(loss(method, student, slope, 32).mean(), weight)
        with torch.no_grad():
            weight -= gradient
    t = torch.tensor([0.25, 0.5, 0.75, 1.0])
    expected = (t**2 + (t - 0.125) ** 2) / 2
    # each time has at least 2 of 32 samples: (1 - 2 / 16)^60 < 1e-3 of the way is left
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-2, atol=1e-3)


SAME = (1.0, 0.75, 0.5, 0.25)


@pytest.mark.parametrize("solver", [Euler(4, 3.0), Grid(SAME, shift=3.0)])
def test_a_solver_of_the_same_steps_is_accepted(solver):
    Progressive(4, 3.0).check(solver)


@pytest.mark.parametrize("solver", [Euler(8, 3.0), Euler(4), Grid(SAME), Grid(SAME, True, 3.0), Heun(4, 3.0)])
def test_any_other_solver_is_refused_with_what_to_set(solver):
    with pytest.raises(ValueError, match="trains 4 straight steps with shift 3.* set sampler.solver to .*steps=4"):
        Progressive(4, 3.0).check(solver)


@pytest.mark.parametrize("options", [{"steps": 0}, {"weighting": "min_snr"}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match=f"Progressive: {next(iter(options))} must be .* got"):
        Progressive(**options)
