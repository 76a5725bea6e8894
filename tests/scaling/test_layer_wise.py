"""Layer-wise scaling: the published widths, and new layers of every family that are drawn as those before them."""

import pytest
import torch
from families import BACKBONES, family, inputs
from torch import nn

import edit
from edit.attention.linear import LinearAttention
from edit.backbones.dit import DiTConfig
from edit.backbones.micro_dit import MicroDiTConfig
from edit.moe.expert_choice import ExpertChoice
from edit.scaling.layer_wise import LayerWiseScaling, feed_ratio, round_up
from edit.tuning.lora import LoRA

SMALL = {"multiple": 16, "hidden_multiple": 16}


# ---- the published widths --------------------------------------------------------------------------------------------


def test_the_published_sizes_have_their_widths():
    """Oracle 8, on the meta device."""
    with torch.device("meta"):
        xl = edit.apply(MicroDiTConfig().build(), {"widths": LayerWiseScaling(), "moe": ExpertChoice()}, fresh=False)
    widths = [u.anatomy.attention.size for u in xl.units]
    assert len(widths) == 28 and widths[:4] == [512, 640, 640, 640] and widths[-1] == 1024
    assert widths == sorted(widths) and {*widths} == {512, 640, 768, 896, 1024}
    assert all(u.anatomy.cross.size == 1024 and u.anatomy.heads * 64 == u.anatomy.attention.size for u in xl.units)
    feeds = [u.anatomy.feed.size for u in xl.units]
    assert (feeds[0], feeds[2], feeds[-1]) == (512, 768, 2816) and feeds == sorted(feeds)
    experts = {int(i): layer.experts.into.shape[1] for i, layer in xl.edits["moe"].items()}
    assert list(experts) == list(range(1, 27, 2)) and experts[1] == 768
    assert all(size == round_up(1024 * (0.5 + 3.5 * i / 27), 256) for i, size in experts.items())


def test_ratios_are_linear_in_the_unit_and_ends_are_met():
    scaling = LayerWiseScaling()
    assert [scaling.ratio(i, 8) for i in range(8)] == pytest.approx([0.5 + 0.5 * i for i in range(8)])
    assert scaling.ratio(0, 1) == 0.5
    assert [round_up(x, 128) for x in (128, 128 + 1e-9, 129, 1)] == [128, 128, 256, 128]


# ---- layers of every family ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in BACKBONES if not n.startswith("flux")])
def test_every_family_runs_with_the_widths_that_its_anatomy_tells(name):
    torch.manual_seed(0)
    denoiser = BACKBONES[name].build().double()
    x, t, condition = inputs(denoiser)
    edit.apply(denoiser, {"widths": LayerWiseScaling(**SMALL)})
    for p in denoiser.parameters():
        nn.init.normal_(p, std=0.1)
    last = len(denoiser.units) - 1
    for i, unit in enumerate(denoiser.units):
        a = unit.anatomy
        assert a.attention.size == 16 * a.heads == round_up(64 * (0.5 + 0.5 * i / last), 16)
        parts = sum(parts for _, parts in a.feed.writers)
        assert a.feed.size == round_up(64 * (0.5 + 3.5 * i / last) * (2 / 3 if parts == 2 else 1), 16)
        for features in (a.attention, a.feed):
            for path, parts in features.writers:
                layer = unit.get_submodule(path)
                assert layer.weight.shape[0] == layer.out_features == parts * features.size
            for path, _ in features.readers:
                layer = unit.get_submodule(path)
                assert layer.weight.shape[1] == layer.in_features == features.size
    out = denoiser(x, t, condition).sample
    assert out.shape == x.shape and out.isfinite().all()
    out.square().mean().backward()
    unit = denoiser.units[0]
    read = [path for f in (unit.anatomy.attention, unit.anatomy.feed) for path, _ in (*f.writers, *f.readers)]
    assert all(unit.get_submodule(path).weight.grad.any() for path in read)


def test_new_layers_are_as_spread_as_those_before_them_each_part_by_itself():
    torch.manual_seed(0)
    denoiser = MicroDiTConfig(input_size=8, width=256, depth=3, head=32, text_width=24).build()
    before = [{n: p.clone() for n, p in u.named_parameters()} for u in denoiser.units]
    edit.apply(denoiser, {"widths": LayerWiseScaling(multiple=32, hidden_multiple=32)})

    def parts(name: str, p: torch.Tensor) -> list[float]:
        return [part.std().item() for part in p.chunk(2 if "w13" in name else 1)]

    for unit, old in zip(denoiser.units, before, strict=True):
        for name, p in unit.named_parameters():
            if name.startswith(("attn1.", "mlp.")):
                assert parts(name, p) == pytest.approx(parts(name, old[name]), rel=0.05)
                assert p.shape == old[name].shape or not torch.equal(p[:1, :8], old[name][:1, :8])
            else:
                assert torch.equal(p, old[name])  # cross-attention, norms, modulation
        assert unit.attn1.norm_q.normalized_shape == (unit.anatomy.attention.size,)


def test_what_is_zero_stays_zero_and_gains_stay_ones():
    denoiser = BACKBONES["wan"].build()
    for unit in denoiser.units:
        nn.init.zeros_(unit.get_submodule(unit.anatomy.feed.readers[0][0]).weight)
    edit.apply(denoiser, {"widths": LayerWiseScaling(**SMALL)})
    for unit in denoiser.units:
        a = unit.anatomy
        assert not unit.get_submodule(a.feed.readers[0][0]).weight.any()
        for _, norm in a.attention.norms:  # across all heads
            weight = unit.get_submodule(norm).weight
            assert weight.shape == (a.attention.size,) and (weight == 1).all()


def test_experts_take_the_ratio_of_their_unit_and_their_own_without_scaling():
    with torch.device("meta"):
        plain = DiTConfig(input_size=8, hidden_size=64, depth=5, num_heads=4).build()
        scaled = edit.apply(DiTConfig(input_size=8, hidden_size=64, depth=5, num_heads=4).build(), {})
        edit.apply(scaled, {"widths": LayerWiseScaling(**SMALL)})
        for denoiser in (plain, scaled):
            edit.apply(denoiser, {"moe": ExpertChoice(multiple=16)}, fresh=False)
    sizes = [[layer.experts.into.shape[1] for layer in d.edits["moe"].values()] for d in (plain, scaled)]
    assert sizes == [[256, 256], [round_up(64 * 1.375, 16), round_up(64 * 3.125, 16)]]
    assert feed_ratio(plain, 1) is None and feed_ratio(scaled, 1) == 1.375


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(denoiser, scaling: LayerWiseScaling, said: str) -> None:
    before = {n: p.shape for n, p in denoiser.named_parameters()}
    with pytest.raises(ValueError, match=said):
        edit.apply(denoiser, {"widths": scaling})
    assert {n: p.shape for n, p in denoiser.named_parameters()} == before  # nothing is half done


def test_what_cannot_be_scaled_is_refused_before_anything_is_changed():
    refused(family("flux"), LayerWiseScaling(**SMALL), r"unit 2 of this flux has one output layer .*: use a family")
    refused(family("dit"), LayerWiseScaling(multiple=24), "attention of 72 channels is no whole number of heads of 16")
    adapted = edit.apply(family("dit"), {"lora": LoRA(rank=2)})
    refused(adapted, LayerWiseScaling(**SMALL), r"has another layer than a plain linear one at attn.qkv: put this edit")
    experts = edit.apply(family("sd3"), {"moe": ExpertChoice()})
    refused(experts, LayerWiseScaling(**SMALL), "another edit replaced the feed-forward")
    with pytest.raises(ValueError, match=r"linear \(LinearAttention\) cannot be applied together with widths"):
        edit.apply(family("dit"), {"widths": LayerWiseScaling(**SMALL), "linear": LinearAttention()})
    twice = edit.apply(family("dit"), {"first": LayerWiseScaling(**SMALL)})
    refused(twice, LayerWiseScaling(**SMALL), "cannot be applied together with first")
    with pytest.raises(ValueError, match="feed must be a list of 2 numbers"):
        LayerWiseScaling(feed=(0.5, 1.0, 4.0))
    with pytest.raises(ValueError, match="attention must be"):
        LayerWiseScaling(attention=(0.0, 1.0))
