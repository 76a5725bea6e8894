"""Our caches are those of diffusers: the same evaluations are computed, and the pictures are equal."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from caches import family
from pipelines import STEPS, evaluated, pipeline, plain, relative

import edit
from edit.caching.cg_taylor import CGTaylor
from edit.caching.first_block_cache import DBCache, FirstBlockCache
from edit.caching.host_diffusers import to_diffusers
from edit.caching.mag_cache import MagCache
from edit.caching.pab import PAB
from edit.caching.reuse import Reuse
from edit.caching.span_reuse import SpanReuse
from edit.caching.taylorseer import TaylorSeer
from edit.caching.tea_cache import TeaCache

TABLE = [1.0, 1.1, 1.02, 1.01, 0.99, 0.98, 1.01, 0.97]
DIFFUSERS: dict[str, Any] = {"schedule": "diffusers"}
HIGH = 1000 * sum(plain("flux")[1][1:3]) / 2  # two evaluations come before it
CACHES = {
    "first block": FirstBlockCache(0.99),
    "db, a first block": DBCache(0.8, front=1, warmup=0),
    "mag": MagCache(0.06, most=3, retention=0.2, length=8),
    "mag, another length, a retention that is rounded": MagCache(0.2, most=2, retention=0.28, length=5),
    "mag, none retained": MagCache(9.0, most=3, retention=0.0, length=8),
    "taylor": TaylorSeer(3, 2, first=3, **DIFFUSERS),
    "taylor, fp32, a line": TaylorSeer(4, 1, first=1, fp32=True, **DIFFUSERS),
    "taylor, every second": TaylorSeer(2, 1, first=2),
    "taylor, last": TaylorSeer(3, 1, first=2, site="last", **DIFFUSERS),
    "reuse": Reuse(2),
    "reuse, some": Reuse(2, units=(1, 3), branches=("attention", "fused")),
    "pab": PAB(2, window=(0.0, HIGH)),
}
GUIDED = {
    "qwen_image": {"first block": FirstBlockCache(0.99), "taylor": CACHES["taylor"], "mag": CACHES["mag"]},
    "wan": {"first block": FirstBlockCache(0.6), "taylor, last": CACHES["taylor, last"], "reuse": CACHES["reuse"]},
}
CLOSE = 1e-6  # of the largest value, eight fp32 steps; guidance of 3 multiplies roundings


def with_cache(name: str, cache: Any) -> tuple[Any, Any]:
    """A pipeline with ours attached, and the denoiser."""
    pipe = pipeline(name)
    denoiser = edit.apply(edit.attach(pipe), {"cache": replace(cache)})
    if isinstance(cache, MagCache):
        denoiser.edits["cache"].table.copy_(torch.tensor(TABLE[: cache.length]))
    return pipe, denoiser


def compared(name: str, cache: Any) -> None:
    ours, denoiser = with_cache(name, cache)
    theirs, (dense, times) = pipeline(name), plain(name)
    theirs.transformer.enable_cache(to_diffusers(denoiser, STEPS, times, theirs))
    (mine, computed), (other, also) = evaluated(ours, name), evaluated(theirs, name)
    assert computed == also and 0 < len(computed) < (STEPS if name == "flux" else 2 * STEPS)
    assert relative(other, mine) < (CLOSE if name == "flux" else 2 * CLOSE) < 1e-3 < relative(mine, dense)


@pytest.mark.parametrize("cache", CACHES)
def test_the_exported_cache_computes_the_same_evaluations_and_paints_the_same_picture(cache):
    compared("flux", CACHES[cache])


@pytest.mark.parametrize("name, cache", [(name, cache) for name in GUIDED for cache in GUIDED[name]])
def test_guidance_branches_that_are_asked_apart_decide_as_there(name, cache):
    compared(name, GUIDED[name][cache])


REFUSED = {
    "its polynomial is form=taylor in axis=step": TaylorSeer(3, 1, form="newton", **DIFFUSERS),
    "its polynomial is form=taylor": TaylorSeer(3, 1, axis="t", **DIFFUSERS),
    "not what a span adds: site=last": TaylorSeer(3, 1, site="span", **DIFFUSERS),
    "and ours are 0, 1, 4, 7: TaylorSeer's schedule=diffusers is that one": TaylorSeer(3, 1, first=2),
    "and ours are 0, 3, 6": Reuse(3),
    "its FirstBlockCache has front=1, warmup=0 and no limits": DBCache(0.1, front=1),
    "its FirstBlockCache has front=1": DBCache(0.1, front=1, warmup=0, order=1),
    "it has caches of FirstBlockCache, MagCache, TaylorSeer and PAB alone": SpanReuse(2),
    "it has caches of FirstBlockCache, MagCache": TeaCache(),
    "it has caches of FirstBlockCache": CGTaylor(),
    "it asks the pipeline for its timestep: give times and pipeline": PAB(),
}


@pytest.mark.parametrize("fp32, kind", [(True, torch.float32), (False, torch.bfloat16)])
def test_differences_have_the_type_that_ours_have(fp32, kind):
    net = edit.apply(family("flux").bfloat16(), {"cache": TaylorSeer(3, 1, first=2, fp32=fp32, **DIFFUSERS)})
    assert to_diffusers(net, STEPS).taylor_factors_dtype == kind


@pytest.mark.parametrize("reason", REFUSED)
def test_what_diffusers_cannot_express_is_refused_with_the_reason(reason):
    net = edit.apply(family("flux"), {"cache": replace(REFUSED[reason])})
    who = f"cache ({type(REFUSED[reason]).__name__}) cannot be told to diffusers: "
    with pytest.raises(ValueError, match=re.escape(who) + ".*" + re.escape(reason)):
        to_diffusers(net, STEPS)


def test_caches_that_are_not_ready_and_models_that_take_none_are_refused():
    with pytest.raises(ValueError, match="its table is not measured: run recipe=calibrate first"):
        to_diffusers(edit.apply(family("flux"), {"cache": MagCache()}), STEPS)
    with pytest.raises(ValueError, match="the stock transformer of a sd3 takes no cache there"):
        to_diffusers(edit.apply(family("sd3"), {"cache": FirstBlockCache()}), STEPS)
    with pytest.raises(ValueError, match="the stock transformer of a dit takes no cache there"):
        to_diffusers(edit.apply(family("dit"), {"cache": FirstBlockCache()}), STEPS)
    with pytest.raises(ValueError, match="take one cache at a time, and of this flux these are: none"):
        to_diffusers(family("flux"), STEPS)
    both = {"a": Reuse(2, units=(0,)), "b": Reuse(2, units=(1,))}
    with pytest.raises(ValueError, match="these are: a, b"):
        to_diffusers(edit.apply(family("flux"), both), STEPS)


def test_a_window_that_begins_at_an_odd_evaluation_is_refused():
    net = edit.apply(family("flux"), {"cache": PAB(2)})
    times = [1.0, 0.9, 0.85, 0.7, 0.5, 0.4, 0.3, 0.2]
    with pytest.raises(ValueError, match="so that attention of evaluation 3 differs.*a multiple of 2"):
        to_diffusers(net, STEPS, times, pipeline("flux"))
    with pytest.raises(ValueError, match="a time for each of the 8 steps, got 9"):
        to_diffusers(net, STEPS, [*times, 0.0], pipeline("flux"))
