"""Mixture of blocks: the oracles of methods/dense2moe.md on groups of units."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from families import family, inputs
from torch import Tensor

import edit
from edit.edits import trains
from edit.moe.block_groups import ends, layout, outside
from edit.moe.dense2moe import Dense2MoE
from edit.moe.mixture_of_blocks import MixtureOfBlocks, mean_text, selected
from edit.unit import core

FAMILIES = ("dit", "dit swiglu", "flux", "pixart", "wan")
DEEP = {"dit": (0, 2), "dit swiglu": (0, 2), "flux": (2, 2), "pixart": (0, 2), "wan": (0, 2)}  # a group of two units


def grouped(name: str, kappa: int = 1, scale: float = 1.0, **options):
    """A tiny family in float64 with a group of two units, whose router decides differently for the samples."""
    a, m = DEEP[name]
    denoiser = edit.apply(family(name), {"mob": MixtureOfBlocks(((a, m, kappa),), **options)}).double().eval()
    for seed in range(30):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in denoiser.edits["mob"].parameters():
                p.copy_(scale * torch.randn(p.shape, dtype=torch.float64))
            taken = denoiser(*batch(denoiser)).trace["mob.0.open"].sum(0)
        if kappa == m or not scale or taken.all():
            break
    return denoiser


def batch(denoiser, count: int = 6):
    return inputs(denoiser, count)


def counted(denoiser) -> Counter:
    """How many samples each unit is run on, from now on."""
    runs: Counter = Counter()
    for i, unit in enumerate(denoiser.units):
        core(unit).register_forward_pre_hook(lambda _, args, i=i: runs.update({i: len(args[0].image)}))
    return runs


# ---- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_with_all_units_taken_it_is_the_dense_stack_and_the_router_learns_all_the_same(name):
    denoiser, whole = grouped(name, kappa=2), family(name)
    x = batch(whole)
    with torch.no_grad():
        wanted = whole(*x).sample
        assert torch.equal(denoiser(*x).sample, wanted)
    out = denoiser.train()(*x)
    assert torch.equal(out.sample, wanted)
    out.sample.square().mean().backward()
    assert all(p.grad.any() for p in denoiser.edits["mob"].parameters())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_grouped_execution_is_masked_training(name):
    denoiser = grouped(name)
    x = batch(denoiser)
    open_ = denoiser(*x).trace["mob.0.open"]
    assert 0 < open_[:, 0].sum() < 6  # samples differ
    masked = denoiser.train()(*x).sample
    torch.testing.assert_close(denoiser.eval()(*x).sample, masked, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_each_sample_runs_exactly_kappa_units():
    torch.manual_seed(5)
    blocks = ((0, 4, 2), (4, 3, 1))
    denoiser = edit.apply(deep(8), {"mob": MixtureOfBlocks(blocks)}).eval()
    for p in denoiser.edits["mob"].parameters():
        p.copy_(torch.randn(p.shape))
    runs = counted(denoiser)
    trace = denoiser(*six(denoiser)).trace
    assert sum(runs[i] for i in range(4)) == 2 * 6 and sum(runs[i] for i in range(4, 7)) == 6 and runs[7] == 6
    opened = torch.cat([trace["mob.0.open"], trace["mob.1.open"]], 1)
    assert [runs[i] for i in range(7)] == opened.sum(0).int().tolist()
    decided = denoiser.applied["mob"].decisions(trace)["open"]
    assert decided.shape == (8, 6) and torch.equal(decided[:7].T, opened) and decided[7].all()


def deep(depth: int):
    from weights import randomise

    from edit.backbones.dit import DiTConfig

    denoiser = DiTConfig(input_size=8, hidden_size=32, depth=depth, num_heads=4, num_classes=10).build()
    randomise(denoiser)
    return denoiser


def six(denoiser):
    x, t, condition = inputs(denoiser, 6)
    return x.float(), t.float(), condition


@torch.no_grad()
def test_permuting_the_batch_permutes_what_is_taken():
    denoiser = grouped("flux")
    x, t, condition = batch(denoiser)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    one = denoiser(x, t, condition)
    other = denoiser(x[order], t[order], condition.map(lambda v: v[order]))
    assert torch.equal(one.trace["mob.0.open"][order], other.trace["mob.0.open"])
    torch.testing.assert_close(one.sample[order], other.sample, rtol=1e-9, atol=1e-9)


# ---- what decides ----------------------------------------------------------------------------------------------------


def test_topk_takes_the_likeliest_and_a_window_takes_adjacent_ones():
    r = torch.tensor([[3.0, 0.0, 2.0, 1.9], [0.0, 5.0, 1.0, 0.0]])
    assert selected(r, 2, "topk").int().tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]
    assert selected(r, 2, "window").int().tolist() == [[0, 0, 1, 1], [0, 1, 1, 0]]
    for kappa in (1, 2, 3, 4):
        chosen = selected(torch.randn(50, 4), kappa, "window")
        assert (chosen.sum(1) == kappa).all()
        assert all(torch.diff(row.nonzero()[:, 0]).eq(1).all() for row in chosen)  # contiguous


@torch.no_grad()
def test_the_router_reads_pooled_image_pooled_text_and_the_conditioning():
    denoiser = grouped("flux", alpha=0.25)
    router = denoiser.edits["mob"][0]
    x = batch(denoiser, 2)
    stream = denoiser.embed(**denoiser.pack(*x))
    pooled = torch.cat((stream.image.float().mean(1), stream.text.float().mean(1)), 1)
    wanted = (
        0.25 * pooled @ router.tokens.weight.float().T + 0.75 * stream.signal.float() @ router.signal.weight.float().T
    )
    torch.testing.assert_close(router(stream), wanted, rtol=1e-5, atol=1e-4)
    assert grouped("dit").edits["mob"][0].tokens.weight.shape[1] == 64  # no text: half of it


def test_padding_has_no_part_in_the_pooled_text():
    text, mask = torch.randn(2, 4, 8), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    torch.testing.assert_close(mean_text(text, mask), torch.stack((text[0, :2].mean(0), text[1].mean(0))))


def test_a_gate_has_the_gradient_of_its_units_log_probability():
    denoiser = grouped("dit").train()
    trace = denoiser(*batch(denoiser)).trace
    gates, opened = trace["mob.0.gates"], trace["mob.0.open"]
    assert torch.equal(gates.detach(), opened)  # 1 or 0, exactly
    weight = denoiser.edits["mob"][0].signal.weight
    (mine,) = torch.autograd.grad(gates.sum(), weight, retain_graph=True)
    (wanted,) = torch.autograd.grad((trace["mob.0.q"].log() * opened).sum(), weight)
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)  # logits are fp32


def test_a_unit_that_no_sample_takes_has_no_gradient_and_those_outside_are_frozen():
    moe = edit.apply(family("flux"), {"moe": Dense2MoE(ranking="magnitude", stage="blocks")})
    edit.apply(moe, {"mob": MixtureOfBlocks(((2, 2, 1),))})
    open_ = {n for n, _ in moe.named_parameters() if trains(moe, n)}
    assert open_ == {
        n
        for n, _ in moe.named_parameters()
        if n.startswith(("model.single_transformer_blocks.", "edits.moe.2.", "edits.moe.3.", "edits.mob."))
    }
    everything = edit.apply(family("flux"), {"mob": MixtureOfBlocks(((2, 2, 1),), others=True)})
    assert all(trains(everything, n) for n, _ in everything.named_parameters())


def test_metrics_tell_a_router_that_ignores_its_input():
    denoiser, static = grouped("dit").train(), grouped("dit", scale=0.0).train()
    seen, fixed = (d.applied["mob"].metrics(d(*batch(d)).trace) for d in (denoiser, static))
    assert seen["spread"] > 0.5 and fixed["spread"] == 0 and fixed["entropy"].item() == pytest.approx(1)
    assert fixed["open/0"] + fixed["open/1"] == 1


def test_activated_parameters_are_the_share_of_units_that_is_taken():
    denoiser = edit.apply(deep(5), {"mob": MixtureOfBlocks(((1, 3, 2),))})
    unit = sum(p.numel() for p in core(denoiser.units[0]).parameters())
    whole = sum(p.numel() for p in denoiser.parameters())
    assert edit.edits.per_token(denoiser) == whole - unit


@torch.no_grad()
def test_an_artifact_comes_back_with_its_groups(tmp_path):
    denoiser = edit.apply(deep(4), {"mob": MixtureOfBlocks([[1, 2, 1]], selection="window")}).eval()
    edit.save(denoiser, tmp_path / "a")
    loaded = edit.load(tmp_path / "a").denoiser
    assert loaded.applied["mob"] == denoiser.applied["mob"] == MixtureOfBlocks(((1, 2, 1),), selection="window")
    x: tuple[Tensor, ...] = six(denoiser)
    torch.testing.assert_close(loaded(*x).sample, denoiser(*x).sample)


# ---- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [(19, 38), (14, 31), (9, 26), (9, 18), (8, 14)])
def test_a_layout_leaves_as_many_units_active_and_never_routes_the_ends_of_a_kind(active):
    groups = layout((19, 38), active)
    inside = [i for a, m, _ in groups for i in range(a, a + m)]
    assert len(inside) == len(set(inside)) and inside == sorted(inside)
    assert not {0, 18, 19, 56} & set(inside)
    for first, size, wanted in ((0, 19, active[0]), (19, 38, active[1])):
        mine = [g for g in groups if first <= g[0] < first + size]
        assert size - sum(m - kappa for _, m, kappa in mine) == wanted
        twos = 2 * (size - wanted) <= size - 2
        assert not twos or all(m == 2 for _, m, _ in mine)  # more, smaller groups where there is room
    assert set(outside((19, 38), groups)) | {(i, i) for i in inside} == {(i, i) for i in range(57)}
    assert ends(groups) == tuple((a + m - 1,) * 2 for a, m, _ in groups)


def test_a_layout_by_share_and_the_published_one():
    assert layout((4,), 0.75) == ((1, 2, 1),)
    assert layout((1, 2), 0.75) == layout((3,), 0.9) == ()  # nothing can be left out, and nothing is
    assert layout((4, 4), 0.75) == ((1, 2, 1), (5, 2, 1))
    published = layout((19, 38), (9, 26))
    assert sum(m == 3 for _, m, _ in published) == 3 and len(published) == 19


# ---- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blocks, said",
    [
        ((), "groups are (first unit, units, units that a sample takes), at least one; got ()"),
        (((0, 2),), "groups are (first unit, units, units that a sample takes), at least one; got ((0, 2),)"),
        (((0, 2, 3),), "a sample cannot take 3 of the 2 units from 0 on: choose 1 to 2"),
        (((0, 2, 0),), "a sample cannot take 0 of the 2 units from 0 on: choose 1 to 2"),
        (((0, 2, 1), (1, 2, 1)), "groups are increasing and disjoint, counted from unit 0; got [[0, 2, 1], [1, 2, 1]]"),
    ],
)
def test_impossible_groups_are_refused(blocks, said):
    with pytest.raises(ValueError) as error:
        MixtureOfBlocks(blocks)
    assert str(error.value) == f"MixtureOfBlocks: {said}"


@pytest.mark.parametrize(
    "name, group, said",
    [
        ("dit", (1, 2, 1), "groups: this dit has units 0 to 1, got 2"),
        ("flux", (1, 2, 1), "units 1 to 2 of this flux are of two kinds: let a group end at one of 1, 3"),
        ("sd3", (2, 1, 1), "unit 2 of this sd3 leaves no text, so no sample can do without it: leave it out of groups"),
    ],
)
def test_groups_that_a_model_has_no_units_for_are_refused(name, group, said):
    with pytest.raises(ValueError) as error:
        edit.apply(family(name), {"mob": MixtureOfBlocks((group,))})
    assert str(error.value) == f"MixtureOfBlocks: {said}"


def test_a_layout_that_has_no_room_is_refused():
    with pytest.raises(ValueError, match="layout: 1 of 4 units cannot be what groups of two and three take.* 3 to 4"):
        layout((4,), (1,))
    with pytest.raises(ValueError, match="layout: active has 1 numbers for 2 kinds of units: give one for each"):
        layout((4, 4), (3,))
    with pytest.raises(RuntimeError, match="a unit was run whose group has not decided"):
        denoiser = grouped("dit")
        stream = denoiser.embed(**denoiser.pack(*batch(denoiser)))
        denoiser.units[1](replace(stream, trace={}))
