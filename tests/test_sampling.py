import math
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn
from weights import randomise

import edit
from edit import noise
from edit.backbones.flux import FluxConfig
from edit.denoiser import Denoiser, Edit
from edit.objectives import DDPM, FlowMatching
from edit.sampling import Sampler
from edit.solvers import DDIMSolver, DDPMSolver, DPMSolver, Euler, EulerMaruyama, Grid, Heun, times
from edit.stream import Condition, Layout, Output, Step, Stream

ALPHA = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


class Gaussian(Denoiser):
    """The exact predictor of data N(mean[label], std^2), in closed form: what a perfectly trained DiT would be."""

    name = "gaussian"

    def __init__(self, std: float = 0.5, predicts: str = "velocity", grid: int = 4, variance: float | None = None):
        self.std, self.predicts, self.grid, self.fixed_variance = std, predicts, grid, variance
        super().__init__(nn.Linear(1, 1), [])
        self.seen: list[tuple[str, int, float]] = []

    @property
    def config(self):
        return {"std": self.std, "predicts": self.predicts, "grid": self.grid, "variance": self.fixed_variance}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    @property
    def sample_shape(self):
        return 4, self.grid, self.grid

    def pack(self, x, t, condition):
        return {"x": x, "t": t, "mean": condition.label.to(x.dtype) / 10}  # label 10: data around 1

    def embed(self, x, t, mean):
        tokens = x.flatten(2).transpose(1, 2)
        return Stream(image=tokens, cond=mean[:, None], time=t[:, None], layout=Layout((1, self.grid, self.grid)))

    def readout(self, stream):
        x = stream.image.transpose(1, 2).unflatten(2, (self.grid, self.grid)).double()
        t, mean = (v.double().view(-1, 1, 1, 1) for v in (stream.time, stream.cond))
        assert stream.step is not None
        self.seen.append((stream.step.branch, stream.step.index, stream.step.sigma))
        if self.predicts == "velocity":
            gain = (t - (1 - t) * self.std**2) / ((1 - t) ** 2 * self.std**2 + t**2)
            out = gain * (x - (1 - t) * mean) - mean
        else:
            alpha = ALPHA[(t * 1000 - 1).round().long()]
            out = (1 - alpha).sqrt() * (x - alpha.sqrt() * mean) / (alpha * self.std**2 + 1 - alpha)
        variance = None if self.fixed_variance is None else torch.full_like(out, self.fixed_variance).float()
        return Output(out.float(), variance, stream.trace)

    def keep(self, indices):
        raise NotImplementedError

    def null(self, condition):
        return Condition(label=torch.zeros_like(condition.label))

    @classmethod
    def to_stock(cls, config, state):
        return dict(config), dict(state)

    @classmethod
    def from_stock(cls, config, state):
        return dict(config), dict(state)


def labels(n: int, label: int = 10) -> Condition:
    return Condition(label=torch.full((n,), label))


def generate(denoiser: Denoiser, solver, n: int = 8, seed: int = 0, **settings) -> Tensor:
    objective = DDPM() if getattr(denoiser, "predicts", "velocity") == "noise" else FlowMatching()
    return Sampler(solver, **settings)(denoiser, objective, labels(n), torch.arange(n), seed=seed)


def start(n: int = 8, seed: int = 0, grid: int = 4) -> Tensor:
    return noise.gaussian(seed, torch.arange(n), noise.NOISE, (4, grid, grid))


# ---- known data: the exact predictor must come out at the exact distribution -----------------------------------------


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


# ---- each solver against its own equations ---------------------------------------------------------------------------


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


# ---- one image per (seed, sample) ------------------------------------------------------------------------------------

ALL = [Euler(4), Heun(3), EulerMaruyama(4), DPMSolver(4), DDPMSolver(4), DDIMSolver(4)]


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_an_image_does_not_depend_on_its_batch(solver):
    denoiser = Gaussian(predicts="noise" if isinstance(solver, (DDPMSolver, DDIMSolver)) else "velocity")
    objective = DDPM() if denoiser.predicts == "noise" else FlowMatching()
    condition = Condition(label=torch.arange(8))

    def images(size: int) -> Tensor:
        return torch.cat(
            [
                Sampler(solver, guidance=2.0)(denoiser, objective, condition.map(lambda v, s=s: v[s]), s, seed=5)
                for s in torch.arange(8).split(size)
            ]
        )

    whole = images(8)
    assert torch.equal(images(3), whole) and torch.equal(images(1), whole)  # an elementwise model: to the bit
    assert len(whole.flatten(1).unique(dim=0)) == 8
    again = Sampler(solver, guidance=2.0)(denoiser, objective, condition, torch.arange(8), seed=6)
    assert not torch.isclose(again, whole).all()


@pytest.mark.parametrize("solver", [Heun(3), EulerMaruyama(4)], ids=repr)
def test_an_image_of_a_dit_does_not_depend_on_its_batch(dit, solver):
    sampler, condition = Sampler(solver, guidance=1.5), Condition(label=torch.arange(8))
    whole = sampler(dit, FlowMatching(), condition, torch.arange(8))
    for size in (3, 1):
        parts = [
            sampler(dit, FlowMatching(), condition.map(lambda v, s=s: v[s]), s) for s in torch.arange(8).split(size)
        ]
        # matrix products of other sizes sum in another order: 1e-6 per evaluation, amplified by the random network
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


def test_an_image_does_not_depend_on_the_number_of_ranks():
    def share() -> np.ndarray:
        import os

        mine = torch.arange(6)[int(os.environ["RANK"]) :: int(os.environ["WORLD_SIZE"])]
        sampler = Sampler(EulerMaruyama(4), guidance=2.0)
        return sampler(Gaussian(), FlowMatching(), labels(len(mine)), mine, seed=3).numpy()

    whole = Sampler(EulerMaruyama(4), guidance=2.0)(Gaussian(), FlowMatching(), labels(6), torch.arange(6), seed=3)
    first, second = run_ranks(share)
    assert np.array_equal(first, whole[0::2].numpy()) and np.array_equal(second, whole[1::2].numpy())


def test_a_rank_that_fails_shows_its_traceback():
    def fail():
        raise RuntimeError("the disk is full")

    with pytest.raises(AssertionError, match="rank [01]:(.|\n)*the disk is full"):
        run_ranks(fail)


def test_nothing_is_drawn_from_the_global_generator():
    denoisers = {predicts: Gaussian(predicts=predicts) for predicts in ("velocity", "noise")}
    before = torch.get_rng_state()
    for solver in ALL:
        generate(denoisers["noise" if isinstance(solver, (DDPMSolver, DDIMSolver)) else "velocity"], solver)
    assert torch.equal(before, torch.get_rng_state())


# ---- guidance --------------------------------------------------------------------------------------------------------


def branches(denoiser: Gaussian) -> list[str]:
    return [branch for branch, _, _ in denoiser.seen]


def test_guidance_one_is_the_conditional_pass_and_runs_no_other():
    denoiser = Gaussian()
    x = generate(denoiser, Euler(5), guidance=1.0)
    assert branches(denoiser) == ["cond"] * 5
    torch.testing.assert_close(generate(Gaussian(), Euler(5), guidance=1 + 1e-6), x, rtol=1e-4, atol=1e-4)


def test_guidance_zero_is_the_unconditional_pass():
    unconditional = Sampler(Euler(5))(Gaussian(), FlowMatching(), labels(8, 0), torch.arange(8))
    torch.testing.assert_close(generate(Gaussian(), Euler(5), guidance=0.0), unconditional)


@torch.no_grad()
def test_guidance_extrapolates_from_the_unconditional_prediction(dit):
    x, condition, t = noise.gaussian(0, torch.arange(2), noise.NOISE, (4, 8, 8)), labels(2, 3), torch.ones(2)
    cond, uncond = (dit(x, t, c).sample for c in (condition, labels(2, 10)))
    guided = Sampler(Euler(1), guidance=3.0)(dit, FlowMatching(), condition, torch.arange(2))
    torch.testing.assert_close(guided, x - (uncond + 3 * (cond - uncond)), rtol=1e-5, atol=1e-5)
    other = dit(x, t, labels(2, 7)).sample  # a negative prompt
    guided = Sampler(Euler(1), guidance=3.0)(dit, FlowMatching(), condition, torch.arange(2), negative=labels(2, 7))
    torch.testing.assert_close(guided, x - (other + 3 * (cond - other)), rtol=1e-5, atol=1e-5)


def test_three_channel_guidance_leaves_the_fourth_channel_conditional():
    plain, guided = generate(Gaussian(), Euler(5)), generate(Gaussian(), Euler(5), guidance=4.0, channels=3)
    assert torch.equal(guided[:, 3], plain[:, 3])
    assert torch.equal(guided[:, :3], generate(Gaussian(), Euler(5), guidance=4.0)[:, :3])
    assert not torch.isclose(guided[:, :3], plain[:, :3]).any()


def test_guided_ddpm_keeps_the_conditional_variance():
    for v in (-1.0, 1.0):
        guided = generate(Gaussian(0.5, "noise", variance=v), DDPMSolver(5), guidance=3.0, channels=3)
        plain = generate(Gaussian(0.5, "noise", variance=v), DDPMSolver(5))
        assert torch.equal(guided[:, 3], plain[:, 3])


@dataclass
class Nothing(Edit):
    """Changes nothing; but where there is an edit, branches are evaluated apart."""

    def apply(self, denoiser: Denoiser) -> None:
        pass


def apart() -> "Gaussian":
    denoiser = Gaussian()
    edit.apply(denoiser, {"nothing": Nothing()})
    return denoiser


def test_without_edits_both_branches_share_a_batch_and_nothing_changes(make_dit):
    one = make_dit()
    two = deepcopy(one)
    edit.apply(two, {"nothing": Nothing()})
    options = {"guidance": 2.0, "interval": (0.2, 0.9), "channels": 3}
    together, separate = generate(one, Euler(5), **options), generate(two, Euler(5), **options)
    # the same products in a larger batch: other kernels may round the last bits of fp32 differently
    torch.testing.assert_close(together, separate, rtol=0, atol=1e-4 * separate.abs().max().item())
    counted = Gaussian()
    generate(counted, Euler(5), guidance=2.0)
    assert len(counted.seen) == 5


def test_outside_its_interval_guidance_is_not_evaluated():
    denoiser = apart()
    generate(denoiser, Euler(10), guidance=2.0, interval=(0.25, 0.75))
    asked = {branch: [round(s, 2) for b, _, s in denoiser.seen if b == branch] for branch in ("cond", "uncond")}
    assert asked["cond"] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert asked["uncond"] == [0.7, 0.6, 0.5, 0.4, 0.3]
    untouched = apart()
    x = generate(untouched, Euler(10), guidance=2.0, interval=(0.0, 0.05))
    assert "uncond" not in branches(untouched)
    assert torch.equal(x, generate(Gaussian(), Euler(10)))


def test_both_branches_of_a_step_share_its_index():
    denoiser = apart()
    generate(denoiser, Heun(2), guidance=2.0)
    assert [(b, i) for b, i, _ in denoiser.seen] == [(b, i) for i in range(3) for b in ("cond", "uncond")]


# ---- perturbed guidance and memory -----------------------------------------------------------------------------------


@dataclass
class IdentityAttention(Edit):
    """Perturbed-attention guidance: the perturbed branch attends to nothing but itself."""

    perturbs = True

    def apply(self, denoiser: Denoiser) -> None:
        def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, step: Step | None) -> Tensor:
            if step is not None and step.branch == "perturbed":
                return v
            return F.scaled_dot_product_attention(q, k, v)

        denoiser.units[1].attention = attention


@torch.no_grad()
def test_perturbation_moves_away_from_the_perturbed_prediction(dit):
    edit.apply(dit, {"pag": IdentityAttention()})
    x, condition, t = noise.gaussian(0, torch.arange(2), noise.NOISE, (4, 8, 8)), labels(2, 3), torch.ones(2)
    cond, uncond = (dit(x, t, c).sample for c in (condition, labels(2, 10)))
    perturbed = dit(x, t, condition, step=Step(0, 1, 1.0, "perturbed")).sample
    assert not torch.allclose(perturbed, cond, atol=1e-3)
    for guidance, base in ((1.0, cond), (2.0, uncond + 2 * (cond - uncond))):
        sampler = Sampler(Euler(1), guidance=guidance, perturbation=1.5)
        moved = sampler(dit, FlowMatching(), condition, torch.arange(2))
        torch.testing.assert_close(moved, x - (base + 1.5 * (cond - perturbed)), rtol=1e-5, atol=1e-5)


def test_perturbation_without_an_edit_that_perturbs_is_refused():
    with pytest.raises(ValueError, match="perturbation guidance needs an edit that perturbs the model"):
        generate(Gaussian(), Euler(2), perturbation=1.0)


@dataclass
class Diary(Edit):
    """Writes down what its unit remembers when it is called."""

    def apply(self, denoiser: Denoiser) -> None:
        unit, self.pages = denoiser.units[0], []

        def remembering(stream: Stream) -> Stream:
            memory = stream.step.recall("diary", 0)
            self.pages.append((stream.step.branch, stream.step.index, dict(memory)))
            memory["written"] = (stream.step.branch, stream.step.index)
            return unit(stream)

        denoiser.units[0] = remembering


def test_memory_lives_for_one_generation_and_one_branch(dit):
    diary = Diary()
    edit.apply(dit, {"diary": diary})
    for _ in range(2):
        diary.pages.clear()
        Sampler(Euler(3), guidance=2.0)(dit, FlowMatching(), labels(1, 3), torch.arange(1))
        for branch in ("cond", "uncond"):
            remembered = [page for b, _, page in diary.pages if b == branch]
            assert remembered == [{}, {"written": (branch, 0)}, {"written": (branch, 1)}]


# ---- a few steps at given times --------------------------------------------------------------------------------------


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


def test_a_renoised_sample_does_not_depend_on_its_batch():
    sampler, denoiser = Sampler(Grid((1.0, 0.5, 0.25), renoise=True)), Gaussian()
    whole = sampler(denoiser, FlowMatching(), labels(6), torch.arange(6))
    part = sampler(denoiser, FlowMatching(), labels(2), torch.tensor([4, 1]))
    assert torch.equal(part, whole[[4, 1]])
    assert not torch.equal(whole[0], whole[1])


def test_noise_predictions_are_stepped_as_velocities():
    """The same Gaussian seen by both kinds of model: they differ by how finely DDPM's 1000 times lie."""
    times_ = tuple(0.95 - 0.09 * k for k in range(10))
    flow, ddpm = (generate(Gaussian(0.5, predicts), Grid(times_)) for predicts in ("velocity", "noise"))
    torch.testing.assert_close(ddpm, flow, rtol=0, atol=0.01)


@dataclass
class Ends(Edit):
    """Writes down which end its model is told."""

    leads = True

    def apply(self, denoiser: Denoiser) -> None:
        self.told = []

    def embed(self, stream: Stream, t: Tensor, condition: Condition, own: nn.Module | None) -> Stream:
        self.told.append((round(t[0].item(), 3), None if condition.end is None else condition.end.tolist()))
        return stream


@dataclass
class Deaf(Ends):
    """Likewise, of a model that is no flow map."""

    leads = False


def test_only_a_flow_map_is_told_where_a_step_ends():
    def heard(solver, ends: Ends, **settings) -> list:
        denoiser = Gaussian()
        edit.apply(denoiser, {"ends": ends})
        generate(denoiser, solver, n=2, **settings)
        return ends.told

    assert heard(Grid((1.0, 0.5)), Ends()) == [(1, [0.5, 0.5]), (0.5, [0, 0])]
    assert heard(Grid((1.0, 0.5), renoise=True), Ends()) == [(1, [0, 0]), (0.5, [0, 0])]  # each goes to data
    assert heard(Euler(2), Ends()) == [(1, [0.5, 0.5]), (0.5, [0, 0])]
    assert heard(Heun(2), Ends())[:2] == [(1, [1, 1]), (0.5, [0.5, 0.5])]  # instantaneous velocities
    assert heard(Euler(1), Ends(), guidance=2.0) == 2 * [(1, [0, 0])]  # both branches
    assert heard(Grid((1.0, 0.5)), Deaf()) == [(1, None), (0.5, None)]


# ---- models with a guidance input ------------------------------------------------------------------------------------


def flux(**options) -> Denoiser:
    denoiser = FluxConfig(16, 1, 1, 32, 2, 32, 32, axes_dims_rope=(8, 12, 12), sample_size=(8, 8), **options).build()
    randomise(denoiser, 0)
    return denoiser.eval()


def told(denoiser: Denoiser, n: int = 2, **settings) -> Tensor:
    condition = denoiser.example(n, text=4)
    return Sampler(Euler(2), **settings)(denoiser, FlowMatching(), condition, torch.arange(n))


def test_a_model_with_a_guidance_input_is_told_the_scale_in_one_pass():
    denoiser, calls = flux(guidance=3.5), []
    denoiser.register_forward_hook(lambda m, args, out: calls.append((len(args[0]), args[2].guidance)))
    x = told(denoiser, told=5.0)
    assert [n for n, _ in calls] == [2, 2]  # no second half, no second pass
    assert all(torch.equal(g, torch.full((2,), 5.0)) for _, g in calls)
    assert not torch.allclose(x, told(denoiser), atol=1e-3)
    assert torch.equal(told(denoiser, told=3.5), told(denoiser))  # its own scale


def test_a_scale_is_told_to_both_branches_where_there_is_guidance_on_top():
    denoiser, seen = flux(), []
    denoiser.register_forward_hook(lambda m, args, out: seen.append(args[2].guidance))
    told(denoiser, told=2.0, guidance=1.5)
    assert all(torch.equal(g, torch.full((4,), 2.0)) for g in seen)


def test_a_scale_cannot_be_told_to_a_model_without_input(dit):
    for denoiser, name in ((flux(guidance_embeds=False), "flux"), (dit, "dit")):
        with pytest.raises(ValueError, match=f"told=2, but this {name} has no guidance input: use guidance instead"):
            told(denoiser, told=2.0)


# ---- refusals --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "build, complaint",
    [
        (lambda: Euler(0), "Euler: steps must be at least 1, got 0"),
        (lambda: EulerMaruyama(1), "EulerMaruyama: steps must be at least 2, got 1"),
        (lambda: EulerMaruyama(10, last=1.0), "last must lie between 0 and 1, got 1.0"),
        (lambda: Grid(()), r"times must decrease and be above 0, got \[\]"),
        (lambda: Grid((0.5, 1.0)), r"times must decrease and be above 0, got \[0.5, 1.0\]"),
        (lambda: Grid((1.0, 0.5, 0.5)), "times must decrease and be above 0"),
        (lambda: Grid((1.0, 0.0)), "times must decrease and be above 0"),
        (lambda: Grid((1.5, 1.0)), "times are at most 1, which is pure noise, got 1.5"),
        (lambda: Grid(shift=0), "shift must be positive, got 0"),
        (lambda: DPMSolver(10, order=4), "order must be 1, 2 or 3, got 4"),
        (lambda: Sampler(interval=(0.7, 0.2)), "interval must be 0 <= low < high <= 1"),
        (lambda: Sampler(interval=(0.0, 1.5)), "interval must be 0 <= low < high <= 1"),
    ],
)
def test_impossible_settings_are_refused(build, complaint):
    with pytest.raises(ValueError, match=complaint):
        build()


# ---- what a sample is told and how large it is -----------------------------------------------------------------------


def test_one_negative_condition_stands_for_the_whole_batch(dit):
    sampler = Sampler(Euler(3), guidance=2.0)
    numbers, told = torch.arange(4), Condition(label=torch.tensor([1, 2, 3, 4]))
    one, four = (
        sampler(dit, FlowMatching(), told, numbers, negative=Condition(label=torch.full((n,), 7))) for n in (1, 4)
    )
    assert torch.equal(one, four)
    assert not torch.equal(one, sampler(dit, FlowMatching(), told, numbers))


def test_a_sample_may_be_trained_on(dit):
    x = Sampler(Euler(2))(dit, FlowMatching(), Condition(label=torch.tensor([1])), torch.arange(1))
    assert not x.is_inference()
    dit(x, torch.ones(1), Condition(label=torch.tensor([1]))).sample.sum().backward()
