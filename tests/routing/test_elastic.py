"""The oracles of methods/elastic-dit.md, and what an edit has to keep besides."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from offload import offloaded
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from weights import randomise

import edit
from edit.backbones.dit import DiTConfig
from edit.backbones.dit_diffusers import DiTDiffusersConfig
from edit.backbones.flux import FluxConfig
from edit.backbones.pixart import PixArtConfig
from edit.backbones.qwen_image import QwenImageConfig
from edit.backbones.sd3 import SD3Config
from edit.denoiser import Denoiser
from edit.measuring.cost import count_forward, macs
from edit.objectives import FlowMatching, Ramp
from edit.pruning.modulation import ModulationApproximator
from edit.routing.dydit import DyDiT
from edit.routing.elastic import GATE, WIDTH, Elastic, ElasticUnit, stacked
from edit.routing.elastic_residuals import Residuals
from edit.routing.elastic_routers import ElasticRouters, Router, forced
from edit.sampling import Sampler
from edit.solvers import Euler
from edit.stream import Condition, Layout, Routing, Step, Stream
from edit.tuning.lora import LoRA
from edit.tuning.td_lora import TDLoRA
from edit.unit import Unit

TEXT = {"joint_attention_dim": 24}
SMALL = {"attention_head_dim": 16, "num_attention_heads": 2}
LATENT = {"in_channels": 16, "axes_dims_rope": (4, 6, 6), "sample_size": (8, 8)}
TINY = {"input_size": 8, "hidden_size": 32, "depth": 3, "num_heads": 4, "num_classes": 10}
CONFIGS = {
    "dit": DiTConfig(**TINY),
    "modern": DiTConfig(**TINY, swiglu=True, rms_norm=True, qk_norm=True, rope=True, registers=2),
    "stock": DiTDiffusersConfig(
        num_layers=3, sample_size=8, in_channels=4, out_channels=8, num_embeds_ada_norm=10, **SMALL
    ),
    "pixart": PixArtConfig(num_layers=3, sample_size=8, cross_attention_dim=32, caption_channels=24, **SMALL),
    "sd3": SD3Config(in_channels=4, num_layers=3, sample_size=8, pooled_projection_dim=20, **SMALL, **TEXT),
    "flux": FluxConfig(num_layers=1, num_single_layers=2, pooled_projection_dim=20, **LATENT, **SMALL, **TEXT),
    "qwen": QwenImageConfig(num_layers=3, **LATENT, **SMALL, **TEXT),
}
FAMILIES = sorted(CONFIGS)
PADDED = torch.arange(5) < torch.tensor([[5], [3], [1], [4]])


def make(family: str = "dit") -> Denoiser:
    """The same random weights every time, in eval mode."""
    torch.manual_seed(0)
    denoiser = CONFIGS[family].build()
    randomise(denoiser)
    return denoiser.eval()


def inputs(family: str = "dit") -> tuple[Tensor, Tensor, Condition]:
    """(x, t, condition) of four samples; PixArt and Qwen-Image are told which of five text tokens are padding."""
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(4, 4, 8, 8, generator=generator), torch.randn(4, 5, 24, generator=generator)
    t, pooled = torch.tensor([0.1, 0.5, 0.7, 1.0]), torch.randn(4, 20, generator=generator)
    if family in ("dit", "modern", "stock"):
        return x, t, Condition(label=torch.tensor([0, 3, 9, 10]))
    masked = family in ("pixart", "qwen")
    return x, t, Condition(text=text, text_mask=PADDED if masked else None, pooled=None if masked else pooled)


def elastic(denoiser: Denoiser, **options) -> Denoiser:
    torch.manual_seed(2)
    return edit.apply(denoiser, {"elastic": Elastic(router=16, **options)})


def routers_of(denoiser: Denoiser) -> ElasticRouters:
    own = denoiser.edits["elastic"]
    assert isinstance(own, ElasticRouters)
    return own


@torch.no_grad()
def stirred(denoiser: Denoiser, family: str = "dit") -> Denoiser:
    """ElasticRouters that decide otherwise for each sample: modulated by the condition, logits of size 1 around 0."""
    generator, seen = torch.Generator().manual_seed(3), {}
    for router in routers_of(denoiser):
        assert isinstance(router, Router) and router.width is not None
        for p in (*router.modulation.parameters(), router.gate.weight, router.width.weight):
            p.copy_(torch.randn(p.shape, generator=generator))
        for head in (router.gate, router.width):
            head.register_forward_hook(lambda head, args, out: seen.update({head: out}))
    with forced(denoiser, mixed):
        denoiser(*inputs(family))
    for head, logits in seen.items():
        head.bias.sub_(logits.mean(0))
        head._forward_hooks.clear()
    return denoiser


def mixed(index: int, p: Tensor, q: Tensor | None) -> Tensor:
    """Closed units, and all widths, side by side."""
    return (torch.arange(len(p), device=p.device) * 2 + index) % 5


def always(decision: int) -> Callable:
    return lambda index, p, q: torch.full_like(p, decision)


def close(ours: Tensor, theirs: Tensor, digits: float = 2e-6) -> None:
    """Equal up to the order of fp32 sums, through three units."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=digits * theirs.abs().max().item())


def entered(denoiser: Denoiser, family: str = "dit", dtype: torch.dtype = torch.float32) -> tuple[ElasticUnit, Stream]:
    """The first wrapped unit and a stream that enters it."""
    with torch.no_grad():
        stream = denoiser.embed(**denoiser.pack(*inputs(family)))
    denoiser.to(dtype)
    unit = denoiser.units[0]
    assert isinstance(unit, ElasticUnit)
    return unit, stream.map(lambda v: v.to(dtype) if v.is_floating_point() else v)


def one(batch: tuple, i: int) -> tuple:
    x, t, condition = batch
    return x[i : i + 1], t[i : i + 1], condition.map(lambda v: v[i : i + 1])


# ---- 1: identity at the start ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_edit_leaves_the_output_as_it_was_in_both_modes(family):
    batch = inputs(family)
    wanted = make(family)(*batch).sample
    net = elastic(make(family))
    assert torch.equal(net(*batch).sample, wanted)
    out = net.train()(*batch)
    close(out.sample, wanted, 1e-6)
    p, q = stacked(out.trace, "p"), stacked(out.trace, "q")
    assert (p - 0.7).abs().max() < 0.01
    expected = (q * torch.tensor([0.25, 0.5, 0.75, 1.0])).sum(2)
    assert (expected - 0.8556).abs().max() < 0.005


@torch.no_grad()
def test_the_budgets_of_a_fresh_edit_are_the_published_ones():
    net = elastic(make(), gate=0.6, width=0.5).train()
    losses = net.applied["elastic"].losses(net(*inputs()).trace)
    # 0.1^2 and 0.3556^2, of heads that differ from their means by 1e-3
    assert losses["gate"] == pytest.approx(0.0100, abs=1e-3) and losses["gate"].shape == (4,)
    assert losses["width"] == pytest.approx(0.1265, abs=1e-3) and losses["width"].shape == (4,)


def test_a_fresh_router_is_as_specified():
    router = Router(64, 128, True)
    assert all((p == 0).all() for p in (*router.modulation.parameters(), router.trunk.bias))
    assert router.trunk.weight.abs().max() <= 64**-0.5  # Kaiming uniform with a = sqrt 5
    assert router.gate.bias.item() == pytest.approx(math.log(0.7 / 0.3)) and router.width.bias.tolist() == [0, 0, 0, 2]
    assert router.width.weight.std().item() == pytest.approx(1e-3, rel=0.2)  # of 512 draws


# ---- 2: mask = slice -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_masked_mlp_is_a_sliced_one_at_each_width(family, k):
    net = elastic(make(family))
    _, stream = entered(net, family, torch.float64)
    for unit in net.units:
        mask = (torch.arange(unit.size) < k * unit.size / 4).double().expand(4, -1)
        layout = replace(stream.layout, routing=Routing(channels=mask))
        masked, narrow = unit.unit(replace(stream, layout=layout)), unit.widths[k](stream)
        close(masked.image, narrow.image, 1e-12)
        if narrow.text is not None:
            close(masked.text, narrow.text, 1e-12)
        assert torch.equal(unit.widths[4](stream).image, narrow.image) == (k == 4)


@torch.no_grad()
def test_the_bias_of_the_second_layer_is_there_at_each_width():
    net = elastic(make())
    for unit in net.units:
        nn.init.zeros_(unit.unit.mlp.fc1.weight)
        nn.init.zeros_(unit.unit.mlp.fc1.bias)
        for narrow in unit.widths.values():
            assert torch.equal(narrow.own_ffn(torch.randn(1, 1, 32), Layout((1, 1, 1)))[0, 0], unit.unit.mlp.fc2.bias)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_training_is_sliced_evaluation(family):
    net, batch = elastic(make(family)), inputs(family)
    with forced(net, mixed):
        sliced = net.eval()(*batch)
        masked = net.train()(*batch)
    assert {tuple(v.tolist()) for v in stacked(sliced.trace, "width")} == {
        (0, 0.5, 1, 0.25),
        (0.25, 0.75, 0, 0.5),
        (0.5, 1, 0.25, 0.75),
    }
    assert torch.equal(stacked(masked.trace, "width"), stacked(sliced.trace, "width"))
    close(masked.sample, sliced.sample)
    assert (sliced.sample - net.eval()(*batch).sample).abs().max() > 1e-2


@torch.no_grad()
def test_a_lora_on_the_same_layers_is_masked_and_sliced_alike():
    net = edit.apply(make(), {"lora": LoRA(rank=2, alpha=4, targets=("mlp.fc1", "mlp.fc2", "attn.qkv"))})
    randomise(net)
    dense = net(*inputs()).sample
    elastic(net)
    assert torch.equal(net(*inputs()).sample, dense)
    with forced(net, mixed):
        close(net.train()(*inputs()).sample, net.eval()(*inputs()).sample)


@torch.no_grad()
@pytest.mark.parametrize("family", ["dit", "flux"])
def test_offloaded_weights_are_narrow_all_the_same(family):
    net = elastic(make(family), band=-1.0)
    with forced(net, mixed):
        wanted = net(*inputs(family)).sample
        offloaded(net.model)
        close(net(*inputs(family)).sample, wanted)


# ---- 3: closed units -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_closed_unit_is_the_identity_on_both_streams_and_is_not_called(family):
    net = elastic(make(family))
    unit, stream = entered(net, family)
    calls = []
    for part in (unit.unit, *unit.widths.values()):
        part.register_forward_hook(lambda *_: calls.append(1))

    def some(index, p, q):
        return torch.tensor([0, 4, 0, 0])

    with forced(net, always(0)):
        after = unit(stream)
    assert after.image is stream.image and after.text is stream.text and not calls
    with forced(net, some):
        after = unit(stream)
    assert calls
    for before, now in ((stream.image, after.image), (stream.text, after.text)):
        if before is not None:
            assert torch.equal(before[[0, 2, 3]], now[[0, 2, 3]])
    assert not torch.equal(stream.image[1], after.image[1])
    with forced(net.train(), always(0)):
        after = unit(stream)  # computed, and multiplied by 0
    assert torch.equal(after.image, stream.image) and (after.text is None or torch.equal(after.text, stream.text))


@torch.no_grad()
def test_after_the_last_unit_of_an_sd3_there_is_no_text_closed_or_open():
    net = elastic(make("sd3"))
    for rule in (always(0), always(4), mixed):
        for mode in (True, False):
            with forced(net.train(mode), rule):
                trace = net(*inputs("sd3"), taps=(1, 2)).trace
            assert "unit.1.text" in trace and "unit.2" in trace and "unit.2.text" not in trace


@torch.no_grad()
@pytest.mark.parametrize("family", ["dit", "sd3", "flux"])
def test_branches_and_maps_are_there_whatever_was_decided(family):
    net, batch = elastic(make(family), cache_from=0.0, band=0.5), inputs(family)
    step = Step(0, 2, 0.5)
    for rule in (always(0), always(2), mixed):
        with forced(net.eval(), rule):
            wanted = net(*batch).sample
            out = net(*batch, branches=(0, -1), maps={1: 4}, step=step)
        with forced(net.train(), rule):
            told = net(*batch, branches=(0, -1), maps={1: 4}).trace
        close(out.sample, wanted)
        for name in ("unit.0.attention", "unit.2.feed", "unit.1.maps"):
            assert torch.equal(out.trace[name], told[name])
        assert torch.equal(stacked(out.trace, "width"), stacked(told, "width"))


# ---- 4, 5: gradients -------------------------------------------------------------------------------------------------


def test_the_gradient_of_a_gate_is_what_its_unit_changes_along_the_output_gradient():
    net = elastic(make("sd3"), width=None).train()
    unit, stream = entered(net, "sd3", torch.float64)
    with forced(net, lambda i, p, q: torch.tensor([0, 4, 4, 0])):
        after = unit(stream)
    p = after.trace["elastic.0.p"]
    p.retain_grad()
    up, text_up = torch.randn_like(after.image), torch.randn_like(after.text)
    ((after.image * up).sum() + (after.text * text_up).sum()).backward()
    full = unit.unit(stream)
    along = (up * (full.image - stream.image)).sum((1, 2)) + (text_up * (full.text - stream.text)).sum((1, 2))
    assert torch.allclose(p.grad, along.float(), rtol=1e-5)  # p is fp32
    wanted = (along * p * (1 - p)).sum()
    assert routers_of(net)[0].gate.bias.grad.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_closed_unit_gets_no_gradient_from_the_loss_but_its_router_does():
    net = elastic(make()).train()
    with forced(net, lambda i, p, q: torch.full_like(p, 4 * (i != 1))):
        net(*inputs()).sample.square().sum().backward()
    assert all((p.grad == 0).all() for p in net.units[1].unit.parameters())
    assert all((p.grad != 0).any() for p in net.units[0].unit.parameters())
    for i in (0, 1):
        router = routers_of(net)[i]
        assert all((p.grad != 0).any() for p in (*router.gate.parameters(), router.trunk.weight))


def test_the_gradient_of_a_width_is_that_of_the_channels_it_reaches():
    net = elastic(make()).train()
    unit, stream = entered(net, dtype=torch.float64)
    seen = {}
    unit.unit.mlp.fc1.register_forward_hook(lambda m, args, out: seen.update(act=F.gelu(out, approximate="tanh")))

    def second(module, args):
        args[0].retain_grad()
        seen["masked"] = args[0]

    unit.unit.mlp.fc2.register_forward_pre_hook(second)
    with forced(net, lambda i, p, q: torch.tensor([1, 2, 3, 4])):
        after = unit(stream)
    q = after.trace["elastic.0.q"]
    q.retain_grad()
    (after.image * torch.randn_like(after.image)).sum().backward()
    along = (seen["act"] * seen["masked"].grad).sum(1)  # b c
    c = torch.stack([along[:, : k * 32].sum(1) for k in (1, 2, 3, 4)], 1).float()
    assert torch.allclose(q.grad, c, rtol=1e-4, atol=1e-6)  # q is fp32
    wanted = (q * (c - (q * c).sum(1, keepdim=True))).sum(0)
    assert torch.allclose(routers_of(net)[0].width.bias.grad.float(), wanted, rtol=1e-4, atol=1e-6)


# ---- 6: budgets ------------------------------------------------------------------------------------------------------


def seen(logits: Tensor, u: Tensor, target: float = 0.6, width: float = 0.5) -> dict[str, Tensor]:
    """The trace of a pass with these logits: u b of gates, u b 4 of widths."""
    p, q = logits.sigmoid(), u.softmax(2)
    b = logits.shape[1]
    trace = {GATE: torch.full((b,), target), WIDTH: torch.full((b,), width)}
    for i in range(len(p)):
        opened = (p[i] >= 0.5).float()
        trace |= {f"elastic.{i}.p": p[i], f"elastic.{i}.q": q[i], f"elastic.{i}.open": opened}
        trace[f"elastic.{i}.width"] = opened * (q[i].argmax(1) + 1) / 4
    return trace


def test_the_gate_budget_pushes_each_logit_by_its_closed_form():
    logits = torch.randn(5, 1, requires_grad=True)
    Elastic().losses(seen(logits, torch.zeros(5, 1, 4)))["gate"].sum().backward()
    p = logits.detach().sigmoid()
    assert torch.allclose(logits.grad, 2 * (p.mean() - 0.6) * p * (1 - p) / 5, atol=1e-7)


def test_reductions_agree_on_one_sample_and_differ_by_the_variance_on_two():
    logits, u = torch.randn(4, 2), torch.randn(4, 2, 4)
    sample, batch = Elastic(), Elastic(reduction="batch")
    for name in ("gate", "width"):
        alone = [e.losses(seen(logits[:, :1], u[:, :1]))[name].mean() for e in (sample, batch)]
        assert alone[0].item() == pytest.approx(alone[1].item(), abs=1e-7)
    each, together = (e.losses(seen(logits, u))["gate"] for e in (sample, batch))
    variance = logits.sigmoid().mean(0).var(correction=0)
    assert each.shape == (2,) and together.shape == ()
    assert (each.mean() - together).item() == pytest.approx(variance.item(), abs=1e-7)


def test_the_gate_target_goes_linearly_from_data_to_noise_and_over_the_run():
    net = elastic(make(), gate=Ramp(0.7, 0.5), gate_at_noise=0.3, width=Ramp(0.8, 0.6)).train()
    x, _, condition = inputs()
    t = torch.tensor([0.0, 1.0, 0.5, 0.25])
    assert torch.allclose(net(x, t, condition).trace[GATE], torch.tensor([0.7, 0.3, 0.5, 0.6]))
    net.applied["elastic"].advance(0.5, routers_of(net))
    trace = net(x, t, condition).trace
    assert torch.allclose(trace[GATE], torch.tensor([0.6, 0.3, 0.45, 0.525]))
    assert torch.allclose(trace[WIDTH], torch.tensor(0.7))
    assert GATE not in net.eval()(x, t, condition).trace


def test_the_width_budget_ignores_closed_units():
    logits, u = torch.tensor([[2.0], [-2.0]]), torch.randn(2, 1, 4)
    rule, before = Elastic(), seen(logits, u)
    u[1] += torch.randn(4)
    assert torch.equal(rule.losses(before)["width"], rule.losses(seen(logits, u))["width"])
    u[0] += torch.randn(4)
    assert not torch.equal(rule.losses(before)["width"], rule.losses(seen(logits, u))["width"])
    none = rule.losses(seen(-logits.abs(), u))["width"]  # nothing open: 0 is what is expected of it
    assert none.item() == pytest.approx(0.25)


def test_a_hard_budget_counts_open_units_with_the_gradient_of_p():
    logits = torch.tensor([[2.0], [0.1], [-1.0]], requires_grad=True)
    loss = Elastic(hard=True, weight=3.0).losses(seen(logits, torch.zeros(3, 1, 4)))["gate"]
    assert loss.item() == pytest.approx(3 * (2 / 3 - 0.6) ** 2, rel=1e-4)
    loss.sum().backward()
    p = logits.detach().sigmoid()
    assert torch.allclose(logits.grad, 6 * (2 / 3 - 0.6) * p * (1 - p) / 3, rtol=1e-4)


def test_a_hard_budget_counts_the_widths_that_are_run_with_the_gradient_of_those_expected():
    logits = torch.tensor([[2.0], [0.1], [-1.0]])
    u = torch.tensor([[[0.0, 0, 0, 1]], [[0.0, 1, 0, 0]], [[1.0, 0, 0, 0]]], requires_grad=True)
    hard, soft = (Elastic(hard=h).losses(seen(logits, u)) for h in (True, False))
    assert hard["width"].item() == pytest.approx((0.75 - 0.5) ** 2)  # widths 1 and 1/2 of the two that are open
    (found,) = torch.autograd.grad(hard["width"].sum(), u, retain_graph=True)
    (expected,) = torch.autograd.grad(soft["width"].sum().sqrt(), u)
    assert torch.allclose(found, 2 * 0.25 * expected, atol=1e-7)


def part_of_a_batch(logits, u) -> tuple[list, list, list]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine, wide = (v[:, 2 * rank : 2 * rank + 2].clone().requires_grad_() for v in (logits, u))
    losses = Elastic(reduction="batch").losses(seen(mine, wide))
    sum(losses.values()).backward()
    dist.destroy_process_group()
    return [v.item() for v in losses.values()], (mine.grad / 2).tolist(), (wide.grad / 2).tolist()  # DDP averages


def test_the_batch_is_that_of_all_ranks():
    logits, u = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, 4, requires_grad=True)
    whole = Elastic(reduction="batch").losses(seen(logits, u))
    sum(whole.values()).backward()
    found = run_ranks(part_of_a_batch, args=(logits.detach(), u.detach()))
    for values, *_ in found:
        assert values == pytest.approx([v.item() for v in whole.values()], abs=1e-6)
    for k, v in ((1, logits), (2, u)):
        assert torch.allclose(torch.cat([torch.tensor(rank[k]) for rank in found], 1), v.grad, atol=1e-7)


# ---- 7, 8: what training makes of it ---------------------------------------------------------------------------------


def trained(net: Denoiser, parameters, loss_of: Callable[[], Tensor], steps: int, lr: float) -> None:
    net.train().requires_grad_(False)
    parameters = list(parameters)
    for p in parameters:
        p.requires_grad_()
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()


def test_routers_alone_keep_their_budgets():
    reached = []
    for gate, width in ((0.55, 0.5), (0.75, 0.75)):
        torch.manual_seed(0)
        net = DiTConfig(input_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=4).build()
        elastic(net, gate=gate, width=width)
        x, t, condition = torch.randn(4, 4, 4, 4), torch.rand(4), Condition(label=torch.arange(4))

        def budgets(net=net, batch=(x, t, condition)) -> Tensor:
            return sum(v.mean() for v in net.applied["elastic"].losses(net(*batch).trace).values())

        trained(net, routers_of(net).parameters(), budgets, 150, 1e-2)
        trace = net(x, t, condition).trace
        p = stacked(trace, "p").mean().item()
        r = (stacked(trace, "q") * torch.tensor([0.25, 0.5, 0.75, 1.0])).sum(2).mean().item()
        assert p == pytest.approx(gate, abs=0.01) and r == pytest.approx(width, abs=0.01)
        reached.append(p)
    assert reached[0] < reached[1]


def test_samples_that_need_the_unit_open_it_and_those_that_do_not_close_it():
    torch.manual_seed(0)
    net = DiTConfig(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=4).build()
    randomise(net)
    elastic(net, gate=0.5, width=None, reduction="batch")
    needs = torch.arange(32) % 2 == 1
    sign = torch.where(needs, 1.0, -1.0).view(-1, 1, 1, 1)  # of the mean, by which a router may tell them apart
    t, condition = torch.full((32,), 0.5), Condition(label=torch.zeros(32, dtype=torch.int64))
    x = torch.randn(32, 4, 4, 4) + sign
    with torch.no_grad(), forced(net, lambda i, p, q: 4 * needs):
        target = net.eval()(x, t, condition).sample  # of half of the samples the unit's input, read out
    # so that outputs are of size 1, as targets of real data are
    scale = target.std()

    def loss() -> Tensor:
        out = net(x, t, condition)
        extra = net.applied["elastic"].losses(out.trace)
        return ((out.sample - target) / scale).square().mean() + extra["gate"]

    trained(net, [*routers_of(net).parameters(), *net.units[0].unit.parameters()], loss, 500, 3e-3)
    opened = net.eval()(x, t, condition).trace["elastic.0.open"]
    assert opened[~needs].mean() < 0.2 and opened[needs].mean() > 0.8
    order = torch.randperm(32)
    assert torch.equal(net(x[order], t, condition).trace["elastic.0.open"], opened[order])
    seen = net.applied["elastic"].metrics({f"elastic.0.{k}": opened for k in ("p", "open", "width")})
    assert seen["spread"] > 0.3  # of one unit: 0.5 where half of the samples open it


# ---- 9, 12: decisions are each sample's own, and the same in both modes ----------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_samples_and_both_modes_decide_alike(family):
    net, batch = stirred(elastic(make(family)), family), inputs(family)
    out = net(*batch)
    made = stacked(out.trace, "width")
    assert (made == 0).any() and made.unique().numel() > 2
    for i in range(4):
        alone = net(*one(batch, i))
        close(out.sample[i : i + 1], alone.sample)
        assert torch.equal(stacked(alone.trace, "width")[:, 0], made[:, i])
    again = net.train()(*batch)
    assert torch.equal(stacked(again.trace, "width"), made)
    close(again.sample, out.sample)


@torch.no_grad()
def test_exactly_the_threshold_opens_in_both_modes():
    net = elastic(make())
    for router in routers_of(net):
        nn.init.zeros_(router.gate.weight)
        nn.init.zeros_(router.gate.bias)
    for mode in (True, False):
        trace = net.train(mode)(*inputs()).trace
        assert (stacked(trace, "p") == 0.5).all() and (stacked(trace, "open") == 1).all()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_router_sees_the_tokens_its_unit_writes_and_the_time(family):
    net = stirred(elastic(make(family)), family)
    unit, stream = entered(net, family)
    router = routers_of(net)[0]
    tokens, real = stream.image[:, stream.layout.registers :], torch.ones(4, 16)
    if unit.unit.anatomy.joint:
        tokens = torch.cat((stream.text, tokens), 1)
        real = torch.cat((PADDED.float() if family == "qwen" else torch.ones(4, 5), real), 1)
    shift, scale = F.linear(F.silu(stream.signal), router.modulation.weight, router.modulation.bias).chunk(2, 1)
    x = (1 + scale)[:, None] * F.layer_norm(tokens, (32,), eps=1e-6) + shift[:, None]
    h = F.relu(x @ router.trunk.weight.T)  # its bias is still 0
    logits, u = (((h @ head.weight.T + head.bias) * real[..., None]).sum(1) for head in (router.gate, router.width))
    p, q = unit.route(stream)
    torch.testing.assert_close(p, (logits / real.sum(1, keepdim=True)).sigmoid()[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(q, (u / real.sum(1, keepdim=True)).softmax(1), rtol=0, atol=1e-5)


def test_what_was_decided_for_a_unit_is_not_told_to_the_next():
    net = elastic(make()).train()
    unit, stream = entered(net)
    assert net.applied["elastic"].width is not None and unit(stream).layout is stream.layout


@torch.no_grad()
def test_padding_says_nothing_to_a_router():
    router = Router(32, 16, True)
    randomise(router)
    cond, image, text = torch.randn(4, 32), torch.randn(4, 6, 32), torch.randn(4, 5, 32)
    p, q = router(cond, image, text, PADDED)
    other = torch.where(PADDED[..., None], text, 9.0)
    again = router(cond, image, other, PADDED)
    assert torch.equal(p, again[0]) and torch.equal(q, again[1])
    assert torch.allclose(p[1:2], router(cond[1:2], image[1:2], text[1:2, :3], None)[0])
    assert not torch.allclose(p[1:], router(cond, image, text, None)[0][1:])


# ---- 10: the cache ---------------------------------------------------------------------------------------------------


def generated(net: Denoiser, samples=(0, 1, 2), guidance: float = 2.0, steps: int = 6) -> tuple[Tensor, dict, dict]:
    """Images, decisions by branch (steps u b each) and the generation's memory."""
    found: dict[str, list] = {}
    memory: dict = {}

    def watch(step, out):
        told = net.applied["elastic"].decisions(out.trace)
        halves = {"cond": slice(None, len(samples)), "uncond": slice(len(samples), None)}
        for name in halves if step.branch == "joint" else (step.branch,):
            found.setdefault(name, []).append({k: v[:, halves[name]] for k, v in told.items()})
        memory.update(step.memory)

    sampler, label = Sampler(Euler(steps), guidance=guidance), Condition(label=torch.tensor(samples) % 10)
    images = sampler(net, FlowMatching(), label, torch.tensor(samples), watch=watch)
    told = {b: {k: torch.stack([d[k] for d in made]) for k in made[0]} for b, made in found.items()}
    return images, told, memory


def test_a_cache_that_is_off_keeps_nothing_and_changes_nothing():
    images = []
    for off in ({"band": -1.0}, {"band": 0.5, "reuse": 0}, {"band": 0.5, "cache_from": 1.0}):
        x, told, memory = generated(stirred(elastic(make(), **off)))
        images.append(x)
        assert not memory and not any("cached" in made for made in told.values())
    plain = stirred(elastic(make(), band=-1.0))
    plain.units = [lambda s, unit=unit: replace(unit(replace(s, step=None)), step=s.step) for unit in plain.units]
    images.append(generated(plain)[0])  # of units that are told of no generation
    assert all(torch.equal(x, images[0]) for x in images)
    cached, told, memory = generated(stirred(elastic(make(), band=0.5, cache_from=0.0)))
    assert memory and told["cond"]["cached"].any() and not torch.equal(cached, images[0])


def test_a_cached_generation_is_one_without_a_cache_whose_units_are_replaced_by_what_they_added():
    found = generated(stirred(elastic(make(), band=1.0, reuse=2, cache_from=0.0)))[0]
    plain, kept = stirred(elastic(make(), band=-1.0)), {}

    def repeating(unit: Callable, i: int) -> Callable:
        def call(stream: Stream) -> Stream:
            """Runs all; keeps and repeats what open samples get."""
            after, step = unit(stream), stream.step
            new, opened = after.image - stream.image, after.trace[f"elastic.{i}.open"] > 0
            old, times = kept.get((i, step.branch), (new, torch.full((len(new),), 9)))
            again = opened & (times < 2)
            change = torch.where(again[:, None, None], old, new)
            ran = opened & ~again
            kept[i, step.branch] = (
                torch.where(ran[:, None, None], new, old),
                torch.where(again, times + 1, torch.where(ran, 0, times)),
            )
            return replace(after, image=stream.image + change)

        return call

    plain.units = [repeating(unit, i) for i, unit in enumerate(plain.units)]
    images = Sampler(Euler(6), guidance=2.0)(plain, FlowMatching(), Condition(label=torch.arange(3)), torch.arange(3))
    close(found, images, 1e-5)  # six steps of two branches
    assert (found - generated(stirred(elastic(make(), band=-1.0)))[0]).abs().max() > 1e-2


@torch.no_grad()
def test_what_was_added_is_kept_from_when_p_is_near_the_threshold_on():
    net = elastic(make(), band=0.1, cache_from=0.0)
    unit, stream = entered(net)
    memory: dict = {}
    nn.init.zeros_(routers_of(net)[0].gate.weight)
    cached, held = [], []
    for k, p in enumerate((0.7, 0.55, 0.55, 0.7, 0.55)):  # far, near, near, far, near
        nn.init.constant_(routers_of(net)[0].gate.bias, math.log(p / (1 - p)))
        moved = replace(stream, image=stream.image + k, step=Step(k, 5, 0.5, "cond", memory))
        after = unit(moved)
        cached.append(after.trace["elastic.0.cached"].unique().item())
        held.append(memory["elastic", 0, "cond"]["residuals"].image)
        if k == 3:
            last = after.image - moved.image
    assert cached == [0, 0, 1, 0, 1] and held[0] is None and held[1] is not None
    close(after.image - moved.image, last)  # of the step before, though p was far


@torch.no_grad()
def test_all_samples_and_some_are_kept_and_repeated_alike():
    _, stream = entered(elastic(make()))
    other = replace(stream, image=stream.image.flip(0))
    for rows in ([0, 1, 2, 3], [2, 0]):
        kept, one = Residuals(4), [Residuals(4) for _ in rows]
        kept.store(rows, stream, other, text=False)
        found = kept.added(stream, rows).image
        for r, i in zip(one, rows, strict=True):
            r.store([i], stream, other, text=False)
            assert torch.equal(r.added(stream, [i]).image[i], found[i])
        assert kept.count == [1 if i in rows else math.inf for i in range(4)]


def test_a_unit_near_the_threshold_is_run_once_per_branch_and_then_repeated():
    net = elastic(make(), band=0.5, reuse=10**9, cache_from=0.0)
    net.applied["elastic"].separate = True
    calls = []
    for unit in net.units:
        unit.widths[4].register_forward_hook(lambda module, args, out: calls.append(args[0].step.branch))
    images, told, memory = generated(net)
    assert sorted(calls) == ["cond"] * 3 + ["uncond"] * 3
    assert {branch for _, _, branch in memory} == {"cond", "uncond"}
    one, other = (memory["elastic", 0, b]["residuals"].image for b in ("cond", "uncond"))
    assert not torch.equal(one, other)
    assert torch.equal(generated(net)[0], images)  # nothing is left of a generation
    assert len(calls) == 12


@pytest.mark.parametrize(
    "options, cached",
    [
        ({"reuse": 2, "cache_from": 0.0}, [0, 1, 1, 0, 1, 1]),
        ({"reuse": 10, "cache_from": 0.5}, [0, 0, 0, 0, 1, 1]),  # of six steps the fourth is the first that is kept
        ({"reuse": 1, "cache_from": 0.0}, [0, 1, 0, 1, 0, 1]),
    ],
)
def test_what_is_repeated_how_often_and_from_when(options, cached):
    _, told, _ = generated(elastic(make(), band=0.5, **options))
    for made in told.values():
        assert (made["cached"] == torch.tensor(cached).view(-1, 1, 1)).all()
        assert (made["width"] == 1 - made["cached"]).all() and (made["open"] == 1).all()


@torch.no_grad()
def test_what_is_repeated_is_what_was_added_last_on_both_streams():
    net = elastic(make("qwen"), band=0.5, cache_from=0.0)
    unit, stream = entered(net, "qwen")
    memory: dict = {}
    steps = [Step(k, 2, 1 - k / 2, "cond", memory) for k in range(2)]
    first = unit(replace(stream, step=steps[0]))
    moved = replace(stream, image=stream.image + 1, text=stream.text - 1, step=steps[1])
    second = unit(moved)
    # two fp32 sums of numbers of size 10
    for name in ("image", "text"):
        change = getattr(first, name) - getattr(stream, name)
        assert torch.allclose(getattr(second, name), getattr(moved, name) + change, atol=1e-5)
    assert (second.trace["elastic.0.cached"] == 1).all()


def test_the_cache_belongs_to_each_sample():
    net = stirred(elastic(make(), band=0.3, reuse=2, cache_from=0.2))
    images, told, _ = generated(net, (0, 1, 2, 3))
    cached = told["cond"]["cached"]
    assert (cached.sum(2) % 4 != 0).any()  # some of a batch, others not
    for i in range(4):
        alone, made, _ = generated(net, (i,))
        assert torch.equal(made["cond"]["cached"][:, :, 0], cached[:, :, i])
        close(images[i : i + 1], alone, 1e-5)  # six steps of two branches


def test_closed_units_repeat_only_where_that_is_asked_for():
    for asked in (False, True):
        net = elastic(make(), band=0.0, reuse=10, cache_from=0.0, cache_on_closed=asked)
        calls = iter(range(100))
        with forced(net, lambda i, p, q, calls=calls: torch.full_like(p, 4 * (next(calls) < 3))):  # at the first step
            _, told, _ = generated(net, guidance=1.0, steps=3)
        assert told["cond"]["cached"].flatten(1).mean(1).tolist() == ([0, 1, 1] if asked else [0, 0, 0])
        assert told["cond"]["open"].flatten(1).mean(1).tolist() == [1, 0, 0]


# ---- 11: what it costs -----------------------------------------------------------------------------------------------


def test_what_is_executed_costs_what_open_units_and_their_widths_cost():
    plain, net = make(), elastic(make())
    n, d, h, r, depth, b = 16, 32, 128, 16, 3, 4
    rest = 6 * d * d + 4 * n * d * d + 2 * n * n * d  # adaLN; qkv and out; scores and sums
    mlp, router = 2 * n * d * h, n * d * r + 2 * d * d
    condition = inputs()[2]
    dense = count_forward(plain, condition, b).macs
    for rule in (mixed, always(0), always(4), always(1)):
        with forced(net, rule):
            counted = count_forward(net, condition, b).macs
            made = torch.stack([rule(i, torch.zeros(b), None) for i in range(depth)]).tolist()
        run = sum((k > 0) * (rest + k * mlp // 4) for unit in made for k in unit)
        outside = dense - b * depth * (rest + mlp)
        assert counted == outside + run + b * depth * router
    assert macs(net) == dense // b + depth * router  # where nothing can be decided all is run


def test_a_single_unit_of_flux_costs_what_is_run_of_it():
    net, d, h, n, b = elastic(make("flux")), 32, 128, 16 + 5, 4
    condition = inputs("flux")[2]
    counted = []
    for k in range(5):  # of the last unit, and the others whole
        with forced(net, lambda i, p, q, k=k: torch.full_like(p, k if i == 2 else 4)):
            counted.append(count_forward(net, condition, b).macs)
    mlp = 2 * n * d * h
    rest = 3 * d * d + 4 * n * d * d + 2 * n * n * d  # its modulation; q, k, v and out; scores and sums
    assert [c - counted[0] for c in counted[1:]] == [b * (rest + k * mlp // 4) for k in (1, 2, 3, 4)]


# ---- forced decisions ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_forced_rule_is_told_what_routers_say_and_is_gone_afterwards():
    net, asked = elastic(make()), []

    def rule(index, p, q):
        asked.append((index, tuple(p.shape), tuple(q.shape), p.dtype, q.dtype))
        return always(0)(index, p, q)

    before = net(*inputs()).sample
    with forced(net, rule), forced(net, always(4)):
        assert torch.equal(net(*inputs()).sample, before) and not asked
    with pytest.raises(RuntimeError, match="stop"), forced(net, rule):
        assert not torch.equal(net(*inputs()).sample, before)
        raise RuntimeError("stop")
    assert asked == [(i, (4,), (4, 4), torch.float32, torch.float32) for i in range(3)]
    assert torch.equal(net(*inputs()).sample, before)


def test_what_cannot_be_forced_is_refused():
    with pytest.raises(ValueError, match="no routers whose decisions could be forced"), forced(make(), always(4)):
        pass
    net = elastic(make(), width=None)
    with pytest.raises(ValueError, match="run at 2 quarters, it has 0, 4: mend"), forced(net, always(2)):
        net(*inputs())
    for rule in (8, -1):  # with a cache, too
        net, step = elastic(make(), band=0.5, cache_from=0.0), Step(0, 2, 0.5)
        with (
            pytest.raises(ValueError, match=f"run at {rule} quarters, it has 0, 1, 2, 3, 4"),
            forced(net, always(rule)),
        ):
            net(*inputs(), step=step)


@torch.no_grad()
def test_blocks_alone_may_be_skipped():
    net = elastic(make("flux"), width=None)
    assert not any("ffn" in u.unit.slots for u in net.units)
    for mode in (True, False):
        with forced(net.train(mode), lambda i, p, q: 4 * ((torch.arange(len(p)) + i) % 2)):
            out = net(*inputs("flux"))
        assert stacked(out.trace, "width").unique().tolist() == [0, 1] and "elastic.0.q" not in out.trace
    assert set(net.applied["elastic"].losses(net.train()(*inputs("flux")).trace)) == {"gate"}


# ---- phases ----------------------------------------------------------------------------------------------------------


def test_before_its_part_of_the_run_the_width_is_whole_and_its_heads_stay():
    net = stirred(elastic(make(), width_from=0.5)).train()
    own, rule = routers_of(net), net.applied["elastic"]
    for progress, whole in ((0.0, True), (0.4, True), (0.5, False)):
        rule.advance(progress, own)
        net.zero_grad()
        out = net(*inputs())
        losses = rule.losses(out.trace)
        (out.sample.square().mean() + sum(v.mean() for v in losses.values())).backward()
        width = stacked(out.trace, "width")
        assert set(width.unique().tolist()) <= {0.0, 1.0} if whole else width.unique().numel() > 2
        for router in own:  # zeros, not None, for which DDP would wait
            assert all((p.grad != 0).any() for p in router.gate.parameters())
            assert all((p.grad == 0).all() == whole for p in router.width.parameters())


# ---- metrics, decisions ----------------------------------------------------------------------------------------------


def test_what_is_logged_is_what_was_decided():
    net = elastic(make()).train()
    with forced(net, mixed):
        trace = net(*inputs()).trace
    rule = net.applied["elastic"]
    seen, made = rule.metrics(trace), rule.decisions(trace)
    assert seen["p"].item() == pytest.approx(0.7, abs=0.01)
    assert seen["open"].item() == pytest.approx(10 / 12)
    assert seen["executed"].item() == pytest.approx((1.75 + 1.5 + 2.5) / 10)
    assert seen["spread"].item() == pytest.approx(0.5)  # 2, 3, 2, 3 open units
    assert [seen[f"open/{i}"].item() for i in range(3)] == [0.75, 0.75, 1.0]
    assert {k: tuple(v.shape) for k, v in made.items()} == dict.fromkeys(("open", "width", "cached"), (3, 4))
    assert not seen.keys() & rule.losses(trace).keys()  # both are logged under the edit's name
    assert rule.metrics({}) == rule.decisions({}) == rule.losses({}) == {}


# ---- as an edit ------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_and_compiled_units_change_nothing(monkeypatch):
    grads, samples = [], []
    # inductor would need a compiler and minutes; what is compiled, and what it guards, is the same
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for checkpointing, compiled in ((False, False), (True, False), (False, True)):
        net = stirred(elastic(make("flux")), "flux").train()
        net.gradient_checkpointing = checkpointing
        if compiled:
            net.units[-1].unit.compile()  # FLUX's single unit
        out = net(*inputs("flux"))
        loss = sum(v.mean() for v in net.applied["elastic"].losses(out.trace).values())
        (out.sample.square().mean() + loss).backward()
        grads.append([p.grad for p in net.parameters() if p.grad is not None])
        with torch.no_grad():
            samples.append(net.eval()(*inputs("flux")).sample)
        run = [u for u in net.units[-1].widths.values() if u._compiled_call_impl is not None]
        assert bool(run) == compiled
    assert all(torch.equal(a, b) for a, b in zip(grads[0], grads[1], strict=True))
    for a, b in zip(grads[0], grads[2], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    close(samples[2], samples[0])


@torch.no_grad()
def test_a_copy_of_the_model_follows_its_own_weights():
    net = elastic(make())
    before = [u.unit.mlp.fc1.weight.clone() for u in net.units]
    twin = deepcopy(net)
    for p in twin.model.parameters():
        p.mul_(1.5)  # as an average of weights would: in place
    fresh = make()
    for p in fresh.model.parameters():
        p.mul_(1.5)
    elastic(fresh)
    with forced(twin, mixed), forced(fresh, mixed):
        assert torch.equal(twin(*inputs()).sample, fresh(*inputs()).sample)
        assert torch.equal(twin.train()(*inputs()).sample, fresh.train()(*inputs()).sample)
    assert all(torch.equal(u.unit.mlp.fc1.weight, w) for u, w in zip(net.units, before, strict=True))


@torch.no_grad()
def test_an_artifact_comes_back_deciding_the_same(tmp_path):
    net = stirred(elastic(make(), gate=Ramp(0.7, 0.5, until=0.1), band=0.1))
    edit.save(net, tmp_path / "a")
    back = edit.load(tmp_path / "a").denoiser
    assert back.applied == net.applied
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in net.state_dict().items())
    ours, theirs = net(*inputs()), back(*inputs())
    assert torch.equal(stacked(ours.trace, "width"), stacked(theirs.trace, "width"))
    close(ours.sample, theirs.sample)  # where in memory weights lie decides how CPU products of few rows are summed


@torch.no_grad()
@pytest.mark.parametrize("family", ["dit", "flux"])
def test_channels_in_order_of_magnitude_are_the_same_model(family):
    net = elastic(make(family), order=True)
    close(net(*inputs(family)).sample, make(family)(*inputs(family)).sample)
    with forced(net, mixed):
        close(net.train()(*inputs(family)).sample, net.eval()(*inputs(family)).sample)
    rows = make(family).state_dict()
    changed = [k for k, v in net.model.state_dict().items() if not torch.equal(v, rows[f"model.{k}"])]
    assert changed and all("mlp" in k or "ff" in k or "proj_out" in k for k in changed)


def test_autocast_leaves_decisions_in_fp32_and_gradients_finite():
    net = stirred(elastic(make("flux")), "flux").train()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        out = net(*inputs("flux"))
        with torch.no_grad():
            net.eval()(*inputs("flux"))
    assert all(out.trace[f"elastic.{i}.{k}"].dtype == torch.float32 for i in range(3) for k in "pq")
    sum(v.mean() for v in net.applied["elastic"].losses(out.trace).values()).backward(retain_graph=True)
    out.sample.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in routers_of(net).parameters())


def sharded_generation() -> list:
    dist.init_process_group("gloo")
    net = stirred(elastic(make()))
    for module in net.model.modules():
        if isinstance(module, Unit):
            fully_shard(module)
    fully_shard(net)
    rank = dist.get_rank()
    with torch.no_grad(), forced(net, lambda i, p, q: mixed(i, p, q) * (rank == 0)):  # the other rank runs none
        sample = net(*inputs()).sample
    dist.destroy_process_group()
    return sample.tolist()


@torch.no_grad()
def test_ranks_that_decide_otherwise_do_not_wait_for_each_other():
    net = elastic(make())
    for found, rule in zip(run_ranks(sharded_generation), (mixed, always(0)), strict=True):
        with forced(net, rule):
            close(torch.tensor(found), net(*inputs()).sample)


@torch.no_grad()
def test_routers_are_where_the_model_is_and_in_fp32():
    with torch.device("meta"):
        net = CONFIGS["flux"].build()
    assert all(p.is_meta for p in elastic(net).parameters())
    small = elastic(make("flux").bfloat16())
    assert {p.dtype for p in routers_of(small).parameters()} == {torch.float32}
    for mode in (True, False):
        out = small.train(mode)(*inputs("flux"))
        assert out.sample.dtype == torch.bfloat16 and out.trace["elastic.0.p"].dtype == torch.float32


def test_what_is_refused_changed_nothing():
    class Other(nn.Linear):
        """Not known."""

    odd, adapted = make(), edit.apply(make(), {"lora": LoRA(rank=2, targets=("mlp.fc1",))})
    odd.model.blocks[2].mlp.fc1 = Other(32, 128)
    for net, order, complaint in (
        (odd, False, "only a part of a plain linear layer can be run, this is a Other"),
        (adapted, True, "mlp.fc1 .* fold the LoRA first, or set order=false"),
    ):
        names, units = set(net.state_dict()), list(net.units)
        with pytest.raises(ValueError, match=complaint):
            elastic(net, order=order)
        assert set(net.state_dict()) == names and net.units == units and "elastic" not in net.applied
        assert not any("ffn" in unit.slots for unit in net.units)
    beside = edit.apply(make(), {"lora": LoRA(rank=2)})  # on the attention alone
    elastic(beside, order=True)


@pytest.mark.parametrize("other", [Elastic(), DyDiT(), TDLoRA()], ids=lambda e: type(e).__name__)
def test_compressed_modulation_says_nothing_to_routers_and_mixtures(other):
    net = edit.apply(make("flux"), {"modulation": ModulationApproximator(depth=1, hidden=8, steps=0)})
    with pytest.raises(ValueError, match=r"cannot be applied together with modulation \(ModulationApproximator\)"):
        edit.apply(net, {"other": other})


def test_it_is_alone_and_on_units_it_knows():
    net = elastic(make())
    with pytest.raises(ValueError, match="cannot be applied together"):
        edit.apply(net, {"more": Elastic()})
    taken = make()
    taken.units[1].slots.ffn = lambda tokens, layout: tokens
    with pytest.raises(ValueError, match="another edit replaced the feed-forward"):
        elastic(taken)


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"gate": 0.0}, "gate is a part of the model, above 0 and at most 1, got 0"),
        ({"gate_at_noise": 1.5}, "gate_at_noise is a part"),
        ({"width": Ramp(0.8, 1.5)}, "width is a part .* got 1.5"),
        ({"threshold": 0.75}, "threshold is above 0 and below 0.7, which is the p of a fresh router, got 0.75"),
        ({"width_from": 1.0}, "width_from is a part of the run, 0 to below 1, got 1"),
        ({"weight": -1.0}, "at least 0, got -1, 10 and 0.5"),
        ({"router": 0}, "at least 1, got 0"),
        ({"reduction": "rank"}, "reduction is sample or batch, got 'rank'"),
    ],
)
def test_impossible_settings_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Elastic(**options)
