"""Oracle 9 of methods/dydit.md, and TD-LoRA beside routers."""

import os
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from families import CONFIGS, TOLERANCE, difference, family, inputs, walk
from ranks import run_ranks
from torch import Tensor, nn

import edit
from edit.backbones.dit import DiTConfig
from edit.denoiser import Denoiser
from edit.edits import trains, without
from edit.measuring.flops import Flops
from edit.routing.adapted import one_sequence
from edit.routing.dydit import DyDiT
from edit.routing.elastic import Elastic
from edit.routing.elastic_routers import forced
from edit.routing.ranking import order_channels, order_heads
from edit.routing.slices import narrowed
from edit.stream import Step
from edit.tuning.lora import LoRA
from edit.tuning.td_lora import TDLoRA, Timed, merging_saves, timed, weights_at
from edit.unit import heads_of, hidden_of

families = pytest.mark.parametrize("name", CONFIGS)


def adapted(denoiser: Denoiser, speak: bool = True, **options) -> Denoiser:
    """With TD-LoRA: fresh, or with experts and mixtures that differ between times."""
    edit.apply(denoiser, {"td_lora": TDLoRA(**options)})
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, p in denoiser.named_parameters():
            if speak and ".td_" in key:
                p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return denoiser


def prepared(denoiser: Denoiser) -> Denoiser:
    """As a recipe trains it."""
    for key, p in denoiser.named_parameters():
        p.requires_grad_(trains(denoiser, key))
    return denoiser.train()


def gradients(denoiser: Denoiser) -> dict[str, Tensor]:
    denoiser.zero_grad()
    denoiser(*inputs(denoiser)).sample.square().sum().backward()
    return {key: p.grad for key, p in denoiser.named_parameters() if p.grad is not None}


def times(denoiser: Denoiser) -> Tensor:
    stream = denoiser.embed(**denoiser.pack(*inputs(denoiser)))
    assert stream.time is not None
    return stream.time


def at(denoiser: Denoiser, i: int, step: Step | None = None) -> Tensor:
    """The prediction of one sample alone."""
    x, t, condition = inputs(denoiser)
    return denoiser(x[i : i + 1], t[i : i + 1], condition.map(lambda v: v[i : i + 1]), step=step).sample[0]


# ---- the oracle ------------------------------------------------------------------------------------------------------


@families
@torch.no_grad()
def test_fresh_it_is_the_frozen_model(name):
    before = family(name)
    assert torch.equal(adapted(family(name), speak=False)(*inputs(before)).sample, before(*inputs(before)).sample)


@families
@torch.no_grad()
def test_at_each_time_it_is_one_plain_weight(name):
    denoiser, plain = adapted(family(name)), family(name)
    frozen = plain(*inputs(plain)).sample
    mixed = denoiser(*inputs(denoiser)).sample
    for i, time in enumerate(times(denoiser)):
        plain = family(name)
        weights = weights_at(denoiser, time)
        assert set(weights) < set(plain.model.state_dict()) and len(weights) == len(list(timed(denoiser)))
        plain.model.load_state_dict({**plain.model.state_dict(), **weights})
        wanted = at(plain, i)
        # float64, but for fp32 RoPE; the samples of a batch have their own times
        tolerance = 1e4 * TOLERANCE[name]
        torch.testing.assert_close(mixed[i], wanted, rtol=tolerance, atol=tolerance)
        generated = at(denoiser, i, Step(0, 1, 0.5))
        torch.testing.assert_close(generated, wanted, rtol=tolerance, atol=tolerance)
        assert (wanted - frozen[i]).abs().max() > 0.01


@families
def test_gradients_begin_at_b_and_reach_all_once_it_speaks(name):
    denoiser = prepared(adapted(family(name), speak=False))
    fresh = gradients(denoiser)
    missing = {key for key, _ in denoiser.named_parameters() if ".td_" in key} - set(fresh)
    # of a last unit nobody reads the text: Qwen-Image's writes it, and SD3's asks for it
    assert not missing or (name == "qwen_image" and all(".to_add_out." in key for key in missing))
    unread = (".add_q_proj.",) if name in ("sd3", "qwen_image") else ()
    last = f".{len(denoiser.units) - 1}."
    read = {key for key in fresh if not (unread and unread[0] in key and last in key)}
    assert {key for key, g in fresh.items() if g.any()} == {key for key in read if key.endswith("td_up")}
    later = gradients(prepared(adapted(family(name))))
    assert {key for key, g in later.items() if g.any()} == read


def generated(denoiser: Denoiser, samples: int) -> tuple[Tensor, int]:
    """One evaluation of a generation of as many like samples, and the multiply-accumulates that it executes."""
    x, _, condition = inputs(denoiser)
    x, condition = x[:1].repeat(samples, 1, 1, 1), condition.map(lambda v: v[:1].repeat_interleave(samples, 0))
    with Flops() as counter:
        out = denoiser(x, torch.full((samples,), 0.5).to(x), condition, step=Step(0, 1, 0.5)).sample
    return out, counter.total // 2


def test_in_a_generation_the_addition_costs_the_same_for_any_number_of_samples():
    plain, denoiser = family("dit"), adapted(family("dit"), rank=2, experts=3)
    layers = [layer for _, layer in timed(denoiser)]
    with torch.no_grad():
        (few, some), (_, more) = generated(denoiser, 8), generated(denoiser, 16)
        assert more - some == generated(plain, 16)[1] - generated(plain, 8)[1]
        of_time = sum(2 * m.weight.numel() + 3 * m.td_mixture.in_features + 3 * 2 * m.out_features for m in layers)
        assert some - generated(plain, 8)[1] == of_time  # r W, and the mixture of three experts
    added, work = generated(denoiser, 8)  # with a graph for gradients: to each token
    torch.testing.assert_close(few, added, rtol=0, atol=1e-10)  # float64
    assert work > some


@torch.no_grad()
def test_few_tokens_have_the_addition_where_a_merged_weight_would_be_more_work():
    layer = next(layer for name, layer in timed(adapted(family("dit"))) if name.endswith("attn.qkv"))
    out, into = layer.weight.shape
    most = out * into // (out + into)
    assert not merging_saves(torch.empty(most, into), layer.weight)
    assert merging_saves(torch.empty(1, most + 1, into), layer.weight)


@torch.no_grad()
def test_the_mixture_is_a_share_of_each_expert_that_moves_with_time():
    denoiser = adapted(family("dit"))
    for _, layer in timed(denoiser):
        w = layer.mixture(times(denoiser))
        torch.testing.assert_close(w.sum(1), torch.ones(2).double())
        assert w.shape == (2, 4) and (w[0] - w[1]).abs().max() > 1e-3


def test_fresh_experts_do_not_stay_alike():
    denoiser = prepared(adapted(family("dit"), speak=False))
    up = gradients(denoiser)["model.blocks.0.mlp.fc1.td_up"].unflatten(1, (4, -1))
    assert not torch.allclose(up[:, 0], up[:, 1], rtol=1e-2, atol=0)


# ---- of which parameters ---------------------------------------------------------------------------------------------


def test_the_default_trains_about_the_published_share_together_with_routers():
    with torch.device("meta"):
        dit = edit.apply(DiTConfig(learn_sigma=True, time="ddpm").build(), {"td": TDLoRA()}, fresh=False)
        whole = sum(p.numel() for n, p in dit.named_parameters() if ".td_" not in n)
        edit.apply(dit, {"dydit": DyDiT()}, fresh=False)
    trained = {n: p.numel() for n, p in dit.named_parameters() if trains(dit, n)}
    # 28 units, r = E = 4: r (13 + 5 + 17 + 8) 1152 and four mixtures of 4 (1152 + 1)
    additions = sum(v for n, v in trained.items() if ".td_" in n)
    assert additions == 28 * (4 * 43 * 1152 + 4 * 4 * 1153) and 0.0089 < additions / whole < 0.0091
    assert any(n.startswith("edits.dydit.") for n in trained)
    assert round(100 * sum(trained.values()) / whole, 1) == 1.4  # methods/dydit.md


@families
def test_modulations_train_where_they_are_asked_for(name):
    denoiser = adapted(family(name), modulation=True)
    trained = {n for n, _ in denoiser.named_parameters() if trains(denoiser, n) and ".td_" not in n}
    marks = (
        "adaLN_modulation",
        "norm1",
        "norm.linear",
        "norm_out",
        "adaln_single",
        "scale_shift",
        "img_mod",
        "txt_mod",
        "time_proj",
    )
    assert trained and all(any(m in n for m in marks) for n in trained)
    assert {part for part in denoiser.facts.modulation if not any(part in n for n in trained)} == set()
    for i, _ in enumerate(denoiser.units):
        prefix = next(n for n, m in denoiser.named_modules() if m is denoiser.units[i])
        assert any(n.startswith(prefix + ".") for n in trained)


@torch.no_grad()
def test_targets_decide_where_and_rows_of_the_condition_are_samples_too():
    denoiser = adapted(family("dit"), targets=("attn.qkv", "adaLN_modulation.1"), rank=2, experts=3)
    assert {n for n, _ in timed(denoiser)} == {
        f"blocks.{i}.{n}" for i in (0, 1) for n in TDLoRA(targets=("attn.qkv", "adaLN_modulation.1")).targets
    }
    together = denoiser(*inputs(denoiser)).sample
    for i in range(2):
        torch.testing.assert_close(together[i], at(denoiser, i), rtol=0, atol=1e-10)  # float64


# ---- as any part of a model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_checkpointing_gives_the_same_gradients_and_leaves_no_call_open(name):
    denoiser = prepared(adapted(family(name)))
    wanted = gradients(denoiser)
    denoiser.gradient_checkpointing = True
    found = gradients(denoiser)
    assert all(torch.equal(found[key], g) for key, g in wanted.items())
    assert not any(layer.calls.open for _, layer in timed(denoiser))


@torch.no_grad()
def test_an_error_leaves_no_call_open():
    denoiser = adapted(family("dit"))
    denoiser.units[1].slots.ffn = lambda tokens, layout: 1 / 0
    with pytest.raises(ZeroDivisionError):
        denoiser(*inputs(denoiser))
    assert not any(layer.calls.open for _, layer in timed(denoiser))


@torch.no_grad()
def test_a_copy_stands_on_its_own():
    denoiser = adapted(family("flux"))
    twin, before = deepcopy(denoiser), denoiser(*inputs(denoiser)).sample
    assert torch.equal(twin(*inputs(twin)).sample, before)
    for key, p in twin.named_parameters():
        if ".td_up" in key:
            p.zero_()
    assert torch.equal(denoiser(*inputs(denoiser)).sample, before)
    plain = family("flux")
    assert torch.equal(twin(*inputs(twin)).sample, plain(*inputs(plain)).sample)
    assert not {id(layer.calls) for _, layer in timed(twin)} & {id(layer.calls) for _, layer in timed(denoiser)}


@families
@torch.no_grad()
def test_an_artifact_keeps_the_frozen_weights_under_stock_names(name, tmp_path):
    denoiser, stock = adapted(family(name).float(), rank=2), set(family(name).model.state_dict())
    edit.save(denoiser, tmp_path / "a")
    read = edit.load(tmp_path / "a").denoiser
    x, t, condition = inputs(denoiser)
    batch = x.float(), t.float(), condition.map(lambda v: v.float() if v.is_floating_point() else v)
    assert torch.equal(read(*batch).sample, denoiser(*batch).sample)
    assert read.applied["td_lora"] == TDLoRA(rank=2)
    rule = TDLoRA()
    assert {rule.stock_key(k) for k in read.model.state_dict()} - {None} == stock


def test_a_unit_stays_compiled_in_one_graph():
    denoiser = prepared(adapted(family("dit")))
    wanted = gradients(denoiser)
    torch._dynamo.reset()
    unit = denoiser.units[0]
    unit.compile(backend="eager", fullgraph=True)  # type: ignore[attr-defined]
    found = gradients(denoiser)
    assert all(torch.allclose(found[key], g, rtol=1e-10, atol=1e-12) for key, g in wanted.items())  # float64
    with torch.no_grad():
        torch.testing.assert_close(at(denoiser.eval(), 0, Step(0, 2, 0.5)), at(denoiser, 0), rtol=0, atol=1e-10)
    assert not any(layer.calls.open for _, layer in timed(denoiser))


def test_it_runs_under_autocast():
    denoiser = prepared(adapted(family("flux").float()))
    x, t, condition = inputs(denoiser)
    batch = x.float(), t.float(), condition.map(lambda v: v.float() if v.is_floating_point() else v)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        denoiser(*batch).sample.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in denoiser.parameters() if p.grad is not None)


def _gradients_on_ranks() -> float:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=2)
    denoiser = prepared(adapted(family("flux")))
    wanted = gradients(denoiser)
    for unit in denoiser.units:
        fully_shard(unit)
    fully_shard(denoiser)
    denoiser.gradient_checkpointing = True
    found = gradients(denoiser)  # both ranks have the same samples
    apart = [(found[key].full_tensor() - g).abs().max().item() for key, g in wanted.items()]
    dist.destroy_process_group()
    return max(apart) / max(g.abs().max().item() for g in wanted.values())


def test_sharded_it_has_the_same_gradients():
    assert max(run_ranks(_gradients_on_ranks)) < 1e-6  # fp32 RoPE


@torch.no_grad()
def test_switched_off_it_is_its_own_teacher():
    denoiser, plain = adapted(family("flux")), family("flux")
    wanted, before = plain(*inputs(plain)).sample, denoiser(*inputs(denoiser)).sample
    with without(denoiser):
        assert torch.equal(denoiser(*inputs(denoiser)).sample, wanted)
    assert torch.equal(denoiser(*inputs(denoiser)).sample, before) and not torch.equal(before, wanted)
    assert TDLoRA().keeps and not TDLoRA(modulation=True).keeps


@torch.no_grad()
def test_branches_of_a_single_unit_add_up():
    denoiser = adapted(family("flux"))
    whole = denoiser(*inputs(denoiser)).sample
    taken_apart = denoiser(*inputs(denoiser), branches=(0, 1)).sample
    torch.testing.assert_close(taken_apart, whole, rtol=0, atol=1e-6)  # fp32 RoPE


# ---- parts of a unit -------------------------------------------------------------------------------------------------


@families
@torch.no_grad()
def test_a_part_of_a_layer_has_that_part_of_the_addition(name):
    """Off is off: what reads the rest through zeroed weights computes what a narrow copy does."""
    denoiser = adapted(family(name))
    for unit, stream in walk(denoiser):
        h, f = heads_of(unit), hidden_of(unit)
        live = torch.cat([torch.arange(h.size // 4), torch.arange(h.size // 2, h.size * 3 // 4)])
        channels = torch.arange(0, f.size, 2)
        narrow = [narrowed(unit, ((h, live), (f, channels)), heads=2, keep=keep) for keep in (False, True)]
        found = [copy(stream) for copy in narrow for _ in range(2)]
        for features, part in ((h, live), (f, channels)):
            off = torch.ones(features.size, dtype=torch.bool)
            off[part] = False
            for path, first in features.readers:
                layer = unit.get_submodule(path)
                assert isinstance(layer, Timed)
                for p in (layer.weight, layer.td_down):
                    p[:, first : first + features.size][:, off] = 0
        wanted = unit(stream)
        assert all(difference(a, wanted) < 100 * TOLERANCE[name] for a in found)


@torch.no_grad()
def test_kept_slices_outlive_a_time_and_their_additions_do_not():
    unit, stream = next(walk(adapted(family("dit"))))
    f = hidden_of(unit)
    kept, live = (narrowed(unit, ((f, torch.arange(0, f.size, 2)),), keep=keep) for keep in (True, False))
    for sample in (0, 1):
        assert stream.time is not None
        now = replace(stream, time=stream.time[sample : sample + 1].expand(2, -1), step=Step(sample, 2, 0.5))
        assert difference(kept(now), live(now)) < 1e-12  # float64


@pytest.mark.parametrize("name", ["dit", "flux"])
@torch.no_grad()
def test_tokens_of_several_samples_run_as_one_sequence_where_it_is_said_whose_they_are(name):
    denoiser = adapted(family(name))
    unit, stream = list(walk(denoiser))[-1]
    layer = next(m for m in unit.modules() if isinstance(m, Timed))
    x = torch.randn(2, 5, layer.in_features).double()
    seen = []

    def ffn(tokens, layout):
        wanted, rows = layer(x), torch.tensor([0, 3, 4, 6, 9])
        with one_sequence(unit, rows // 5):
            for tokens_of in (x.flatten(0, 1)[rows], x.flatten(0, 1)[None, rows]):
                seen.append((layer(tokens_of).view(5, -1) - wanted.flatten(0, 1)[rows]).abs().max())
        with pytest.raises(RuntimeError, match="1 sequence for 2 samples, each with its own time: say whose"):
            layer(x.flatten(0, 1)[None, rows])
        return torch.zeros_like(tokens)

    unit.slots.ffn = ffn
    unit(stream)
    assert len(seen) == 2 and max(seen) < 1e-12  # float64
    with pytest.raises(RuntimeError, match="outside of its unit, which knows the time: call the unit"):
        layer(x)


# ---- beside routers --------------------------------------------------------------------------------------------------


@families
@torch.no_grad()
def test_an_ordered_unit_computes_what_it_did(name):
    for unit, stream in walk(adapted(family(name))):
        before = unit(stream)
        order_heads(unit)
        order_channels(unit)
        assert difference(unit(stream), before) < 100 * TOLERANCE[name]


@families
@torch.no_grad()
def test_under_elastic_units_masked_is_sliced(name):
    denoiser, before = adapted(family(name)), adapted(family(name))(*inputs(family(name), 4)).sample
    edit.apply(denoiser, {"elastic": Elastic(band=-1.0, order=True)})
    batch = inputs(denoiser, 4)
    tolerance = 1e4 * TOLERANCE[name]
    torch.testing.assert_close(denoiser.eval()(*batch).sample, before, rtol=tolerance, atol=tolerance)
    with forced(denoiser, lambda i, p, q: (torch.arange(4) + i) % 5):
        sliced, masked = denoiser.eval()(*batch).sample, denoiser.train()(*batch).sample
    torch.testing.assert_close(sliced, masked, rtol=tolerance, atol=tolerance)
    assert (sliced - before).abs().max() > 0.01


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("name", ["dit", "flux"])
@torch.no_grad()
def test_under_dydit_units_masked_is_sliced(name, tokens):
    denoiser, before = adapted(family(name)), adapted(family(name))(*inputs(family(name))).sample
    edit.apply(denoiser, {"dydit": DyDiT(order=True, tokens=tokens)})
    x, t, condition = inputs(denoiser)
    tolerance = 1e4 * TOLERANCE[name]
    torch.testing.assert_close(denoiser(x, t, condition).sample, before, rtol=tolerance, atol=tolerance)
    g = torch.Generator().manual_seed(3)
    for p in denoiser.edits.parameters():  # now some are on and some are not
        p.copy_(0.2 * torch.randn(p.shape, generator=g))
    everywhere = range(len(denoiser.units))
    for now in t:  # a batch of one time, as in a generation; branches are computed with factors
        t_now = now.expand(2)
        masked = denoiser(x, t_now, condition, branches=everywhere)
        sliced = denoiser(x, t_now, condition, step=Step(0, 1, float(now)))
        torch.testing.assert_close(sliced.sample, masked.sample, rtol=tolerance, atol=tolerance)
        shares = denoiser.applied["dydit"].decisions(sliced.trace)
        assert all(0 < share.mean() < 1 for share in shares.values()) and ("tokens" in shares) == tokens
    if not tokens:  # samples of different times in one batch
        mixed, masked = denoiser(x, t, condition).sample, denoiser(x, t, condition, branches=everywhere).sample
        torch.testing.assert_close(mixed, masked, rtol=tolerance, atol=tolerance)


def test_its_factors_train_beside_routers():
    denoiser = adapted(family("dit"))
    edit.apply(denoiser, {"dydit": DyDiT()})
    denoiser.double()
    trained = {n for n, p in prepared(denoiser).named_parameters() if p.requires_grad}
    assert {n for n in trained if ".td_" not in n} == {n for n, _ in denoiser.named_parameters() if "edits." in n}
    denoiser(*inputs(denoiser)).sample.square().sum().backward()
    assert all(p.grad is not None for n, p in denoiser.named_parameters() if ".td_" in n)
    assert all(p.grad is None for n, p in denoiser.named_parameters() if n not in trained)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_adapted_is_refused(dit):
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        TDLoRA(rank=0)
    with pytest.raises(ValueError, match="inside a unit has a name that ends in 'to_q'; there are attn.qkv, attn.proj"):
        edit.apply(dit, {"td": TDLoRA(targets=("attn.qkv", "to_q"))})
    edit.apply(dit, {"td": TDLoRA()})
    with pytest.raises(ValueError, match="another edit has changed unit 0 of this dit already: put TDLoRA before it"):
        edit.apply(dit, {"second": TDLoRA()})
    with pytest.raises(ValueError, match="cannot be folded into the weights"):
        edit.fold(dit)


def test_it_comes_before_what_changes_the_same_layers(dit):
    other = deepcopy(dit)
    edit.apply(dit, {"lora": LoRA(rank=2)})
    with pytest.raises(
        ValueError, match="attn.qkv of unit 0 of this dit is no plain linear layer any more: put TDLoRA"
    ):
        edit.apply(dit, {"td": TDLoRA()})
    edit.apply(other, {"elastic": Elastic()})
    with pytest.raises(ValueError, match=r"td \(TDLoRA\) cannot be applied after elastic .*: put it before"):
        edit.apply(other, {"td": TDLoRA()})


def test_under_a_lora_there_is_no_plain_weight_until_that_is_folded(dit, batch):
    edit.apply(adapted(dit, targets=("mlp.fc1",)), {"lora": LoRA(rank=2, targets=("mlp.fc1",))})
    time = dit.embed(**dit.pack(*batch)).time[0]
    with pytest.raises(ValueError, match="a LoRA lies on blocks.0.mlp.fc1, which has no plain weight: fold it first"):
        weights_at(dit, time)
    edit.fold(dit, "lora")
    stock = dit.from_config(dit.config).model.state_dict()
    assert weights_at(dit, time).keys() == {k for k in stock if k.endswith("mlp.fc1.weight")}


def test_lora_and_td_lora_both_train_and_are_both_switched_off(dit, batch):
    before = dit(*batch).sample
    edit.apply(dit, {"td": TDLoRA(targets=("mlp.fc1",)), "lora": LoRA(rank=2)})
    assert {n.rpartition(".")[0].rpartition(".")[2] for n, _ in dit.named_parameters() if trains(dit, n)} >= {"fc1"}
    for p in dit.parameters():
        assert isinstance(p, nn.Parameter)
    with torch.no_grad(), without(dit):
        assert torch.equal(dit(*batch).sample, before)


@pytest.mark.parametrize("name", ["dit", "flux"])
@torch.no_grad()
def test_tokens_of_samples_at_different_times_run_as_one_sequence_with_the_mixture_of_each(name):
    denoiser = edit.apply(adapted(family(name)), {"dydit": DyDiT()})
    generator = torch.Generator().manual_seed(3)
    for p in denoiser.edits.parameters():
        p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    sliced = denoiser(*inputs(denoiser))
    factored = denoiser(*inputs(denoiser), branches=range(len(denoiser.units)))  # where branches are wanted
    chosen = [v.float().mean().item() for k, v in sliced.trace.items() if k.startswith("dydit.tokens.")]
    assert any(0 < share < 1 for share in chosen)  # in one of the units, at least
    # FLUX's stock positions round in fp32
    torch.testing.assert_close(sliced.sample, factored.sample, rtol=0, atol=1e-7 if name == "flux" else 1e-12)
