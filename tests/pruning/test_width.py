from copy import deepcopy

import pytest
import torch
from torch import nn
from weights import randomise

import edit
from edit.backbones.dit import DiTConfig
from edit.backbones.dit_diffusers import DiTDiffusersConfig
from edit.backbones.flux import FluxConfig
from edit.backbones.pixart import PixArtConfig
from edit.backbones.qwen_image import QwenImageConfig
from edit.backbones.sd3 import SD3Config
from edit.edits import trains
from edit.measuring.cost import macs
from edit.pruning.width import FeedForwardWidth, TextFeedForwardLinear, feed_forwards, linearised
from edit.stream import Condition
from edit.tuning.lora import LoRA

HEADS = {"attention_head_dim": 8, "num_attention_heads": 4}
TEXT = {"joint_attention_dim": 24, "pooled_projection_dim": 20}
CONFIGS = {
    "dit": DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=10),
    "dit swiglu": DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=10, swiglu=True),
    "dit_diffusers": DiTDiffusersConfig(num_layers=2, sample_size=8, num_embeds_ada_norm=10, **HEADS),
    "dit_diffusers geglu": DiTDiffusersConfig(
        num_layers=2, sample_size=8, num_embeds_ada_norm=10, activation_fn="geglu", **HEADS
    ),
    "flux": FluxConfig(
        in_channels=16, num_layers=2, num_single_layers=2, axes_dims_rope=(2, 2, 4), sample_size=(8, 8), **HEADS, **TEXT
    ),
    "sd3": SD3Config(in_channels=4, num_layers=3, sample_size=8, pos_embed_max_size=8, **HEADS, **TEXT),
    "pixart": PixArtConfig(num_layers=2, sample_size=8, cross_attention_dim=32, caption_channels=24, **HEADS),
    "qwen_image": QwenImageConfig(
        in_channels=16, num_layers=2, joint_attention_dim=24, axes_dims_rope=(2, 2, 4), sample_size=(8, 8), **HEADS
    ),
}


def make(name: str):
    denoiser = CONFIGS[name].build()
    randomise(denoiser)
    return denoiser.eval()


def batch_of(denoiser):
    g = torch.Generator().manual_seed(1)
    known = denoiser.example(3, text=5)
    words = {k: torch.randn(v.shape, generator=g) for k in ("text", "pooled") if (v := getattr(known, k)) is not None}
    condition = Condition(label=known.label, text_mask=known.text_mask, **words)
    return torch.randn(3, *denoiser.sample_shape, generator=g), torch.tensor([0.2, 0.5, 0.9]), condition


def hidden(denoiser) -> list[int]:
    return [out.in_features - first for u in denoiser.units for _, out, first in feed_forwards(u)]


families = pytest.mark.parametrize("name", CONFIGS)


# ---- narrower --------------------------------------------------------------------------------------------------------


@families
@torch.no_grad()
def test_channels_that_say_nothing_go_first_and_nobody_misses_them(name):
    denoiser = make(name)
    batch = batch_of(denoiser)
    for k, unit in enumerate(denoiser.units):
        for into, out, first in feed_forwards(unit):
            width = out.in_features - first
            silent = torch.randperm(width)[: width - round(width / 2)]
            if k % 2:  # nothing goes in, its bias included, or nothing comes out
                out.weight[:, first + silent] = 0
            else:
                into.weight.unflatten(0, (-1, width))[:, silent] = 0
                into.bias.view(-1, width)[:, silent] = 0
    expected, before = denoiser(*batch).sample, hidden(denoiser)
    edit.apply(denoiser, {"narrow": FeedForwardWidth(0.5)})
    assert hidden(denoiser) == [round(w / 2) for w in before]
    torch.testing.assert_close(denoiser(*batch).sample, expected, rtol=1e-4, atol=1e-4)  # fp32, shorter sums


@families
def test_parameters_and_executed_macs_fall_by_what_is_cut(name):
    denoiser = make(name)
    condition, tokens = denoiser.example(1, text=5), []
    counted, size = macs(denoiser, condition), sum(p.numel() for p in denoiser.parameters())
    layers = [layer for u in denoiser.units for layer in feed_forwards(u)]
    for into, _, _ in layers:
        into.register_forward_pre_hook(lambda m, args: tokens.append(args[0].shape[1]))
    with torch.no_grad():
        denoiser(*batch_of(denoiser))
    weights, parameters = 0, 0
    for (into, out, first), n in zip(layers, tokens, strict=True):
        width = out.in_features - first
        gone, parts = width - round(0.75 * width), into.out_features // width
        weights += n * gone * 32 * (parts + 1)
        parameters += gone * (32 * (parts + 1) + parts)
    edit.apply(denoiser, {"narrow": FeedForwardWidth(0.25)})
    assert macs(denoiser, condition) == counted - weights
    assert sum(p.numel() for p in denoiser.parameters()) == size - parameters


def test_large_channels_are_better_than_small_ones():
    denoiser = make("flux")
    batch = batch_of(denoiser)
    for unit in denoiser.units:
        for _, out, first in feed_forwards(unit):
            with torch.no_grad():
                out.weight[:, first:] *= torch.rand(out.in_features - first) ** 3
    expected = denoiser(*batch).sample

    def error(sign: int) -> float:
        other = deepcopy(denoiser)
        if sign < 0:  # the opposite choice
            for into, out, first in (layer for u in other.units for layer in feed_forwards(u)):
                size = into.weight.norm(dim=1) * out.weight[:, first:].norm(dim=0)
                with torch.no_grad():
                    out.weight[:, first:][:, size.topk(len(size) // 2).indices] = 0
        else:
            edit.apply(other, {"narrow": FeedForwardWidth(0.5)})
        return (other(*batch).sample - expected).square().mean().item()

    assert error(1) < 0.1 * error(-1)


def test_it_works_where_nothing_is_allocated():
    with torch.device("meta"):
        flux = FluxConfig(num_layers=1, num_single_layers=1).build()
        edit.apply(flux, {"narrow": FeedForwardWidth(0.75), "text": TextFeedForwardLinear((0,))}, fresh=False)
    assert hidden(flux) == [3072, 3072] and all(p.is_meta for p in flux.parameters())


def test_what_cannot_be_narrowed_is_refused_before_anything_is_cut():
    with pytest.raises(ValueError, match=r"ratio is the share to drop, in \(0, 1\), got 1.0"):
        FeedForwardWidth(1.0)
    denoiser = make("dit")
    with pytest.raises(ValueError, match="this dit has units 0 to 1, got 7"):
        edit.apply(denoiser, {"narrow": FeedForwardWidth(units=(0, 7))})
    own = denoiser.units[1].slots.ffn
    denoiser.units[1].slots.ffn = own  # as another edit would replace it
    with pytest.raises(ValueError, match="unit 1 of this dit has no feed-forward network of plain linear layers"):
        edit.apply(denoiser, {"narrow": FeedForwardWidth()})
    assert hidden(denoiser) == [128]
    adapted = edit.apply(make("flux"), {"lora": LoRA(targets=("proj_mlp",))})
    with pytest.raises(ValueError, match="unit 2 of this flux has no feed-forward network of plain linear layers"):
        edit.apply(adapted, {"narrow": FeedForwardWidth()})
    narrow = edit.apply(make("dit"), {"narrow": FeedForwardWidth()})
    with pytest.raises(ValueError, match="cannot be folded into the weights"):
        edit.fold(narrow)


# ---- linear ----------------------------------------------------------------------------------------------------------


def network(spread: float = 0.2) -> tuple[nn.Linear, nn.GELU, nn.Linear]:
    into, out = nn.Linear(16, 64), nn.Linear(64, 16)
    nn.init.normal_(into.weight, std=spread)
    return into, nn.GELU(approximate="tanh"), out


@torch.no_grad()
def test_the_start_is_the_least_squares_fit_to_normal_inputs():
    into, gelu, out = network()
    layer, x = linearised(into, gelu, out), torch.randn(200_000, 16)
    y = out(gelu(into(x)))
    fit = torch.linalg.lstsq(torch.cat((x, torch.ones(len(x), 1)), 1), y).solution
    # of 200 000 draws the fit itself is uncertain by about 1e-3 of a weight's scale
    torch.testing.assert_close(layer.weight, fit[:-1].T, rtol=0, atol=3e-3)
    torch.testing.assert_close(layer.bias, fit[-1], rtol=0, atol=3e-3)


@torch.no_grad()
@pytest.mark.parametrize("shift, slope", [(30.0, 1.0), (-30.0, 0.0)])
def test_where_the_gelu_is_straight_the_fit_is_exact(shift, slope):
    into, gelu, out = network()
    into.bias.fill_(shift)
    x = torch.randn(50, 16)
    layer = linearised(into, gelu, out)
    torch.testing.assert_close(layer(x), slope * out(into(x)) + (1 - slope) * out.bias, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_wide_and_dead_channels_are_fitted_too():
    into, gelu, out = network(spread=5.0)  # inputs of the GELU are 20 wide: a kink
    into.weight[:8] = 0
    layer, x = linearised(into, gelu, out), torch.randn(100_000, 16)
    residual = out(gelu(into(x))) - layer(x)
    scale = residual.std()
    assert residual.mean(0).abs().max() < 0.02 * scale  # 0.003 would be one deviation of the mean
    assert (residual.T @ x / len(x)).abs().max() < 0.02 * scale  # what is left is uncorrelated with the inputs


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen_image"])
@torch.no_grad()
def test_the_texts_network_is_one_layer_and_its_old_weights_are_gone(name, tmp_path):
    denoiser = make(name)
    unit, batch = denoiser.units[0], batch_of(denoiser)
    part = "txt_mlp" if name == "qwen_image" else "ff_context"
    old, before = getattr(unit, part), denoiser(*batch).sample
    size, counted = sum(p.numel() for p in denoiser.parameters()), macs(denoiser, denoiser.example(1, text=5))
    edit.apply(denoiser, {"text": TextFeedForwardLinear((0,))})
    new = getattr(unit, part)
    assert type(new) is nn.Linear
    assert sum(p.numel() for p in denoiser.parameters()) == size - sum(p.numel() for p in old.parameters()) + 33 * 32
    assert macs(denoiser, denoiser.example(1, text=5)) == counted - 5 * (2 * 32 * 128 - 32 * 32)
    after = denoiser(*batch).sample
    new.weight.zero_()
    new.bias.zero_()
    assert 0 < (after - before).norm() < 0.7 * (denoiser(*batch).sample - before).norm()  # better than none
    edit.save(denoiser, tmp_path / "a")
    assert torch.equal(edit.load(tmp_path / "a").denoiser(*batch).sample, denoiser(*batch).sample)


@torch.no_grad()
def test_both_prunings_and_a_lora_compose_and_come_back(tmp_path):
    edits = {
        "narrow": FeedForwardWidth(0.5),
        "text": TextFeedForwardLinear((0, 1)),
        "lora": LoRA(targets=("ff_context", "to_q")),
    }
    denoiser = edit.apply(make("flux"), edits)
    assert {n for n, _ in denoiser.named_parameters() if trains(denoiser, n)} == {
        n for n, _ in denoiser.named_parameters() if ".lora_" in n
    }
    batch = batch_of(denoiser)
    edit.save(denoiser, tmp_path / "a")
    assert torch.equal(edit.load(tmp_path / "a").denoiser(*batch).sample, denoiser(*batch).sample)


@pytest.mark.parametrize("name, unit", [("flux", 2), ("sd3", 2), ("dit", 0), ("pixart", 1)])
def test_units_without_a_text_network_are_refused(name, unit):
    with pytest.raises(ValueError, match=f"unit {unit} of this {name} has no text feed-forward network with a GELU"):
        edit.apply(make(name), {"text": TextFeedForwardLinear((unit,))})


def test_no_units_are_refused():
    with pytest.raises(ValueError, match="name at least one unit, counted from 0"):
        TextFeedForwardLinear(())
