"""Our caches of whole units, told to cache-dit: the same steps are computed, and the pictures are equal."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from caches import family
from pipelines import STEPS, evaluated, painted, pipeline, plain, relative
from test_host_diffusers import CLOSE

import edit
from edit.caching.cg_taylor import CGTaylor
from edit.caching.dmd import Modes
from edit.caching.first_block_cache import DBCache, FirstBlockCache
from edit.caching.host_cache_dit import LadderCalibrator, to_cache_dit
from edit.caching.lesa import BakedLESA
from edit.caching.mag_cache import MagCache
from edit.caching.pab import PAB
from edit.caching.reuse import Reuse
from edit.caching.span_reuse import SpanReuse
from edit.caching.taylor import Ladder
from edit.caching.taylorseer import TaylorSeer
from edit.caching.tea_cache import TeaCache

cache_dit = pytest.importorskip("cache_dit")  # an optional extra: pip install edit-dit[bench]
logging.getLogger("cache_dit").setLevel(logging.WARNING)

SPAN: dict[str, Any] = {"site": "span", "spare": (1, 0)}
OURS, THEIRS = "edit", "taylorseer"
CACHES = {  # and whose polynomial stands in
    "span": (SpanReuse(3), None),
    "span, front and back": (SpanReuse(2, front=2, back=1), None),
    "span, warm": (SpanReuse(2, start=0.4), None),
    "taylor, order 0": (TaylorSeer(3, 0, first=2, **SPAN), None),
    "taylor, theirs": (TaylorSeer(2, 1, first=4, schedule="cache_dit", **SPAN), THEIRS),
    "taylor, early": (TaylorSeer(3, 1, first=2, **SPAN), OURS),
    "taylor, front and back": (TaylorSeer(3, 2, first=3, site="span", spare=(1, 1)), OURS),
    "newton": (TaylorSeer(3, 2, first=3, form="newton", **SPAN), OURS),
    "another axis": (TaylorSeer(3, 1, first=2, axis="logsnr", **SPAN), OURS),
    "last, order 0": (TaylorSeer(3, 0, first=2, site="last"), THEIRS),
    "last, early": (TaylorSeer(3, 1, first=2, site="last"), OURS),
    "last, theirs": (TaylorSeer(3, 1, first=4, site="last"), THEIRS),
    "a table": (BakedLESA(3, first=2, forced=None, steps=STEPS, guided=False), OURS),
    "first block": (FirstBlockCache(0.99), None),
    "db": (DBCache(0.99, front=1, back=1, warmup=2, most_in_a_row=2), None),
    "db, few": (DBCache(0.99, front=1, warmup=2, most=2), None),
    "db, a line": (DBCache(0.99, front=1, warmup=2, order=1), OURS),
    "db, a line, theirs": (DBCache(0.99, front=1, warmup=4, order=1), THEIRS),
}
GUIDED = {
    "qwen_image": ["span", "last, early", "first block", "taylor, theirs"],
    "wan": ["span", "newton", "db, a line"],
}


def compared(name: str, cache: Any, whose: str | None) -> None:
    ours, theirs, (dense, times) = pipeline(name), pipeline(name), plain(name)
    denoiser = edit.apply(edit.attach(ours), {"cache": replace(cache)})
    if isinstance(cache, BakedLESA):
        g = torch.Generator().manual_seed(0)
        for buffer in denoiser.edits["cache"].buffers():
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=g))
    mine, computed = evaluated(ours, name)
    config, calibrator = to_cache_dit(denoiser, STEPS, times)
    assert whose == (None if calibrator is None else calibrator.calibrator_type)
    cache_dit.enable_cache(theirs, cache_config=config, calibrator_config=calibrator)
    try:
        other, also = evaluated(theirs, name)
        again = painted(theirs, name) if name == "flux" and whose == OURS else other
    finally:
        cache_dit.disable_cache(theirs)
    if cache.spared[0] < 2 or name != "flux":  # else the block that is watched always runs
        calls = STEPS if name == "flux" else 2 * STEPS
        assert computed == also and 0 < len(computed) < calls
    assert relative(other, mine) < (CLOSE if name == "flux" else 2 * CLOSE) < 1e-3 < relative(mine, dense)
    assert torch.equal(again, other), "ours begins anew with each picture"


@pytest.mark.parametrize("cache", CACHES)
def test_the_exported_cache_computes_the_same_steps_and_paints_the_same_picture(cache):
    compared("flux", *CACHES[cache])


@pytest.mark.parametrize("name, cache", [(name, cache) for name in GUIDED for cache in GUIDED[name]])
def test_guidance_branches_that_are_asked_apart_keep_apart(name, cache):
    compared(name, *CACHES[cache])


def test_a_static_cache_becomes_its_mask_of_steps():
    def mask(cache):
        config, _ = to_cache_dit(edit.apply(family("flux"), {"cache": cache}), 10)
        assert config.steps_computation_policy == "static" and config.max_warmup_steps == 0
        return config.steps_computation_mask

    assert mask(SpanReuse(3)) == [1, 0, 0, 1, 0, 0, 1, 0, 0, 1]
    assert mask(TaylorSeer(4, 1, first=2, **SPAN)) == [1, 1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert mask(TaylorSeer(4, 1, first=3, schedule="cache_dit", **SPAN)) == [1, 1, 1, 0, 0, 0, 1, 0, 0, 0]


def test_ours_as_a_calibrator_is_exact_on_a_parabola_where_theirs_is_not():
    made = LadderCalibrator(Ladder(2, "newton"), [float(i) for i in range(10)])
    for s in range(8):
        made.mark_step_begin()
        if s in (0, 2, 5):
            made.update(torch.full((1, 1, 1), float(s * s)), "h")
    assert made.approximate("h").item() == pytest.approx(49)
    made.reset_cache()
    assert made.step == -1 and not made.states


REFUSED = {
    "it caches a span of whole blocks": [TaylorSeer(3, 1), Reuse(), PAB(), MagCache(), TeaCache(), CGTaylor()],
    "its first block always runs": [SpanReuse(2, front=0), TaylorSeer(3, 1, first=2, site="span")],
    "a threshold of 1 or more": [FirstBlockCache(1.0)],
    "its budget is of a whole generation": [DBCache(0.1, front=1, budget=0.3)],
    "it has no Modes": [DBCache(0.1, front=1, predictor=Modes())],
    "do not know the guidance branch": [BakedLESA(steps=STEPS)],
    "axis=sigma needs the times": [TaylorSeer(3, 1, first=2, axis="sigma", **SPAN)],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cache_dit_cannot_express_is_refused_with_the_reason(reason):
    for cache in REFUSED[reason]:
        net = edit.apply(family("flux"), {"cache": replace(cache)})
        with pytest.raises(ValueError, match=rf"{type(cache).__name__}. cannot be told to cache-dit: .*{reason}"):
            to_cache_dit(net, STEPS)


def test_an_order_above_what_the_steps_allow_is_refused_as_by_our_sampler():
    net = edit.apply(family("flux"), {"cache": TaylorSeer(4, 4, first=1, **SPAN)})
    with pytest.raises(ValueError, match="order 4 needs 5 computed evaluations"):
        to_cache_dit(net, STEPS)
