"""DiT-MoE: the published sizes, and what its specification says must hold (methods/dit-moe.md, oracles)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from every import CONFIGS
from families import BACKBONES, inputs
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from weights import randomise

import edit
from edit.backbones.dit import DiTConfig
from edit.denoiser import Denoiser
from edit.edits import grouped, per_token
from edit.measuring.cost import cost, macs
from edit.measuring.flops import Flops
from edit.moe.dit_moe import DiTMoE
from edit.sampling import Sampler
from edit.solvers import Euler
from edit.stream import Stream
from recipes.config.composed import spelling
from recipes.config.sources import register


def small(**options) -> DiTMoE:
    return DiTMoE(**{"experts": 4, **options})


@pytest.fixture
def moe(make_dit):
    """Experts in three units, all weights random."""
    denoiser = edit.apply(make_dit(), {"moe": small()})
    randomise(denoiser)
    return denoiser


# ---- the published sizes ---------------------------------------------------------------------------------------------

SIZES = {  # name: L, D, heads, E, total, active (in units of the last printed digit), GMAC at 256 tokens
    "S/2-8E2A": (12, 384, 6, 8, (199, 1e6), (71, 1e6), 15.43),
    "S/2-16E2A": (12, 384, 6, 16, (369, 1e6), (71, 1e6), 15.44),
    "B/2-8E2A": (12, 768, 12, 8, (795, 1e6), (286, 1e6), 61.68),
    "L/2-8E2A": (24, 1024, 16, 8, (28, 1e8), (10, 1e8), 219.26),
    "XL/2-8E2A": (28, 1152, 16, 8, (41, 1e8), (15, 1e8), 323.74),
    "G/2-16E2A": (40, 1408, 16, 16, (165, 1e8), (31, 1e8), 690.94),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_published_sizes_have_their_published_parameters_and_work(name):
    """Oracle 3, on the meta device: parameters within one of the last digit printed in the paper's table 1. Its work is
    that of the products with weights in units, which a unit more shows."""
    depth, d, heads, experts, total, active, gmac = SIZES[name]
    spec = preset(name)
    assert (spec.depth, spec.hidden_size, spec.num_heads) == (depth, d, heads)

    def built(spec: DiTConfig) -> Denoiser:
        with torch.device("meta"):
            return edit.apply(spec.build(), {"moe": DiTMoE(experts=experts)}, fresh=False)

    whole = built(spec)
    count, each = sum(p.numel() for p in whole.parameters()), per_token(whole)
    assert abs(count / total[1] - total[0]) < 1 and abs(each / active[1] - active[0]) < 1
    block = d * d * (10 + 12 * experts + 3 * 2) + experts * d
    assert depth * block < count < 1.01 * depth * block + 3e6
    unit = macs(built(replace(spec, depth=2))) - macs(built(replace(spec, depth=1)))
    work, attention, modulation = d * d * (4 + 12 * 2 + 3 * 2), 2 * 256 * d, 6 * d * d
    assert unit == 256 * (work + experts * d + attention) + modulation
    assert 256 * depth * work / 1e9 == pytest.approx(gmac, rel=0.005)


def preset(name: str) -> DiTConfig:
    """The backbone of the experiment with a size's name; its edit is that of the paper's table."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        cfg = compose("train", [f"experiment=dit_moe/{spelling(name.replace('-', '_'))}"])
    assert cfg.edits.dit_moe.get("experts", 8) == SIZES[name][3] and len(cfg.edits) == 1
    assert cfg.data.batch_size * cfg.trainer.devices == 1024 and cfg.optimizer.lr == 1e-4
    return instantiate(cfg.backbone)


# ---- the layer in a DiT ----------------------------------------------------------------------------------------------


def test_one_expert_without_a_shared_one_is_the_dense_swiglu_dit_bit_for_bit(make_dit, batch):
    """Oracle 1: a softmax over one expert is 1."""
    dense = make_dit(swiglu=True, mlp_ratio=6.0)  # 2/3 of it: 4
    for block in dense.model.blocks:
        for b in (block.mlp.w12.bias, block.mlp.w3.bias):
            torch.nn.init.zeros_(b)
    wanted = dense(*batch).sample
    weights = [(b.mlp.w12.weight, b.mlp.w3.weight) for b in dense.model.blocks]
    edit.apply(dense, {"moe": small(experts=1, k=1, shared=0)})
    with torch.no_grad():
        for layer, (into, out) in zip(dense.edits["moe"].values(), weights, strict=True):
            layer.experts.into.copy_(into[None])
            layer.experts.out.copy_(out[None])
    assert torch.equal(dense(*batch).sample, wanted)


def test_copies_with_gates_of_sum_1_predict_as_the_dense_model_whatever_the_router(make_dit, batch):
    """Oracle 6."""
    for options in ({}, {"swiglu": True}):
        dense = make_dit(**options)
        wanted = dense(*batch).sample
        edit.apply(dense, {"moe": small(start="copies", gate_norm="topk")})
        assert not hasattr(dense.model.blocks[0].mlp, "fc1") or not list(dense.model.blocks[0].mlp.parameters())
        for layer in dense.edits["moe"].values():
            torch.nn.init.normal_(layer.router.weight)
        torch.testing.assert_close(dense(*batch).sample, wanted, rtol=1e-6, atol=1e-6)


def test_copies_with_gates_as_they_are_shrink_the_branch_to_the_sum_of_the_gates(make_dit):
    """Oracle 6: K / E at logits of zero."""
    dense, tokens = make_dit(), torch.randn(2, 16, 32)
    layout = dense.embed(**dense.pack(torch.randn(2, 4, 8, 8), torch.rand(2), dense.example(2))).layout
    whole = dense.units[0].slots.ffn(tokens, layout)
    edit.apply(dense, {"moe": small(start="copies")})
    layer = dense.edits["moe"]["0"]
    p = layer.router(tokens).softmax(-1).topk(2).values.sum(-1, keepdim=True)
    torch.testing.assert_close(layer(tokens, layout), p * whole, rtol=1e-5, atol=1e-6)
    torch.nn.init.zeros_(layer.router.weight)
    torch.testing.assert_close(layer(tokens, layout), whole * 2 / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backbone", ["dit ddpm", "dit swiglu", "pixart", "sd3", "qwen_image", "wan"])
def test_copies_keep_the_function_of_every_family(backbone):
    torch.manual_seed(0)
    denoiser = BACKBONES[backbone].build()
    randomise(denoiser)
    x, t, condition = inputs(denoiser)
    given = x.float(), t.float(), condition.map(lambda v: v.float() if v.is_floating_point() else v)
    wanted = denoiser.eval()(*given).sample
    edit.apply(denoiser, {"moe": small(start="copies", gate_norm="topk")})
    found = denoiser(*given).sample
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_every_fresh_block_is_the_identity_whatever_the_router_does():
    """Oracle 8: adaLN-zero is not touched."""
    denoiser = edit.apply(DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4).build(), {"moe": small()})
    for p in denoiser.edits.parameters():
        torch.nn.init.normal_(p)
    stream = denoiser.embed(**denoiser.pack(torch.randn(2, 4, 8, 8), torch.rand(2), denoiser.example(2)))
    for unit in denoiser.units:
        assert torch.equal(unit(stream).image, stream.image)


def test_a_fresh_layer_starts_as_the_paper_has_it(make_dit):
    layer = edit.apply(make_dit(), {"moe": DiTMoE()}).edits["moe"]["0"]
    assert layer.router.weight.abs().max() <= 32**-0.5 and layer.experts.into_bias is None
    bound = (6 / (32 + 128)) ** 0.5  # Xavier of W1, W3 and W2 each, 4 d wide
    assert 0.95 * bound < layer.experts.into.abs().max() <= bound
    assert layer.experts.out.shape == (8, 32, 128) and layer.shared.out.weight.shape == (32, 64)  # S d, not 4 S d
    assert layer.experts.activation is F.silu and layer.gate == "softmax"


@torch.no_grad()
def test_a_sample_does_not_depend_on_the_others(moe, batch):
    """Oracle 7."""
    x, t, condition = batch
    wanted = moe(x, t, condition).sample
    turned = moe(x.flip(0), t.flip(0), condition.map(lambda v: v.flip(0))).sample.flip(0)
    torch.testing.assert_close(turned, wanted, rtol=1e-5, atol=1e-5)
    other = torch.cat((x[:1], torch.randn_like(x[1:])))
    torch.testing.assert_close(moe(other, t, condition).sample[0], wanted[0], rtol=1e-5, atol=1e-5)


def test_a_unit_in_bf16_is_compiled_as_one_graph(make_dit):
    """Oracle 9: of the unit, with its records."""
    denoiser = edit.apply(make_dit(depth=1), {"moe": small()}).to(torch.bfloat16)
    randomise(denoiser)
    stream = denoiser.embed(**denoiser.pack(torch.randn(2, 4, 8, 8), torch.rand(2), denoiser.example(2)))
    torch._dynamo.reset()
    compiled = torch.compile(denoiser.units[0], fullgraph=True, backend="eager")
    found: Stream = compiled(stream)
    plain = denoiser.units[0](stream)
    torch.testing.assert_close(found.image, plain.image)
    assert torch.equal(found.trace["moe.0.loads"], plain.trace["moe.0.loads"])


# ---- the balance loss ------------------------------------------------------------------------------------------------


def trace_of(loads, probabilities, units=3, name="moe"):
    """The same load of each unit: b E."""
    names = [f"{name}.{i}" for i in range(units)]
    return {f"{n}.loads": loads for n in names} | {f"{n}.probabilities": probabilities for n in names}


def named(options) -> DiTMoE:
    """An edit that was applied as "moe"."""
    made = DiTMoE(**options)
    object.__setattr__(made, "name", "moe")
    return made


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_the_balance_loss_is_alpha_for_each_unit_and_alpha_e_over_k_when_it_has_collapsed(scope):
    """Oracle 4."""
    moe, even = named({"aux_scope": scope}), torch.full((5, 8), 1 / 8)
    assert moe.losses(trace_of(even, even))["balance"].mean().item() == pytest.approx(3 * 0.005)
    full = torch.tensor([0.5, 0.5, *[0.0] * 6]).expand(5, 8)
    assert moe.losses(trace_of(full, full))["balance"].mean().item() == pytest.approx(3 * 0.005 * 8 / 2)


def test_a_batch_of_uneven_samples_that_even_out_is_balanced_in_the_scope_of_the_batch_alone():
    loads = torch.eye(4).repeat_interleave(2, 0)  # eight samples, two for each expert
    of = {s: named({"experts": 4, "k": 1, "aux_scope": s, "alpha": 1.0}) for s in ("batch", "sample")}
    found = {s: m.losses(trace_of(loads, loads, units=1))["balance"] for s, m in of.items()}
    assert found["batch"].item() == pytest.approx(1) and found["sample"].tolist() == pytest.approx([4.0] * 8)


def test_the_balance_loss_reaches_routers_and_the_tokens_before_them_and_no_expert(moe, batch):
    """Oracle 4."""
    moe.train()
    loss = moe.applied["moe"].losses(moe(*batch).trace)["balance"]
    loss.backward()
    reached = {n for n, p in moe.named_parameters() if p.grad is not None and p.grad.any()}
    assert {f"edits.moe.{i}.router.weight" for i in range(3)} <= reached
    assert "model.blocks.0.attn.qkv.weight" in reached and "model.x_embedder.proj.weight" in reached
    # an expert of one unit is upstream of the routers of those after it; of the last unit none is
    assert not [n for n in reached if n.startswith("edits.moe.2.") and "router" not in n]
    assert "edits.moe.1.experts.out" in reached


def gradients(denoiser, batch, scale: float, parts: int) -> dict:
    """Of both losses, as a gradient scaler and accumulation have them."""
    denoiser.zero_grad()
    for _ in range(parts):
        out = denoiser(*batch)
        loss = out.sample.square().mean() + denoiser.applied["moe"].losses(out.trace)["balance"]
        (loss * scale / parts).backward()
    return {n: p.grad / scale for n, p in denoiser.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scale, parts", [(65536.0, 1), (1.0, 4)])
def test_loss_scaling_and_accumulation_leave_the_share_of_the_balance_loss_as_it_is(moe, batch, scale, parts):
    """Oracle 5."""
    moe.applied["moe"].alpha = 10.0  # so that it shows
    plain, other = gradients(moe.train(), batch, 1.0, 1), gradients(moe, batch, scale, parts)
    assert plain.keys() == other.keys()
    for name, g in plain.items():
        torch.testing.assert_close(other[name], g, rtol=1e-4, atol=1e-4 * g.abs().max().item(), msg=name)


def test_metrics_tell_the_fullest_expert_and_the_idle_ones():
    loads = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]])
    found = named({"experts": 4}).metrics(trace_of(loads, loads))
    assert found["unevenness"].item() == pytest.approx(3.0) and found["idle"].item() == 1


# ---- what is said of it ----------------------------------------------------------------------------------------------


def test_executed_work_is_that_of_the_chosen_experts_with_and_without_values(moe, batch):
    with Flops() as flops, torch.no_grad():
        moe(*batch)
    assert flops.total // 2 == 4 * macs(moe)
    more = edit.apply(
        DiTConfig(input_size=8, hidden_size=32, depth=3, num_heads=4, num_classes=10).build(), {"moe": small(experts=8)}
    )
    routers = 3 * 16 * 32 * 4  # four further experts cost a token four products in each unit's router
    assert macs(more) - macs(moe) == routers


def test_activated_parameters_are_the_share_of_the_routed_experts(moe):
    counted = cost(moe, Sampler(Euler(1)))
    routed = 3 * 4 * 3 * 32 * 128
    assert counted.per_token == counted.parameters - routed // 2
    moe_only = grouped(moe)
    assert {g.kind for g in moe_only.values()} == {"stack"} and len(moe_only) == 6
    copies = edit.apply(
        DiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=4).build(), {"moe": small(start="copies")}
    )
    assert {n.rpartition(".")[2]: g.kind for n, g in grouped(copies).items()} == {
        "into": "stack",
        "out": "stack",
        "into_bias": "vector",
        "out_bias": "vector",
    }


@pytest.mark.parametrize(
    "options, places",
    [
        ({}, [0, 1, 2, 3]),
        ({"every": 2}, [1, 3]),
        ({"half": "deep"}, [2, 3]),
        ({"half": "shallow"}, [0, 1]),
        ({"units": (0, 3)}, [0, 3]),
    ],
)
def test_experts_stand_where_they_are_wanted(make_dit, options, places):
    denoiser = edit.apply(make_dit(depth=4), {"moe": small(**options)})
    assert [int(i) for i in denoiser.edits["moe"]] == places
    assert [i for i, unit in enumerate(denoiser.units) if "ffn" in unit.slots] == places


@pytest.mark.parametrize(
    "options, said",
    [
        ({"k": 9}, "a token cannot take 9 of 8 experts: choose k up to experts"),
        ({"gate_norm": "sum"}, "gate_norm must be one of none, topk, got 'sum'"),
        ({"start": "dense"}, "start must be one of fresh, copies, got 'dense'"),
        ({"units": (0,), "every": 2}, "units are listed, so every and half choose nothing"),
        ({"k": 0}, "k must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_sentence(options, said):
    with pytest.raises(ValueError, match=said):
        DiTMoE(**options)


def test_models_that_it_does_not_fit_are_refused_in_a_sentence(make_dit):
    with pytest.raises(ValueError, match="experts of 0.33 times the width 32 of this dit have no whole number of chan"):
        edit.apply(make_dit(), {"moe": small(ratio=0.33)})
    with pytest.raises(ValueError, match="every=4 and half=all leave none of the 3 units of this dit"):
        edit.apply(make_dit(), {"moe": small(every=4)})
    with pytest.raises(ValueError, match="another edit replaced the feed-forward of this DiTBlock: leave one of them"):
        edit.apply(make_dit(), {"moe": small(), "more": small()})
    with pytest.raises(ValueError, match="unit 2 of this flux has one output layer for attention and feed-forward"):
        edit.apply(BACKBONES["flux"].build(), {"moe": small(units=(0, 2))})
    with pytest.raises(ValueError, match="activation of the feed-forward of a .* is not known here: set start=fresh"):
        edit.apply(BACKBONES["dit_diffusers geglu"].build(), {"moe": small(start="copies")})


def test_units_whose_feed_forward_shares_a_layer_stay_dense():
    assert list(edit.apply(BACKBONES["flux"].build(), {"moe": small()}).edits["moe"]) == ["0", "1"]
