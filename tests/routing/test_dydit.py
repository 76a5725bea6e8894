"""Oracles 1 to 8 of methods/dydit.md, and DyDiT as an edit; 9 is in tests/tuning/test_td_lora."""

from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from weights import randomise

import edit
from edit.backbones.attached import attached
from edit.backbones.dit import DiTConfig
from edit.backbones.flux import FluxConfig
from edit.backbones.pixart import PixArtConfig
from edit.backbones.sd3 import SD3Config
from edit.denoiser import Denoiser, Edit
from edit.few_step.flow_map import IntervalInput
from edit.measuring.flops import Flops
from edit.objectives import DDPM, FlowMatching, Ramp
from edit.pruning.tinyfusion import TinyFusion
from edit.routing.dydit import RATIO, DyDiT
from edit.routing.dydit_routers import TOKENS, WIDTHS, DyDiTRouters, Logits, TokenRouter, work
from edit.routing.dydit_units import PLAN, Routed
from edit.routing.slices import Narrow
from edit.sampling import Sampler
from edit.solvers import Euler
from edit.stream import Condition, Step
from edit.tuning.lora import LoRA
from recipes.roles import units_of

MODERN = {"swiglu": True, "hidden_size": 48, "rope": True, "qk_norm": True, "rms_norm": True, "registers": 2}
FAMILIES = ["dit", "modern", "flux", "sd3", "pixart"]


def tiny(family: str) -> Denoiser:
    """Depth 3 and 4 heads, random weights, the same every time; FLUX has a double unit and two single ones."""
    torch.manual_seed(0)
    if family == "flux":
        denoiser: Denoiser = FluxConfig(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=24,
            pooled_projection_dim=12,
            guidance_embeds=False,
            axes_dims_rope=(4, 6, 6),
            sample_size=(8, 8),
        ).build()
    elif family == "sd3":
        denoiser = SD3Config(4, 3, 4, 8, 24, 12, 8, dual_attention_layers=(1,), pos_embed_max_size=8).build()
    elif family == "pixart":
        denoiser = PixArtConfig(4, 8, 3, 4, 8, 32, 24, 8).build()
    else:
        options = MODERN if family == "modern" else {"hidden_size": 32}
        denoiser = DiTConfig(**{"input_size": 8, "depth": 3, "num_heads": 4, "num_classes": 10, **options}).build()
    randomise(denoiser, 0)
    return denoiser.eval()


def inputs(family: str, b: int = 4) -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(b, 4, 8, 8, generator=g), torch.tensor([0.2, 0.9, 0.5, 1.0])[:b]
    if family not in ("dit", "modern"):
        text, pooled = torch.randn(b, 5, 24, generator=g), torch.randn(b, 12, generator=g)
        return x, t, Condition(text=text, pooled=None if family == "pixart" else pooled)
    return x, t, Condition(label=torch.tensor([0, 3, 9, 10])[:b])


def own_of(denoiser: Denoiser) -> DyDiTRouters:
    own = denoiser.edits["dydit"]
    assert isinstance(own, DyDiTRouters)
    return own


def routed(denoiser: Denoiser, fresh: bool = False, **options) -> Denoiser:
    """With routers that choose, of random weights and without a bias, unless they stay fresh."""
    edit.apply(denoiser, {"dydit": DyDiT(**{"order": False, **options})})
    if not fresh:
        g = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, p in own_of(denoiser).named_parameters():
                if name.endswith(("width.bias", "out.bias")):
                    p.zero_()
                elif name.endswith(("width.weight", "into.weight", "out.weight")):
                    p.copy_(torch.randn(p.shape, generator=g))
            for router in (r for r in own_of(denoiser).tokens or () if isinstance(r, TokenRouter)):
                router.out.weight.copy_(torch.tensor([1.0, -1.0, 0.5])[: router.out.in_features])  # relu(a) - relu(b)
    return denoiser


def streams(denoiser: Denoiser, batch: tuple) -> list:
    """What each unit gets in eval mode."""
    x, t, condition = batch
    stream = denoiser.embed(**denoiser.pack(x, t, condition))
    found = []
    for name, e in denoiser.applied.items():
        stream = e.embed(stream, t, condition, denoiser.edits[name] if name in denoiser.edits else None)
    for unit in denoiser.units:
        found.append(stream)
        stream = unit(stream)
    return found


def one_by_one(denoiser: Denoiser, batch: tuple) -> Tensor:
    x, t, condition = batch
    rows = [slice(i, i + 1) for i in range(len(x))]
    return torch.cat([denoiser(x[r], t[r], condition.map(lambda v, r=r: v[r])).sample for r in rows])


def mixed(share: Tensor) -> bool:
    return bool((share > 0).any() and (share < 1).any())


# ---- 1: a fresh edit -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_routers_open_everything_and_the_model_is_the_static_one(family):
    denoiser, batch = tiny(family), inputs(family)
    static = denoiser(*batch).sample
    out = routed(denoiser, True)(*batch)
    assert torch.equal(out.sample, static)
    assert torch.equal(out.trace[RATIO], torch.ones(4)) and PLAN not in out.trace
    assert all((v == 1).all() for v in denoiser.applied["dydit"].decisions(out.trace).values())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_ranking_heads_and_channels_moves_weights_and_preserves_the_model(family):
    denoiser, batch = tiny(family).double(), inputs(family)
    batch = (batch[0].double(), batch[1], batch[2].map(lambda v: v.double() if v.is_floating_point() else v))
    static, before = denoiser(*batch).sample, {k: v.clone() for k, v in denoiser.model.state_dict().items()}
    ranked = routed(denoiser, True, order=True)
    moved = {k for k, v in denoiser.model.state_dict().items() if not torch.equal(v, before[k])}
    assert len(moved) >= 3 * 4  # weights around the heads and around the channels of each of 3 units
    torch.testing.assert_close(ranked(*batch).sample, static, rtol=0, atol=1e-12)  # another order of fp64 sums


# ---- 2: what a unit costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "width, heads, attention, feed", [(384, 6, 0.2013, 0.3020), (768, 12, 0.7046, 1.2080), (1152, 16, 1.5099, 2.7179)]
)
def test_work_is_the_published_constant(width, heads, attention, feed):
    with torch.device("meta"):
        unit = DiTConfig(hidden_size=width, num_heads=heads, depth=1).build().units[0]
    w = work(unit)
    fixed, attended, always = w.parts(256, 0, 0)
    assert attended / 1e9 == pytest.approx(attention, abs=5e-5)  # four decimals
    assert 256 * w.feed / 1e9 == pytest.approx(feed, abs=5e-5)
    assert fixed == always == w.out == 0
    if width == 1152:
        assert 28 * (attended + 256 * w.feed) / 1e9 == pytest.approx(118.380, abs=1e-3)


def modulation_macs(denoiser: Denoiser) -> int:
    """Of what the model leaves out of the units: adaLN for one sample."""
    parts = ("adaLN_modulation", "norm.linear", "norm1.linear", "norm1_context.linear")
    layers = [m for u in denoiser.units for n, m in u.plain.named_modules() if n.startswith(parts)]
    return sum(m.weight.numel() for m in layers if isinstance(m, nn.Linear))


def router_macs(denoiser: Denoiser, n: int, length: int) -> int:
    own, total = own_of(denoiser), 0
    for router in own.tokens or ():
        if hasattr(router, "modulation"):  # one vector is modulated, each image token scored
            total += router.modulation.weight.numel() + n * router.out.weight.numel()
        else:
            total += n * (router.into.weight.numel() + router.out.weight.numel())
    return total


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"tokens": False}, {"width": False}], ids=["both", "width", "tokens"])
def test_the_model_of_the_work_is_what_is_executed(family, options):
    denoiser, (x, t, condition) = routed(tiny(family), **options), inputs(family)
    own, seen = own_of(denoiser), set()
    length = 5 if condition.text is not None else 0
    registers = 2 if family == "modern" else 0
    for i in range(4):
        told = condition.map(lambda v, i=i: v[i : i + 1])
        stream = denoiser.embed(**denoiser.pack(x[i : i + 1], t[i : i + 1], told))
        stream = denoiser.applied["dydit"].embed(stream, t, told, own)
        with Flops() as counter:
            stream = denoiser.run(stream)
        out = denoiser.applied["dydit"].readout(denoiser.readout(stream), stream, own)
        executed = counter.total // 2 - modulation_macs(denoiser) - router_macs(denoiser, 16, length)
        whole = 0
        for w in own.works:
            fixed, attended, always = w.parts(16, registers, length)
            whole += fixed + attended + (always + 16) * (w.out + w.feed)
        assert executed == pytest.approx(out.trace[RATIO].item() * whole, rel=1e-6)  # fp32 shares
        assert executed < 0.9 * whole
        seen.add(executed)
    assert len(seen) > 1  # other times and contents, other work


# ---- 3: masked = sliced ----------------------------------------------------------------------------------------------


def factored_and_sliced(denoiser: Denoiser, plan: Tensor, batch: tuple) -> list[tuple]:
    """Each unit with factors and with slices of its weights, from the same stream."""
    found = []
    for unit, stream in zip(denoiser.units, streams(denoiser, batch), strict=True):
        assert isinstance(unit, Routed)
        widths = plan.double().expand(len(stream.image), len(denoiser.units), 2, -1)
        found.append((unit.factored(stream.record(WIDTHS, widths)), unit.call(unit.at(plan, stream), stream)))
    return found


def in_double(denoiser: Denoiser, batch: tuple) -> tuple[Denoiser, tuple]:
    x, t, condition = batch
    denoiser.double()
    return denoiser, (x.double(), t, condition.map(lambda v: v.double() if v.is_floating_point() else v))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_factors_compute_what_slices_compute(family, lora):
    plain = tiny(family)
    if lora:
        edit.apply(plain, {"lora": LoRA(2, 4, targets=("all-linear",))})
        randomise(plain, 3)
    denoiser, batch = in_double(routed(plain), inputs(family))
    plan = torch.tensor([[True, False, True, False], [False, True, False, True]])
    for factored, sliced in factored_and_sliced(denoiser, plan, batch):
        assert torch.equal(*(s.trace[next(k for k in s.trace if k.startswith(TOKENS))] for s in (factored, sliced)))
        torch.testing.assert_close(factored.image, sliced.image, rtol=0, atol=1e-12)
        if family == "flux":
            torch.testing.assert_close(factored.text, sliced.text, rtol=0, atol=1e-12)


@torch.no_grad()
def test_what_is_left_out_is_what_its_heads_and_groups_contributed():
    static, batch = in_double(tiny("dit"), inputs("dit"))
    denoiser = routed(deepcopy(static), tokens=False)
    plan = torch.tensor([[True, False, True, False], [False, True, False, True]])
    for unit in static.units:  # without the columns that read them nothing of them is left
        unit.attn.proj.weight.view(32, 4, 8)[:, ~plan[0]] = 0
        unit.mlp.fc2.weight.view(32, 4, 32)[:, ~plan[1]] = 0
    for unit, reference, stream in zip(denoiser.units, static.units, streams(denoiser, batch), strict=True):
        sliced = unit.at(plan, stream)
        torch.testing.assert_close(sliced(stream).image, reference(stream).image, rtol=0, atol=1e-12)
        narrow = sliced.mlp.fc1(torch.zeros(1, 32, dtype=torch.float64))
        assert narrow.shape == (1, 64)


# ---- 4: tokens -------------------------------------------------------------------------------------------------------


def all_logits(denoiser: Denoiser, value: float) -> None:
    with torch.no_grad():
        for router in own_of(denoiser).tokens:
            router.out.weight.zero_()
            router.out.bias.fill_(value)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("logit", [None, -1.0, 1.0], ids=["some", "none", "all"])
def test_gathered_tokens_compute_what_masked_ones_do(family, logit):
    denoiser, batch = in_double(routed(tiny(family), width=False), inputs(family))
    if logit is not None:
        all_logits(denoiser, logit)
    plan = torch.ones(2, 4, dtype=torch.bool)
    for i, (factored, sliced) in enumerate(factored_and_sliced(denoiser, plan, batch)):
        kept = sliced.trace[f"{TOKENS}.{i}"]
        assert mixed(kept) if logit is None else (kept == (logit > 0)).all()
        torch.testing.assert_close(factored.image, sliced.image, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_left_out_stay_as_they_are_bit_for_bit(family):
    denoiser, batch = routed(tiny(family), width=False), inputs(family)
    for i, (unit, stream) in enumerate(zip(denoiser.units, streams(denoiser, batch), strict=True)):
        after, before, plain = unit(stream), stream, unit.plain
        dropped = after.trace[f"{TOKENS}.{i}"] == 0
        assert 0 < dropped.sum() < dropped.numel()
        if not plain.anatomy.fused:  # there the choice comes first, and attention changes none of them either
            seen = {}
            plain.slots.branch = lambda s, name, run, seen=seen: seen.update({name: s}) or run(s)
            plain(stream)
            before = seen["feed"]
        registers = stream.layout.registers
        change = (after.image - before.image)[:, registers:].abs().amax(2)
        assert torch.equal(after.image[:, registers:][dropped], before.image[:, registers:][dropped])
        assert (change[~dropped] > 0).all() and (after.image[:, :registers] != before.image[:, :registers]).all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["dit", "flux"])
def test_tokens_left_out_still_influence_the_others(family):
    denoiser, batch = routed(tiny(family), width=False), inputs(family)
    for i, (unit, stream) in enumerate(zip(denoiser.units, streams(denoiser, batch), strict=True)):
        after = unit(stream)
        kept = after.trace[f"{TOKENS}.{i}"]
        j = kept[0].argmin().item()
        image = stream.image.clone()
        image[0, j] += 1e-3 * torch.randn_like(image[0, j])
        moved = unit(replace(stream, image=image))
        assert kept[0, j] == 0 and torch.equal(moved.trace[f"{TOKENS}.{i}"], kept)
        others = (moved.image - after.image)[0].abs().amax(1)[kept[0] == 1]
        assert (others > 0).any()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_mixed_times_computes_what_its_samples_do_alone(family):
    denoiser, batch = routed(tiny(family)), inputs(family)
    out = denoiser(*batch)
    assert len(out.trace[WIDTHS].unique(dim=0)) > 1 and mixed(out.trace[f"{TOKENS}.0"])
    # matrix products of other shapes: other orders of fp32 sums
    torch.testing.assert_close(out.sample, one_by_one(denoiser, batch), rtol=1e-4, atol=1e-4)
    x, t, condition = batch
    alone = denoiser(x[1:2], t[1:2], condition.map(lambda v: v[1:2]))
    for i in range(3):
        assert torch.equal(out.trace[f"{TOKENS}.{i}"][1:2], alone.trace[f"{TOKENS}.{i}"])


# ---- 5: who sees what ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["dit", "flux"])
def test_widths_depend_on_time_alone_and_tokens_on_what_they_hold(family):
    denoiser, (x, t, condition) = routed(tiny(family)), inputs(family)
    found = denoiser(x, torch.full_like(t, 0.5), condition).trace
    assert (found[WIDTHS] == found[WIDTHS][:1]).all()
    assert not torch.equal(found[WIDTHS][0], denoiser(x, torch.full_like(t, 0.1), condition).trace[WIDTHS][0])
    assert len(found[f"{TOKENS}.0"].unique(dim=0)) > 1


# ---- 6, 7: the law of a draw, and what is always on ------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_a_draw_is_open_as_often_as_the_sigmoid_says_whatever_the_temperature(temperature):
    own = DyDiTRouters((), 4, None, None, temperature)
    for z in (0.7, -1.5):
        drawn = own.opened(torch.full((1_000_000,), z))
        # a million draws: a standard deviation of at most 5e-4
        assert drawn.mean().item() == pytest.approx(torch.tensor(z).sigmoid().item(), abs=1e-3)
        assert drawn.unique().tolist() == [0.0, 1.0]
    logits = torch.tensor([0.3, -0.3], requires_grad=True)
    own.opened(logits).sum().backward()
    assert (logits.grad > 0).all()
    assert own.eval().opened(logits).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_the_gradient_of_a_draw_is_the_sigmoid_s_over_the_temperature(temperature):
    own, logits = DyDiTRouters((), 4, None, None, temperature), torch.linspace(-3, 3, 50).requires_grad_()
    torch.manual_seed(1)
    own.opened(logits).sum().backward()
    torch.manual_seed(1)
    first, second = (torch.empty(50).exponential_().log() for _ in range(2))
    y = torch.sigmoid((logits.detach() + second - first) / temperature)
    torch.testing.assert_close(logits.grad, y * (1 - y) / temperature)


@torch.no_grad()
def test_the_first_head_and_group_are_always_on():
    denoiser = routed(tiny("dit"), True, bias=-1e4, token_bias=-1e4)
    for mode in (True, False):
        denoiser.train(mode)
        own_of(denoiser).complete = False
        trace = denoiser(*inputs("dit")).trace
        assert (trace[WIDTHS][..., 0] == 1).all() and (trace[WIDTHS][..., 1:] == 0).all()
        w = own_of(denoiser).works[0]
        _, a, _ = w.parts(16, 0, 0)
        torch.testing.assert_close(trace[RATIO], torch.full((4,), a / 4 / (a + 16 * w.feed)))


# ---- 8: the budget ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_budget_moves_all_routers_and_no_backbone_weight(family):
    denoiser = routed(tiny(family), True, ratio=0.6, complete=0.0).train()
    denoiser.applied["dydit"].losses(denoiser(*inputs(family)).trace)["budget"].backward()
    own = own_of(denoiser)
    assert all(p.grad is None or not p.grad.any() for p in denoiser.model.parameters())
    assert (own.width.bias.grad != 0).all() and own.width.weight.grad.any()
    assert all(router.out.bias.grad.any() for router in own.tokens)


def test_the_budget_alone_is_reached():
    denoiser, batch, ratios = routed(tiny("dit"), True, ratio=0.6, complete=0.0).train(), inputs("dit"), []
    optimizer = torch.optim.Adam(own_of(denoiser).parameters(), lr=0.2)
    for _ in range(150):
        trace = denoiser(*batch).trace
        optimizer.zero_grad()
        denoiser.applied["dydit"].losses(trace)["budget"].backward()
        optimizer.step()
        ratios.append(trace[RATIO].mean().item())
    assert sum(ratios[-50:]) / 50 == pytest.approx(0.6, abs=0.02) and ratios[0] > 0.99


def test_the_budget_goes_from_all_to_its_end_in_the_papers_steps():
    denoiser = routed(tiny("dit"))
    own, rule = own_of(denoiser), denoiser.applied["dydit"]
    for step, target, complete in ((0, 1.0, True), (100, 1.0, True), (600, 0.75, True), (1100, 0.5, True)):
        rule.advance(step / 200_000, own)
        assert own.target == pytest.approx(target) and own.complete is complete
    rule.advance(30_000 / 200_000, own)
    assert own.target == 0.5 and own.complete is False


def budget_of_ranks(rank_ratios: tuple[float, ...]) -> list[float]:
    dist.init_process_group("gloo")
    ratio = torch.tensor(rank_ratios[dist.get_rank()], requires_grad=True)
    loss = DyDiT().losses({RATIO: ratio[None], "dydit.target": torch.tensor(0.5)})["budget"]
    loss.backward()
    return [loss.item(), ratio.grad.item()]


def test_the_budget_is_one_of_all_ranks():
    for loss, gradient in run_ranks(budget_of_ranks, 2, args=((0.9, 0.3),)):
        assert loss == pytest.approx(2 * 0.1**2) and gradient == pytest.approx(4 * 0.1)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_complete_network_is_trained_beside_the_chosen_one(family):
    denoiser, batch = routed(tiny(family)), inputs(family)
    static = tiny(family)(*batch, taps=(1,), branches=(0,), maps={2: 4})
    denoiser.train()
    assert own_of(denoiser).complete
    out = denoiser(*batch, taps=(1,), branches=(0,), maps={2: 4})
    assert {k: v.shape for k, v in static.trace.items()} == {
        k: v.shape for k, v in out.trace.items() if k[:4] == "unit"
    }
    further = denoiser.applied["dydit"].further(out)["complete"]
    # masks of one in place of no masks, and FLUX's single units with a branch on its own: other fp32 sums
    torch.testing.assert_close(further.sample, static.sample, rtol=1e-4, atol=1e-4)
    assert (further.variance is None) == (static.variance is None) and out.sample.shape == static.sample.shape
    assert not torch.allclose(out.sample, static.sample, rtol=1e-2, atol=1e-2)
    assert out.trace[RATIO].shape == (4,) and (out.trace[RATIO] < 0.95).all()
    assert out.trace[WIDTHS].shape == (4, 3, 2, 4) and out.trace[f"{TOKENS}.2"].shape == (4, 16)
    denoiser.applied["dydit"].advance(0.2, own_of(denoiser))
    assert denoiser.applied["dydit"].further(denoiser(*batch)) == {}


@dataclass
class Noted(Edit):
    """Records a number of each sample, and three of none."""

    def apply(self, denoiser):
        return None

    def readout(self, output, stream, own):
        noted = {"noted": output.sample.mean((1, 2, 3)), "law": output.sample.new_ones(3)}
        return output._replace(trace={**output.trace, **noted})


def test_what_other_edits_record_while_both_are_trained_is_of_the_chosen_network():
    denoiser = routed(edit.apply(tiny("dit"), {"noted": Noted()})).train()
    out = denoiser(*inputs("dit"))
    assert denoiser.applied["dydit"].further(out)
    assert torch.equal(out.trace["noted"], out.sample.mean((1, 2, 3))) and len(out.trace["law"]) == 3


def test_both_networks_are_scored_on_a_learned_variance_too(make_dit, batch):
    denoiser = routed(make_dit(time="ddpm", learn_sigma=True)).train()
    out = denoiser(*batch)
    further = denoiser.applied["dydit"].further(out)["complete"]
    assert further.variance.shape == out.variance.shape == batch[0].shape
    x, noise = torch.randn(2, *batch[0].shape)
    scored = [DDPM().losses(o, x, noise, batch[0], batch[1]) for o in (out, further)]
    assert scored[0].keys() == scored[1].keys() == {"noise", "bound"}
    sum(v.mean() for losses in scored for v in losses.values()).backward()
    assert all(p.grad is not None for n, p in denoiser.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_parameter_and_checkpointing_draws_the_same_again(family):
    found = []
    for checkpointing in (False, True):
        denoiser = routed(tiny(family)).train()
        denoiser.gradient_checkpointing = checkpointing
        torch.manual_seed(5)
        out = denoiser(*inputs(family))
        loss = out.sample.square().mean() + denoiser.applied["dydit"].losses(out.trace)["budget"]
        loss.backward()
        found.append({n: p.grad for n, p in denoiser.named_parameters()})
    assert all(g is not None for g in found[0].values())
    assert all(g.any() for n, g in found[0].items() if n.startswith("edits."))
    for name, g in found[0].items():
        assert torch.equal(g, found[1][name]), name


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_training_and_evaluation_run_in_half_precision(family):
    denoiser, batch = routed(tiny(family)), inputs(family)
    with torch.autocast("cpu", torch.bfloat16):
        assert denoiser(*batch).sample.isfinite().all()
        out = denoiser.train()(*batch)
        loss = out.sample.float().square().mean() + denoiser.applied["dydit"].losses(out.trace)["budget"]
    loss.backward()
    assert all(p.grad.isfinite().all() for p in denoiser.parameters())
    assert denoiser.eval().bfloat16()(batch[0], batch[1], batch[2]).sample.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["dit", "flux"])
def test_routers_stay_in_fp32_over_weights_of_bf16_and_decide_alike_in_training_and_evaluation(family):
    denoiser, batch = routed(tiny(family).bfloat16()), inputs(family)
    own = own_of(denoiser)
    assert all(p.dtype == torch.float32 for p in own.parameters())
    assert all(p.dtype == torch.bfloat16 for p in denoiser.model.parameters())
    x, t, condition = batch
    stream = denoiser.embed(**denoiser.pack(x, t, condition))
    assert stream.image.dtype == torch.bfloat16
    for half in (False, True):
        found = []
        for mode in (True, False):
            denoiser.train(mode)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                found.append([own.width(stream.time), *(router(stream) for router in own.tokens)])
        for trained, evaluated in zip(*found, strict=True):
            assert trained.dtype == torch.float32 and torch.equal(trained, evaluated)


@torch.no_grad()
def test_a_logit_is_the_small_difference_of_large_numbers_under_autocast_too():
    layer = Logits(2, 1)
    layer.weight.fill_(-35.0)
    layer.bias.fill_(34.9)  # 35 in bf16
    features = torch.tensor([[0.5, 0.5], [0.5, 0.492]])  # sums of -0.1 and 0.18
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(features)[:, 0]
    torch.testing.assert_close(logits, torch.tensor([-0.1, 0.18]), rtol=0, atol=1e-5)  # fp32 near 35: 4e-6


def compile_units(denoiser: Denoiser, **options) -> None:
    torch._dynamo.reset()  # of what the process this one was forked from may have compiled
    torch._dynamo.utils.counters.clear()
    for unit in units_of(denoiser):
        unit.compile(backend="eager", **options)


def compiled_units_train_the_same(family: str) -> None:
    results = []
    for compiled in (False, True):
        denoiser = routed(tiny(family)).train()
        if compiled:
            compile_units(denoiser, fullgraph=True)
        torch.manual_seed(3)
        out = denoiser(*inputs(family))
        (out.sample.square().mean() + denoiser.applied["dydit"].losses(out.trace)["budget"]).backward()
        results.append([out.sample.detach(), *(p.grad for p in denoiser.parameters())])
    for eager, found in zip(*results, strict=True):
        torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-5)  # the same operations, fp32
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == (2 if family == "flux" else 1)  # one per kind of unit, whatever its number


def compiled_units_compute_the_same(family: str, options: dict) -> None:
    denoiser, batch = routed(tiny(family), **options), inputs(family)
    with torch.no_grad():
        if denoiser.edits["dydit"].width is not None:
            own_of(denoiser).width.bias[:6].fill_(1e4)  # the first unit's 3 heads and 3 groups stay on
        eager = denoiser(*batch).sample
        compile_units(denoiser)
        plain = nn.Module.compile
        nn.Module.compile = lambda self: plain(self, backend="eager")  # of the copies, in this process
        torch.testing.assert_close(denoiser(*batch).sample, eager, rtol=1e-5, atol=1e-5)
    assert denoiser.units[0].whole._compiled_call_impl is not None
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


SLOW = pytest.mark.slow  # seconds of tracing


@pytest.mark.parametrize("family", ["dit", pytest.param("flux", marks=SLOW)])
def test_compiled_units_train_the_same(family):
    run_ranks(compiled_units_train_the_same, 1, args=(family,))  # what has compiled cannot be forked from


@pytest.mark.parametrize(
    "family, options",
    [
        ("dit", {"tokens": False}),
        pytest.param("dit", {}, marks=SLOW),
        pytest.param("flux", {"width": False}, marks=SLOW),
    ],
)
def test_compiled_units_compute_the_same(family, options):
    run_ranks(compiled_units_compute_the_same, 1, args=(family, options))


# ---- generation ------------------------------------------------------------------------------------------------------


def test_a_generation_decides_once_per_time_for_both_branches_and_keeps_the_latest_slices():
    denoiser, condition = routed(tiny("dit")), inputs("dit")[2]
    memory, seen = {}, {}

    def watch(step: Step, out) -> None:
        memory.update({"it": step.memory})
        seen.setdefault(step.sigma, []).append((step.branch, out.trace))

    sampler = Sampler(Euler(4), guidance=2.0)
    sampler(denoiser, FlowMatching(), condition, torch.arange(4), watch=watch)
    plans = {sigma: plan for (_, sigma), plan in memory["it"]["dydit", "plans"].items()}
    assert len(memory["it"]["dydit", "plans"]) == 4  # evaluations
    assert set(plans) == set(seen) and len({p.numpy().tobytes() for _, p in plans.values()}) > 1
    for sigma, branches in seen.items():
        ((branch, trace),) = branches
        assert branch == "joint" and torch.equal(trace[WIDTHS] > 0.5, plans[sigma][1].expand(8, -1, -1, -1))
    cond, uncond = seen[1.0][0][1][f"{TOKENS}.2"].chunk(2)  # the same noise, each branch with its own tokens
    assert not torch.equal(cond, uncond)
    kept = {k[1]: v for k, v in memory["it"].items() if isinstance(k[1], int)}
    assert kept  # one narrow copy a unit at most, of the latest time that asked for one, with its slices made
    for i in range(3):
        narrow = [plan[0, i] for _, (_, plan) in sorted(plans.items(), reverse=True) if not plan[0, i].all()]
        assert (i in kept) == bool(narrow)
        if narrow:
            plan, unit = kept[i]
            assert torch.equal(plan, narrow[-1])
            assert all(layer.kept for layer in unit.modules() if isinstance(layer, Narrow))
            assert any(isinstance(layer, Narrow) for layer in unit.modules())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_a_generation_decides_and_computes_what_a_call_outside_does(family):
    denoiser, (x, t, condition) = routed(tiny(family)), inputs(family)
    t = torch.full_like(t, 0.5)
    memory: dict = {}
    outside = denoiser(x, t, condition)
    for _ in range(2):  # with slices that are made, and that are kept
        inside = denoiser(x, t, condition, step=Step(0, 2, 0.5, memory=memory))
        torch.testing.assert_close(inside.sample, outside.sample, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(inside.trace[k], v) for k, v in outside.trace.items())


@torch.no_grad()
def test_a_flow_map_asked_for_two_ends_of_one_time_decides_for_each():
    denoiser, (x, t, condition) = edit.apply(tiny("dit"), {"interval": IntervalInput()}), inputs("dit")
    randomise(denoiser.edits, 3)
    routed(denoiser)
    t, memory, widths = torch.full_like(t, 0.5), {}, []
    for index, end in enumerate((0.4, 0.0)):
        told = replace(condition, end=torch.full_like(t, end))
        inside = denoiser(x, t, told, step=Step(index, 2, 0.5, memory=memory)).trace[WIDTHS]
        assert torch.equal(inside, denoiser(x, t, told).trace[WIDTHS])
        widths.append(inside)
    assert not torch.equal(*widths)


@torch.no_grad()
def test_in_a_stock_pipeline_it_paints_as_the_sampler_does():
    import diffusers

    denoiser, condition = tiny("flux"), inputs("flux", 1)[2]
    sampler, numbers = Sampler(Euler(3)), torch.arange(1)
    static = sampler(denoiser, FlowMatching(), condition, numbers)
    wanted = sampler(routed(denoiser), FlowMatching(), condition, numbers)
    assert (wanted - static).abs().max() > 1e-2  # there was something to leave out
    pack = diffusers.FluxPipeline._pack_latents
    noise = edit.noise.gaussian(0, numbers, edit.noise.NOISE, (4, 8, 8))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(scheduler, None, None, None, None, None, denoiser.model)
    pipe.set_progress_bar_config(disable=True)
    with attached(pipe, denoiser):
        painted = pipe(
            prompt_embeds=condition.text,
            pooled_prompt_embeds=condition.pooled,
            height=64,
            width=64,
            num_inference_steps=3,
            latents=pack(noise, 1, 4, 8, 8),
            output_type="latent",
        ).images
    torch.testing.assert_close(painted, pack(wanted, 1, 4, 8, 8), rtol=1e-4, atol=1e-4)  # fp32 times, thousandfold


@torch.no_grad()
def test_branches_and_maps_are_there_in_evaluation_too():
    for family in FAMILIES:
        denoiser, (x, t, condition) = routed(tiny(family)), inputs(family)
        out, plain = denoiser(x, t, condition, branches=(0, 1, 2), maps={1: 4}), denoiser(x, t, condition)
        torch.testing.assert_close(out.sample, plain.sample, rtol=1e-4, atol=1e-4)  # factors and slices, fp32
        for i in range(3):
            left_out = out.trace[f"{TOKENS}.{i}"] == 0
            assert left_out.any() and (out.trace[f"unit.{i}.feed"][left_out] == 0).all()


# ---- as an edit ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_copy_decides_for_itself_and_its_slices_follow_its_weights():
    denoiser, batch = routed(tiny("dit")), inputs("dit")
    before, copy = denoiser(*batch).sample, deepcopy(denoiser)
    assert torch.equal(copy(*batch).sample, before)
    for p in copy.parameters():
        p.mul_(1.1)
    other = routed(tiny("dit"))
    other.load_state_dict(copy.state_dict())
    assert torch.equal(copy(*batch).sample, other(*batch).sample)
    assert torch.equal(denoiser(*batch).sample, before) and not torch.equal(other(*batch).sample, before)


@torch.no_grad()
@pytest.mark.parametrize("family", ["dit", "flux"])
def test_an_artifact_comes_back_with_its_decisions(family, tmp_path):
    denoiser, batch = routed(tiny(family), ratio=Ramp(0.9, 0.4), order=True), inputs(family)
    edit.save(denoiser, tmp_path / "a")
    back = edit.load(tmp_path / "a").denoiser
    out, again = denoiser(*batch), back(*batch)
    assert back.applied["dydit"] == denoiser.applied["dydit"]
    # weights in a file's memory lie at other addresses, for which products round otherwise
    torch.testing.assert_close(again.sample, out.sample, rtol=1e-5, atol=1e-5)
    for k, v in denoiser.applied["dydit"].decisions(out.trace).items():
        assert torch.equal(back.applied["dydit"].decisions(again.trace)[k], v) and mixed(v)


@torch.no_grad()
def test_metrics_and_decisions_say_what_was_run():
    denoiser, batch = routed(tiny("dit")), inputs("dit")
    rule = denoiser.applied["dydit"]
    trace = denoiser(*batch).trace
    found, logged = rule.decisions(trace), rule.metrics(trace)
    assert {k: tuple(v.shape) for k, v in found.items()} == {"heads": (3, 4), "groups": (3, 4), "tokens": (3, 4, 16)}
    assert found["heads"].unique().tolist() and found["heads"].min() >= 0.25
    assert logged.keys() == {"ratio", "heads", "groups", "tokens"}
    assert logged["tokens"] == found["tokens"].mean() and logged["ratio"] == trace[RATIO].mean()
    only = routed(tiny("dit"), width=False)
    assert only.applied["dydit"].metrics(only(*batch).trace).keys() == {"ratio", "tokens"}
    assert rule.losses(trace) == {}  # outside of training nothing is asked for


def sharded(rank: int = 0) -> list[float]:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    (x, t, condition), losses = inputs("dit"), []
    plain = routed(tiny("dit"))
    model = routed(tiny("dit"))
    for unit in model.units:
        fully_shard(unit.unit)
    fully_shard(model)
    for m in (plain, model):
        out = m(x, t, condition).sample.detach()
        sampler = Sampler(Euler(2), guidance=2.0)
        images = sampler(m, FlowMatching(), condition, torch.arange(4))
        torch.manual_seed(3)
        trained = m.train()(x, t, condition)
        loss = trained.sample.square().mean() + m.applied["dydit"].losses(trained.trace)["budget"]
        loss.backward()
        grads = [p.grad.full_tensor() if m is model else p.grad for p in m.parameters()]
        losses.append([out, images, loss.detach(), *grads])
    for a, b in zip(*losses, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)  # factors in place of slices, fp32


def test_sharded_units_compute_what_whole_ones_do():
    run_ranks(sharded, 2)


@torch.no_grad()
def test_under_zero_3_the_units_themselves_are_called_and_compute_the_same():
    denoiser, (x, t, condition) = routed(tiny("dit")), inputs("dit")
    batch = x, torch.full_like(t, 0.5), condition
    wanted, called = denoiser(*batch), []
    for i, module in enumerate(denoiser.modules()):
        module.ds_id = i  # as DeepSpeed numbers modules, and its hooks ask for the number
        module.register_forward_pre_hook(lambda module, args: called.append(module.ds_id))
    for p in denoiser.parameters():
        p.ds_id = 0
    for step in (None, Step(0, 2, 0.5)):
        out = denoiser(*batch, step=step)
        torch.testing.assert_close(out.sample, wanted.sample, rtol=1e-4, atol=1e-4)  # factors and slices, fp32
        assert all(torch.equal(out.trace[k], v) for k, v in wanted.trace.items())
    assert {unit.unit.ds_id for unit in denoiser.units} < set(called)


def test_the_order_of_what_cannot_be_permuted_is_refused_before_anything_is_changed():
    denoiser, batch = edit.apply(tiny("dit"), {"lora": LoRA(2, 4)}), inputs("dit")
    before = denoiser(*batch).sample
    with pytest.raises(ValueError, match="fold the LoRA first, or set order=false"):
        edit.apply(denoiser, {"dydit": DyDiT()})
    assert list(denoiser.applied) == ["lora"] and not any(isinstance(u, Routed) for u in denoiser.units)
    assert torch.equal(denoiser(*batch).sample, before)
    assert torch.equal(routed(denoiser, True)(*batch).sample, before)


def test_what_it_cannot_route_is_refused():
    with torch.device("meta"):
        wrapped = edit.apply(DiTConfig(hidden_size=32, num_heads=4).build(), {"search": TinyFusion()}, fresh=False)
        wrapped.applied.clear()  # without the refusal of that pair
        with pytest.raises(ValueError, match="but a Gated wraps one of this dit: put DyDiT in the place"):
            edit.apply(wrapped, {"dydit": DyDiT()}, fresh=False)
        odd = DiTConfig(hidden_size=32, num_heads=4, swiglu=True, depth=1).build()
        with pytest.raises(ValueError, match="has 4 and 85 channels"):
            edit.apply(odd, {"dydit": DyDiT()}, fresh=False)
        twice = edit.apply(DiTConfig(hidden_size=32, num_heads=4, depth=1).build(), {"one": DyDiT()}, fresh=False)
        with pytest.raises(ValueError, match="two .DyDiT. cannot be applied together with one"):
            edit.apply(twice, {"two": DyDiT()}, fresh=False)


def test_without_weights_everything_is_run():
    with torch.device("meta"):
        meta = edit.apply(tiny("flux"), {"dydit": DyDiT(bias=-1.0)}, fresh=False).eval()
        x, t, condition = inputs("flux")
        out = meta(x.to("meta"), t.to("meta"), condition.map(lambda v: v.to("meta")))
    assert out.sample.is_meta and out.trace[RATIO].shape == (4,)


def test_units_without_a_decision_are_not_run(dit, batch):
    denoiser = routed(dit)
    with pytest.raises(RuntimeError, match="call that"):
        denoiser.run(denoiser.embed(**denoiser.pack(*batch)))


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"ratio": 0.0}, "ratio is the share"),
        ({"ratio": Ramp(1.0, 1.5)}, "ratio is the share"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"weight": -1.0}, "weight not negative"),
        ({"complete": 1.5}, "complete is a part of the run"),
        ({"width": False, "tokens": False}, "nothing to choose"),
    ],
)
def test_impossible_settings_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        DyDiT(**options)
