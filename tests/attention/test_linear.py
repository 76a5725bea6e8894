import pytest
import torch
import torch.nn.functional as F
from weights import randomise

import edit
from edit.attention.linear import LinearAttention, Linearised, features
from edit.backbones.flux import FluxConfig
from edit.backbones.qwen_image import QwenImageConfig
from edit.edits import trains
from edit.measuring.cost import macs
from edit.stream import Condition, Layout
from edit.tuning.lora import LoRA

GRID = Layout(grid=(1, 3, 4), text_length=5)
SMALL = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24, "in_channels": 16}


def qkv(heads: int = 3, tokens: int = 17, width: int = 8, seed: int = 0) -> tuple[torch.Tensor, ...]:
    return torch.randn(3, 2, heads, tokens, width, generator=torch.Generator().manual_seed(seed)).unbind()


@pytest.fixture
def flux():
    """3 double and 2 single units of width 32."""
    small = {"pooled_projection_dim": 20, "axes_dims_rope": (4, 6, 6), "guidance_embeds": False}
    denoiser = FluxConfig(num_layers=3, num_single_layers=2, **SMALL, **small).build()
    randomise(denoiser)
    return denoiser.eval()


@pytest.fixture
def told():
    g = torch.Generator().manual_seed(1)
    text, pooled = torch.randn(3, 5, 24, generator=g), torch.randn(3, 20, generator=g)
    return torch.randn(3, 4, 8, 8, generator=g), torch.tensor([0.2, 0.5, 0.9]), Condition(text=text, pooled=pooled)


# ---- the operator ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sums_over_many_keys_stay_within_fp16():
    """Features of about 29: their sum over 4096 keys is 119,000, above the largest number, their mean is not."""
    q = torch.full((1, 1, 4096, 4), 20.0)
    o = Linearised(1, 4, masks=False)(q, q, torch.full_like(q, 2.0).half(), GRID)
    torch.testing.assert_close(o, torch.full_like(o, 2.0), rtol=1e-2, atol=0)


@torch.no_grad()
def test_it_is_the_mean_of_values_under_normalised_products_of_features():
    q, k, v = qkv()
    attend = Linearised(3, 8, masks=False)
    attend.sharpness.copy_(torch.tensor([0.5, 1.0, 3.0]).view(3, 1, 1))
    a = attend.sharpness
    weights = (F.elu(a * q) + 1) @ (F.elu(a * k) + 1).transpose(-1, -2)
    expected = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(attend(q, k, v, GRID), expected, rtol=1e-5, atol=1e-5)  # fp32, sums in another order


@torch.no_grad()
def test_one_token_does_not_see_where_the_others_stand_and_constant_values_stay():
    q, k, v = qkv()
    attend, order = Linearised(3, 8, masks=False), torch.randperm(17)
    one = attend(q, k, v, GRID)
    torch.testing.assert_close(attend(q, k[:, :, order], v[:, :, order], GRID), one)
    torch.testing.assert_close(attend(q, k, torch.ones_like(v), GRID), torch.ones_like(v))


@torch.no_grad()
def test_the_start_is_nearer_to_softmax_than_features_of_unit_sharpness():
    q, k, v = qkv(tokens=64, width=32)
    q = 0.5 * q
    soft, linear = F.scaled_dot_product_attention(q, k, v), Linearised(3, 32, masks=False)
    assert torch.equal(linear.sharpness, torch.full((3, 1, 1), 32**0.25))

    def error() -> float:
        return (linear(q, k, v, GRID) - soft).square().mean().item()

    started = error()
    linear.sharpness.fill_(1.0)
    assert started < 0.9 * error()  # 0.85 of it for hundreds of tokens of these sizes


@torch.no_grad()
def test_masked_text_is_as_if_it_were_not_there():
    q, k, v = qkv()
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    short = [torch.cat((x[:, :, :3], x[:, :, 5:]), 2) for x in (q, k, v)]
    masked = Linearised(3, 8, masks=True)(q, k, v, Layout(grid=(1, 3, 4), text_length=5, text_mask=mask))
    expected = Linearised(3, 8, masks=True)(*short, Layout(grid=(1, 3, 4), text_length=3))
    torch.testing.assert_close(torch.cat((masked[:, :, :3], masked[:, :, 5:]), 2), expected)
    blind = Linearised(3, 8, masks=False)(q, k, v, Layout(grid=(1, 3, 4), text_length=5, text_mask=mask))
    torch.testing.assert_close(blind, Linearised(3, 8, masks=False)(q, k, v, GRID))


def test_features_are_positive_everywhere_and_their_gradients_finite():
    x = torch.tensor([-1e4, -30.0, -1.0, 0.0, 2.0, 1e4], requires_grad=True)
    y = features(x)
    y.sum().backward()
    assert (y > 0).all() and x.grad.isfinite().all()
    torch.testing.assert_close(y[2:], F.elu(x[2:]) + 1)


# ---- as an edit ------------------------------------------------------------------------------------------------------


def test_executed_macs_fall_from_the_square_of_the_tokens_to_the_tokens(flux):
    condition, before = flux.example(1, text=48), macs(flux, flux.example(1, text=48))
    edit.apply(flux, {"linear": LinearAttention((1, 3, 4))})
    s, heads, e = 48 + 64 * 64, 2, 16  # the backbone's own sample: 128 x 128
    saved = 2 * s * s * e - (s * e * (e + 1) + s * e * (e + 1))
    assert before - macs(flux, condition) == 3 * heads * saved


def test_only_projections_and_sharpness_are_trained(flux, told):
    edit.apply(flux, {"linear": LinearAttention((0, 3))})
    open_ = {n for n, _ in flux.named_parameters() if trains(flux, n)}
    parts = [f"transformer_blocks.{i}.attn.{p}" for i in range(3) for p in ("to_q", "to_k", "to_v", "to_out.0")]
    parts += [f"single_transformer_blocks.{i}.attn.{p}" for i in range(2) for p in ("to_q", "to_k", "to_v")]
    wanted = {f"model.{p}.{kind}" for p in parts for kind in ("weight", "bias")}
    assert open_ == wanted | {"edits.linear.0.sharpness", "edits.linear.3.sharpness"}
    for n, p in flux.named_parameters():
        p.requires_grad_(n in open_)
    flux(*told).sample.square().sum().backward()
    dead = {n for n, p in flux.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().max())}
    # a bias of the keys moves all logits of a query alike: softmax does not feel it, but RoPE and QK-norm come between
    assert not dead


def test_in_a_dit_the_joint_projection_is_open(dit):
    edit.apply(dit, {"linear": LinearAttention()})
    open_ = {n.split(".", 3)[-1] for n, _ in dit.named_parameters() if n.startswith("model") and trains(dit, n)}
    assert open_ == {"attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"}


@torch.no_grad()
def test_qwen_image_still_leaves_masked_text_out(told):
    qwen = QwenImageConfig(num_layers=2, axes_dims_rope=(4, 6, 6), **SMALL).build()
    randomise(qwen)
    edit.apply(qwen.eval(), {"linear": LinearAttention()})
    x, t, c = told
    mask = torch.tensor([[True, True, True, False, False]] * 3)
    padded = qwen(x, t, Condition(text=c.text, text_mask=mask)).sample
    other = torch.cat((c.text[:, :3], 9 * c.text[:, 3:]), 1)
    torch.testing.assert_close(qwen(x, t, Condition(text=other, text_mask=mask)).sample, padded)
    assert (qwen(x, t, Condition(text=other)).sample - padded).abs().max() > 1e-3


def test_a_lora_above_it_is_trained_too(flux):
    edit.apply(flux, {"linear": LinearAttention((0,)), "lora": LoRA(targets=("attn.to_q",))})
    open_ = {n for n, _ in flux.named_parameters() if trains(flux, n)}
    assert "edits.linear.0.sharpness" in open_ and all(".lora_" in n for n in open_ - {"edits.linear.0.sharpness"})


def test_what_cannot_be_is_refused_in_a_sentence(flux, told):
    with pytest.raises(ValueError, match="this flux has units 0 to 4, got 5"):
        edit.apply(flux, {"linear": LinearAttention((0, 5))})
    with pytest.raises(ValueError, match=r"name each unit once, got \[1, 1\]"):
        edit.apply(flux, {"linear": LinearAttention((1, 1))})
    unit = flux.units[2]
    unit.add_module("attending", unit._modules.pop("attn"))
    with pytest.raises(ValueError, match="the projections of unit 2 have names that it cannot train"):
        edit.apply(flux, {"linear": LinearAttention((2,))})
    unit.add_module("attn", unit._modules.pop("attending"))
    edit.apply(flux, {"linear": LinearAttention((1,))})
    with pytest.raises(ValueError, match="another edit has replaced the attention of unit 1: leave it out"):
        edit.apply(flux, {"again": LinearAttention()})
    with pytest.raises(ValueError, match="another attention than plain softmax"):
        flux(*told, maps={1: 4})
    with pytest.raises(ValueError, match="cannot be folded into the weights"):
        edit.fold(flux)
