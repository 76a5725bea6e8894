"""TaylorSeer: which evaluations are computed, what stands in for the others, what it costs and holds."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from caches import FEW, MADE, executed, family, paint, sampler, told
from gates import stream
from torch import nn

import edit
from edit.artifacts.checkpoint import load, save
from edit.caching.reuse import Reuse
from edit.caching.taylor import Ladder
from edit.caching.taylorseer import TaylorSeer
from edit.measuring.cost import cost, count_generation, twin
from edit.measuring.flops import Flops
from edit.predictions import default_objective
from edit.stream import Branch, Condition, Step
from edit.unit import core

SITES = ["module", "last", "span"]


def small(**settings) -> TaylorSeer:
    return TaylorSeer(**{"interval": 2, "order": 1, "first": 1, **settings})


# ---- the schedule (oracle 1) -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "interval, first, schedule, count",
    [
        (3, 2, "paper", 18),
        (4, 2, "paper", 14),
        (5, 2, "paper", 11),
        (6, 3, "paper", 10),
        (9, 3, "paper", 8),
        (5, 1, "paper", 10),
        (5, 3, "diffusers", 13),
        (5, 3, "cache_dit", 12),
    ],
)
def test_fifty_evaluations_are_computed_as_often_as_published(interval, first, schedule, count):
    cache = TaylorSeer(interval, first=first, schedule=schedule)
    found = [s for s in range(50) if cache.computed(s)]
    assert len(found) == count and found[:first] == list(range(first))
    if (interval, first) == (6, 3):
        assert found == [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]
    if schedule == "diffusers":
        assert found[3:] == [4, 9, 14, 19, 24, 29, 34, 39, 44, 49]


def test_anchors_are_the_computed_ones_of_a_samplers_evaluations():
    """0, 1, 5 of nine, whose times have a tenth, 0, at the end."""
    cache = TaylorSeer(4, 1, first=2)
    assert [cache.anchors((0.5,) * count) for count in (9, 10, 11)] == [3, 3, 4]


def test_settings_reach_the_predictor():
    assert TaylorSeer(order=2, form="newton", fp32=True).predictor == Ladder(2, "newton", True)


def test_a_time_that_comes_twice_is_found_where_a_generation_begins_late():
    """Guidance that begins at evaluation 1 has a clock that counts from there."""
    cache, times, memory = small(first=4, axis="t"), (1.0, 0.9, 0.7, 0.7, 0.4, 0.0), {}
    cache.name, again = "cache", []
    for index in (1, 2, 3):
        step = Step(index, 5, times[index], times=times, memory=memory)
        cache.embed(replace(stream(0.0, index, 5), step=step), torch.zeros(2), Condition(), None)
        again.append((cache.at(step).again, cache.kind(step)))
    assert again == [(False, False), (False, False), (True, True)]


# ---- generations (oracles 2, 5, 6, 7, 8) -----------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", MADE)
def test_an_interval_of_one_is_the_plain_model_bit_for_bit(name, site):
    assert torch.equal(paint(family(name, cache=small(interval=1, site=site))), paint(family(name)))


@pytest.mark.parametrize("name", MADE)
def test_order_zero_at_the_branches_is_interval_reuse_bit_for_bit(name):
    """From one computed evaluation on, every N-th of both is computed."""
    taylor = paint(family(name, cache=TaylorSeer(2, 0, first=2)), 6)
    reuse = paint(family(name, cache=Reuse(2, start=1 / 6)), 6)
    assert executed(family(name, cache=TaylorSeer(2, 0, first=2)), 6, "cache") == executed(
        family(name, cache=Reuse(2, start=1 / 6)), 6, "cache"
    )
    assert torch.equal(taylor, reuse) and not torch.equal(taylor, paint(family(name), 6))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", FEW)
def test_guidance_branches_in_one_batch_and_apart_make_the_same_images(name, site):
    together, apart = (family(name, cache=small(site=site)) for _ in range(2))
    apart.applied["cache"].separate = True
    assert list(executed(apart, name="cache")) == ["cond", "uncond"]
    wanted = paint(apart, 6)
    # fp32 products of larger batches are summed in another order, which the extrapolation enlarges
    torch.testing.assert_close(paint(together, 6), wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


def products(unit: nn.Module) -> dict[str, nn.Module]:
    """Linear layers of tokens: those that modulate run at every evaluation."""
    linear = {path: m for path, m in unit.named_modules() if isinstance(m, nn.Linear)}
    return {path: m for path, m in linear.items() if not any(word in path for word in ("norm", "adaLN", "mod"))}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", MADE)
def test_what_is_predicted_is_not_run(name, site):
    net, calls, whole = family(name, cache=small(site=site, interval=3)), Counter(), Counter()
    assert executed(net, 7, "cache")["joint"] == [[float(s in (0, 3, 6))] * len(net.units) for s in range(7)]
    for unit in map(core, net.units):
        for path, module in products(unit).items():
            whole[path] += 3
            module.register_forward_pre_hook(lambda m, a, path=path: calls.update([path]))
    paint(net, 7)
    assert calls == whole


@pytest.mark.parametrize(
    "name", ["dit", "pixart", *(pytest.param(n, marks=pytest.mark.slow) for n in ("flux", "sd3 dual"))]
)
def test_a_generation_of_predicted_spans_executes_what_the_arithmetic_says(name):
    """Embedding and output layer at every evaluation, all units at the one that is computed."""

    def macs(net):
        given = default_objective(net), told(net, 1), 1
        return count_generation(twin(net), sampler(net, 3), *given).macs

    plain, spent = twin(family(name)), []
    for i, unit in enumerate(plain.units):

        def counted(stream, unit=unit):
            with Flops() as flops:
                stream = unit(stream)
            spent.append(flops.total // 2)
            return stream

        plain.units[i] = counted
    given = torch.zeros(1, *plain.sample_shape, device="meta"), torch.zeros(1, device="meta")
    with torch.no_grad():
        plain(*given, told(plain, 1).map(lambda v: v.to("meta")))
    assert macs(family(name, cache=small(site="last", interval=3, order=0))) == macs(family(name)) - 2 * 2 * sum(spent)


def test_gates_of_a_predicted_branch_are_those_of_the_present_evaluation(make_dit):
    """The time alone changes between two evaluations at the same tokens: so the gated sums differ by the gates."""
    net, memory = edit.apply(make_dit(), {"cache": small(order=0)}), {}
    unit = core(net.units[0])
    seen = []

    def spy(stream):
        out = unit(stream)
        seen.append((stream.image, out.image, unit.modulate(stream).attention_gate))
        return out

    branch = []
    slot = unit.slots.branch

    def watched(stream, name, run):
        out = slot(stream, name, run)
        branch.append((name, out.image))
        return out

    unit.slots.branch = watched
    net.units[0] = spy
    x = torch.randn(2, *net.sample_shape)
    with torch.no_grad():
        for index, t in enumerate((0.9, 0.2)):
            net(x, torch.full((2,), t), told(net), step=Step(index, 4, t, memory=memory))
    (n0, a0), (_, f0), (n1, a1), (_, f1) = branch
    assert n0 == n1 == "attention" and torch.equal(a0, a1) and torch.equal(f0, f1)
    (x0, y0, g0), (x1, y1, g1) = seen
    assert torch.equal(x0, x1) and not torch.equal(g0.image, g1.image) and not torch.equal(y0, y1)


@torch.no_grad()
@pytest.mark.parametrize("site", ["last", "span"])
def test_the_last_tokens_are_repeated_themselves_and_a_span_adds_what_it_did(site):
    net, memory, seen = family("dit", cache=small(site=site, order=0)), {}, []
    for index, t in enumerate((0.9, 0.2)):
        step, x = Step(index, 4, t, memory=memory), torch.randn(2, *net.sample_shape)
        seen.append(net(x, torch.full((2,), t), told(net), step=step, taps=(1,)).trace["unit.1"])
    assert torch.equal(*seen) == (site == "last")


@pytest.mark.parametrize("site, order", [("module", 2), ("last", 1), ("span", 3)])
def test_a_generation_holds_order_plus_one_tensors_for_each_site_and_the_next_begins_with_none(site, order):
    net, held = family("dit", cache=TaylorSeer(2, order, first=order + 1, site=site)), []

    def watch(step, out):
        parts = step.memory["cache", 0, "joint"]
        states = [parts[n] for n in ("attention", "feed")] if site == "module" else [parts["value"]]
        held.append([len(s["ladder"]) for s in states])
        assert len(step.memory) == (len(net.units) if site == "module" else 1) + 1  # and the clock of all

    first = paint(net, 9, watch)
    assert held[-1] == [order + 1] * len(held[-1]) and held[0] == [1] * len(held[0])
    assert torch.equal(paint(net, 9), first)


# ---- units left alone, stored, refused -------------------------------------------------------------------------------


def test_spared_units_run_at_every_evaluation(make_flux):
    net = edit.apply(make_flux(sample_size=(8, 8)), {"cache": small(site="span", spare=(1, 1))})
    runs = Counter()
    for i, unit in enumerate(map(core, net.units)):
        unit.register_forward_pre_hook(lambda m, a, i=i: runs.update([i]))
    paint(net, 6)
    depth = len(net.units)
    assert runs == {i: 6 if i in (0, depth - 1) else 3 for i in range(depth)}


@torch.no_grad()
def test_a_span_that_adds_the_same_at_every_evaluation_is_replayed_exactly(make_dit):
    """Constant branches and constant gates; without either, replay differs."""
    net = make_dit(depth=4)
    for unit in map(core, net.units[1:3]):
        unit.slots.branch = lambda stream, name, run: Branch(torch.full_like(stream.image, 0.5))
        for name, p in unit.named_parameters():
            if "adaLN" in name and name.endswith("weight"):
                p.zero_()
    wanted, other = paint(net, 6), paint(make_dit(depth=4), 6)
    cache = {"cache": small(site="span", spare=(1, 1), order=0)}
    found = paint(edit.apply(net, cache), 6)
    # fp32: what was added is found again by a difference
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    cache = {"cache": small(site="span", spare=(1, 1), order=0)}
    assert (paint(edit.apply(make_dit(depth=4), cache), 6) - other).abs().max() > 1e-3


@pytest.mark.parametrize("site", SITES)
def test_it_is_stored_as_data_and_read_again(site, tmp_path):
    net = family("flux", cache=small(site=site, order=2, axis="logsnr", form="newton"))
    save(net, tmp_path / "artifact")
    read = load(tmp_path / "artifact").denoiser
    assert read.applied["cache"] == net.applied["cache"] and torch.equal(paint(read, 8), paint(net, 8))


@pytest.mark.parametrize("site", SITES)
def test_while_training_it_does_nothing(site):
    plain, cached = family("flux"), family("flux", cache=small(site=site))
    given = torch.randn(2, *plain.sample_shape), torch.tensor([0.3, 0.7]), told(plain)
    a, b = plain(*given), cached(*given)
    assert torch.equal(a.sample, b.sample) and a.trace.keys() == b.trace.keys()


@pytest.mark.parametrize("axis", ["t", "sigma", "logsnr"])
def test_a_line_in_the_axis_is_followed_exactly(axis, make_dit):
    from edit.caching.engine import place

    cache = small(axis=axis, order=1)
    ladder, state = cache.predictor, {}
    steps = [Step(i, 4, t) for i, t in enumerate((0.9, 0.7, 0.4))]
    for step in steps[:2]:
        ladder.observe(state, cache.at(step), Branch(torch.full((1, 1, 1), 3 * place(step, axis) + 1)))
    assert ladder.predict(state, cache.at(steps[2])).image.item() == pytest.approx(
        3 * place(steps[2], axis) + 1, rel=1e-4
    )


@pytest.mark.parametrize("axis", ["step", "t", "sigma", "logsnr"])
def test_where_all_times_are_known_a_line_in_the_axis_is_followed_exactly_too(axis):
    from edit.caching.engine import place

    cache, times, memory, state = small(axis=axis, interval=3, first=2), (0.9, 0.7, 0.4, 0.2, 0.0), {}, {}
    cache.name = "cache"
    for index in range(3):
        step = Step(index, 4, times[index], times=times, memory=memory)
        cache.embed(replace(stream(0.0, index, 4), step=step), torch.zeros(2), Condition(), None)
        line = 3 * place(step, axis) + 1
        if index < 2:
            cache.predictor.observe(state, cache.at(step), Branch(torch.full((1, 1, 1), line)))
    assert cache.predictor.predict(state, cache.at(step)).image.item() == pytest.approx(line, rel=1e-4)


def test_settings_that_cannot_be_are_refused(make_dit):
    with pytest.raises(ValueError, match="TaylorSeer: order must be at most 4, got 5"):
        TaylorSeer(order=5)
    with pytest.raises(ValueError, match="interval must be at least 1, got 0"):
        TaylorSeer(0)
    with pytest.raises(ValueError, match="spare is two numbers of units, for site=span alone"):
        TaylorSeer(spare=(1, 0))
    with pytest.raises(ValueError, match="of the 3 units of this dit the first 2 and the last 1 always run"):
        edit.apply(make_dit(), {"cache": TaylorSeer(site="span", spare=(2, 1))})
    with pytest.raises(ValueError, match="order 4 needs 5 computed evaluations, and of the 8 of this sampler 3 are"):
        paint(edit.apply(make_dit(), {"cache": TaylorSeer()}), 8)
    with pytest.raises(ValueError, match="order 3 needs 4 computed evaluations, and of the 8 of this sampler 3 are"):
        paint(edit.apply(make_dit(), {"cache": TaylorSeer(order=3)}), 8)
    net = edit.apply(make_dit(), {"reuse": Reuse(units=(1,))})
    for site in SITES:
        with pytest.raises(ValueError, match="TaylorSeer: 'reuse' caches attention of unit 1 already"):
            edit.apply(net, {"cache": small(site=site)})
    edit.apply(net, {"cache": small(site="span", spare=(2, 0))})


@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.slow), 2.0])
@pytest.mark.parametrize("site, order", [("module", 2), ("last", 1), ("span", 3)])
def test_bytes_held_are_order_plus_one_tensors_of_tokens_for_each_site_and_branch(site, order, guidance):
    """Counted while the real model and a twin without weights generate."""
    net = family("dit", cache=TaylorSeer(2, order, first=order + 1, site=site))
    tokens = 4 * net.config["hidden_size"] * (net.config["input_size"] // net.config["patch_size"]) ** 2
    sites, branches = 2 * len(net.units) if site == "module" else 1, 2 if guidance > 1 else 1
    clock = (9 + 1) * 4 * order + 8  # the numbers of nine evaluations, those of the present one, which is next
    for real in (True, False):
        counted = cost(net, sampler(net, 9, guidance=guidance), condition=told(net, 1), real=real)
        assert counted.held == sites * (order + 1) * tokens * branches + clock
    assert cost(family("dit")).held is None


def test_bytes_held_are_the_most_of_a_generation():
    """Behind the guidance interval one branch is left, and what the two remembered is gone."""
    net = family("dit", cache=TaylorSeer(2, 1, first=2, site="last"))
    whole, first = (
        cost(net, sampler(net, 9, interval=interval), condition=told(net, 1)).held for interval in ((0, 1), (0.5, 1))
    )
    assert whole == first
