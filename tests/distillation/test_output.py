import math
from copy import deepcopy

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from views import passed

from edit.distillation.output import OutputKD, step_kl
from edit.losses import Seen
from edit.objectives import DDPM, FlowMatching, Ramp
from edit.stream import Output


def outputs(student: torch.Tensor, teacher: torch.Tensor, t: torch.Tensor, progress: float = 0.0) -> Seen:
    return passed(Output(student, None, {}), t, progress, Output(teacher, None, {}))


@pytest.mark.parametrize("options", [{}, {"space": "data"}, {"loss": "huber"}, {"loss": "huber", "space": "data"}])
def test_a_copy_of_the_teacher_has_no_loss_and_no_gradient(options, flux, told, see):
    term, student = OutputKD(**options), deepcopy(flux).requires_grad_(True)
    assert term.build(student, flux) is None
    loss = term.losses(see(student, flux, told, term))["output_kd"]
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0]
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_each_sample_has_the_mean_square_of_its_own_difference():
    student, teacher, t = torch.zeros(3, 2, 4, 4), torch.ones(3, 2, 4, 4), torch.tensor([0.1, 0.5, 1.0])
    teacher[1] *= 3
    seen = outputs(student, teacher, t)
    assert OutputKD(weight=0.5).losses(seen)["output_kd"].tolist() == [0.5, 4.5, 0.5]
    in_data = OutputKD(space="data").losses(seen)["output_kd"]
    torch.testing.assert_close(in_data, torch.tensor([0.01, 9 * 0.25, 1.0]))


def test_huber_is_the_norm_for_large_and_the_square_for_small_differences():
    d, t = 32, torch.full((2,), 0.5)
    delta = torch.ones(2, 2, 4, 4) * torch.tensor([100.0, 1e-6]).view(2, 1, 1, 1)
    loss = OutputKD(loss="huber", c=1e-3).losses(outputs(delta, torch.zeros_like(delta), t))["output_kd"]
    assert loss[0].item() == pytest.approx(100 * math.sqrt(d), rel=1e-4)  # c = 1e-3 below 566
    assert loss[1].item() == pytest.approx(1e-12 * d / 2e-3, rel=1e-4)  # the next order is (5.7e-6 / 1e-3)^2
    default = OutputKD(loss="huber").losses(outputs(delta, torch.zeros_like(delta), t))["output_kd"]
    square, c = 1e-12 * d, 0.00054 * math.sqrt(d)
    assert default[1].item() == pytest.approx(math.sqrt(square + c * c) - c, rel=1e-3)


def test_the_weight_follows_its_schedule():
    student, teacher, t = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.ones(1)
    term = OutputKD(weight=Ramp(1.0, 0.0, begin=0.5))
    at = [term.losses(outputs(student, teacher, t, p))["output_kd"].item() for p in (0.0, 0.5, 0.75, 1.0)]
    assert at == [1, 1, 0.5, 0]


def test_distillation_from_an_optimal_teacher_has_the_gradient_of_flow_matching_and_less_variance():
    # data N(0, 1): E[noise - x | x_t] = (2 t - 1) x_t / ((1 - t)^2 + t^2); student a x_t, gradients at a, per sample
    n, a = 100_000, torch.full((100_000, 1, 1, 1), 0.3, requires_grad=True)
    x, noise, t = torch.randn(n, 1, 1, 1), torch.randn(n, 1, 1, 1), torch.rand(n)
    flow, at = FlowMatching(), t.view(-1, 1, 1, 1)
    x_t = flow.corrupt(x, noise, t)
    teacher = (2 * at - 1) * x_t / ((1 - at) ** 2 + at**2)
    kd = OutputKD().losses(outputs(a * x_t, teacher, t))["output_kd"]
    fm = flow.losses(Output(a * x_t, None, {}), x, noise, x_t, t)["flow"]
    of_kd, of_fm = (torch.autograd.grad(loss.sum(), a)[0].flatten() for loss in (kd, fm))
    error = (of_kd - of_fm).std() / math.sqrt(n)
    assert (of_kd - of_fm).mean().abs() < 4 * error  # seeded; 4 standard errors
    assert of_kd.mean().abs() > 20 * error  # and the gradient is not lost in them
    assert of_kd.var() < 0.6 * of_fm.var()  # 4.33 / 8.35 = 0.52 from 2 million samples


# ---- learned variance ------------------------------------------------------------------------------------------------


def test_the_variance_term_is_the_kl_between_two_denoising_steps():
    ddpm = DDPM()
    shape, i = (2, 1, 2, 2), torch.tensor([3, 700])
    eps, eps_t, v, v_t, x_t = (torch.randn(shape) for _ in range(5))
    betas = ddpm.betas()
    abar = torch.cumprod(1 - betas, 0)
    b, now, before = (table[i].view(2, 1, 1, 1) for table in (betas, abar, abar.roll(1)))
    steps = []
    for noise, fraction in ((eps_t, (v_t + 1) / 2), (eps, (v + 1) / 2)):
        mean = (x_t - b / (1 - now).sqrt() * noise) / (1 - b).sqrt()
        log_var = fraction * b.log() + (1 - fraction) * (b * (1 - before) / (1 - now)).log()
        steps.append(Normal(mean, (log_var / 2).exp()))
    expected = kl_divergence(*steps).flatten(1).mean(1) / math.log(2)
    found = step_kl(ddpm, Output(eps, v, {}), Output(eps_t, v_t, {}), (i + 1) / 1000)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)  # fp32 against fp64 tables


def test_the_variance_is_distilled_without_touching_the_mean(make_dit, batch, see):
    teacher, student = (make_dit(seed, time="ddpm", learn_sigma=True) for seed in (0, 1))
    term = OutputKD(variance=0.5)
    term.build(student, teacher)
    seen = see(student, teacher, batch, term)
    seen.output.sample.retain_grad()
    loss = term.losses(seen)["variance_kd"]
    loss.sum().backward()
    torch.testing.assert_close(loss, 0.5 * step_kl(DDPM(), seen.output, seen.taught, seen.t))
    assert loss.shape == (4,) and (loss > 0).all()
    assert seen.output.sample.grad is None and student.model.final_layer.linear.weight.grad.any()


def test_a_copy_has_no_variance_loss_and_no_gradient(make_dit, batch, see):
    teacher = make_dit(time="ddpm", learn_sigma=True)
    student, term = deepcopy(teacher), OutputKD()
    loss = term.losses(see(student, teacher, batch, term))["variance_kd"]
    loss.sum().backward()
    assert loss.tolist() == [0] * 4
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_a_teacher_without_a_variance_teaches_none(make_dit, batch, see):
    student, teacher = make_dit(time="ddpm", learn_sigma=True), make_dit(time="ddpm")
    assert OutputKD().losses(see(student, teacher, batch, OutputKD())).keys() == {"output_kd"}


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"space": "noise"}, "space must be output or data, got 'noise'"),
        ({"loss": "l1"}, "loss must be mse or huber, got 'l1'"),
        ({"loss": "huber", "c": 0.0}, "c must be positive, got 0.0"),
    ],
)
def test_impossible_settings_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        OutputKD(**options)


def test_models_that_cannot_be_compared_are_refused(flux, make_dit):
    with pytest.raises(ValueError, match="compares with a teacher and there is none"):
        OutputKD().build(flux)
    with pytest.raises(ValueError, match="the student predicts noise, the teacher velocity"):
        OutputKD().build(make_dit(time="ddpm"), flux)
    with pytest.raises(ValueError, match="space=data compares velocities, this model predicts noise"):
        OutputKD(space="data").build(make_dit(time="ddpm"), make_dit(time="ddpm"))
