"""CG-Taylor: its gate on scripted signals; what runs and is held in generations, samples that decide for themselves."""

from collections import Counter

import pytest
import torch
from caches import executed, family, paint, sampler, told
from gates import decided

import edit
from edit.caching.cg_taylor import CGTaylor, Confidence
from edit.caching.taylor import Ladder, RowLadder
from edit.measuring.cost import cost
from edit.predictions import default_objective
from edit.stream import Branch
from edit.unit import core

TAU = {"dit": 0.0078, "flux": 0.77, "sd3": 0.42, "pixart": 0.101, "wan": 0.198}
FAMILIES = list(TAU)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_unit_runs_every_time_and_the_others_at_the_ends_alone_where_all_is_trusted(name):
    net, calls = family(name, cache=CGTaylor(1e6)), Counter()
    for i, unit in enumerate(map(core, net.units)):
        unit.register_forward_pre_hook(lambda m, a, i=i: calls.update([i]))
    paint(net, 8)
    assert calls == {i: 8 if i == 0 else 4 for i in range(len(net.units))}


def test_two_ladders_of_image_tokens_share_their_anchors():
    net, seen = family("flux", cache=CGTaylor(0.02, order_gate=2, order_target=1)), []

    def watch(step, out):
        memory = step.memory["cache", 1, "joint"]
        a, b = memory["gate"]["ladder"], memory["value"]
        assert a["places"][-1] == b["places"][-1] and all(v.text is None for v in (*a["ladder"], *b["ladder"]))
        seen.append((a["places"][-1], len(a["ladder"]), len(b["ladder"])))

    paint(net, 10, watch)
    assert seen[-1][1:] == (3, 2) and len({place for place, *_ in seen}) > 2


# ---- samples that decide for themselves ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_alone_decides_as_its_batch_of_one_does(name):
    def painted(reduction):
        net = family(name, cache=CGTaylor(TAU[name], order_gate=1, reduction=reduction))
        net.applied["cache"].separate = True
        given = default_objective(net), told(net, 1), torch.arange(1)
        seen: list[float] = []

        def watch(step, out):
            seen.append(net.applied["cache"].decisions(out.trace)["executed"].mean().item())

        return sampler(net, 10)(net, *given, watch=watch), seen

    (one, first), (mean, second), (most, third) = (painted(r) for r in ("per_sample", "batch_mean", "batch_max"))
    assert first == second == third and len(set(first)) == 2
    # the ladders add in another order
    torch.testing.assert_close(one, mean, rtol=0, atol=1e-5 * mean.abs().max().item())
    assert torch.equal(most, mean)


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_that_decide_for_themselves_make_the_same_pictures_in_any_batch(name):
    """Some evaluations are computed for a part of the samples, which run as one batch."""
    net = family(name, cache=CGTaylor(TAU[name], order_gate=1, reduction="per_sample"))
    condition, shares, sizes = told(net, 4), [], []
    core(net.units[-1]).register_forward_pre_hook(lambda m, a: sizes.append(len(a[0].image)))

    def watch(step, out):
        shares.append(net.applied["cache"].decisions(out.trace)["executed"][0].sum().item())

    def painted(rows, watch=None):
        given = default_objective(net), condition.map(lambda v: v[rows]), torch.arange(4)[rows]
        return sampler(net, 10)(net, *given, watch=watch)

    together = painted(slice(None), watch)
    assert sizes == [s for s in shares if s] and any(0 < s < 8 for s in shares), shares
    for i in range(4):
        # fp32 products of larger batches are summed in another order, which the extrapolation enlarges
        alone = painted(slice(i, i + 1))[0]
        torch.testing.assert_close(alone, together[i], rtol=0, atol=1e-3 * together.abs().max().item())


@pytest.mark.parametrize("order", range(4))
def test_ladders_of_samples_with_the_same_anchors_are_the_ladder(order):
    g = torch.Generator().manual_seed(0)
    one, rows, a, b = Ladder(order), RowLadder(order), {}, {}
    for at in (0.0, 1.0, 3.0, 4.0, 7.0):
        value = Branch(torch.randn(3, 2, 2, generator=g), torch.randn(3, 1, 2, generator=g))
        one.observe(a, at, value)
        rows.observe(b, at, value)
        for mine, other in zip(one.predict(a, at + 2), rows.predict(b, at + 2), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_a_sample_that_is_left_out_keeps_its_anchor_and_its_ladder():
    rows, state = RowLadder(1), {}
    for at, v in ((0.0, 0.0), (1.0, 1.0)):
        rows.observe(state, at, Branch(torch.full((2, 1, 1), v)))
    rows.observe(state, 3.0, Branch(torch.full((1, 1, 1), 9.0)), torch.tensor([1]))  # slope 4 of the second
    assert rows.predict(state, 5.0).image.flatten().tolist() == [5.0, 17.0]


# ---- the gate --------------------------------------------------------------------------------------------------------


def confident(values, tau, order=1, warmup=1, max_skip=None) -> list[int]:
    return decided(Confidence(tau, Ladder(order), warmup, max_skip), values)


def test_lines_are_trusted_after_two_anchors_and_the_ends_are_always_computed():
    line = [1.0 + 0.5 * s for s in range(10)]
    assert confident(line, 1e-5) == [0, 1, 9]
    assert confident(line, 1e-5, warmup=3) == [0, 1, 2, 3, 9]
    assert confident(line, 0.0) == list(range(10))
    assert confident(line, 1e-5, max_skip=2) == [0, 1, 4, 7, 9]


def test_infinite_tolerance_computes_the_warm_up_and_the_last():
    g = torch.Generator().manual_seed(0)
    assert confident(torch.randn(10, generator=g).tolist(), float("inf"), warmup=2) == [0, 1, 2, 9]


def test_a_kink_is_noticed_where_it_is_and_the_ladder_refreshed_there():
    """The slope changes after evaluation 5; an extrapolation from 0 and 1 is wrong from 6 on, and those from (1, 6) and
    (6, 7) are wrong at 7 and right at 8."""
    kink = [1.0 + s for s in range(6)] + [6.0 - 3 * (s - 5) / 4 for s in range(6, 12)]
    assert confident(kink, 1e-4) == [0, 1, 6, 7, 11]


def test_a_ladder_that_is_refreshed_at_every_evaluation_would_miss_a_drift():
    """A slow curve: each point is close to the line through the two before it, and far from an old one."""
    curve = [1.0 + 0.02 * s * s for s in range(12)]
    computed = confident(curve, 0.05)
    one_step = max(abs(curve[s] - (2 * curve[s - 1] - curve[s - 2])) / curve[s] for s in range(2, 12))
    assert one_step < 0.05 and len(computed) > 3


def test_decisions_do_not_depend_on_the_scale_of_features_and_loosen_with_the_tolerance():
    curve = [1.0 + 0.02 * s * s for s in range(12)]
    assert confident(curve, 0.05) == confident([1000 * v for v in curve], 0.05)
    counts = [len(confident(curve, tau)) for tau in (0.0, 0.01, 0.05, 0.2, 10.0)]
    assert counts == sorted(counts, reverse=True) and counts[0] == 12 and counts[-1] == 3


def test_settings_that_cannot_be_are_refused(make_dit):
    with pytest.raises(
        ValueError, match="evaluations 0 to 2 and the last are computed, which are all 4 of this sampler"
    ):
        paint(edit.apply(make_dit(), {"cache": CGTaylor()}), 4)
    with pytest.raises(ValueError, match="CGTaylor: order_gate must be at most 4, got 5"):
        CGTaylor(order_gate=5)
    with pytest.raises(ValueError, match="CGTaylor: max_skip must be at least 1 or None, got 0"):
        CGTaylor(max_skip=0)
    assert executed(edit.apply(make_dit(), {"cache": CGTaylor()}), 5, "cache")["joint"][:3] == [[1.0, 1.0]] * 3


def test_bytes_held_are_the_tensors_of_both_ladders():
    net = family("dit", cache=CGTaylor(1e6, order_gate=2, order_target=1))
    tokens = 4 * net.config["hidden_size"] * (net.config["input_size"] // net.config["patch_size"]) ** 2
    counted = cost(net, sampler(net, 9, guidance=1.0), condition=told(net, 1), real=True)
    assert counted.held == (3 + 2) * tokens + 4  # and how long ago each sample was computed
