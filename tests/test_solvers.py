"""Solvers: order, published formulas, exact on Gaussian data, refusals."""

import math

import pytest
import torch
from gaussian import ALPHA, Gaussian, generate, labels, start
from torch import Tensor

from edit import noise
from edit.denoiser import Denoiser
from edit.objectives import FlowMatching, RescaledFlow
from edit.sampling import Sampler
from edit.solvers import DDIMSolver, DDPMSolver, DPMSolver, Euler, EulerMaruyama, Grid, Heun, StockEuler, times
from edit.stream import Output, Stream


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "predicts, solver",
    [
        ("velocity", Euler(200)),
        ("velocity", Euler(200, shift=2.0)),
        ("velocity", Heun(50)),
        ("velocity", EulerMaruyama(400, last=0.02)),  # the default's last 0.04 alone costs narrow data 2 % of variance
        ("velocity", DPMSolver(50)),
        ("noise", DPMSolver(50)),
        ("noise", DPMSolver(100, order=3)),
        ("noise", DDPMSolver(1000)),
        ("noise", DDIMSolver(250)),
    ],
    ids=repr,
)
def test_samples_of_gaussian_data_have_its_mean_and_variance(predicts, solver, std):
    x = generate(Gaussian(std, predicts, grid=16), solver, n=32).double()  # 32768 numbers
    assert x.mean().item() == pytest.approx(1.0, abs=0.03 * max(std, 1))
    # the oracle's 3 % for the variance: 0.8 % standard error, the rest is the solver's
    assert x.var().item() == pytest.approx(std**2, rel=0.03)


class Loud(Gaussian):
    """The exact predictor of s noise - x at x_t = (1 - t) x + t s noise."""

    SCALE = 4.0

    def readout(self, stream: Stream) -> Output:
        x = stream.image.transpose(1, 2).unflatten(2, (self.grid, self.grid)).double()
        t, mean = (v.double().view(-1, 1, 1, 1) for v in (stream.time, stream.cond))
        data, loud = (1 - t) * self.std**2, t * self.SCALE**2
        gain = (loud - data) / ((1 - t) * data + t * loud)
        return Output((gain * (x - (1 - t) * mean) - mean).float(), None, stream.trace)


@pytest.mark.parametrize(
    "solver",
    [Euler(200), Heun(50), EulerMaruyama(800, last=0.005), DPMSolver(50), StockEuler(200), Grid(times(200, 1.0)[:-1])],
    ids=lambda s: type(s).__name__,
)
def test_every_flow_solver_begins_a_rescaled_flow_at_its_louder_noise(solver):
    """A grid asks on the linear path, from noise of unit variance on."""
    objective = RescaledFlow(scale=Loud.SCALE)
    x = Sampler(solver)(Loud(0.5, grid=16), objective, labels(32), torch.arange(32)).double()
    assert x.mean().item() == pytest.approx(1.0, abs=0.03) and x.var().item() == pytest.approx(0.25, rel=0.04)


def flow_error(solver, std: float = 0.5) -> float:
    """Distance from the exact solution of the probability-flow ODE, which carries noise z to mean + std z."""
    return (generate(Gaussian(std), solver) - (1 + std * start())).abs().max().item()


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_euler_is_of_first_order_and_heun_of_second(shift):
    assert 1.8 < flow_error(Euler(40, shift)) / flow_error(Euler(80, shift)) < 2.2
    # Heun's last step is Euler's, on a path that is straight there: it costs order two nothing
    assert 3.4 < flow_error(Heun(20, shift)) / flow_error(Heun(40, shift)) < 4.6


def test_heun_is_more_exact_than_euler_at_equal_cost():
    assert Heun(20).evaluations == Euler(39).evaluations
    assert flow_error(Heun(20)) < flow_error(Euler(39)) / 3


def test_the_error_of_dpm_solver_falls_with_its_steps_and_order():
    first, second = ([flow_error(DPMSolver(n, order)) for n in (5, 20, 80)] for order in (1, 2))
    assert all(3.3 < a / b < 4.7 for a, b in zip(first, first[1:], strict=False)), first  # four times the steps
    # diffusers starts at 0.999 where noise is not yet all of the sample: errors of order 1e-3 remain for ever
    assert second[0] > 4 * second[1] > 8 * second[2], second
    assert all(b < a / 1.5 for a, b in zip(first, second, strict=True)), (first, second)


def test_dpm_solver_agrees_with_many_ddim_steps_on_noise_predictions():
    exact = generate(Gaussian(0.5, "noise"), DDIMSolver(1000))
    coarse, fine = (generate(Gaussian(0.5, "noise"), DPMSolver(n)) for n in (10, 40))
    assert (fine - exact).abs().max() < (coarse - exact).abs().max()
    torch.testing.assert_close(fine, exact, rtol=0, atol=0.02)  # the two start at slightly different noise levels


def test_times_run_from_noise_to_data():
    assert times(4, 1.0) == [1, 0.75, 0.5, 0.25, 0]
    shifted = times(4, 3.0)
    assert shifted == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    denoiser = Gaussian()
    generate(denoiser, Euler(4, 3.0))
    assert [sigma for _, _, sigma in denoiser.seen] == shifted[:-1]


def test_euler_is_x_plus_v_dt():
    denoiser, x = Gaussian(), start().double()
    for t, t_next in ((1, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0)):
        gain = (t - (1 - t) * 0.25) / ((1 - t) ** 2 * 0.25 + t**2)
        x = x + (t_next - t) * (gain * (x - (1 - t)) - 1)
    torch.testing.assert_close(generate(denoiser, Euler(3)).double(), x, rtol=1e-5, atol=1e-5)


def test_euler_maruyama_is_the_published_scheme():
    # REPA's sampler: d = v - t s, x += d dt + sqrt(2 t |dt|) n on linspace(1, 0.04), one noiseless step to 0
    ts, x = [*torch.linspace(1, 0.04, 5).tolist(), 0.0], start().double()
    for k, (t, t_next) in enumerate(zip(ts, ts[1:], strict=False)):
        variance = (1 - t) ** 2 * 0.25 + t**2
        v = (t - (1 - t) * 0.25) / variance * (x - (1 - t)) - 1
        score = -(x - (1 - t)) / variance
        x = x + (v - t * score) * (t_next - t)
        if t_next:
            x = x + math.sqrt(2 * t * (t - t_next)) * noise.gaussian(0, torch.arange(8), noise.SOLVER + k, (4, 4, 4))
    torch.testing.assert_close(generate(Gaussian(), EulerMaruyama(5)).double(), x, rtol=1e-4, atol=1e-4)


def test_ddim_is_its_formula():
    denoiser, x = Gaussian(0.5, "noise"), start().double()
    indices = [800, 600, 400, 200, 0]
    for i, before in zip(indices, [*indices[1:], None], strict=True):
        a, b = ALPHA[i], torch.tensor(1.0) if before is None else ALPHA[before]
        eps = (1 - a).sqrt() * (x - a.sqrt()) / (a * 0.25 + 1 - a)
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    torch.testing.assert_close(generate(denoiser, DDIMSolver(5)).double(), x, rtol=1e-4, atol=1e-4)
    assert [round(sigma * 1000) - 1 for _, _, sigma in denoiser.seen] == indices


@pytest.mark.parametrize("learned", [None, -1.0, 0.0, 1.0, 0.4])
def test_respaced_ddpm_recomputes_its_betas_and_interpolates_the_learned_variance(learned):
    denoiser, x, steps = Gaussian(0.5, "noise", variance=learned), start().double(), 7
    indices = [round(i * 999 / (steps - 1)) for i in range(steps)]
    kept = ALPHA[indices]
    before = torch.cat((torch.ones(1), kept[:-1]))
    betas = 1 - kept / before
    torch.testing.assert_close(torch.cumprod(1 - betas, 0), kept)  # the respaced chain has the same noise levels
    for k in reversed(range(steps)):
        a, b, beta = kept[k], before[k], betas[k]
        eps = (1 - a).sqrt() * (x - a.sqrt()) / (a * 0.25 + 1 - a)
        data = (x - (1 - a).sqrt() * eps) / a.sqrt()
        x = b.sqrt() * beta / (1 - a) * data + (1 - beta).sqrt() * (1 - b) / (1 - a) * x
        if k:
            posterior = beta * (1 - b) / (1 - a)
            u = 0.0 if learned is None else (learned + 1) / 2
            fresh = noise.gaussian(0, torch.arange(8), noise.SOLVER + k, (4, 4, 4))
            x = x + (beta**u * posterior ** (1 - u)).sqrt() * fresh
    torch.testing.assert_close(generate(denoiser, DDPMSolver(steps)).double(), x, rtol=1e-4, atol=1e-4)
    assert [round(sigma * 1000) - 1 for _, _, sigma in denoiser.seen] == indices[::-1]


def test_the_250_steps_of_the_paper_are_its_indices():
    denoiser = Gaussian(0.5, "noise", grid=1)
    generate(denoiser, DDPMSolver(250), n=1)
    seen = [round(sigma * 1000) - 1 for _, _, sigma in denoiser.seen][::-1]
    assert seen == [round(i * 999 / 249) for i in range(250)]


@pytest.mark.parametrize("solver", [Euler(3), Heun(3), EulerMaruyama(3), DPMSolver(3)], ids=repr)
def test_evaluations_are_what_a_generation_runs(solver):
    denoiser, told = Gaussian(), []
    sampler = Sampler(solver)
    sampler(denoiser, FlowMatching(), labels(2), torch.arange(2), progress=lambda *at: told.append(at))
    assert [index for _, index, _ in denoiser.seen] == list(range(solver.evaluations))
    assert told == [(k + 1, solver.evaluations) for k in range(solver.evaluations)]


def test_a_grid_of_even_times_is_euler():
    even, shifted = Grid((1.0, 0.75, 0.5, 0.25)), Grid((1.0, 0.75, 0.5, 0.25), shift=3.0)
    assert even.steps == even.evaluations == 4 and even.grid == (1, 0.75, 0.5, 0.25, 0)
    assert shifted.grid == pytest.approx((1, 0.9, 0.75, 0.5, 0))
    for grid, euler in ((even, Euler(4)), (shifted, Euler(4, 3.0))):
        torch.testing.assert_close(generate(Gaussian(), grid), generate(Gaussian(), euler), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "tokens, published", [(4096, [1000, 904.5, 759.5, 512.8]), (1024, [1000, 849.2, 652.5, 384.9])]
)
def test_a_grid_shifted_for_flux_has_the_published_times(tokens, published):
    """Oracle 19."""
    shift = math.exp(0.5 + 0.65 * (tokens - 256) / 3840)
    assert [1000 * t for t in Grid(shift=shift).grid[:-1]] == pytest.approx(published, abs=0.05)


def test_a_grid_may_start_below_pure_noise_and_asks_at_its_own_times():
    denoiser = Gaussian()
    generate(denoiser, Grid((0.8, 0.3)))
    assert [sigma for _, _, sigma in denoiser.seen] == pytest.approx([0.8, 0.3])


def test_renoising_goes_to_data_and_back_with_fresh_noise():
    ts, x = (1.0, 0.6, 0.2), start().double()
    for k, t in enumerate(ts):
        gain = (t - (1 - t) * 0.25) / ((1 - t) ** 2 * 0.25 + t**2)
        data = x - t * (gain * (x - (1 - t)) - 1)
        after = [*ts[1:], 0][k]
        x = (1 - after) * data
        if after:
            x = x + after * noise.gaussian(0, torch.arange(8), noise.SOLVER + k, (4, 4, 4))
    got = generate(Gaussian(), Grid(ts, renoise=True))
    torch.testing.assert_close(got.double(), x, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, generate(Gaussian(), Grid(ts)), atol=0.1)


def test_noise_predictions_are_stepped_as_velocities():
    """The same Gaussian seen by both kinds of model: they differ by how finely DDPM's 1000 times lie."""
    times_ = tuple(0.95 - 0.09 * k for k in range(10))
    flow, ddpm = (generate(Gaussian(0.5, predicts), Grid(times_)) for predicts in ("velocity", "noise"))
    torch.testing.assert_close(ddpm, flow, rtol=0, atol=0.01)


def told(denoiser: Denoiser, n: int = 2, **settings) -> Tensor:
    condition = denoiser.example(n, text=4)
    return Sampler(Euler(2), **settings)(denoiser, FlowMatching(), condition, torch.arange(n))


@pytest.mark.parametrize("solver", [Euler(2), Heun(2), EulerMaruyama(2)], ids=repr)
def test_a_flow_solver_refuses_a_noise_prediction_and_names_the_cure(solver):
    with pytest.raises(
        ValueError, match=f"{type(solver).__name__} integrates a velocity.*use DDPMSolver or DDIMSolver"
    ):
        generate(Gaussian(predicts="noise"), solver)


@pytest.mark.parametrize("solver", [DDPMSolver(2), DDIMSolver(2)], ids=repr)
def test_a_ddpm_solver_refuses_a_velocity_and_names_the_cure(solver):
    with pytest.raises(ValueError, match=f"{type(solver).__name__} integrates a noise.*use Euler, Heun or EulerM"):
        generate(Gaussian(), solver)


@pytest.mark.parametrize("solver", [DDPMSolver, DDIMSolver, DPMSolver])
def test_more_steps_than_the_objective_has_are_refused(solver):
    with pytest.raises(ValueError, match=f"{solver.__name__}: steps must be at most 1000, got 1001"):
        generate(Gaussian(predicts="noise", grid=1), solver(1001), n=1)
