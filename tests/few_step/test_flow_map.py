import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from views import Models, view
from weights import randomise

import edit
from edit.backbones.dit_diffusers import DiTDiffusersConfig
from edit.backbones.pixart import PixArtConfig
from edit.backbones.qwen_image import QwenImageConfig
from edit.backbones.sd3 import SD3Config
from edit.edits import describe, rebuild
from edit.few_step.flow_map import IntervalInput, derivative, mean_velocity, need_interval
from edit.few_step.mean_flow import MeanFlow
from edit.few_step.shortcut import Shortcut
from edit.few_step.trig import SCM, LossWeight
from edit.losses import Draws, Seen
from edit.objectives import FlowMatching
from edit.sampling import Sampler
from edit.solvers import DDPMSolver, Euler, EulerMaruyama, Grid, Heun
from edit.stream import Condition
from edit.tuning.lora import LoRA

HEADS = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
FAMILIES = ("dit", "flux", "sd3", "qwen_image")


@pytest.fixture(params=FAMILIES)
def asked(request, make_dit, make_flux):
    """A model of each family that can be a flow map, all weights random, with (x, t, condition) of three samples."""
    g = torch.Generator().manual_seed(1)
    text, pooled = torch.randn(3, 5, 24, generator=g), torch.randn(3, 20, generator=g)
    x, t = torch.randn(3, 4, 8, 8, generator=g), torch.tensor([0.2, 0.5, 0.9])
    if request.param == "dit":
        return make_dit(), (x, t, Condition(label=torch.tensor([0, 3, 10])))
    if request.param == "flux":
        return make_flux(guidance_embeds=False), (x, t, Condition(text=text, pooled=pooled))
    if request.param == "sd3":
        sizes = {
            "joint_attention_dim": 24,
            "pooled_projection_dim": 20,
            "in_channels": 4,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        }
        model, condition = SD3Config(**HEADS, **sizes).build(), Condition(text=text, pooled=pooled)
    else:
        sizes = {"joint_attention_dim": 24, "in_channels": 16, "axes_dims_rope": (4, 6, 6)}
        mask = torch.ones(3, 5, dtype=torch.bool)
        model, condition = QwenImageConfig(**HEADS, **sizes).build(), Condition(text=text, text_mask=mask)
    randomise(model)
    return model.eval(), (x, t, condition)


def ends(batch, *values: float):
    """The same batch, led to these ends."""
    x, t, condition = batch
    return x, t, replace(condition, end=torch.tensor(values))


# ---- the input -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_at_first_every_end_is_reached_with_the_velocity_at_the_beginning(asked):
    model, batch = asked
    before = model(*batch).sample
    edit.apply(model, {"flow_map": IntervalInput()})
    assert torch.equal(model(*batch).sample, before)
    for values in ((0.0, 0.0, 0.0), (0.2, 0.1, 0.5)):
        torch.testing.assert_close(model(*ends(batch, *values)).sample, before)


@torch.no_grad()
def test_a_trained_input_tells_ends_apart_and_is_silent_without_one(asked):
    model, batch = asked
    before = model(*batch).sample
    edit.apply(model, {"flow_map": IntervalInput()})
    randomise(model.edits["flow_map"])
    assert torch.equal(model(*batch).sample, before)
    near, far = model(*ends(batch, 0.2, 0.5, 0.9)).sample, model(*ends(batch, 0.2, 0.0, 0.0)).sample
    assert torch.equal(near[0], far[0]) and ((near - far).abs().amax((1, 2, 3))[1:] > 1e-4).all()


def test_gradients_reach_the_whole_input_once_its_last_layer_has_moved(asked):
    model, batch = asked
    edit.apply(model, {"flow_map": IntervalInput()})
    own = model.edits["flow_map"]
    model(*ends(batch, 0.0, 0.0, 0.0)).sample.square().mean().backward()
    assert own.mlp[2].weight.grad.any() and not own.mlp[0].weight.grad.any()
    randomise(own)
    model(*ends(batch, 0.0, 0.0, 0.0)).sample.square().mean().backward()
    assert all(p.grad.any() for p in own.parameters())


@torch.no_grad()
def test_a_saved_flow_map_draws_the_same_pictures(tmp_path, asked):
    model, (_, _, condition) = asked
    edit.apply(model, {"flow_map": IntervalInput(scale=3.0)})
    sampler, numbers = Sampler(Euler(3)), torch.arange(3)

    def draw(model):
        return sampler(model, FlowMatching(), condition, numbers, shape=(4, 8, 8))

    fresh = draw(model)
    randomise(model.edits["flow_map"])
    drawn = draw(model)
    assert (drawn - fresh).abs().max() > 1e-3  # the sampler says where its steps end
    edit.save(model, tmp_path / "a", objective=FlowMatching(), sampler=sampler)
    loaded = edit.load(tmp_path / "a")
    assert loaded.denoiser.applied == model.applied and loaded.sampler == sampler
    assert torch.equal(draw(loaded.denoiser), drawn)


@torch.no_grad()
def test_what_ends_are_told_is_the_samplers_grid(dit, batch):
    x, _, condition = batch
    edit.apply(dit, {"flow_map": IntervalInput()})
    randomise(dit.edits["flow_map"])
    drawn = Sampler(Grid((1.0, 0.6)))(dit, FlowMatching(), condition, torch.arange(4))
    z = edit.noise.gaussian(0, torch.arange(4), edit.noise.NOISE, x.shape[1:])
    for t, r in ((1.0, 0.6), (0.6, 0.0)):
        z = z - (t - r) * dit(z, torch.full((4,), t), replace(condition, end=torch.full((4,), r))).sample
    torch.testing.assert_close(drawn, z)


def test_it_works_where_nothing_is_allocated_and_beside_lora(make_dit, batch):
    dit = make_dit()
    edit.apply(dit, {"lora": LoRA(rank=2), "flow_map": IntervalInput()})
    assert all(edit.edits.trains(dit, n) for n, _ in dit.named_parameters() if n.startswith("edits.flow_map"))
    with torch.device("meta"):
        twin = edit.apply(type(dit).from_config(dit.config), {"flow_map": IntervalInput()}, fresh=False)
    assert all(p.is_meta for p in twin.parameters())


def test_it_is_data():
    again = rebuild(json.loads(json.dumps(describe(IntervalInput(2.0)))))
    assert again == IntervalInput(2.0)


@pytest.mark.parametrize("family", ["pixart", "dit_diffusers", "dit"])
def test_models_that_predict_noise_are_refused(family, make_dit):
    heads = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4}
    model = {
        "pixart": lambda: PixArtConfig(**heads, cross_attention_dim=32, sample_size=8).build(),
        "dit_diffusers": lambda: DiTDiffusersConfig(**heads, sample_size=8).build(),
        "dit": lambda: make_dit(time="ddpm"),
    }[family]()
    with pytest.raises(ValueError, match=f"a flow map steps along velocities, this {model.name} predicts noise: use a"):
        edit.apply(model, {"flow_map": IntervalInput()})
    assert not model.applied and not len(model.edits)


def test_a_second_input_a_bad_scale_and_a_missing_input_are_refused(dit):
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        IntervalInput(0.0)
    with pytest.raises(ValueError, match="MeanFlow trains a flow map, but this dit is not told.*IntervalInput"):
        need_interval("MeanFlow", dit)
    edit.apply(dit, {"flow_map": IntervalInput()})
    need_interval("MeanFlow", dit)
    with pytest.raises(ValueError, match="this dit is told the end of its steps already"):
        edit.apply(dit, {"again": IntervalInput()})


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["difference", "jvp"])
def test_a_derivative_is_the_directional_one(how):
    x, t, dx, dt = torch.randn(3, 2, 4, 4), torch.rand(3), torch.randn(3, 2, 4, 4), torch.randn(3)

    def f(x, t):
        return x.sin() * t.view(-1, 1, 1, 1) ** 2

    s = t.view(-1, 1, 1, 1)
    expected = x.cos() * dx * s**2 + x.sin() * 2 * s * dt.view(-1, 1, 1, 1)
    # fp32 rounding over 2e-3, and the difference's own error of step^2 / 6 times a third derivative of order 10
    torch.testing.assert_close(derivative(f, x, t, dx, dt, how, 1e-3), expected, rtol=1e-3, atol=1e-3)


def test_both_derivatives_of_a_model_agree_and_leave_no_graph(asked):
    model, batch = asked
    edit.apply(model, {"flow_map": IntervalInput()})
    randomise(model.edits["flow_map"])
    x, t, told = ends(batch, 0.0, 0.1, 0.5)
    # in the middle of the sinusoids of 1000 t: their period of 0.006 is long for a step of 1e-4
    v, one = torch.randn_like(x), torch.ones(3)

    def f(x, t):
        return model(x, t, told).sample

    exact, difference = (derivative(f, x, t, v, one, how, 1e-4) for how in ("jvp", "difference"))
    assert not exact.requires_grad and not difference.requires_grad
    assert (exact - difference).norm() < 0.02 * exact.norm()  # fp32 through all units, over 2e-4
    assert exact.norm() > 1


@pytest.mark.parametrize("method", [MeanFlow(), SCM(), Shortcut()], ids=lambda m: type(m).__name__)
def test_the_default_step_leaves_out_most_of_the_ripple_of_time_embeddings(method, flux, told):
    x, t, condition = told
    v, one = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)), torch.ones(3)

    def slope(how, step):
        return derivative(lambda x, t: flux(x, t, condition).sample, x, t, v, one, how, step)

    trend = slope("difference", 0.05)
    ripple, left = ((slope(*way) - trend).norm() for way in (("jvp", 1.0), ("difference", method.step)))
    # random weights hear all frequencies alike: the ripple is 20 to 50 times the trend, and a tenth of it is left
    assert ripple > 10 * trend.norm() and left < ripple / 4


def test_a_derivative_is_taken_in_fp32_and_keeps_no_cast_weight(dit, batch):
    x, t, condition = batch
    seen = []

    def f(x, t):
        out = dit(x, t, condition).sample
        seen.append(out.dtype)
        return out

    with torch.autocast("cpu", torch.bfloat16):
        derivative(f, x, t, x, torch.ones(4))
        assert dit(x, t, condition).sample.dtype == torch.bfloat16
        dit(x, t, condition).sample.float().sum().backward()  # through casts of its own
    assert seen == [torch.float32] * 2
    assert all(p.grad is not None for p in dit.parameters() if p.requires_grad)


@pytest.mark.parametrize("how", ["difference", "jvp"])
def test_all_calls_see_the_same_dropout(how):
    x, masks = torch.ones(1, 1, 8, 8), []

    def f(x, t):
        mask = torch.nn.functional.dropout(torch.ones(1, 1, 8, 8))
        masks.append(mask)
        return x * mask

    slope = derivative(f, x, torch.ones(1), x, torch.ones(1), how)
    f(x, torch.ones(1))
    assert all(torch.equal(m, masks[0]) for m in masks) and 0 < masks[0].count_nonzero() < 64
    torch.testing.assert_close(slope, masks[0], rtol=1e-3, atol=1e-3)  # fp32 over 2e-2


# ---- the identity ----------------------------------------------------------------------------------------------------


def average(lam: float):
    """The mean velocity of v = lam z: z_r = z_t e^(-lam (t - r)), so u = z (1 - e^(-lam (t - r))) / (t - r)."""

    def u(x, t, condition):
        length = (t - condition.end).double().view(-1, 1, 1, 1)
        exact = torch.where(length == 0, lam, -torch.expm1(-lam * length) / torch.where(length == 0, 1, length))
        return x * exact.to(x.dtype)

    return u


def test_the_mean_velocity_of_a_linear_field_is_the_published_number():
    u = average(-0.7)(torch.full((1, 1, 1, 1), 1.3), torch.tensor([0.8]), Condition(end=torch.tensor([0.3])))
    assert u.item() == pytest.approx(-1.08958, abs=1e-5)


@pytest.mark.parametrize("how, near", [("jvp", 1e-6), ("difference", 1e-4)])  # fp32; fp32 over 2e-3, times t - r
def test_the_mean_velocity_of_a_linear_field_fulfils_the_identity(how, near):
    x, t = torch.tensor([1.3, -0.4, 1.3]).view(3, 1, 1, 1), torch.tensor([0.8, 0.6, 0.8])
    condition = Condition(end=torch.tensor([0.3, 0.0, 0.8]))
    u = average(-0.7)
    target = mean_velocity(u, x, t, -0.7 * x, condition, how, 1e-3)
    torch.testing.assert_close(target, u(x, t, condition), rtol=0, atol=near)
    assert torch.equal(target[2], -0.7 * x[2])  # no way to go: the velocity itself


def test_a_deepcopy_has_an_input_of_its_own(dit, batch):
    edit.apply(dit, {"flow_map": IntervalInput()})
    twin = deepcopy(dit)
    randomise(twin.edits["flow_map"])
    led = ends(batch, 0.0, 0.0, 0.0, 0.0)
    with torch.no_grad():
        assert not torch.equal(twin(*led).sample, dit(*led).sample)


@pytest.mark.parametrize("method", [MeanFlow(), Shortcut()], ids=lambda m: type(m).__name__)
def test_a_flow_map_is_sampled_by_what_tells_it_its_ends_and_ends_there(method):
    method.check(Euler(4))
    method.check(Grid((1.0, 0.4), shift=3.0))
    for solver in (Heun(2), EulerMaruyama(4), Grid((1.0, 0.4), renoise=True), DDPMSolver(4)):
        with pytest.raises(
            ValueError, match=f"{type(method).__name__} trains.* {type(solver).__name__}.*renoise=false"
        ):
            method.check(solver)


# ---- the methods -----------------------------------------------------------------------------------------------------


def spread(t):
    """Standard deviation of x_t, for data N(0, 0.5^2)."""
    return ((1 - t) ** 2 / 4 + t**2).sqrt().view(-1, 1, 1, 1)


def teacher(x, t, condition):
    s = t.view(-1, 1, 1, 1)
    return x * (s - (1 - s) / 4) / spread(t) ** 2


class Learner(nn.Module):
    """The teacher plus a learned multiple of x that knows where the step begins and how long it is; zero at first."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 1))
        nn.init.zeros_(self.net[2].weight)
        nn.init.zeros_(self.net[2].bias)

    def forward(self, x, t, condition):
        length = torch.zeros_like(t) if condition.end is None else t - condition.end
        return teacher(x, t, None) + x * self.net(torch.stack((t, length), 1)).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    "method",
    [MeanFlow(apart=0.75, p=0.5), MeanFlow("data", 0.75, p=0.5), Shortcut(), SCM(), SCM("data")],
    ids=["mean flow", "mean flow on data", "shortcut", "scd", "scm"],
)
def test_in_a_few_steps_a_student_learns_where_the_way_of_a_gaussian_leads(method):
    student, own = Learner(), LossWeight()
    optimizer = torch.optim.Adam([*student.parameters(), *own.parameters()], lr=1e-2)
    roles = Models(student, student, student, teacher, student, student, own)
    t, end = torch.tensor([0.3, 0.5, 0.7, 0.8, 0.8]), torch.tensor([0.1, 0.0, 0.2, 0.0, 0.5])
    told = Condition(end=end)
    if isinstance(method, SCM):  # which leads to data, and is not told so
        end, told = 0 * end, Condition()

    @torch.no_grad()
    def error():
        x = spread(t)
        x = x - (t - end).view(-1, 1, 1, 1) * student(x, t, told)
        return (x - spread(end)).abs().max()

    before = error()
    for k in range(300):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - k / 300)
        draws = Draws(0, torch.arange(128) + 128 * k, k, (1, 2, 2))
        given = Seen(Condition(), Condition(), torch.ones(128), draws, k / 300, draws.gaussian(50) / 2)
        optimizer.zero_grad()
        sum(method.student_losses(view(roles, given)).values()).mean().backward()
        optimizer.step()
    assert before > 0.4 and error() < before / 2  # the longest way; after 2400 steps of twice the width by 8 to 90
