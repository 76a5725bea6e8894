"""EDM: the paper's equations, term by term, and Heun's sampler on data whose exact denoiser is known (micro-dit.md)."""

from collections.abc import Callable

import pytest
import torch
from gaussian import start
from torch import Tensor

from edit.backbones.dit import DiTConfig
from edit.backbones.micro_dit import MicroDiTConfig
from edit.edm import EDMHeun
from edit.objectives import DDPM, EDM, FlowMatching, LogitNormal
from edit.paths import corrupt
from edit.predictions import default_objective
from edit.sampling import default_sampler
from edit.solvers import DDIMSolver, Euler, Grid, Solver
from edit.stream import Output
from recipes.assembly import refuse_unfit_objective
from recipes.config.errors import UserError

S = 0.9  # sigma_d
SIGMAS = torch.tensor([0.002, 0.1, 0.9, 3.0, 80.0], dtype=torch.float64)


def drawn(count: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Data, noise and a prediction in float64, where equal formulas differ by roundings alone."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, 2, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))  # type: ignore[return-value]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # predictions are taken in fp32


# ---- the objective ---------------------------------------------------------------------------------------------------


def test_input_denoised_and_loss_are_the_papers_formulas():
    x, n, F = drawn()
    sigma = SIGMAS.view(-1, 1, 1, 1)
    t, objective = SIGMAS / (1 + SIGMAS), EDM()
    x_sigma = x + sigma * n
    c_skip, c_in = S**2 / (sigma**2 + S**2), 1 / (sigma**2 + S**2).sqrt()
    c_out = sigma * S / (sigma**2 + S**2).sqrt()
    given = objective.corrupt(x, n, t)
    close(given, c_in * x_sigma)
    D = c_skip * x_sigma + c_out * F
    close(objective.denoised(F, given, t), D)
    weight = (sigma**2 + S**2) / (sigma * S) ** 2
    wanted = (weight * (D - x) ** 2).flatten(1).mean(1)
    (found,) = objective.losses(Output(F, None, {}), x, n, given, t).values()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)  # F is rounded to fp32, and sigma 80 weighs it by 1.2


def test_without_noise_the_denoised_is_the_sample_whatever_the_network_says():
    """Oracle 9."""
    x, n, F = drawn()
    t = torch.full((5,), 1e-7, dtype=torch.float64)
    close(EDM().denoised(F, EDM().corrupt(x, n, t), t), x)
    zero = torch.zeros(5, dtype=torch.float64)
    close(EDM().denoised(F, EDM().corrupt(x, n, zero), zero), x)


@pytest.mark.parametrize("spread", [S, 0.3])
def test_a_network_that_says_nothing_has_a_loss_of_1_at_every_noise_level_if_sigma_data_is_right(spread):
    """Oracle 9: 2^17 numbers per level, so a mean of squares is within 2 % at five deviations."""
    g = torch.Generator().manual_seed(1)
    x, n = (torch.randn(5, 2**17, generator=g).view(5, 2, 256, 256) for _ in range(2))
    t = (SIGMAS / (1 + SIGMAS)).float()
    objective = EDM()
    (found,) = objective.losses(Output(torch.zeros_like(x), None, {}), spread * x, n, x, t).values()
    assert torch.allclose(found, torch.ones(5), atol=0.02) == (spread == S)


def test_log_sigma_is_normal_with_the_papers_mean_and_deviation():
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    log_sigma = EDM().times(u).logit()
    torch.testing.assert_close(log_sigma, -0.6 + 1.2 * torch.special.ndtri(u))
    at_512 = EDM(time=LogitNormal(0.0, 0.6)).times(u).logit()
    torch.testing.assert_close(at_512, 0.6 * torch.special.ndtri(u))


def test_a_point_of_the_linear_path_is_what_training_gives_the_model_and_its_velocity_leads_to_the_denoised():
    x, n, F = drawn()
    t, objective = torch.tensor([0.01, 0.3, 0.5, 0.9, 0.999], dtype=torch.float64), EDM()
    x_t = corrupt(x, n, t)
    native, at = objective.native(x_t, t)
    close(native, objective.corrupt(x, n, t))
    assert torch.equal(at, t)
    v, column = objective.velocity(F, x_t, t), t.view(-1, 1, 1, 1)
    close(x_t - column * v, objective.denoised(F, native, t))
    sigma = column / (1 - column)
    perfect = (x - S**2 / (sigma**2 + S**2) * (x + sigma * n)) / (sigma * S / (sigma**2 + S**2).sqrt())
    close(objective.velocity(perfect, x_t, t), n - x)


def test_velocities_are_finite_at_both_ends():
    x, n, F = drawn()
    for end, wanted in ((0.0, -S * S * x / S**2 - F), (1.0, n - S * F)):
        t = torch.full((5,), end, dtype=torch.float64)
        close(EDM().velocity(F, corrupt(x, n, t), t), wanted)


def test_the_objective_of_a_model_that_predicts_a_mixture_is_edm_and_its_backbone_is_told_c_noise():
    dit = DiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=4, time="edm").build()
    assert isinstance(default_objective(dit), EDM) and isinstance(default_sampler(dit).solver, EDMHeun)
    sigma = SIGMAS.float()
    for model in (dit, MicroDiTConfig(input_size=8, width=32, depth=1, head=16, multiple=32).build()):
        told = model.times(sigma / (1 + sigma))
        torch.testing.assert_close(told, sigma.log() / 4, rtol=1e-4, atol=1e-5)  # 1 - t is rounded at sigma 80
        assert model.times(torch.tensor([0.0, 1.0])).isfinite().all()


# ---- the sampler -----------------------------------------------------------------------------------------------------


def asked(solver: Solver, x: Tensor, D: Callable[[Tensor, float], Tensor]) -> tuple[Tensor, list[float]]:
    """Integrated with F of a denoiser D(x_sigma, sigma), which is asked as a network is, and the times of all calls."""
    times = []

    def predict(given: Tensor, t: float, end: float | None = None) -> Tensor:
        times.append(t)
        sigma = t / (1 - t)
        scale = (sigma**2 + S**2) ** 0.5
        x_sigma = given * scale
        return (D(x_sigma, sigma) - S**2 / scale**2 * x_sigma) / (sigma * S / scale)

    return solver.integrate(predict, x, EDM(), lambda k: x), times


def gaussian(spread: float) -> Callable[[Tensor, float], Tensor]:
    """The exact denoiser of data N(0, spread^2)."""
    return lambda x, sigma: spread**2 / (spread**2 + sigma**2) * x


@pytest.mark.parametrize("spread", [0.2, 0.9])
def test_exact_denoisers_of_gaussian_data_give_back_its_standard_deviation(spread):
    """The exact map is a factor: dx / dsigma = sigma x / (sigma^2 + s^2), from 80 times the noise."""
    noise = start(8).double()
    exact = 80 * spread / (80**2 + spread**2) ** 0.5
    for steps, share in ((30, 0.03), (300, 3e-4)):  # of second order
        found, _ = asked(EDMHeun(steps), noise, gaussian(spread))
        torch.testing.assert_close(found, exact * noise, rtol=share, atol=0)
        assert abs(found.std() / noise.std() - spread) < share * spread


def test_halving_the_steps_quadruples_the_error():
    noise = start(2).double()
    exact = 80 * 0.5 / (80**2 + 0.5**2) ** 0.5 * noise

    def error(steps: int) -> float:  # the last step, Euler's, from 0.002 has an error of its own: 1e-5
        return (asked(EDMHeun(steps), noise, gaussian(0.5))[0] - exact).abs().max().item()

    assert 3.3 < error(20) / error(40) < 5


def test_the_path_is_algorithm_1_of_the_paper():
    """As the paper writes it, with a denoiser that is no linear map."""
    noise = start(2).double()

    def D(x: Tensor, sigma: float) -> Tensor:
        return torch.tanh(x) / (1 + sigma)

    steps, rho = 6, 7
    sigmas = [(80 ** (1 / rho) + i / (steps - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho for i in range(steps)]
    sigmas += [0.0]
    x, called = 80 * noise, []
    for i in range(steps):
        d = (x - D(x, sigmas[i])) / sigmas[i]
        called.append(sigmas[i])
        ahead = x + (sigmas[i + 1] - sigmas[i]) * d
        if sigmas[i + 1] != 0:
            d_ahead = (ahead - D(ahead, sigmas[i + 1])) / sigmas[i + 1]
            called.append(sigmas[i + 1])
            ahead = x + (sigmas[i + 1] - sigmas[i]) * (d / 2 + d_ahead / 2)
        x = ahead
    solver = EDMHeun(steps)
    found, times = asked(solver, noise, D)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)  # F passes fp32, and 80 magnifies its roundings
    assert times == pytest.approx([s / (1 + s) for s in called], rel=1e-12)
    assert solver.times_of(EDM(), (2, 4, 4)) == pytest.approx([*times, 0.0], rel=1e-12)
    assert solver.evaluations == len(times) == 2 * steps - 1 and EDMHeun().evaluations == 59
    assert times[0] == 80 / 81 and EDMHeun(1).sigmas == (pytest.approx(80.0), 0.0)


def test_few_steps_at_given_times_take_the_same_way_as_with_velocities():
    noise, times = start(2).double(), (1.0, 0.7, 0.3)
    found, x = few(Grid(times), noise), noise
    for t, t_next in zip(times, (*times[1:], 0.0), strict=True):
        v = (t - (1 - t) * 0.25) / ((1 - t) ** 2 * 0.25 + t**2) * x  # of data N(0, 0.25)
        x = x + (t_next - t) * v
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-6)


def few(solver: Grid, x: Tensor) -> Tensor:
    def predict(given: Tensor, t: float, end: float | None = None) -> Tensor:
        """F of the exact denoiser of N(0, 0.25), in u and w: the mean of w x / s - u n given u x / s + w n."""
        data = S * (1 - t)
        u, w = data / (t**2 + data**2) ** 0.5, t / (t**2 + data**2) ** 0.5
        return u * w * (0.25 / S**2 - 1) / (u**2 * 0.25 / S**2 + w**2) * given

    return solver.integrate(predict, x, EDM(), lambda k: x)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_solvers_and_objectives_of_another_prediction_are_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"EDMHeun integrates a mixture, but .* predicts a velocity: use Euler"):
        EDMHeun().check(FlowMatching())
    with pytest.raises(ValueError, match=r"EDMHeun integrates a mixture, but .* a noise: use DDPMSolver"):
        EDMHeun().check(DDPM())
    for solver in (Euler(), DDIMSolver()):
        with pytest.raises(ValueError, match=r"predicts a mixture: use edit.edm.EDMHeun \(sampler=edm_heun\)"):
            solver.check(EDM())
    EDMHeun().check(EDM())
    Grid().check(EDM())
    with torch.device("meta"):
        model = MicroDiTConfig(depth=1).build()
    with pytest.raises(UserError, match=r"backbone predicts a mixture, .* trains a velocity: choose objective=edm"):
        refuse_unfit_objective(model, FlowMatching())
    refuse_unfit_objective(model, EDM())


def test_noise_that_does_not_fall_is_refused():
    with pytest.raises(ValueError, match="choose sigma_min below sigma_max"):
        EDMHeun(sigma_min=80.0)
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        EDM(sigma_data=0.0)
