"""Dense2MoE: the oracles of methods/dense2moe.md on feed-forwards, and what stages train and refuse."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from families import family, inputs
from torch import Tensor, nn

import edit
from edit import edits as editing
from edit.backbones.flux import FluxConfig
from edit.edits import trains
from edit.measuring.flops import Flops
from edit.moe.block_groups import layout
from edit.moe.dense2moe import Dense2MoE, take
from edit.moe.division import deal, united
from edit.moe.experts import Experts, FeedForward, MoE
from edit.moe.feeds import Dense, dense, take_neurons
from edit.moe.mixture_of_blocks import MixtureOfBlocks
from edit.moe.routing import LOADS, PROBABILITIES, Router
from edit.moe.taylor import TaylorRanking
from edit.pruning.modulation_rank import ModulationRank
from edit.stream import Layout

FAMILIES = ("dit", "flux", "sd3", "pixart", "qwen_image")
WHOLE = {"dit": 2, "flux": 6, "sd3": 5, "pixart": 2, "qwen_image": 6}  # feed-forwards, of image and text apart
PLAIN = {"ranking": "magnitude", "stage": "experts"}


def converted(name: str, **options):
    """A tiny family in float64 with experts, and the dense one."""
    whole, torch_state = family(name), torch.manual_seed(3)
    assert torch_state is not None
    return edit.apply(family(name), {"moe": Dense2MoE(**{**PLAIN, **options})}).double().eval(), whole


def awake(denoiser) -> None:
    """Routers that prefer some experts, so that tokens differ."""
    for layer in denoiser.edits["moe"].values():
        nn.init.normal_(layer.router.weight, std=1.0)


# ---- the partition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_with_all_experts_at_gates_of_one_it_is_the_dense_model(name):
    moe, whole = converted(name, k=12, gate="ones", ranking="random", deal="random")
    assert len(moe.edits["moe"]) == WHOLE[name]
    x = inputs(whole)
    torch.testing.assert_close(moe(*x).sample, whole(*x).sample, rtol=1e-12, atol=1e-12)  # fp64
    routers = sum(layer.router.weight.numel() for layer in moe.edits["moe"].values())
    sizes = [sum(p.numel() for p in d.parameters()) for d in (moe, whole)]
    assert sizes[0] - sizes[1] == routers  # nothing is there twice, of fused units neither


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("how", ["snake", "contiguous", "random"])
@torch.no_grad()
def test_any_division_of_a_feed_forward_adds_up_to_it_with_b2_once(gated, how):
    g, parts = torch.Generator().manual_seed(0), 1 + gated
    w1, b1, w2, b2 = (
        torch.randn(s, generator=g, dtype=torch.float64) for s in ((parts * 20, 6), parts * 20, (6, 20), 6)
    )
    u = torch.randn(2, 5, 6, generator=g, dtype=torch.float64)
    hidden = F.linear(u, w1, b1)
    hidden = F.gelu(hidden[..., :20]) * hidden[..., 20:] if gated else F.gelu(hidden)  # GEGLU
    moe = MoE(
        "moe",
        Router(6, 4, 0.02),
        Experts(4, 6, 4, F.gelu, gated, True),
        FeedForward(6, 4, F.gelu, gated, True, True),
        4,
        "ones",
    ).double()
    take_neurons(moe, Dense(w1, b1, w2, b2), *deal(torch.rand(20, generator=g), 4, 4, how, g))
    torch.testing.assert_close(moe(u, Layout((1, 1, 5))), F.linear(hidden, w2, b2), rtol=1e-12, atol=1e-12)
    again = united(moe)
    take_neurons(moe, again, *deal(torch.rand(20, generator=g), 4, 4, how, g))
    torch.testing.assert_close(moe(u, Layout((1, 1, 5))), F.linear(hidden, w2, b2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_before_it_is_divided_channels_are_in_their_own_order_as_a_ranking_counts_them(name):
    whole, denoiser = family(name), family(name)
    method = Dense2MoE(**PLAIN)
    method.name = "moe"
    own = method.apply(denoiser)
    for unit, key in zip(whole.units, ("0", "1"), strict=False):
        theirs, mine = dense(unit, unit.anatomy.feed), united(own[key])
        assert torch.equal(mine.into, theirs.into) and torch.equal(mine.out, theirs.out)


def test_snake_order_deals_by_falling_importance_and_back():
    shared, routed = deal(torch.arange(16.0), 4, 3, "snake")
    assert shared.tolist() == [15, 14, 13, 12]
    assert routed.tolist() == [[11, 6, 5, 0], [10, 7, 4, 1], [9, 8, 3, 2]]  # equal sums, 22 each
    assert deal(torch.arange(16.0), 4, 3, "contiguous")[1].tolist() == [[11, 10, 9, 8], [7, 6, 5, 4], [3, 2, 1, 0]]
    g = torch.Generator().manual_seed(0)
    assert sorted(deal(torch.arange(16.0), 4, 3, "random", g)[1].flatten().tolist()) == list(range(12))


# ---- k ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_more_expert_adds_its_gate_times_its_output():
    moe, _ = converted("dit")
    awake(moe)
    layer, u = moe.edits["moe"]["0"], torch.randn(2, 16, 64, dtype=torch.float64)
    p = layer.router(u.flatten(0, 1)).softmax(-1)
    g, chosen = p.sort(descending=True)
    into, bias, out = layer.experts.into, layer.experts.into_bias, layer.experts.out
    before = layer.shared(u)
    for k in range(1, 5):
        take(moe, k)
        after, e = layer(u, Layout((1, 4, 4))), chosen[:, k - 1]
        hidden = layer.experts.activation(torch.einsum("nd,nhd->nh", u.flatten(0, 1), into[e]) + bias[e])
        added = g[:, k - 1 : k] * torch.einsum("nh,ndh->nd", hidden, out[e])
        torch.testing.assert_close((after - before).flatten(0, 1), added, rtol=1e-5, atol=1e-6)  # gates are fp32
        before = after


@torch.no_grad()
def test_without_an_expert_it_is_stage_as_model_bit_for_bit_and_counts_as_such():
    b, _ = converted("flux")
    a, _ = converted("flux", stage="shared")
    x = inputs(a)
    assert not torch.equal(b(*x).sample, a(*x).sample)
    take(b, 0)
    assert torch.equal(b(*x).sample, a(*x).sample)
    assert editing.per_token(b) == editing.per_token(a) < editing.per_token(converted("flux")[0])
    assert b.applied["moe"].k == 0  # as an artifact stores it


def test_k_is_refused_beyond_the_experts_there_are():
    moe, whole = converted("dit")
    with pytest.raises(ValueError, match=r"moe \(Dense2MoE\): a token cannot take 13 of 12 experts: choose 0 to 12"):
        take(moe, 13)
    with pytest.raises(ValueError, match="this dit has no experts of Dense2MoE: apply it first"):
        take(whole, 1)


# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sizes():
    """FLUX.1-dev with experts, and with units left out, without weights: by the units that are active."""
    with torch.device("meta"):
        large = edit.apply(FluxConfig().build(), {"moe": Dense2MoE(stage="blocks")}, fresh=False).eval()

    def smaller(active):
        edits = {"blocks": MixtureOfBlocks(layout((19, 38), active))}
        return edit.apply(deepcopy(large), edits, fresh=False)

    return {(19, 38): large} | {active: smaller(active) for active in ((14, 31), (9, 26), (9, 18))}


def matrices(denoiser, part: str) -> int:
    return sum(p.numel() for n, p in denoiser.named_parameters() if f".{part}." in n and "bias" not in n)


def test_flux_has_the_counted_feed_forwards_and_routers(sizes):
    large = sizes[19, 38]
    shared, routed, routers = (matrices(large, part) for part in ("shared", "experts", "router"))
    assert shared + routed == 608 * 3072**2 and round((shared + routed) / 1e9, 4) == 5.7378
    assert round((shared + routed * 2 / 12) / 1e9, 4) == 2.1517
    assert routers == 76 * 3072 * 12 and round(routers / 1e6, 2) == 2.80


def active(denoiser) -> tuple[float, float]:
    """Billions of parameters that a token is computed with, with and without the units' modulation."""
    shares = denoiser.applied["blocks"].activated(denoiser) if "blocks" in denoiser.applied else {}
    parts = ("norm1.linear.", "norm1_context.linear.", "norm.linear.")
    modulation = sum(
        p.numel() * shares.get(n, 1.0) for n, p in denoiser.named_parameters() if any(part in n for part in parts)
    )
    whole = editing.per_token(denoiser)
    return whole / 1e9, (whole - modulation) / 1e9


def test_activated_sizes_of_flux_are_as_published_without_modulation(sizes):
    found = {units: active(denoiser) for units, denoiser in sizes.items()}
    assert found[19, 38][1] == pytest.approx(5.15, rel=0.02)
    assert found[9, 26][1] == pytest.approx(3.03, rel=0.02)
    # M and XS are our layouts: these are the distances that configs/experiment/flux_dev states
    assert found[14, 31][1] / 4 - 1 == pytest.approx(-0.009, abs=5e-4)
    assert found[9, 18][1] / 2.64 - 1 == pytest.approx(-0.074, abs=5e-4)
    assert [round(found[units][0], 2) for units in sizes] == [8.32, 6.43, 4.73, 3.97]
    assert all(sum(p.numel() for p in d.parameters()) == pytest.approx(11.905e9, rel=1e-4) for d in sizes.values())


@pytest.mark.slow
def test_modulation_of_low_rank_is_counted_so():
    with torch.device("meta"):
        edits = {"rank": ModulationRank(256), "moe": Dense2MoE(stage="blocks")}
        low = edit.apply(FluxConfig().build(), edits, fresh=False)
    per_unit = 256 * 3072 * (19 * 2 * (1 + 6) + 38 * (1 + 3))  # U and V
    assert editing.per_token(low) / 1e9 == pytest.approx(5.089 + per_unit / 1e9, abs=2e-3)


def formula(feed: float) -> float:
    """FLOPs of FLUX's 57 units at 1024 pixels with 77 tokens of text; `feed`: of the feed-forwards, in d^2 a token."""
    d, t = 3072, 4096 + 77
    return 2 * 57 * ((4 + feed) * d**2 * t + 2 * t**2 * d)


def test_the_formula_gives_the_counted_flops():
    assert round(formula(8) / 1e12, 2) == 66.07 and round(formula(3) / 1e12, 2) == 43.62


@pytest.mark.slow
@pytest.mark.parametrize("experts, feed", [(False, 8), (True, 3)])
def test_executed_flops_are_those_of_the_formula(experts, feed, sizes):
    with torch.device("meta"):
        denoiser = sizes[19, 38] if experts else FluxConfig().build().eval()
        x, t = torch.zeros(1, 16, 128, 128), torch.full((1,), 0.5)
        condition = denoiser.example(1, 77).map(lambda v: v.to("meta"))
        with Flops() as counter, torch.no_grad():
            denoiser(x, t, condition)
    assert counter.total == pytest.approx(formula(feed), rel=2e-3)  # and embedders, modulation, routers


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stage_b():
    moe, _ = converted("flux")
    for name, p in moe.named_parameters():
        p.requires_grad_(trains(moe, name))
    return moe.train()


def test_stage_b_has_gradients_for_routed_experts_and_routers_alone(stage_b):
    out = stage_b(*inputs(stage_b))
    assert stage_b.applied["moe"].losses(out.trace)["balance"] > 0
    out.sample.square().mean().backward()  # without a balance loss
    for name, p in stage_b.named_parameters():
        routed = name.startswith("edits.moe.") and ".shared." not in name
        assert (p.grad is not None) == routed, name
        assert not name.endswith("router.weight") or p.grad.any(), name


def test_an_expert_that_no_token_takes_has_a_gradient_of_exactly_zero(stage_b):
    layer = stage_b.edits["moe"]["0"]
    u = torch.randn(1, 1, 64, dtype=torch.float64)
    layer(u, Layout((1, 1, 1))).square().sum().backward()
    taken = set(layer.router(u[0]).topk(2).indices[0].tolist())
    for part in (layer.experts.into, layer.experts.into_bias, layer.experts.out):
        reached = {e for e in range(12) if part.grad[e].any()}
        assert reached == taken and len(taken) == 2


@pytest.mark.parametrize(
    "stage, trained",
    [
        ({"stage": "shared"}, {"units", "shared"}),
        ({"stage": "shared", "scope": "shared"}, {"shared"}),
        ({"stage": "experts"}, {"routed"}),
        ({"stage": "blocks"}, {"units", "shared", "routed", "around"}),
    ],
)
def test_each_stage_trains_its_own_part(stage, trained):
    moe, _ = converted("flux", **stage)

    def part(name: str) -> str:
        if name.startswith("edits.moe."):
            return "shared" if ".shared." in name else "routed"
        return "units" if "transformer_blocks" in name else "around"

    named = [n for n, _ in moe.named_parameters()]
    assert {part(n) for n in named if trains(moe, n)} == trained
    assert not {part(n) for n in named if not trains(moe, n)} & trained


def trace_of(f: Tensor, p: Tensor) -> dict[str, Tensor]:
    """Of two layers with the same load."""
    return {f"moe.{i}.{what}": v[None] for i in (0, 1) for what, v in ((LOADS, f), (PROBABILITIES, p))}


def test_the_balance_loss_is_one_for_equal_loads_and_n_over_k_for_a_collapse():
    one = Dense2MoE(balance=1.0, **PLAIN)
    object.__setattr__(one, "name", "moe")
    even, crowded = torch.full((12,), 1 / 12), torch.tensor([0.5, 0.5, *[0.0] * 10])
    assert one.losses(trace_of(even, even))["balance"].item() == pytest.approx(1, abs=1e-6)
    assert one.losses(trace_of(crowded, crowded))["balance"].item() == pytest.approx(6)
    weighed = replace(one)
    weighed.balance, weighed.name = 1e-2, "moe"
    assert weighed.losses(trace_of(crowded, crowded))["balance"].item() == pytest.approx(0.06)
    weighed.stage = "blocks"  # none is published there
    assert weighed.losses(trace_of(crowded, crowded)) == {}


def test_a_step_of_the_balance_loss_lowers_the_crowded_experts_probability():
    moe, _ = converted("dit")
    layers = moe.edits["moe"]
    with torch.no_grad():
        for layer in layers.values():
            layer.router.weight.zero_()[0, :] = 0.05
    x = inputs(moe)
    x = x[0] + 1, x[1], x[2]

    def crowded() -> tuple[Tensor, int, Tensor]:
        trace = moe(*x).trace
        loads, p = trace[f"moe.0.{LOADS}"].mean(0), trace[f"moe.0.{PROBABILITIES}"].mean(0)
        e = int(loads.argmax())
        return moe.applied["moe"].losses(trace)["balance"], e, p

    loss, e, before = crowded()
    loss.backward()
    with torch.no_grad():
        layers["0"].router.weight -= layers["0"].router.weight.grad
    assert crowded()[2][e] < before[e]


# ---- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ({"k": 13}, "Dense2MoE: a token cannot take 13 of 12 experts: choose 0 to 12"),
        ({"gate": "none"}, "Dense2MoE: gate must be one of softmax, softmax_renorm, sigmoid, ones, got 'none'"),
        ({"deal": "cards"}, "Dense2MoE: deal must be one of snake, contiguous, random, got 'cards'"),
        ({"stage": "a"}, "Dense2MoE: stage must be one of shared, experts, blocks, got 'a'"),
    ],
)
def test_impossible_settings_are_refused(options, said):
    with pytest.raises(ValueError) as error:
        Dense2MoE(**options)
    assert str(error.value) == said


@pytest.mark.parametrize("options", [{"n": 11}, {"r_s": 0.99, "n": 12}, {"r_n": 0.255}])
def test_widths_that_do_not_divide_are_refused_before_anything_changes(options):
    whole = family("dit")
    with pytest.raises(ValueError, match="Dense2MoE: 256 hidden channels of this dit are not .* choose r_s, n and r_n"):
        edit.apply(whole, {"moe": Dense2MoE(**{**PLAIN, **options})})
    assert not any(unit.filled for unit in whole.units)


def test_the_wrong_stages_artifact_is_refused_in_one_sentence(tmp_path):
    whole = family("dit").float()
    edit.save(whole, tmp_path / "dense")
    edit.save(edit.apply(family("dit").float(), {"ranking": TaylorRanking()}), tmp_path / "ranked")
    for stage in ("shared", "experts"):
        edit.save(converted("dit", stage=stage)[0].float(), tmp_path / stage)
    cases = {
        (
            "shared",
            "dense",
        ): r"stage=shared begins with a ranking, and start=.*dense has no edits: give the run of recipe",
        (
            "shared",
            "shared",
        ): "begins with a ranking, and start=.*shared has stage=shared: give the run of recipe=calib",
        (
            "experts",
            "ranked",
        ): "begins with the artifact of stage=shared, and start=.*ranked has TaylorRanking: give the",
        (
            "experts",
            "experts",
        ): "begins with the artifact of stage=shared, and start=.*has stage=experts: give the run of",
        (
            "blocks",
            "shared",
        ): "begins with the artifact of stage=experts, and start=.*has stage=shared: give the run of",
    }
    for (stage, start), said in cases.items():
        new = Dense2MoE(ranking="taylor", stage=stage, start=str(tmp_path / start))
        with pytest.raises(ValueError, match=said) as error:
            edit.apply(family("dit").float(), {"moe": new})
        assert "\n" not in str(error.value) and ". " not in str(error.value).replace(str(tmp_path), "")
    with pytest.raises(ValueError, match="needs the scores of a calibration, and start is empty: give the run"):
        edit.apply(family("dit").float(), {"moe": Dense2MoE()})
    with pytest.raises(ValueError, match="has gate=softmax, and this one ones: train all stages alike"):
        new = Dense2MoE(stage="experts", gate="ones", start=str(tmp_path / "shared"))
        edit.apply(family("dit").float(), {"moe": new})


@torch.no_grad()
def test_a_stage_takes_over_all_weights_of_the_stage_before(tmp_path):
    before = converted("flux", stage="shared")[0].float()
    for p in before.parameters():
        p.add_(0.01 * torch.randn_like(p))
    edit.save(before, tmp_path / "a")
    new = Dense2MoE(stage="experts", start=str(tmp_path / "a"))
    after = edit.apply(family("flux").float(), {"moe": new}).eval()
    mine, theirs = after.state_dict(), before.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in mine.items())
    x, t, condition = inputs(before)
    x = x.float(), t.float(), condition.map(lambda v: v.float())
    take(after, 0)
    assert torch.equal(after(*x).sample, before(*x).sample)
