import math

import pytest
import torch
from scipy import stats

from edit.objectives import (
    DDPM,
    FlowMatching,
    LogitNormal,
    Ramp,
    RescaledFlow,
    Shifted,
    Uniform,
    discretised_nll,
    schedule_tables,
    shift_times,
    weight_at,
)
from edit.paths import velocity_to_data
from edit.stream import Output

GRID = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000  # quantiles: laws are tested without chance


def pair(b: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(data, noise, times)"""
    return torch.randn(b, 4, 8, 8), torch.randn(b, 4, 8, 8), torch.linspace(0.1, 0.9, b)


# ---- times -----------------------------------------------------------------------------------------------------------


def test_the_uniform_law_is_the_identity():
    assert torch.equal(Uniform()(GRID), GRID)


def test_logit_normal_has_the_published_moments():
    t = LogitNormal()(GRID)
    assert t.mean().item() == pytest.approx(0.5, abs=1e-6)  # by symmetry
    assert t.std().item() == pytest.approx(0.208, abs=5e-4)  # stated to three digits
    assert ((t >= 0.3) & (t <= 0.7)).double().mean().item() == pytest.approx(0.60, abs=0.005)  # stated to two


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 0.7), (1.0, 1.4)])
def test_the_logit_of_a_logit_normal_time_is_normal(mean, std):
    logits = torch.logit(LogitNormal(mean, std)(GRID))
    assert stats.kstest(logits.numpy(), "norm", args=(mean, std)).statistic < 1e-4


def test_extreme_uniform_numbers_give_times_inside_the_interval():
    for law in (LogitNormal(), Shifted(LogitNormal(), 3.0), Shifted(Uniform(), 0.3)):
        t = law(torch.tensor([2.0**-25, 1 - 2.0**-24]))
        assert (t > 0).all() and (t < 1).all()


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 12.0])
def test_shifted_times_keep_their_ends_and_order_and_move_towards_noise(shift):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    moved = Shifted(Uniform(), shift)(t)
    assert moved[0] == 0 and moved[-1].item() == pytest.approx(1, abs=1e-15)
    assert (moved.diff() > 0).all()
    assert ((moved - t)[1:-1] * (shift - 1) >= 0).all()
    # a shift by s multiplies t / (1 - t), the noise-to-signal ratio, by s
    torch.testing.assert_close((moved / (1 - moved))[1:-1], shift * (t / (1 - t))[1:-1])
    torch.testing.assert_close(shift_times(moved, 1 / shift), t)


def test_a_shift_applies_to_the_law_it_wraps():
    torch.testing.assert_close(Shifted(LogitNormal(), math.e)(GRID), LogitNormal(mean=1.0)(GRID))


# ---- flow matching ---------------------------------------------------------------------------------------------------


def test_flow_matching_starts_at_data_ends_at_noise_and_is_linear():
    x, eps, _ = pair()
    flow = FlowMatching()
    assert torch.equal(flow.corrupt(x, eps, torch.zeros(3)), x)
    assert torch.equal(flow.corrupt(x, eps, torch.ones(3)), eps)
    torch.testing.assert_close(flow.corrupt(x, eps, torch.full((3,), 0.25)), 0.75 * x + 0.25 * eps)


def test_the_flow_loss_is_the_squared_distance_to_noise_minus_data_per_sample():
    x, eps, t = pair()
    off = torch.tensor([0.0, 1.0, 2.0]).view(-1, 1, 1, 1)
    losses = FlowMatching().losses(Output(eps - x + off, None, {}), x, eps, FlowMatching().corrupt(x, eps, t), t)
    assert losses.keys() == {"flow"}
    torch.testing.assert_close(losses["flow"], torch.tensor([0.0, 1.0, 4.0]))


def test_snr_cap_weighs_velocities_as_min_snr_weighs_data():
    x, eps, _ = pair()
    t = torch.tensor([0.05, 0.4, 0.8])
    snr = ((1 - t) / t) ** 2
    assert (snr > 5).tolist() == [True, False, False]
    flow = FlowMatching(weighting="snr_cap", cap=5.0)
    torch.testing.assert_close(flow.weight(t), torch.minimum(snr, torch.tensor(5.0)) / (snr + 1))
    # an error of d in the velocity is one of t d in the data, and min-SNR weighs the latter by min(snr, cap)
    x_t, prediction = flow.corrupt(x, eps, t), torch.randn_like(x)
    data_error = ((velocity_to_data(prediction, x_t, t) - x) ** 2).flatten(1).mean(1)
    min_snr = snr.clamp(max=5) * data_error
    # min(snr, cap) / (snr + 1) is that up to the path's own scale, t^2 (snr + 1) = t^2 + (1 - t)^2
    got = flow.losses(Output(prediction, None, {}), x, eps, x_t, t)["flow"] * (t**2 + (1 - t) ** 2)
    torch.testing.assert_close(got, min_snr)
    assert torch.equal(FlowMatching().weight(t), torch.ones(3))


def test_the_cosine_loss_compares_directions_over_channels():
    x, eps, t = pair()
    v = eps - x
    flow = FlowMatching(cosine=0.5)

    def cosine(prediction):
        return flow.losses(Output(prediction, None, {}), x, eps, x, t)["cosine"]

    torch.testing.assert_close(cosine(3 * v), torch.zeros(3), rtol=0, atol=1e-6)  # a length is no direction
    torch.testing.assert_close(cosine(-v), torch.full((3,), 2 * 0.5))
    # rescaling each pixel by itself changes nothing, rescaling a channel does: the axis is that of channels
    torch.testing.assert_close(cosine(v * torch.rand(3, 1, 8, 8).add(0.5)), torch.zeros(3), rtol=0, atol=1e-6)
    assert (cosine(v * torch.tensor([5.0, 1, 1, 1]).view(1, 4, 1, 1)) > 0.01).all()


def test_rescaled_flow_is_flow_matching_of_louder_noise():
    """x_t = (1 - t) x + t s noise, target s noise - x, start s noise; s = 1 changes nothing."""
    x, noise, t = pair()
    loud, plain = RescaledFlow(scale=4.0), FlowMatching()
    assert torch.equal(loud.start(noise), 4 * noise) and torch.equal(plain.start(noise), noise)
    x_t = loud.corrupt(x, noise, t)
    torch.testing.assert_close(x_t, (1 - t.view(-1, 1, 1, 1)) * x + t.view(-1, 1, 1, 1) * 4 * noise)
    right = Output(4 * noise - x, None, {})
    assert loud.losses(right, x, noise, x_t, t)["flow"].abs().max() < 1e-12
    assert (plain.losses(right, x, noise, x_t, t)["flow"] > 1).all()
    for name in ("corrupt", "native"):
        args = (x, noise, t) if name == "corrupt" else (x_t, t)
        torch.testing.assert_close(getattr(RescaledFlow(), name)(*args), getattr(plain, name)(*args))
    assert RescaledFlow().level(0.3) == pytest.approx(0.3) and loud.level(0.5) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="scale must be positive"):
        RescaledFlow(scale=0)


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_a_rescaled_flow_is_asked_at_its_own_point_of_the_linear_path_and_answers_on_it(scale):
    x, noise, tau = pair()
    objective = RescaledFlow(scale=scale)
    linear = FlowMatching().corrupt(x, noise, tau)
    x_t, t = objective.native(linear, tau)
    torch.testing.assert_close(x_t, objective.corrupt(x, noise, t), rtol=1e-5, atol=1e-5)
    velocity = objective.velocity(scale * noise - x, linear, tau)
    torch.testing.assert_close(velocity, noise - x, rtol=1e-4, atol=1e-4)
    assert objective.level(t[0].item()) == pytest.approx(tau[0].item(), abs=1e-6)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_a_rescaled_flow_is_finite_at_both_ends_of_the_path(end):
    x, noise, _ = pair()
    objective, t = RescaledFlow(scale=4.0), torch.full((3,), end)
    x_t, at = objective.native(FlowMatching().corrupt(x, noise, t), t)
    assert at.allclose(t) and torch.allclose(x_t, objective.start(noise) if end else x)
    assert objective.velocity(4 * noise - x, FlowMatching().corrupt(x, noise, t), t).isfinite().all()


def test_snr_cap_of_a_rescaled_flow_counts_the_louder_noise():
    t = torch.tensor([0.2, 0.5, 0.9])
    loud, plain = RescaledFlow(scale=4.0, weighting="snr_cap"), FlowMatching(weighting="snr_cap")
    torch.testing.assert_close(loud.weight(t), plain.weight(t * 4 / (1 - t + 4 * t)))


def test_losses_are_in_float32_for_low_precision_outputs():
    x, eps, t = pair()
    output = Output((eps - x).bfloat16(), torch.zeros_like(x).bfloat16(), {})
    for objective in (FlowMatching(cosine=1.0), DDPM()):
        losses = objective.losses(output, x, eps, objective.corrupt(x, eps, t), t)
        assert {v.dtype for v in losses.values()} == {torch.float32}


# ---- DDPM ------------------------------------------------------------------------------------------------------------


def test_the_noise_schedule_ends_at_the_published_signal():
    betas = DDPM().betas()
    assert (len(betas), betas[0].item(), betas[-1].item()) == (1000, 1e-4, 0.02)
    assert torch.cumprod(1 - betas, 0)[-1].item() == pytest.approx(4.04e-5, rel=2e-3)  # stated to three digits


def test_every_index_survives_the_way_through_a_float32_time():
    i = torch.arange(1000)
    assert torch.equal(DDPM().index((i + 1) / 1000), i)


def test_training_times_are_the_thousand_steps_equally_often():
    t = DDPM().times(GRID)
    steps, counts = torch.unique(DDPM().index(t), return_counts=True)
    assert steps.tolist() == list(range(1000)) and (counts - 100).abs().max() <= 1
    torch.testing.assert_close(t, (DDPM().index(t) + 1) / 1000, check_dtype=False)


def test_ddpm_keeps_unit_variance_and_follows_the_schedule():
    alpha = torch.cumprod(1 - DDPM().betas(), 0).float()
    x, eps, _ = pair()
    i = torch.tensor([0, 500, 999])
    a = alpha[i].view(-1, 1, 1, 1)
    torch.testing.assert_close(DDPM().corrupt(x, eps, (i + 1) / 1000), a.sqrt() * x + (1 - a).sqrt() * eps)


def bound_at_init(indices: torch.Tensor) -> torch.Tensor:
    """The bound of a zero-initialised network, in bits per dimension, exactly in expectation over the noise.

    The bound at index >= 1 depends on the noise through its square alone, so signs (square 1) give the expectation.
    """
    x, eps = torch.randn(len(indices), 1, 4, 4), torch.randn(len(indices), 1, 4, 4).sign()
    t, zero = (indices + 1) / 1000, torch.zeros_like(x)
    ddpm = DDPM()
    return ddpm.losses(Output(zero, zero, {}), x, eps, ddpm.corrupt(x, eps, t), t)["bound"]


def test_the_bound_at_initialisation_has_its_closed_form():
    published = torch.tensor([0.632713, 0.107784, 0.014582, 0.007952, 0.014722])
    # published to six decimals; the squared difference of two means in float32 costs the rest at small indices
    torch.testing.assert_close(bound_at_init(torch.tensor([1, 10, 100, 500, 999])), published, rtol=2e-5, atol=1e-6)
    assert bound_at_init(torch.arange(1, 1000)).mean().item() == pytest.approx(0.01416, abs=5e-6)


def test_the_bound_vanishes_for_the_true_posterior():
    x, eps, t = pair()
    ddpm = DDPM()
    x_t, lower = ddpm.corrupt(x, eps, t), torch.full_like(x, -1.0)  # v = -1: the posterior's own variance
    torch.testing.assert_close(ddpm.variational(eps, lower, x, x_t, t), torch.zeros(3), rtol=0, atol=1e-6)


def test_the_bound_of_a_wider_step_is_the_divergence_of_two_gaussians():
    x, eps, t = pair()
    ddpm = DDPM()
    betas = ddpm.betas()
    alpha = torch.cumprod(1 - betas, 0)
    i = ddpm.index(t)
    small, large = (betas * (1 - alpha.roll(1)) / (1 - alpha))[i], betas[i]
    p, q = torch.distributions.Normal(0, small.sqrt()), torch.distributions.Normal(0, large.sqrt())
    bits = torch.distributions.kl_divergence(p, q) / math.log(2)
    got = ddpm.variational(eps, torch.ones_like(x), x, ddpm.corrupt(x, eps, t), t)  # v = 1: variance beta
    torch.testing.assert_close(got, bits.float(), rtol=1e-3, atol=1e-7)  # nearly equal logarithms in float32


@pytest.mark.parametrize("v", [1.0, -1.0], ids=["beta", "posterior of index 1"])
def test_the_bound_at_index_zero_is_the_likelihood_of_the_quantised_data(v):
    x = torch.linspace(-1, 1, 256).view(1, 1, 16, 16)
    eps, t = torch.zeros_like(x), torch.tensor([0.001])
    ddpm = DDPM()
    got = ddpm.variational(eps, torch.full_like(x, v), x, ddpm.corrupt(x, eps, t), t)
    # index 0 puts the whole posterior mean on the predicted data; its own posterior variance would be zero
    beta, alpha = ddpm.betas(), torch.cumprod(1 - ddpm.betas(), 0)
    variance = beta[0] if v == 1 else beta[1] * (1 - alpha[0]) / (1 - alpha[1])
    levels = torch.distributions.Normal(x.double(), variance.sqrt())
    inner = levels.cdf(x.double() + 1 / 255) - levels.cdf(x.double() - 1 / 255)
    mass = torch.where(x < -0.999, levels.cdf(x.double() + 1 / 255), inner)
    mass = torch.where(x > 0.999, 1 - levels.cdf(x.double() - 1 / 255), mass)
    assert got.item() == pytest.approx(-mass.log2().mean().item(), rel=1e-3)


def test_the_discretised_gaussian_is_a_distribution_over_256_levels():
    levels = torch.linspace(-1, 1, 256)
    for mean, log_var in ((0.0, -2.0), (0.9, -6.0), (-1.3, 1.0)):
        mass = (-discretised_nll(levels, torch.tensor(mean), torch.tensor(log_var))).exp()
        # open ends take the tails; the floor of 1e-12 adds nothing visible
        assert mass.sum().item() == pytest.approx(1, abs=1e-4)


def test_the_bound_sends_no_gradient_to_the_predicted_noise():
    x, eps, t = pair()
    ddpm = DDPM()
    out = torch.randn(3, 8, 8, 8, requires_grad=True)
    losses = ddpm.losses(Output(out[:, :4], out[:, 4:], {}), x, eps, ddpm.corrupt(x, eps, t), t)
    (grad,) = torch.autograd.grad(losses["bound"].sum(), out, retain_graph=True)
    assert grad[:, :4].count_nonzero() == 0 and grad[:, 4:].count_nonzero() == grad[:, 4:].numel()
    (grad,) = torch.autograd.grad(losses["noise"].sum(), out)
    assert grad[:, :4].count_nonzero() == grad[:, :4].numel() and grad[:, 4:].count_nonzero() == 0


def test_gradients_stay_finite_at_every_index():
    i = torch.arange(0, 1000, 37)
    x, eps = torch.rand(len(i), 1, 4, 4) * 2 - 1, torch.randn(len(i), 1, 4, 4)
    out = torch.randn(len(i), 2, 4, 4, requires_grad=True)
    ddpm, t = DDPM(), (i + 1) / 1000
    losses = ddpm.losses(Output(out[:, :1], out[:, 1:], {}), x, eps, ddpm.corrupt(x, eps, t), t)
    (losses["noise"] + losses["bound"]).sum().backward()
    assert out.grad.isfinite().all()


def test_a_model_without_variance_has_no_bound_and_its_weight_scales_it():
    x, eps, t = pair()
    x_t, v = DDPM().corrupt(x, eps, t), torch.zeros_like(x)
    assert DDPM().losses(Output(v, None, {}), x, eps, x_t, t).keys() == {"noise"}
    one, tenth = (DDPM(bound=w).losses(Output(v, v, {}), x, eps, x_t, t)["bound"] for w in (1.0, 0.1))
    torch.testing.assert_close(tenth, 0.1 * one)


# ---- noise predictions on the linear path ----------------------------------------------------------------------------


def on_line() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales of data and noise at each of DDPM's 1000 indices, and the times of the linear path with their ratio."""
    alpha = torch.cumprod(1 - DDPM().betas(), 0)
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    return signal.float(), spread.float(), (spread / (signal + spread)).float()


def test_a_flow_model_is_asked_and_answers_on_the_linear_path_itself():
    x_t, v, t = pair()
    assert all(a is b for a, b in zip(FlowMatching().native(x_t, t), (x_t, t), strict=True))
    assert torch.equal(FlowMatching().velocity(v.bfloat16(), x_t, t), v.bfloat16().float())


def test_a_point_of_the_linear_path_is_ddpms_own_noisy_sample_and_its_noise_is_the_velocity():
    """From each index to the linear path and back: the times are hit exactly, nothing is lost but fp32."""
    ddpm, indices = DDPM(), torch.tensor([0, 1, 10, 250, 500, 900, 998, 999])
    _, _, line = on_line()
    x, eps = torch.randn(8, 4, 8, 8), torch.randn(8, 4, 8, 8)
    t = line[indices]
    native, time = ddpm.native(FlowMatching().corrupt(x, eps, t), t)
    assert torch.equal(ddpm.index(time), indices)
    torch.testing.assert_close(native, ddpm.corrupt(x, eps, time), rtol=1e-5, atol=2e-6)
    v = ddpm.velocity(eps, FlowMatching().corrupt(x, eps, t), t)
    # noise minus the sample is divided by 1 - t, as small as 6e-3, and so are fp32's last digits
    error = (v - (eps - x)).abs().amax((1, 2, 3))
    assert (error < 2e-6 / (1 - t)).all(), error


def test_between_two_indices_the_nearest_one_is_asked():
    ddpm = DDPM()
    _, _, line = on_line()
    below, above = (torch.lerp(line[300:301], line[301:302], w) for w in (0.4, 0.6))
    times = [ddpm.native(torch.zeros(1, 1, 1, 1), t)[1].item() for t in (below, above)]
    assert times == pytest.approx([0.301, 0.302])


@pytest.mark.parametrize("t, index", [(0.0, 0), (1.0, 999)])
def test_the_ends_of_the_path_are_the_first_and_last_index_and_stay_finite(t, index):
    ddpm, at = DDPM(), torch.full((3,), t)
    x_t, eps, _ = pair()
    native, time = ddpm.native(x_t, at)
    signal, spread, line = (v[index] for v in on_line())
    assert torch.equal(ddpm.index(time), torch.full((3,), index))
    torch.testing.assert_close(native, (signal + spread) * x_t)
    v = ddpm.velocity(eps, x_t, at)
    assert v.isfinite().all() and v.dtype == torch.float32
    torch.testing.assert_close(v, (eps - x_t) / (1 - line), rtol=1e-4, atol=1e-4)  # 1 - line loses digits at noise


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_the_exact_noise_of_gaussian_data_is_its_exact_velocity(s):
    ddpm, t, x_t = DDPM(), torch.linspace(0, 1, 101), torch.randn(101, 4, 2, 2)
    native, time = ddpm.native(x_t, t)
    signal, spread, line = (v[ddpm.index(time)].view(-1, 1, 1, 1) for v in on_line())
    eps = spread * native / ((signal * s) ** 2 + spread**2)
    v = ddpm.velocity(eps, x_t, t)
    exact = (line - (1 - line) * s**2) / ((1 - line) ** 2 * s**2 + line**2) * x_t
    # at the last index 1 - t is 6e-3 and divides fp32's rounding of a number of size 1
    torch.testing.assert_close(v, exact, rtol=1e-3, atol=1e-3)
    inside = (t - line.flatten()).abs() < 2e-3  # where indices are dense the time asked for is the time that was given
    assert inside.sum() > 90
    at = t.view(-1, 1, 1, 1)
    given = (at - (1 - at) * s**2) / ((1 - at) ** 2 * s**2 + at**2) * x_t
    torch.testing.assert_close(v[inside], given[inside], rtol=0.02, atol=0.05)


def test_samples_of_a_batch_are_seen_each_at_its_own_time():
    ddpm = DDPM()
    x_t, eps, t = pair()
    native, time = ddpm.native(x_t, t)
    v = ddpm.velocity(eps, x_t, t)
    for k in range(len(t)):
        one, at = ddpm.native(x_t[k : k + 1], t[k : k + 1])
        assert torch.equal(one[0], native[k]) and torch.equal(at[0], time[k])
        assert torch.equal(ddpm.velocity(eps[k : k + 1], x_t[k : k + 1], t[k : k + 1])[0], v[k])


def test_a_schedules_tables_are_made_once_and_change_no_loss_by_a_bit():
    x, eps, t = pair()
    out = Output(torch.randn_like(x), torch.randn_like(x), {})

    def numbers(ddpm):
        x_t = ddpm.corrupt(x, eps, t)
        native, time = ddpm.native(x_t, t)
        return [x_t, native, time, ddpm.velocity(eps, x_t, t), *ddpm.losses(out, x, eps, x_t, t).values()]

    schedules = (DDPM(), DDPM(beta_end=0.01), DDPM(steps=500, beta_start=1e-3))
    schedule_tables.cache_clear()
    cached = [[numbers(ddpm) for ddpm in schedules] for _ in range(2)]  # in turns, as teacher and student might ask
    assert schedule_tables.cache_info().misses == len(schedules)
    for ddpm, first, second in zip(schedules, *cached, strict=True):
        schedule_tables.cache_clear()
        for fresh, *kept in zip(numbers(ddpm), first, second, strict=True):
            assert torch.equal(fresh, kept[0]) and torch.equal(fresh, kept[1])
    assert not torch.equal(cached[0][0][0], cached[0][1][0])
    assert DDPM(bound=0.1)._tables(x.device)[0] is DDPM()._tables(torch.device("cpu"))[0]


def test_tables_that_a_sampler_asked_for_first_can_be_trained_with():
    schedule_tables.cache_clear()
    with torch.inference_mode():
        DDPM().native(torch.zeros(1, 1, 1, 1), torch.ones(1))
    x, eps, t = pair()
    v = torch.zeros_like(x, requires_grad=True)
    DDPM().losses(Output(eps, v, {}), x, eps, DDPM().corrupt(x, eps, t), t)["bound"].sum().backward()
    assert v.grad.count_nonzero() == v.numel()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, -1.0])
def test_a_shift_that_is_not_positive_is_refused(shift):
    with pytest.raises(ValueError, match=f"shift must be positive, got {shift}"):
        Shifted(shift=shift)


def test_an_unknown_weighting_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="weighting must be none or snr_cap, got 'min_snr'"):
        FlowMatching(weighting="min_snr")  # type: ignore[arg-type]


# ---- weights that change over a run ----------------------------------------------------------------------------------


def test_a_ramp_goes_linearly_between_its_ends_and_stays_there():
    ramp = Ramp(start=2.0, end=1.0, begin=0.2, until=0.6)
    assert [weight_at(ramp, p) for p in (0, 0.2, 0.4, 0.6, 1)] == pytest.approx([2, 2, 1.5, 1, 1])
    assert weight_at(0.3, 0.9) == 0.3


def test_a_ramp_of_levels_goes_down_once_an_epoch():
    # TinyFusion: beta_0 (1 - e / (E - 1)) in epoch e of E
    ramp = Ramp(start=1e-2, end=0.0, levels=5)
    for epoch in range(5):
        for inside in (0.0, 0.5, 0.999):
            assert ramp((epoch + inside) / 5) == pytest.approx(1e-2 * (1 - epoch / 4))
    assert Ramp(start=1.0, levels=1)(0.7) == 1.0  # a run of one epoch
    with pytest.raises(ValueError, match="levels must be at least 1"):
        Ramp(1.0, levels=0)


@pytest.mark.parametrize("ends", [(0.5, 0.5), (-0.1, 1), (0, 1.1)])
def test_a_ramp_outside_the_run_is_refused(ends):
    with pytest.raises(ValueError, match="parts of the run"):
        Ramp(1.0, begin=ends[0], until=ends[1])
