"""Some image tokens alone (`edit.subset`), on every tiny backbone, and losses over them."""

import math
from dataclasses import replace

import pytest
import torch
from families import BACKBONES, inputs
from torch import Tensor
from weights import randomise

from edit.denoiser import Denoiser
from edit.grid import pixels
from edit.objectives import DDPM, EDM, FlowMatching
from edit.paths import mean
from edit.predictions import default_objective
from edit.stream import Condition, Layout, Output, Stream
from edit.subset import covered, gathered, left, subset, whole

every = pytest.mark.parametrize("name", BACKBONES)
# sums in float64 are in another order; stock RoPE is fp32, see `families.TOLERANCE`
NEAR = {"flux": 1e-6, "flux untold": 1e-6, "qwen_image": 1e-6}


@pytest.fixture(scope="module")
def family():
    made: dict[str, Denoiser] = {}

    def make(name: str) -> Denoiser:
        if name not in made:
            torch.manual_seed(0)
            made[name] = BACKBONES[name].build()
            randomise(made[name])
            made[name].double().eval()
        return made[name]

    return make


def some(denoiser: Denoiser, count: int, k: int | None = None) -> Tensor:
    """Numbers of image tokens, ascending, others in each sample: b k; a half of them, or `k`."""
    with torch.no_grad():
        grid = denoiser.embed(**denoiser.pack(*inputs(denoiser, count))).layout.grid
    n, g = math.prod(grid), torch.Generator().manual_seed(3)
    scores = torch.rand(count, n, generator=g)
    return scores.topk(k or n // 2, 1).indices.sort(1).values


class Blind:
    """The slot `attention` of a full forward in which nobody sees the tokens that are not kept."""

    def __init__(self, kept: Tensor, count: int):
        self.kept, self.count = kept, count

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, step=None) -> Tensor:
        start = layout.registers
        if q.shape[2] > layout.registers + self.count and layout.side == "front":
            start += layout.text_length
        seen = torch.ones(len(q), q.shape[2], dtype=torch.bool)
        seen[:, start : start + self.count] = False
        seen = seen.scatter(1, self.kept + start, True)
        bias = torch.where(seen, 0.0, -math.inf).to(q.dtype)[:, None, None]
        joint = layout.joint_mask(k.shape[2])
        if joint is not None:
            bias = bias.masked_fill(~joint[:, None, None], -math.inf)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)


# ---- tokens ----------------------------------------------------------------------------------------------------------


@every
@torch.no_grad()
def test_all_tokens_in_their_order_predict_what_the_plain_forward_does(name, family):
    denoiser = family(name)
    x, t, condition = inputs(denoiser)
    plain = denoiser(x, t, condition, taps=(0, "norm"))
    n = math.prod(plain.grid)
    everything = torch.arange(n).expand(2, -1)
    out = denoiser(x, t, replace(condition, kept=everything), taps=(0, "norm"))
    near = NEAR.get(name, 1e-12)
    torch.testing.assert_close(out.sample, plain.sample, rtol=near, atol=near)
    for tap in plain.trace:
        torch.testing.assert_close(out.trace[tap], plain.trace[tap], rtol=near, atol=near)
    assert torch.equal(out.kept, everything) and plain.kept is None


@every
@torch.no_grad()
def test_kept_tokens_are_what_attention_over_them_alone_makes_at_their_true_places(name, family):
    denoiser = family(name)
    x, t, condition = inputs(denoiser)
    kept = some(denoiser, 2)
    out = denoiser(x, t, replace(condition, kept=kept), taps=(-1, "norm", "output"))
    grid = out.grid
    for unit in denoiser.units:
        unit.slots.attention = Blind(kept, math.prod(grid))
    try:
        plain = denoiser(x, t, condition, taps=(-1, "norm", "output"))
    finally:
        for unit in denoiser.units:
            del unit.slots.attention
    near = NEAR.get(name, 1e-10)
    last = f"unit.{len(denoiser.units) - 1}"
    for tap in (last, "end.norm", "end.output"):
        assert out.trace[tap].shape[1] == kept.shape[1]
        torch.testing.assert_close(out.trace[tap], gathered(plain.trace[tap], kept), rtol=near, atol=near)
    if f"{last}.text" in plain.trace:
        torch.testing.assert_close(out.trace[f"{last}.text"], plain.trace[f"{last}.text"], rtol=near, atol=near)
    where = covered(out)
    torch.testing.assert_close(out.sample, torch.where(where, plain.sample, 0), rtol=near, atol=near)
    if plain.variance is not None:
        torch.testing.assert_close(out.variance, torch.where(where, plain.variance, 0), rtol=near, atol=near)


@every
@torch.no_grad()
def test_places_matter(name, family):
    denoiser = family(name)
    x, t, condition = inputs(denoiser)
    kept = some(denoiser, 2)
    stream = subset(denoiser.embed(**denoiser.pack(x, t, condition)), kept)
    moved = replace(stream, layout=replace(stream.layout, rope=None if stream.layout.rope is None else lost(stream)))
    if stream.layout.rope is None:
        return  # they were added to the tokens, which the other tests compare
    assert not torch.allclose(denoiser.run(stream).image, denoiser.run(moved).image, rtol=1e-3)


def lost(stream: Stream) -> Tensor:
    """The table with the image tokens' positions in another order."""
    rope, k = stream.layout.rope, stream.layout.kept.shape[1]
    return torch.cat((rope[..., :-k, :], rope[..., -k:, :].flip(-2)), -2)


@every
def test_gradients_reach_kept_tokens_alone(name, family):
    denoiser = family(name)
    x, t, condition = inputs(denoiser)
    x.requires_grad_(True)
    out = denoiser(x, t, replace(condition, kept=some(denoiser, 2)))
    (g,) = torch.autograd.grad(out.sample.square().sum(), x)
    where = covered(out).expand_as(g)
    assert bool(g[where].any()) and not bool(g[~where].any())


def test_tapped_tokens_are_those_of_the_forward(family):
    denoiser = family("dit swiglu")
    x, t, condition = inputs(denoiser)
    condition = replace(condition, kept=some(denoiser, 2, 3))
    wanted = denoiser(x, t, condition, taps=(0,)).trace["unit.0"]
    assert torch.equal(denoiser.tapped(x, t, condition, (0,))["unit.0"], wanted) and wanted.shape[1] == 3


def test_a_layout_of_some_tokens_keeps_its_rows_with_its_samples(family):
    for name in ("dit swiglu", "flux", "wan"):
        denoiser = family(name)
        x, t, condition = inputs(denoiser, 3)
        kept = some(denoiser, 3)
        stream = subset(denoiser.embed(**denoiser.pack(x, t, condition)), kept)
        rows = torch.tensor([2, 0])
        alone = condition.map(lambda v, rows=rows: v[rows])
        wanted = subset(denoiser.embed(**denoiser.pack(x[rows], t[rows], alone)), kept[rows])
        found = stream.layout.map(lambda v, rows=rows: v[rows])
        assert torch.equal(found.rope, wanted.layout.rope) and torch.equal(found.kept, kept[rows])


def test_scattered_tokens_are_at_their_places_among_zeros():
    tokens, kept = torch.randn(3, 12, 5), torch.tensor([[0, 3, 11], [1, 2, 3], [4, 7, 9]])
    stream = Stream(tokens, torch.zeros(3, 5), Layout((1, 3, 4)))
    back = whole(subset(stream, kept)).image
    there = torch.zeros(3, 12, dtype=torch.bool).scatter(1, kept, True)
    assert torch.equal(back[there], tokens[there]) and not back[~there].any()
    assert whole(stream) is stream and subset(stream, None) is stream


def test_registers_and_further_tokens_stay():
    tokens, kept = torch.randn(2, 2 + 6 + 1, 5), torch.tensor([[0, 5], [2, 3]])
    stream = Stream(tokens, torch.zeros(2, 5), Layout((1, 2, 3), registers=2, further=1))
    found = subset(stream, kept).image
    assert torch.equal(found[:, :2], tokens[:, :2]) and torch.equal(found[:, -1], tokens[:, -1])
    assert torch.equal(found[0, 2:4], tokens[0, [2, 7]]) and torch.equal(found[1, 2:4], tokens[1, [4, 5]])


def test_a_share_of_tokens_is_a_whole_number_rounded_down_and_never_none():
    assert [left(256, r) for r in (0, 0.5, 0.75, 0.99)] == [256, 128, 64, 2]
    assert left(20, 0.9) == 2  # 20 * (1 - 0.9) is a hair less
    assert left(4, 0.9) == 1


@pytest.mark.parametrize("shape", [(2,), (2, 0), (2, 17)])
def test_a_selection_of_another_shape_is_refused(dit, shape):
    kept = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match="1 to 16 of them in each sample, got shape .*: keep at least one"):
        dit(torch.randn(2, 4, 8, 8), torch.rand(2), Condition(label=torch.zeros(2, dtype=torch.int64), kept=kept))


def test_tokens_in_another_order_are_refused(dit, batch):
    x, t, condition = batch
    kept = torch.arange(3).expand(4, -1)
    stream = dit.embed(**dit.pack(x, t, condition))
    turned = replace(stream, layout=replace(stream.layout, permutation=torch.arange(16).flip(0)))
    with pytest.raises(ValueError, match="another order: leave one of the two out"):
        subset(turned, kept)
    thin = subset(stream, kept)
    with pytest.raises(ValueError, match="another order: leave one of the two out"):
        dit.run(replace(thin, layout=replace(thin.layout, permutation=torch.arange(16).flip(0))))


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_a_mean_over_some_elements_is_over_them_alone():
    x = torch.randn(2, 3, 4, 4)
    where = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    where[0, :, :2], where[1, :, 1, 1] = True, True
    assert torch.allclose(mean(x, where), torch.stack((x[0, :, :2].mean(), x[1, :, 1, 1].mean())))
    assert torch.equal(mean(x), x.flatten(1).mean(1))


def scored(objective, out: Output, x: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
    return objective.losses(out, x, noise, objective.corrupt(x, noise, t), t)


OBJECTIVES = [FlowMatching(cosine=0.5), FlowMatching(weighting="snr_cap"), DDPM(), EDM()]
SHAPES = {"picture": ((3, 8, 8), (1, 4, 2)), "video": ((3, 4, 8, 8), (2, 4, 4))}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{type(o).__name__} {o.time}"[:20])
@pytest.mark.parametrize("kind", SHAPES)
def test_targets_of_dropped_tokens_change_no_loss_and_those_of_kept_ones_do(objective, kind):
    shape, grid = SHAPES[kind]
    x, noise, t = torch.randn(2, *shape), torch.randn(2, *shape), objective.times(torch.tensor([0.3, 0.8]))
    n = math.prod(grid)
    kept = torch.stack((torch.arange(n // 4), torch.arange(n // 4) * 2 + 1))
    variance = torch.randn(2, *shape) if isinstance(objective, DDPM) else None
    out = Output(torch.randn(2, *shape), variance, {}, grid, kept)
    where = covered(out)
    assert where.sum() * n == where[0].numel() * 2 * (n // 4)
    before = scored(objective, out, x, noise, t)
    dropped = scored(objective, out, torch.where(where, x, x - 1), torch.where(where, noise, noise + 1), t)
    moved = scored(objective, out, x, torch.where(where, noise + 1, noise), t)
    for name, value in before.items():
        assert torch.equal(dropped[name], value) and not torch.isclose(moved[name], value).any(), name


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{type(o).__name__} {o.time}"[:20])
def test_the_mean_of_masked_losses_over_all_masks_is_the_whole_loss(objective):
    shape, grid = (3, 4, 4), (1, 2, 2)
    x, noise, t = torch.randn(2, *shape), torch.randn(2, *shape), objective.times(torch.tensor([0.3, 0.8]))
    variance = torch.randn(2, *shape) if isinstance(objective, DDPM) else None
    out = Output(torch.randn(2, *shape), variance, {}, grid)
    masks = torch.combinations(torch.arange(4), 2)
    found = [scored(objective, out._replace(kept=m.expand(2, -1)), x, noise, t) for m in masks]
    for name, value in scored(objective, out, x, noise, t).items():
        torch.testing.assert_close(torch.stack([f[name] for f in found]).mean(0), value)


def test_all_tokens_have_the_loss_of_a_plain_output_bit_for_bit():
    out = Output(torch.randn(2, 3, 4, 4), None, {}, (1, 2, 2))
    x, noise, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.3, 0.8])
    (loss,) = scored(FlowMatching(), out, x, noise, t).values()
    assert torch.equal(loss, ((out.sample - (noise - x)) ** 2).flatten(1).mean(1))


@every
def test_the_objective_of_every_backbone_is_scored_on_kept_tokens(name, family):
    denoiser, objective = family(name), default_objective(family(name))
    x, t, condition = inputs(denoiser)
    noise, t = torch.randn_like(x), objective.times(t)
    with torch.no_grad():
        out = denoiser(x, t, replace(condition, kept=some(denoiser, 2)))
    assert all(v.isfinite().all() for v in scored(objective, out, x, noise, t).values())


def test_pixels_of_tokens_are_blocks():
    found = pixels(torch.arange(4).view(1, 4), (1, 2, 2), (4, 6))
    assert torch.equal(found[0, 0, ::2, ::3], torch.tensor([[0, 1], [2, 3]])) and (found[0, 0, :2, :3] == 0).all()
