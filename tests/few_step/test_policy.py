"""Oracle 11 of methods/distillation.md, and what training and sampling by a policy ask for."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from views import Models, view

import edit
from edit.artifacts.checkpoint import load, save
from edit.few_step.policy import MixtureHead, Policy, PolicyImitation, PolicySolver, segments
from edit.losses import Draws, Seen
from edit.objectives import FlowMatching, shift_times
from edit.paths import corrupt
from edit.sampling import Sampler
from edit.solvers import Euler
from edit.stream import Condition, Output
from edit.tuning.lora import LoRA

SHAPE = (2, 4, 4)


def policy(k: int = 3, std: float = 0.5, s: tuple[float, ...] = (1.0, 0.6), dtype=torch.float64) -> Policy:
    """Random, of two samples."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=g, dtype=dtype)

    spread = std * (0.3 * draw(1, 4, 4)).exp()
    return Policy(draw(*SHAPE), torch.tensor(s, dtype=dtype), draw(*SHAPE), draw(k, *SHAPE), draw(k, 4, 4), spread)


def wide(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1, 1)


def by_the_book(p: Policy, x: Tensor, t: Tensor) -> Tensor:
    """The specification's formulas as they stand there."""
    t, s = wide(t), wide(p.s)
    means = p.x[:, None] - s[:, None] * (p.u[:, None] + p.offsets)  # b k c y x
    variance = (s * p.std).square()[:, None]
    zeta = (((1 - t) / t) ** 2 - ((1 - s) / s) ** 2)[:, None]
    nu = ((1 - t) * x / t**2 - (1 - s) * p.x / s**2)[:, None]
    precision = 1 / variance + zeta
    after = (means / variance + nu) / precision
    weights = (p.logits + 0.5 * (precision * after**2 - means**2 / variance).sum(2)).softmax(1)
    return (x - (weights[:, :, None] * after).sum(1)) / t


def test_the_stable_form_is_the_specification_s():
    p = policy()
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    for part in (0.999, 0.7, 0.2, 0.05):
        t = part * p.s
        # two forms in float64; the book's loses digits to 1 / t^2 at small t
        torch.testing.assert_close(p.velocity(x, t), by_the_book(p, x, t), rtol=1e-9, atol=1e-9)


def test_where_the_segment_starts_it_is_the_mixtures_mean_velocity():
    p = policy()
    mean = (p.logits.softmax(1)[:, :, None] * (p.x[:, None] - wide(p.s)[:, None] * (p.u[:, None] + p.offsets))).sum(1)
    torch.testing.assert_close(p.velocity(p.x, p.s), (p.x - mean) / wide(p.s))


def test_one_component_without_width_is_a_straight_line_to_its_mean():
    p = policy(k=1, std=1e-12)
    mean = p.x - wide(p.s) * (p.u + p.offsets[:, 0])
    halfway = mean + 0.5 * (p.x - mean)  # of the line from the mean at time 0 to x at s
    torch.testing.assert_close(p.velocity(halfway, 0.5 * p.s), p.u + p.offsets[:, 0])
    torch.testing.assert_close(p.follow(p.x, p.s, 0 * p.s, 7, 1.0), mean)


# ---- data of a known law: K Gaussians of one std, in every pixel ----------------------------------------------------

STD = 0.4
CENTRES = torch.tensor([[1.0, -0.5], [-0.8, 0.3], [0.2, 1.1]])  # k c


def posterior(x: Tensor, t: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the data given x_t: means b k c y x, log weights b k y x, variance b 1 1 1."""
    t, m = wide(t), centres.to(x)[None, :, :, None, None]
    spread = ((1 - t) * STD) ** 2 + t**2
    apart = x[:, None] - (1 - t)[:, None] * m
    means = m + ((1 - t) * STD**2 / spread)[:, None] * apart
    return means, -(apart**2).sum(2) / (2 * spread), (STD * t) ** 2 / spread


def field(x: Tensor, t: Tensor, condition: object = None, centres: Tensor = CENTRES) -> Tensor:
    """The law's exact velocity."""
    means, logits, _ = posterior(x, t, centres)
    return (x - (logits.softmax(1)[:, :, None] * means).sum(1)) / wide(t)


def belief(x: Tensor, t: Tensor, condition: object = None, centres: Tensor = CENTRES) -> Output:
    """What a perfect student with a mixture head says."""
    means, logits, variance = posterior(x, t, centres)
    u = field(x, t, None, centres)
    offsets = (x[:, None] - means) / wide(t)[:, None] - u[:, None]
    log_std = (0.5 * variance.log() - wide(t).log()).expand(-1, 1, *x.shape[2:])
    return Output(u, None, {"policy": torch.cat((offsets.flatten(1, 2), logits, log_std), 1)})


def believed(x: Tensor, t: Tensor, centres: Tensor = CENTRES) -> Policy:
    out = belief(x, t, None, centres)
    return Policy.of(out.trace["policy"], out.sample, x, t)


@pytest.mark.parametrize("centres", [CENTRES, torch.zeros(1, 2)], ids=["mixture", "gaussian"])
def test_of_the_true_posterior_it_is_the_probability_flow(centres):
    x, s = torch.randn(2, *SHAPE), torch.tensor([1.0, 0.6])
    p = believed(x, s, centres)
    for part in (1.0, 0.8, 0.3, 0.02):  # anywhere, on its own path or not; fp32
        y = torch.randn(2, *SHAPE)
        exact = field(y, part * s, None, centres)
        torch.testing.assert_close(p.velocity(y, part * s), exact, rtol=1e-3, atol=1e-3)


def test_followed_to_data_it_ends_where_the_flow_of_a_gaussian_ends():
    x, s = torch.randn(2, *SHAPE), torch.tensor([1.0, 0.6])
    p = believed(x, s, torch.zeros(1, 2))
    spread = wide((((1 - s) * STD) ** 2 + s**2).sqrt())

    def error(substeps: int) -> Tensor:
        return (p.follow(x, s, 0 * s, substeps, 1.0) - x * STD / spread).abs().max()

    assert error(128) < 0.02
    assert 1.8 < error(64) / error(128) < 2.2  # Euler: first order


@pytest.mark.parametrize("t", [1.0, 1e-2, 1e-4, 1e-7, 0.0])
@pytest.mark.parametrize("log_std", [-60.0, -3.0, 3.0])
def test_values_and_gradients_are_finite_as_time_and_width_vanish(t, log_std):
    mixture = torch.randn(2, 3 * 2 + 3 + 1, 4, 4)
    mixture[:, -1] = log_std
    u, x = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    mixture.requires_grad_()
    p = Policy.of(mixture, u, x, torch.ones(2))
    v = p.velocity(torch.randn(2, *SHAPE), torch.full((2,), t))
    v.sum().backward()
    assert v.isfinite().all() and mixture.grad.isfinite().all()


# ---- the head -------------------------------------------------------------------------------------------------------


def with_head(denoiser, **options):
    denoiser = edit.apply(deepcopy(denoiser), {"policy": MixtureHead(**options)})
    return denoiser.requires_grad_(True)


@pytest.fixture(params=["dit", "registers", "flux"])
def model(request, make_dit, flux, batch, told):
    if request.param == "flux":
        return flux, told
    return make_dit(registers=2 if request.param == "registers" else 0), batch


def test_a_new_head_leaves_the_prediction_and_its_policy_starts_with_it(model):
    denoiser, (x, t, condition) = model
    before, out = denoiser(x, t, condition), with_head(denoiser)(x, t, condition)
    torch.testing.assert_close(out.sample, before.sample, rtol=0, atol=0)
    p = Policy.of(out.trace["policy"], out.sample, x, t)
    assert p.offsets.shape == (len(x), 8, *x.shape[1:]) and p.std.shape == (len(x), 1, *x.shape[2:])
    assert p.offsets.std() > 0.02  # components that were one would stay one
    torch.testing.assert_close(p.velocity(x, t), out.sample, rtol=1e-5, atol=1e-5)


def test_each_pixel_has_the_mixture_of_its_token(model):
    denoiser, (x, t, condition) = model
    denoiser = with_head(denoiser, components=2)
    head, seen = denoiser.edits["policy"], []
    torch.nn.init.normal_(head[1].weight)
    head.register_forward_hook(lambda module, args, out: seen.append(out))
    mixture = denoiser(x, t, condition).trace["policy"]
    tokens = seen[0].unflatten(2, (2, 2, -1))  # both models have tokens of 2 x 2 pixels
    row, column = 5, 2
    torch.testing.assert_close(mixture[:, :, row, column], tokens[:, (row // 2) * 4 + column // 2, row % 2, column % 2])


def test_a_lora_student_trains_lora_and_head(dit):
    denoiser = edit.apply(dit, {"lora": LoRA(rank=2), "policy": MixtureHead()})
    trained = {n for n, _ in denoiser.named_parameters() if edit.edits.trains(denoiser, n)}
    assert trained == {n for n, _ in denoiser.named_parameters() if ".lora_" in n or n.startswith("edits.policy")}


# ---- training -------------------------------------------------------------------------------------------------------


def given(count: int = 2, progress: float = 0.0, shape=SHAPE, condition=None, moment: int = 0, x=None) -> Seen:
    condition = condition or Condition(label=torch.zeros(count, dtype=torch.int64))
    return Seen(
        condition, condition, torch.ones(count), Draws(0, torch.arange(count), moment, shape), progress=progress, x=x
    )


def roles(output, teacher) -> Models:
    def none(*_):
        raise AssertionError("not asked for by this method")

    return Models(none, output, none, torch.no_grad()(teacher), none, none)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0], ids=["teacher's path", "mixed", "own path"])
@pytest.mark.parametrize("data", [False, True], ids=["prompts", "data"])
def test_a_student_that_knows_the_law_has_nothing_to_learn(progress, data):
    method = PolicyImitation(needs_data=data)
    for moment in range(4):
        batch = given(4, progress, moment=moment, x=STD * torch.randn(4, *SHAPE) if data else None)
        losses = method.student_losses(view(roles(belief, field), batch))
        assert losses["policy"].shape == (4,)
        assert losses["policy"].max() < 1e-3  # 30 times the square of fp32 errors of some 1e-3 at small times


def test_any_other_width_is_worse_and_the_gradient_says_so():
    """Small data: a policy with a belief that is too wide or too narrow departs from the flow."""

    def slope(change: float) -> float:
        by = torch.tensor(change, requires_grad=True)

        def output(x: Tensor, t: Tensor, condition: object) -> Output:
            out = belief(x, t, None, torch.zeros(1, 2))
            mixture = out.trace["policy"]
            return out._replace(trace={"policy": torch.cat((mixture[:, :-1], mixture[:, -1:] + by), 1)})

        teacher = lambda x, t, condition: field(x, t, None, torch.zeros(1, 2))  # noqa: E731
        loss = PolicyImitation().student_losses(view(roles(output, teacher), given(8, 1.0)))["policy"].sum()
        return torch.autograd.grad(loss, by)[0].item()

    assert slope(-0.5) < 0 < slope(0.5)


def test_imitation_of_the_velocity_finds_the_law_of_the_data():
    """At noise every sample has the same posterior, the law itself: a student of constants can learn it, and does."""
    offsets = 0.05 * torch.randn(3, 2)
    offsets -= offsets.mean(0)
    mixture = torch.cat((offsets.flatten(), torch.zeros(3), torch.tensor([math.log(0.05)])))
    mean, mixture = torch.zeros(2, requires_grad=True), mixture.requires_grad_()

    def output(x: Tensor, t: Tensor, condition: object) -> Output:
        return Output(x - mean[:, None, None], None, {"policy": mixture[None, :, None, None].expand(len(x), -1, 4, 4)})

    method, optimizer = PolicyImitation(steps=1, shift=1.0, substeps=12), torch.optim.Adam([mean, mixture], 0.05)
    for k in range(120):
        batch = replace(given(16, k / 120), draws=Draws(0, torch.arange(16 * k, 16 * k + 16), k, SHAPE))
        optimizer.zero_grad()
        method.student_losses(view(roles(output, field), batch))["policy"].mean().backward()
        optimizer.step()
    means = (mean - mixture[:6].view(3, 2)).detach()
    nearest = torch.cdist(CENTRES, means).min(1)
    assert sorted(nearest.indices.tolist()) == [0, 1, 2] and nearest.values.max() < 0.1
    assert mixture[-1].exp().item() == pytest.approx(STD, abs=0.05)
    assert (mixture[6:9].softmax(0) - 1 / 3).abs().max() < 0.05


def test_gradients_reach_the_whole_student_and_the_path_has_none(dit, batch):
    condition = batch[2]
    student = with_head(dit)
    torch.nn.init.normal_(student.edits["policy"][1].weight, std=0.1)
    teacher = deepcopy(dit).requires_grad_(True)
    asked = []

    def taught(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        asked.append(x.requires_grad)
        return teacher(x, t, condition).sample

    batch = given(4, 0.3, (4, 8, 8), condition)
    PolicyImitation().student_losses(view(roles(student, taught), batch))["policy"].sum().backward()
    assert asked == [False] * 4
    assert all(p.grad is None for p in teacher.parameters())
    idle = [n for n, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_without_data_a_segment_starts_where_the_one_before_has_ended():
    """Segments are drawn by their length; only the call at the start of the drawn one has a graph."""
    method, started = PolicyImitation(substeps=4, points=1), []
    for moment in range(200):
        calls = []

        def output(x: Tensor, t: Tensor, condition: object, calls=calls) -> Output:
            calls.append((float(t[0]), torch.is_grad_enabled(), x))
            return belief(x, t)

        method.student_losses(view(roles(output, field), given(1, 1.0, moment=moment)))
        starts = shift_times(segments(4, 0.5), 3.2).tolist()[: len(calls)]
        assert [c[0] for c in calls] == pytest.approx(starts)
        assert [c[1] for c in calls] == [False] * (len(calls) - 1) + [True]
        started.append(len(calls) - 1)
    shares = [started.count(k) / 200 for k in range(4)]
    # 2/7, 2/7, 2/7, 1/7; 0.1 is three standard deviations of a share of 200
    assert all(abs(a - b) < 0.1 for a, b in zip(shares, (2 / 7, 2 / 7, 2 / 7, 1 / 7), strict=True))


def test_with_data_a_segment_starts_at_noised_data():
    method, x = PolicyImitation(needs_data=True, steps=2, last=1.0, shift=1.0), torch.randn(64, *SHAPE)
    seen = {}

    def output(x_t: Tensor, t: Tensor, condition: object) -> Output:
        seen.update(x=x_t, t=t)
        return belief(x_t, t)

    batch = given(64, x=x)
    method.student_losses(view(roles(output, field), batch))
    assert set(seen["t"].tolist()) == {1.0, 0.5}
    torch.testing.assert_close(seen["x"], corrupt(x, batch.draws.gaussian(0), seen["t"]))


def test_points_lie_within_the_segment_and_the_teachers_share_falls():
    """While the path is all the teacher's the first point is the start; once it is the student's own it is anywhere."""
    first = {}
    for progress in (0.0, 1.0):
        times = []

        def teacher(x: Tensor, t: Tensor, condition: object, times=times) -> Tensor:
            times.append(t)
            return field(x, t)

        method = PolicyImitation(steps=1, shift=1.0)
        method.student_losses(view(roles(belief, teacher), given(64, progress)))
        assert len(times) == 4
        way = torch.stack(times)
        assert (way.diff(dim=0) <= 0).all() and 0 < way.min() and way.max() <= 1
        first[progress] = way[0]
    assert (first[0.0] == 1).all()
    assert first[1.0].std() > 0.1  # the largest of four uniform numbers has a std of 0.16


# ---- sampling -------------------------------------------------------------------------------------------------------


def test_segments_fill_the_time_and_the_last_is_shorter():
    assert segments(4, 0.5).tolist() == pytest.approx([1, 5 / 7, 3 / 7, 1 / 7, 0])
    assert segments(1, 0.5).tolist() == [1, 0]


def test_a_perfect_student_samples_the_flow_in_one_call():
    x, calls = torch.randn(3, *SHAPE), []

    def predict(x_t: Tensor, t: float, end: float | None = None) -> Tensor:
        calls.append(t)
        out = belief(x_t, torch.full((3,), t))
        return torch.cat((out.sample, out.trace["policy"]), 1)

    fine = x
    for k in range(2000):
        t = torch.full((3,), 1 - k / 2000)
        fine = fine - field(fine, t) / 2000
    for steps in (1, 4):
        calls.clear()
        got = PolicySolver(steps, shift=1.0, substeps=1000).integrate(predict, x, FlowMatching(), lambda k: x)
        assert len(calls) == steps
        assert (got - fine).abs().mean() < 0.01  # both are Euler's, 1000 and 2000 steps


def test_an_artifact_samples_as_the_model_it_was_saved_from(tmp_path, dit):
    student = with_head(dit, components=3).eval()
    torch.nn.init.normal_(student.edits["policy"][1].weight, std=0.1)
    sampler = Sampler(PolicySolver(steps=2, substeps=8), guidance=1.5)
    told, numbers = Condition(label=torch.tensor([1, 2])), torch.arange(2)
    before = sampler(student, FlowMatching(), told, numbers)
    artifact = load(save(student, tmp_path / "a", FlowMatching(), sampler))
    assert artifact.sampler == sampler
    assert artifact.denoiser.applied["policy"] == MixtureHead(components=3)
    after = artifact.sampler(artifact.denoiser, artifact.objective, told, numbers)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert before.isfinite().all()


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_sampler_that_does_not_sample_as_it_trains_is_refused():
    method = PolicyImitation()
    method.check(PolicySolver(substeps=64))  # finer or coarser is the user's to choose
    for solver in (Euler(4), PolicySolver(steps=8), PolicySolver(shift=1.0)):
        with pytest.raises(ValueError, match="PolicyImitation trains 4 segments.*use sampler.solver="):
            method.check(solver)


def test_a_student_without_a_head_is_refused(dit):
    with pytest.raises(ValueError, match="use edits=policy"):
        PolicyImitation().build(dit, None)
    with pytest.raises(ValueError, match="PolicySolver needs a model that records 'policy'"):
        Sampler(PolicySolver())(dit, FlowMatching(), Condition(label=torch.tensor([1])), torch.arange(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: PolicySolver(steps=0),
        lambda: PolicySolver(substeps=3),
        lambda: PolicySolver(last=0.0),
        lambda: PolicySolver(shift=0.0),
        lambda: PolicyImitation(points=0),
        lambda: PolicyImitation(last=2.0),
        lambda: MixtureHead(components=0),
        lambda: MixtureHead(std=0.0),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(ValueError, match="at least|above|positive|<="):
        make()


def test_a_model_has_one_mixture(dit):
    with pytest.raises(ValueError, match="cannot be applied together"):
        edit.apply(with_head(dit), {"second": MixtureHead()})


def test_widths_are_in_units_of_the_start(dit, batch):
    out = with_head(dit, std=0.05)(*batch)
    assert out.trace["policy"][:, -1].mean().item() == pytest.approx(math.log(0.05))
