"""MicroDiT's deferred masking: oracles of methods/micro-dit.md that are the mixer's and the masks'."""

import math
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import BACKBONES, inputs
from torch import Tensor
from weights import randomise

import edit
from edit.backbones.micro_dit import MicroDiTConfig
from edit.denoiser import Denoiser
from edit.losses import Draws, Seen
from edit.measuring.flops import Flops
from edit.moe.expert_choice import ExpertChoice
from edit.predictions import default_objective
from edit.scaling.layer_wise import LayerWiseScaling
from edit.stream import Condition
from edit.structure import grid_of
from edit.subset import covered
from edit.tokens.micro_dit import DeferredMasking, Mixer, PatchMixer, positions

SMALL = {"depth": 2, "width": 32, "head": 16, "multiple": 32}
MIXED = ("dit swiglu", "flux", "pixart", "wan", "micro_dit")  # registers; text along; text aside; video; its own


def mixed(name: str, **options) -> Denoiser:
    """A model with a mixer, all weights random: gates and the last layer start at zero."""
    torch.manual_seed(0)
    denoiser = edit.apply(BACKBONES[name].build(), {"mixer": PatchMixer(**{**SMALL, **options})})
    randomise(denoiser)
    return denoiser.double().eval()


@pytest.fixture(scope="module")
def models() -> dict[str, Denoiser]:
    return {name: mixed(name) for name in MIXED}


def seen_of(
    denoiser: Denoiser, term: DeferredMasking, batch, progress: float = 0.0, first: int = 0, seed: int = 0
) -> Seen:
    x, t, condition = batch
    draws = Draws(seed, torch.arange(first, first + len(x)), 0, tuple(x.shape[1:])).of("masking")
    own = term.build(denoiser)
    return Seen(condition, condition, torch.ones(len(x)), draws, progress, x, x_t=x, t=t, own=own)


def loss_of(denoiser: Denoiser, batch, kept: Tensor | None, noise: Tensor) -> Tensor:
    """The objective's loss of each sample, on a clean sample x and noise."""
    x, t, condition = batch
    objective = default_objective(denoiser)
    t = objective.times(t)
    x_t = objective.corrupt(x, noise, t)
    out = denoiser(x_t, t, replace(condition, kept=kept))
    return torch.stack(list(objective.losses(out, x, noise, x_t, t).values())).sum(0)


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75, 0.9, 0.99])
def test_each_sample_keeps_as_many_tokens_as_is_said_and_others_than_its_neighbours(make_dit, ratio):
    dit = make_dit(input_size=16)  # 64 tokens
    term = DeferredMasking(ratio)
    batch = torch.randn(16, 4, 16, 16), torch.rand(16), Condition(label=torch.zeros(16, dtype=torch.int64))
    x_t, condition = term.mixed(seen_of(dit, term, batch))
    kept = condition.kept
    assert torch.equal(x_t, batch[0])
    assert kept.shape == (16, max(1, math.floor(64 * round(1 - ratio, 9))))
    assert bool((kept[:, 1:] > kept[:, :-1]).all()) and kept.min() >= 0 and kept.max() < 64
    assert len({tuple(row) for row in kept.tolist()}) > 8


def test_masks_are_functions_of_seed_and_sample_and_every_token_is_kept_as_often(make_dit):
    dit, term = make_dit(), DeferredMasking(0.75)  # 16 tokens, 4 are kept
    batch = torch.randn(4096, 4, 8, 8), torch.rand(4096), Condition()
    kept = term.mixed(seen_of(dit, term, batch))[1].kept
    part = tuple(v if isinstance(v, Condition) else v[:5] for v in batch)
    assert torch.equal(term.mixed(seen_of(dit, term, part, first=7))[1].kept, kept[7:12])
    assert not torch.equal(term.mixed(seen_of(dit, term, part, first=7, seed=1))[1].kept, kept[7:12])
    often = torch.bincount(kept.flatten(), minlength=16) / 4096
    assert (often - 0.25).abs().max() < 0.03  # four standard deviations
    pairs = torch.zeros(4096, 16).scatter(1, kept, 1.0)
    together = (pairs.T @ pairs / 4096).fill_diagonal_(0.05)
    assert (together - 4 * 3 / (16 * 15)).abs().max() < 0.018  # without regard to each other


def test_samples_of_another_size_than_the_models_are_counted_by_their_own(make_flux):
    flux, term = make_flux(sample_size=(8, 8)), DeferredMasking(0.75)
    batch = torch.randn(2, 4, 12, 8), torch.rand(2), Condition()
    assert term.mixed(seen_of(flux, term, batch))[1].kept.shape == (2, 6)


def test_all_tokens_are_seen_at_the_end_of_the_run_and_without_a_ratio(dit, batch):
    term = DeferredMasking(0.75, unmasked=0.25)
    assert term.mixed(seen_of(dit, term, batch, progress=0.74))[1].kept is not None
    assert term.mixed(seen_of(dit, term, batch, progress=0.75))[1].kept is None
    none = DeferredMasking(0)
    assert none.mixed(seen_of(dit, none, batch))[1].kept is None and not none.drops
    assert (term.drops, term.drops_until) == (0.75, 0.75)


def test_it_adds_no_loss_and_tells_the_share_of_tokens(dit, batch):
    term = DeferredMasking(0.75)
    seen = seen_of(dit, term, batch)
    x_t, condition = term.mixed(seen)
    after = replace(seen, output=dit(x_t, seen.t, condition))
    assert term.losses(after) == {} and term.metrics(after)["kept"] == 0.25
    assert term.metrics(replace(seen, output=dit(*batch)))["kept"] == 1.0


@pytest.mark.parametrize("ratio", [1, 1.0])
def test_a_ratio_of_one_is_refused_with_what_to_do(ratio):
    with pytest.raises(
        ValueError, match="ratio must be below 1, got 1.*: no token would be left .* leave the term out"
    ):
        DeferredMasking(ratio)


# ---- the mixer -------------------------------------------------------------------------------------------------------


def test_without_a_mask_the_loss_is_the_plain_one_bit_for_bit(models):
    for denoiser in models.values():
        x, t, condition = batch = inputs(denoiser)
        noise = torch.randn_like(x)
        objective = default_objective(denoiser)
        with torch.no_grad():
            found = loss_of(denoiser, batch, None, noise)
            t = objective.times(t)
            x_t = objective.corrupt(x, noise, t)
            plain = objective.losses(denoiser(x_t, t, condition), x, noise, x_t, t)
        assert torch.equal(found, torch.stack(list(plain.values())).sum(0))


@pytest.mark.parametrize("name", MIXED)
@torch.no_grad()
def test_all_tokens_in_their_order_pass_the_mixer_as_without_a_mask(models, name):
    denoiser = models[name]
    x, t, condition = inputs(denoiser)
    everything = torch.arange(math.prod(grid_of(denoiser))).expand(2, -1)
    out, plain = denoiser(x, t, replace(condition, kept=everything)), denoiser(x, t, condition)
    torch.testing.assert_close(out.sample, plain.sample, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MIXED)
def test_a_dropped_tokens_latent_changes_the_loss_through_the_mixer_alone(models, name):
    torch.manual_seed(0)
    bare = BACKBONES[name].build()
    randomise(bare)
    for denoiser, through in ((models[name], True), (bare.double().eval(), False)):
        x, t, condition = inputs(denoiser)
        x.requires_grad_(True)
        n = math.prod(grid_of(denoiser))
        kept = torch.stack((torch.arange(n // 2), torch.arange(n // 2) + n // 2))
        out = denoiser(x, t, replace(condition, kept=kept))
        (g,) = torch.autograd.grad(out.sample.square().sum(), x)
        dropped = g[(~covered(out)).expand_as(g)]
        assert bool(dropped.any()) == through
        assert through == bool((dropped != 0).all())


@pytest.mark.parametrize("name", MIXED)
def test_every_layer_of_the_mixer_learns_from_masked_steps(models, name):
    denoiser = models[name]
    denoiser.zero_grad(set_to_none=True)
    x, *_ = batch = inputs(denoiser)
    kept = torch.tensor([[0, 3], [1, 2]])
    loss_of(denoiser, batch, kept, torch.randn_like(x)).sum().backward()
    idle = [n for n, p in denoiser.edits.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@torch.no_grad()
def test_the_mixer_knows_places_in_families_that_add_none_to_their_tokens(models):
    for name in MIXED:
        denoiser = models[name]
        stream = denoiser.embed(**denoiser.pack(*inputs(denoiser)))
        layout = stream.layout
        image = stream.image.clone()
        image[:, layout.registers :] = image[:, layout.registers : layout.registers + 1]  # alike at all places
        own = denoiser.edits["mixer"]
        z = layout.of_image(own(replace(stream, image=image), None).image)
        alike = bool((z - z[:, :1]).abs().max() < 1e-9)
        assert alike == (layout.rope is None)


def test_positions_tell_all_places_of_a_grid_apart():
    for grid in ((1, 4, 6), (3, 4, 5)):
        table = positions(grid, 32, torch.zeros(1))
        assert table.shape == (math.prod(grid), 32)
        assert torch.pdist(table).min() > 0.1
    rows = positions((1, 4, 6), 32, torch.zeros(1)).view(4, 6, 4, 8)  # rows' sines and cosines, then columns'
    assert torch.equal(rows[:, 0, :2], rows[:, 5, :2]) and torch.equal(rows[0, :, 2:], rows[3, :, 2:])


def test_the_published_mixer_has_its_size():
    with torch.device("meta"):
        told = SimpleNamespace(image=torch.empty(1, 4, 1024), signal=torch.empty(1, 1024), text=torch.empty(1, 7, 1024))
        own, experts = (Mixer(PatchMixer(experts=e), told, 28) for e in (0, 8))
    d, m, hidden = 1024, 768, 2048
    block = 8 * m * m + 3 * m * hidden + (d + 1) * 6 * m + 3 * m
    count = 6 * block + 3 * d * m + 2 * d + m  # W_in, W_y, W_out and the gains of their norms
    assert sum(p.numel() for p in own.parameters()) == count
    blocks = (p for part in (experts.blocks, experts.experts) for p in part.parameters())
    assert abs(sum(p.numel() for p in blocks) / 184e6 - 1) < 0.001  # that of the specification


def test_a_width_of_the_models_own_has_no_layers_around_it_and_none_is_three_quarters(make_dit):
    same = edit.apply(make_dit(hidden_size=64), {"mixer": PatchMixer(1, 64, 16)}).edits["mixer"]
    assert [n for n, _ in same.named_parameters() if not n.startswith("blocks.")] == []
    assert edit.apply(make_dit(hidden_size=64), {"mixer": PatchMixer(1, None, 16)}).edits["mixer"].width == 48
    assert edit.apply(make_dit(hidden_size=32), {"mixer": PatchMixer(1, None, 64)}).edits["mixer"].width == 64
    with pytest.raises(ValueError, match="width must be a multiple of head=64, got 100: change one of the two"):
        PatchMixer(width=100)


def test_blocks_begin_as_published(make_dit):
    torch.manual_seed(0)
    own = edit.apply(make_dit(depth=8), {"mixer": PatchMixer(2, 256, 32)}).edits["mixer"]
    for block in own.blocks:
        assert abs(block.attn1.to_out.weight.std() / (0.02 / 4) - 1) < 0.05  # 0.02 / sqrt(2 * 8)
        assert not block.adaLN_modulation[1].weight.any()
    bound = math.sqrt(6 / (32 + 256))
    assert 0.95 * bound < own.enter[1].weight.abs().max() <= bound


@torch.no_grad()
def test_every_second_block_may_have_experts_that_choose_tokens():
    denoiser = mixed("pixart", depth=4, experts=4, capacity=1.0)
    own = denoiser.edits["mixer"]
    assert list(own.experts) == ["1", "3"] and not hasattr(own.blocks[1], "mlp") and hasattr(own.blocks[2], "mlp")
    x, t, condition = inputs(denoiser)
    plain = denoiser(x, t, condition).sample
    assert torch.equal(deepcopy(denoiser)(x, t, condition).sample, plain)
    own.experts["3"].experts.out.mul_(2)
    assert not torch.allclose(denoiser(x, t, condition).sample, plain)
    with pytest.raises(ValueError, match="a token cannot have 3 of 2 experts: lower capacity"):
        PatchMixer(experts=2, capacity=3.0)


def gradients(denoiser: Denoiser) -> tuple[dict[str, Tensor], int]:
    """Of a masked step; and the bytes that the forward has saved for them."""
    x, *_ = batch = inputs(denoiser)
    noise, saved = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype), []
    denoiser.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v.nbytes) or v, lambda v: v):
        loss = loss_of(denoiser, batch, torch.tensor([[0, 3], [1, 2]]), noise).sum()
    loss.backward()
    return {name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None}, sum(saved)


@pytest.mark.parametrize("name", ["flux", "micro_dit"])
def test_checkpointing_reaches_the_mixers_blocks_and_changes_no_gradient(name):
    found = {}
    for depth, saving in ((2, False), (2, True), (4, False), (4, True)):
        denoiser = mixed(name, depth=depth, experts=2).train()
        denoiser.gradient_checkpointing = saving
        found[depth, saving] = gradients(denoiser)
    plain, again = found[4, False][0], found[4, True][0]
    assert plain.keys() == again.keys() and all(torch.equal(g, again[key]) for key, g in plain.items())
    assert found[4, False][1] > 1.2 * found[2, False][1]
    assert found[4, True][1] == found[2, True][1]  # of a block there is its input alone


# ---- cost ------------------------------------------------------------------------------------------------------------


def executed(denoiser: Denoiser, k: int | None) -> float:
    """Multiply-accumulates of a forward and a backward of one sample that keeps k tokens."""
    x, t, condition = inputs(denoiser, 1)
    kept = None if k is None else torch.arange(k)[None]
    with Flops() as counter:
        denoiser(x.float(), t.float(), replace(condition, kept=kept)).sample.sum().backward()
    return counter.total / 2


def test_executed_work_falls_to_the_kept_tokens_with_attention_to_their_square(make_dit):
    dit = make_dit(input_size=16, hidden_size=64, depth=4)
    x = torch.randn(1, 4, 16, 16), torch.rand(1), Condition(label=torch.zeros(1, dtype=torch.int64))
    d, units, n, patch = 64, 4, 64, 16

    def forward(k: int, mixer: int = 0) -> int:
        width, hidden = 32, 96
        narrow = n * (4 * width**2 + 3 * width * hidden) + 2 * n * n * width + 6 * d * width
        own = mixer * narrow + (n + k) * d * width * bool(mixer)
        tokens = units * (k * 12 * d * d + 2 * k * k * d + 6 * d * d) + k * d * patch + 2 * d * d
        return own + tokens + n * patch * d + 256 * d + d * d

    for mixer, model in (
        (0, dit),
        (2, edit.apply(make_dit(input_size=16, hidden_size=64, depth=4), {"mixer": PatchMixer(**SMALL)})),
    ):
        for k in (64, 32, 16):
            condition = x[2] if k == 64 else replace(x[2], kept=torch.arange(k)[None])
            with Flops() as counter, torch.no_grad():
                model(x[0], x[1], condition)
            assert counter.total / 2 == forward(k, mixer)


@pytest.mark.parametrize(
    "size, mixer, count",
    [
        pytest.param("XL", (6, 768, 64), 1165e6, id="XL", marks=pytest.mark.slow),  # 7 s, for structures alone
        pytest.param("tiny", (4, 512, 32), 202e6, id="tiny"),
    ],
)
@torch.no_grad()
def test_the_published_models_have_their_sizes_and_a_quarter_of_the_tokens_their_work(size, mixer, count):
    """Oracle 7."""
    config = MicroDiTConfig() if size == "XL" else MicroDiTConfig(width=512, depth=16, head=32)
    edits = {"scaling": LayerWiseScaling(), "experts": ExpertChoice(), "mixer": PatchMixer(*mixer, experts=8)}
    with torch.device("meta"):
        denoiser = edit.apply(config.build(), edits, fresh=False).eval()
    assert abs(sum(p.numel() for p in denoiser.parameters()) / count - 1) < 0.005
    if size == "tiny":
        return
    x, t = torch.empty(1, 4, 32, 32, device="meta"), torch.empty(1, device="meta")
    work = []
    for k in (None, 128, 64):
        condition = Condition(text=torch.empty(1, 1, 1024, device="meta"))  # work on captions is not in their count
        if k is not None:
            condition = replace(condition, kept=torch.empty(1, k, dtype=torch.int64, device="meta"))
        with Flops() as counter:
            denoiser(x, t, condition)
        work.append(counter.total / 2e9)
    for found, published in zip(work, (110.6, 63.0, 39.8), strict=True):
        assert abs(found / published - 1) < 0.015, work
    assert abs(work[2] / work[0] - 0.36) < 0.005


@pytest.mark.parametrize("name", MIXED)
def test_a_masked_step_of_every_kind_of_family_costs_less_than_a_whole_one(name):
    denoiser = mixed(name, depth=1).float()
    assert executed(denoiser, 4) < 0.75 * executed(denoiser, None)
