"""Interval reuse: what is repeated, what it costs, and how it lives with guidance, edits, compilers and pipelines."""

from collections import Counter
from copy import deepcopy
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from caches import FEW, MADE, branches_of, executed, family, generated, paint, told
from operators import Operators
from ranks import run_ranks
from torch.distributed.fsdp import FSDPModule, fully_shard

import edit
from edit import noise
from edit.artifacts.checkpoint import load, save
from edit.backbones.attached import attached
from edit.backbones.stock import tokens_of
from edit.caching.engine import EXECUTED
from edit.caching.reuse import Reuse
from edit.denoiser import Denoiser
from edit.predictions import default_objective
from edit.pruning.tinyfusion import Gated, TinyFusion
from edit.routing.dydit import DyDiT
from edit.stream import Step
from edit.tuning.lora import LoRA
from edit.unit import core

# ---- what is repeated ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_an_interval_of_one_is_the_plain_model_bit_for_bit(name):
    memory: dict = {}
    images = paint(family(name, reuse=Reuse(1)), watch=lambda step, out: memory.update(step.memory))
    assert torch.equal(images, paint(family(name))) and not memory


@pytest.mark.parametrize("name", MADE)
def test_a_repeated_branch_is_the_earlier_one_bit_for_bit_and_another_input_would_make_another(name):
    denoiser, outputs = family(name, reuse=Reuse(2)), {}
    for i, unit in enumerate(map(core, denoiser.units)):
        slot = unit.slots.branch

        def spy(stream, branch, run, i=i, slot=slot):
            out = slot(stream, branch, run)
            with torch.no_grad():
                outputs.setdefault((i, branch), []).append((out, run(stream)))
            return out

        unit.slots.branch = spy
    paint(denoiser, guidance=1.0)
    assert {branch for _, branch in outputs} >= {"attention", "feed"}
    for (i, branch), ((a, own), (b, other), (c, _), (d, _)) in outputs.items():
        text = a.text is not None
        assert torch.equal(b.image, a.image) and torch.equal(d.image, c.image)
        assert not text or (torch.equal(b.text, a.text) and torch.equal(d.text, c.text))
        assert torch.equal(a.image, own.image), "the first is computed"
        assert not torch.equal(b.image, other.image) and not torch.equal(c.image, a.image), (i, branch)


@pytest.mark.parametrize(
    "settings, computed",
    [
        (dict(interval=1), {0, 1, 2, 3, 4, 5, 6, 7}),
        (dict(interval=2), {0, 2, 4, 6}),
        (dict(interval=3), {0, 3, 6}),
        (dict(interval=100), {0}),
        (dict(interval=3, backwards=True), {0, 1, 4, 7}),
        (dict(interval=3, start=0.25), {0, 1, 2, 5}),
        (dict(interval=3, start=0.3), {0, 1, 2, 3, 6}),
        (dict(interval=4, start=0.25, backwards=True), {0, 1, 3, 7}),
        (dict(interval=2, start=1.0), {0, 1, 2, 3, 4, 5, 6, 7}),
    ],
)
def test_evaluations_are_computed_as_the_settings_say(settings, computed, make_dit):
    seen = executed(edit.apply(make_dit(), {"reuse": Reuse(**settings)}), 8)["joint"]
    assert seen == [[float(i in computed)] * 3 for i in range(8)]


def test_each_generation_begins_anew():
    denoiser = family("dit", reuse=Reuse(3))
    first = paint(denoiser, 5)
    assert torch.equal(paint(denoiser, 5), first)
    assert (first - paint(family("dit"), 5)).abs().max() > 1e-4


def test_chosen_units_and_branches_alone_are_repeated(make_flux):
    denoiser = edit.apply(make_flux(sample_size=(8, 8)), {"reuse": Reuse(2, units=(1, 4), branches=("feed", "fused"))})
    assert [i for i, u in enumerate(denoiser.units) if "branch" in core(u).slots] == [1, 4]
    assert executed(denoiser)["joint"] == [[1.0, 1.0], [0.0, 0.0]] * 2


# ---- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in MADE])
def test_a_generation_executes_what_the_arithmetic_says(name):
    whole, parts = branches_of(family(name))
    assert 0.5 < sum(parts.values()) / whole < 1
    for interval, repeated in ((1, 0), (2, 1), (3, 2)) if name == "dit" else ((3, 2),):
        cost = generated(family(name, reuse=Reuse(interval)), 3)
        assert cost == 2 * (3 * whole - repeated * sum(parts.values()))


@pytest.mark.parametrize(
    "name, branch",
    [
        pytest.param("flux", "feed", marks=pytest.mark.slow),
        ("flux", "fused"),
        ("pixart", "cross"),
        ("sd3 dual", "second"),
    ],
)
def test_what_is_not_chosen_is_computed_every_time(name, branch):
    whole, parts = branches_of(family(name))
    chosen = {i: macs for (i, b), macs in parts.items() if b == branch}
    unit = next(iter(chosen))
    of_unit = sum(macs for (i, _), macs in parts.items() if i == unit)
    for settings, part in (({"branches": (branch,)}, sum(chosen.values())), ({"units": (unit,)}, of_unit)):
        assert generated(family(name, reuse=Reuse(2, **settings)), 2) == 2 * (2 * whole - part) > 0


@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_a_repeated_branch_runs_neither_norm_nor_product(name):
    net, memory = family(name, reuse=Reuse(2)), {}
    x = torch.randn(2, *net.sample_shape)
    given = x, torch.full((2,), 0.5), told(net)
    counts = {}
    for index in range(2):
        units, seen = list(net.units), []

        def recorded(stream, unit, seen=seen):
            with Operators() as modulation:
                core(unit).modulate(stream)
            with Operators() as ops:
                stream = unit(stream)
            seen.append((ops.seen, modulation.seen))
            return stream

        net.units = [lambda stream, unit=unit: recorded(stream, unit) for unit in units]
        net(*given, step=Step(index, 2, 0.5, memory=memory))
        net.units, counts[index] = units, seen
    costly = ("norm", "mm", "attention", "rsqrt", "gelu", "linear", "cat")
    for computed, repeated in zip(counts[0], counts[1], strict=True):
        for word in costly:
            kinds = {op for op in (*computed[0], *repeated[0]) if word in op}
            assert all(repeated[0][op] == repeated[1][op] for op in kinds), word
        assert sum(computed[0].values()) > 2 * sum(repeated[0].values())


# ---- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
def test_guidance_branches_in_one_batch_and_apart_make_the_same_images(name):
    together, apart = family(name, reuse=Reuse(2)), family(name, reuse=Reuse(2))
    apart.applied["reuse"].separate = True
    shares = [[[float(i % 2 == 0)] * len(apart.units) for i in range(4)]]
    assert list(executed(together).values()) == shares and list(executed(together)) == ["joint"]
    assert list(executed(apart).values()) == shares * 2 and list(executed(apart)) == ["cond", "uncond"]
    wanted = paint(apart)
    # fp32 products of larger batches are summed in another order
    torch.testing.assert_close(paint(together), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_an_interval_of_guidance_that_begins_later_starts_its_memory_there(make_dit):
    """Evaluations at 1, 0.75, 0.5 and 0.25, of which the two in the middle are guided."""
    net = edit.apply(make_dit(), {"reuse": Reuse(4)})
    on, off = [1.0] * 3, [0.0] * 3
    assert executed(net, interval=(0.3, 0.8)) == {"cond": [on, on], "joint": [on, off]}
    net.applied["reuse"].separate = True
    assert executed(net, interval=(0.3, 0.8)) == {"cond": [on, off, off, off], "uncond": [on, off]}


# ---- beside other edits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_two_caches_on_different_branches_do_not_collide(name):
    attention, rest = Reuse(2, branches=("attention",)), Reuse(3, branches=("feed",))
    first = family(name, a=attention, b=rest)
    second = family(name, b=replace(rest), a=replace(attention))
    memory: dict = {}
    images = paint(first, 7, lambda step, out: memory.update(step.memory))
    assert torch.equal(images, paint(second, 7))
    assert set(memory["a", 0, "joint"]) == {"attention"} and set(memory["b", 0, "joint"]) == {"feed"}
    assert [s[0] for s in executed(first, 7, "a")["joint"]] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    assert [s[0] for s in executed(first, 7, "b")["joint"]] == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    assert not torch.equal(paint(first, 7), paint(family(name, a=replace(attention)), 7))
    for third in (Reuse(units=(1,)), Reuse(branches=("attention",))):
        with pytest.raises(
            ValueError, match="Reuse: '[ab]' caches (attention|feed) of unit [01] already: choose other"
        ):
            edit.apply(first, {"c": third})


def test_it_repeats_what_the_slot_had_before():
    def doubled(stream, branch, run):
        out = run(stream)
        return out._replace(image=2 * out.image)

    plain, cached = family("dit"), family("dit")
    for net in (plain, cached):
        core(net.units[1]).slots.branch = doubled
    edit.apply(cached, {"reuse": Reuse(1)})
    assert torch.equal(paint(cached), paint(plain)) and not torch.equal(paint(plain), paint(family("dit")))


def trained(net: Denoiser) -> Denoiser:
    """With a LoRA that does something."""
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, p in net.named_parameters():
            if ".lora_" in key:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return net


@pytest.mark.parametrize("name, targets", [("dit", ("attn.qkv", "mlp.fc1")), ("flux", ("to_q", "proj_mlp"))])
def test_a_lora_before_it_and_after_it_is_the_same(name, targets):
    before = trained(family(name, lora=LoRA(4, targets=targets), reuse=Reuse(2)))
    after = trained(family(name, reuse=Reuse(2), lora=LoRA(4, targets=targets)))
    assert torch.equal(paint(before), paint(after))
    assert not torch.equal(paint(before), paint(family(name, reuse=Reuse(2))))
    once = trained(family(name, lora=LoRA(4, targets=targets), reuse=Reuse(1)))
    assert torch.equal(paint(once), paint(trained(family(name, lora=LoRA(4, targets=targets)))))


def test_units_behind_gates_of_tinyfusion_are_repeated_and_closed_ones_do_not_run(make_dit):
    gated, search = make_dit(), TinyFusion("2:3")
    edit.apply(gated, {"search": search})
    reused = edit.apply(deepcopy(gated), {"reuse": Reuse(2)})
    assert all(isinstance(u, Gated) for u in reused.units)
    assert executed(reused)["joint"] == [[1.0, 1.0], [0.0, 0.0]] * 2  # one of three units is closed
    once = edit.apply(deepcopy(gated), {"reuse": Reuse(1)})
    assert torch.equal(paint(once), paint(gated)) and not torch.equal(paint(reused), paint(gated))


def test_routers_that_divide_a_batch_are_refused_in_either_order(make_dit):
    with pytest.raises(ValueError, match=r"routers \(DyDiT\) cannot be applied together with reuse \(Reuse\)"):
        edit.apply(make_dit(), {"reuse": Reuse(), "routers": DyDiT()})


# ---- training, copies, artifacts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
def test_while_training_it_does_nothing(name):
    plain, cached = family(name), family(name, reuse=Reuse(2))
    given = torch.randn(2, *plain.sample_shape), torch.tensor([0.3, 0.7]), told(plain)
    for taps in ((), (0,)):
        a, b = (net(*given, branches=taps) for net in (plain, cached))
        assert torch.equal(a.sample, b.sample) and a.trace.keys() == b.trace.keys()
        assert cached.applied["reuse"].decisions(b.trace) == {}
    grads = [torch.autograd.grad(net(*given).sample.sum(), list(net.parameters())[-4:]) for net in (plain, cached)]
    assert all(map(torch.equal, *grads))
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in cached.named_parameters()]


def test_a_copy_repeats_its_own_branches():
    net = family("dit", reuse=Reuse(2))
    copied = deepcopy(net)
    wanted = paint(net)
    assert torch.equal(paint(copied), wanted)
    for unit, other in zip(net.units, copied.units, strict=True):
        assert core(other).slots.branch.before.__self__ is other and core(unit).slots.branch.before.__self__ is unit
        assert core(other).slots.branch.edit is copied.applied["reuse"] is not net.applied["reuse"]
    copied.applied["reuse"].interval = 1
    assert torch.equal(paint(copied), paint(family("dit"))) and torch.equal(paint(net), wanted)


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_it_is_stored_as_data_and_read_again(name, tmp_path):
    units, branches = ((1, 2), ("feed", "fused")) if name == "flux" else ((1,), ())
    net = family(name, reuse=Reuse(3, units=units, branches=branches, backwards=True))
    save(net, tmp_path / "artifact")
    read = load(tmp_path / "artifact").denoiser
    assert read.applied["reuse"] == net.applied["reuse"] and read.applied["reuse"].name == "reuse"
    assert torch.equal(paint(read), paint(net)) and not torch.equal(paint(net), paint(family(name)))


def test_settings_that_cannot_be_are_refused(make_dit, make_flux):
    assert Reuse(units=[1], branches=["feed"]) == Reuse(units=(1,), branches=("feed",))  # as YAML has them
    with pytest.raises(ValueError, match="Reuse: interval must be at least 1, got 0; the default is 2"):
        Reuse(0)
    with pytest.raises(ValueError, match="Reuse: this dit has units 0 to 2, got 3"):
        edit.apply(make_dit(), {"reuse": Reuse(units=(3,))})
    with pytest.raises(ValueError, match="these units have the branches attention, feed, got 'fused'"):
        edit.apply(make_dit(), {"reuse": Reuse(branches=("feed", "fused"))})
    with pytest.raises(ValueError, match="these units have the branches attention, feed, fused, got 'cross'"):
        edit.apply(make_flux(), {"reuse": Reuse(branches=("cross",))})
    net = edit.apply(make_dit(), {"reuse": Reuse()})
    with pytest.raises(ValueError, match="Reuse cannot be folded into the weights"):
        edit.fold(net)


# ---- compiled and sharded --------------------------------------------------------------------------------------------


def compiled(name: str, backend: str) -> None:
    from torch._dynamo.backends.registry import lookup_backend

    torch._dynamo.reset()  # of what the process this one was forked from may have compiled
    torch._dynamo.utils.counters.clear()
    net, graphs, runs = family(name, reuse=Reuse(3)), [], Counter()
    wanted = paint(net, 6)

    def counting(gm, inputs):
        words = " ".join(str(node.target) for node in gm.graph.nodes)
        kind = "attention" if "scaled_dot_product" in words else "feed" if "gelu" in words else ""
        graphs.append(kind)
        made = lookup_backend(backend)(gm, inputs)

        def run(*args):
            runs[kind] += 1
            return made(*args)

        return run

    for unit in net.units:
        core(unit).compile(backend=counting)
    seen = []
    images = paint(net, 6, watch=lambda step, out: seen.append((len(graphs), runs["attention"], dict(out.trace))))
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    assert len({count for count, *_ in seen[1:]}) == 1, "nothing is compiled again"
    # each computed evaluation runs the attention of each unit as a graph, and each repeated one none
    depth = len(net.units)
    assert [attention for _, attention, _ in seen] == [depth, depth, depth, 2 * depth, 2 * depth, 2 * depth]
    assert runs["feed"] == 2 * (depth - sum(u.anatomy.fused for u in net.units))
    shares = [net.applied["reuse"].decisions(trace)[EXECUTED].mean().item() for *_, trace in seen]
    assert shares == [1.0, 0.0, 0.0] * 2


SLOW = pytest.mark.slow  # seconds of tracing


@pytest.mark.parametrize(
    "name, backend",
    [("dit", "eager"), pytest.param("dit", "aot_eager", marks=SLOW), pytest.param("flux", "eager", marks=SLOW)],
)
def test_compiled_units_stay_compiled_and_no_step_compiles_again(name, backend):
    run_ranks(compiled, 1, args=(name, backend))  # what has compiled cannot be forked from


def sharded() -> list:
    dist.init_process_group("gloo")
    net, gathered = family("flux", reuse=Reuse(2)), Counter()
    for unit in map(core, net.units):
        fully_shard(unit)
        unit.register_forward_pre_hook(lambda unit, args: gathered.update([type(unit).__name__]))
    fully_shard(net)
    assert all(isinstance(u, FSDPModule) for u in net.units)
    images = paint(net)
    dist.destroy_process_group()
    return [images.tolist(), dict(gathered)]


def test_sharded_units_gather_and_paint_the_same():
    wanted = paint(family("flux", reuse=Reuse(2)))
    for images, gathered in run_ranks(sharded):
        torch.testing.assert_close(torch.tensor(images), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
        assert len(gathered) == 2 and set(gathered.values()) == {
            2 * 4
        }  # both of a kind at every evaluation, also where all is repeated


# ---- inside stock pipelines ------------------------------------------------------------------------------------------


def vae() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()


def flux_pipeline(net: Any) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return diffusers.FluxPipeline(scheduler, vae(), None, None, None, None, net.model)


def sd3_pipeline(net: Any) -> Any:
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.StableDiffusion3Pipeline(net.model, scheduler, vae(), **dict.fromkeys(parts))


@pytest.mark.parametrize("name", ["flux", "sd3 dual"])
def test_a_stock_pipeline_paints_what_the_sampler_paints(name):
    net = family(name, reuse=Reuse(3))
    pipe = flux_pipeline(net) if name == "flux" else sd3_pipeline(net)
    pipe.set_progress_bar_config(disable=True)
    condition, x = told(net), noise.gaussian(5, torch.arange(2), noise.NOISE, net.sample_shape)
    negative = condition.map(torch.zeros_like)
    words = {"prompt_embeds": condition.text, "pooled_prompt_embeds": condition.pooled, "output_type": "latent"}
    if name == "flux":
        words |= {"guidance_scale": 3.5, "latents": tokens_of(x)}
    else:
        words |= {"guidance_scale": 3.0, "latents": x, "negative_prompt_embeds": negative.text}
        words |= {"negative_pooled_prompt_embeds": negative.pooled}
    ours = net.sampler()
    assert ours is not None
    ours = replace(ours, solver=replace(ours.solver, steps=7), guidance=1.0 if name == "flux" else 3.0)
    wanted = ours(net, default_objective(net), condition, torch.arange(2), seed=5, negative=negative)
    wanted = tokens_of(wanted) if name == "flux" else wanted
    for _ in range(2):  # the second picture begins anew
        with attached(pipe, net), torch.no_grad():
            found = pipe(**words, height=16, width=16, num_inference_steps=7).images
        # diffusers keeps time x 1000 in fp32
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
    net.applied["reuse"].interval = 1
    with attached(pipe, net), torch.no_grad():
        plain = pipe(**words, height=16, width=16, num_inference_steps=7).images
    assert (plain - wanted).abs().max() > 1e-3 * wanted.abs().max()
