"""What all feature caches have in common."""

from collections import Counter
from dataclasses import replace
from functools import cache as remembered

import pytest
import torch
from caches import FEW, MADE, executed, family, paint, told
from gates import UNIT

import edit
from edit.caching.branches import BranchCached
from edit.caching.cg_taylor import CGTaylor
from edit.caching.delta_dit import DeltaDiT
from edit.caching.dmd import DMD, Modes
from edit.caching.duca import DuCa
from edit.caching.engine import Cached, distance, place
from edit.caching.first_block_cache import DBCache, FirstBlockCache
from edit.caching.foca import Calibrated, FoCa
from edit.caching.fora import FORA
from edit.caching.mag_cache import MagCache
from edit.caching.pab import PAB
from edit.caching.reuse import Reuse
from edit.caching.span_reuse import SpanReuse
from edit.caching.taylorseer import TaylorSeer
from edit.caching.tea_cache import TeaCache
from edit.caching.toca import ToCa
from edit.objectives import FlowMatching
from edit.routing.dydit import DyDiT
from edit.sampling import Sampler
from edit.solvers import Grid
from edit.stream import Step, pack
from edit.unit import core

EXACT = {  # settings with which nothing is predicted
    "reuse": Reuse(1),
    "span_reuse": SpanReuse(1),
    "pab": PAB(1, 1, 1),
    "taylorseer": TaylorSeer(1),
    "tea_cache": TeaCache(0.0),
    "first_block_cache": FirstBlockCache(0.0),
    "db_cache": DBCache(0.0, front=1),
    "mag_cache": MagCache(),  # not measured
    "cg_taylor": CGTaylor(0.0),
    "fora": FORA(1),
    "delta_dit": DeltaDiT(1, interval=1),
    "toca": ToCa(1),
    "duca": DuCa(1),
    "dmd": DMD(1, site="module"),
    "foca": FoCa(1),
}
OFTEN = {  # settings with which much is predicted
    "reuse": Reuse(3),
    "span_reuse": SpanReuse(3),
    "pab": PAB(2, 2, 2),
    "taylorseer": TaylorSeer(3, 1, first=1, site="last"),
    "tea_cache": TeaCache(1e6),
    "first_block_cache": FirstBlockCache(1e6),
    "db_cache": DBCache(1e6, front=1, warmup=2, most_in_a_row=2, order=1),
    "cg_taylor": CGTaylor(1e6),
    "fora": FORA(3),
    "delta_dit": DeltaDiT(1),
    "toca": ToCa(4, ratio=0.1),
    "duca": DuCa(4, 0.25),
    "dmd": DMD(2),
    "dmd db_cache": DBCache(1e6, front=1, warmup=2, most_in_a_row=1, predictor=Modes()),
    "foca": FoCa(3),
    "foca db_cache": DBCache(1e6, front=1, warmup=2, most_in_a_row=2, predictor=Calibrated()),
}


@remembered
def plain(name: str, steps: int) -> torch.Tensor:
    """The images of a family without a cache, which many caches are compared with."""
    return paint(family(name), steps)


@pytest.mark.parametrize("cache", EXACT)
@pytest.mark.parametrize("name", MADE)
def test_a_cache_that_predicts_nothing_is_the_plain_model_bit_for_bit(name, cache):
    assert torch.equal(paint(family(name, cache=replace(EXACT[cache])), 6), plain(name, 6))


@pytest.mark.parametrize("cache", OFTEN)
@pytest.mark.parametrize("name", FEW)
def test_what_is_predicted_changes_images_and_the_next_generation_begins_anew(name, cache):
    net = family(name, cache=replace(OFTEN[cache]))
    first = paint(net, 8)
    assert torch.equal(paint(net, 8), first) and not torch.equal(first, plain(name, 8))
    shares = [s for evaluation in executed(net, 8, "cache")["joint"] for s in evaluation]
    assert min(shares) < 0.2 and 1.0 in shares


@pytest.mark.parametrize("cache", OFTEN)
def test_a_generation_can_be_stopped_and_saved(cache):
    """What caches remember is of the kinds that a checkpoint takes."""
    kept = []
    paint(family("flux", cache=replace(OFTEN[cache])), 8, lambda step, out: kept.append(pack(step.memory, torch.clone)))
    assert len(kept) == 8 and kept[-1][0] == "dict"


@pytest.mark.parametrize("cache", OFTEN)
def test_guidance_branches_remember_apart(cache):
    net = family("dit", cache=replace(OFTEN[cache]))
    net.applied["cache"].separate = True
    seen = set()
    paint(net, 6, lambda step, out: seen.update(key[2] for key in step.memory))
    assert seen == {"cond", "uncond"}


@pytest.mark.parametrize("cache", [c for c in OFTEN if not isinstance(OFTEN[c], BranchCached)])
@pytest.mark.parametrize("name", FEW)
def test_units_of_a_predicted_span_are_not_called(name, cache):
    net, calls = family(name, cache=replace(OFTEN[cache])), Counter()
    for i, unit in enumerate(map(core, net.units)):
        unit.register_forward_pre_hook(lambda m, a, i=i: calls.update([i]))
    shares = executed(net, 8, "cache")["joint"]
    covered = sorted({i for i, _ in net.applied["cache"].covers(net)})
    assert [calls[i] for i in covered] == [sum(s[k] for s in shares) for k in range(len(covered))]
    assert all(calls[i] == 8 for i in range(len(net.units)) if i not in covered)


def test_two_caches_of_one_unit_and_routers_are_refused(make_dit):
    for cache in OFTEN.values():
        net = edit.apply(make_dit(), {"first": Reuse(2)})
        with pytest.raises(ValueError, match=f"{type(cache).__name__}: 'first' caches .* of unit . already"):
            edit.apply(net, {"second": replace(cache)})
        with pytest.raises(ValueError, match="cannot be applied together"):
            edit.apply(make_dit(), {"cache": replace(cache), "routers": DyDiT()})
    assert all(isinstance(c, Cached) for c in EXACT.values())


def test_few_steps_of_a_student_are_refused_and_those_that_lie_close_are_not(make_dit):
    times = [1 - k / 8 for k in range(8)]
    for cache in (Reuse(), TaylorSeer(2, 1), CGTaylor()):
        denoiser = edit.apply(make_dit(), {"cache": cache})
        for jump in (False, True):
            with pytest.raises(ValueError, match=rf"cache \({type(cache).__name__}\): the 3 evaluations of a few-step"):
                Sampler(Grid(times[::3], renoise=jump)).check(denoiser, FlowMatching())
        Sampler(Grid(times)).check(denoiser, FlowMatching())
    Sampler(Grid(times[::2])).check(edit.apply(make_dit(), {"cache": Reuse()}), FlowMatching())  # four are enough


def test_a_span_of_no_unit_is_refused(make_dit):
    for cache in (SpanReuse(front=2, back=1), DBCache(), TaylorSeer(site="span", spare=(3, 0))):
        with pytest.raises(ValueError, match="of the 3 units of this dit the first . and the last . always run"):
            edit.apply(make_dit(), {"cache": cache})


def test_places_of_evaluations_follow_their_definitions():
    step = Step(3, 10, 0.8)
    assert (place(step, "step"), place(step, "t")) == (3.0, 0.8)
    assert place(step, "sigma") == pytest.approx(4) and place(step, "logsnr") == pytest.approx(-2.772589)
    assert place(Step(0, 10, 1.0), "sigma") == pytest.approx(999)


def test_a_change_is_a_part_of_the_old_value():
    assert distance(UNIT, torch.full((2, 3, 4), 3.0), torch.full((2, 3, 4), 2.0)).item() == 0.5


@pytest.mark.parametrize("cache", OFTEN)
def test_while_training_it_does_nothing(cache):
    plain, cached = family("flux"), family("flux", cache=replace(OFTEN[cache]))
    given = torch.randn(2, *plain.sample_shape), torch.tensor([0.3, 0.7]), told(plain)
    a, b = plain(*given), cached(*given)
    assert torch.equal(a.sample, b.sample) and a.trace.keys() == b.trace.keys()
