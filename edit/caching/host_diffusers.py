"""A denoiser's cache as the configuration of one of `diffusers`' own.

    pipeline.transformer.enable_cache(to_diffusers(denoiser, steps=28))

FirstBlockCache (and a DBCache that is one), MagCache, TaylorSeer of the sites "module" and "last", Reuse where its
schedule is one of TaylorSeer's there, and PAB. None of ours is a FasterCache.

diffusers counts the calls of each guidance branch that a pipeline names; PAB there counts all calls and keeps one
output for all of them, so it is for pipelines that ask once in a step. In releases before 0.40 a cache is to be enabled
before the transformer is first called, which lists its hooks then: of later ones it says "No context is set".

Specification: methods/feature-cache-baselines.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import float32

from edit.caching.branches import BranchCached
from edit.caching.engine import names_of
from edit.caching.first_block_cache import DBCache, FirstBlockCache
from edit.caching.hosts import cache_of, evaluations, refused
from edit.caching.mag_cache import MagCache, nearest
from edit.caching.pab import PAB
from edit.caching.reuse import Reuse
from edit.caching.taylorseer import TaylorSeer
from edit.denoiser import Denoiser
from edit.stream import Step
from edit.unit import Unit, core

HOST = "diffusers"


def to_diffusers(denoiser: Denoiser, steps: int, times: Sequence[float] = (), pipeline: Any = None) -> Any:
    """A cache as the configuration of `diffusers`' own, for `transformer.enable_cache`.

    Args:
        denoiser: of a family whose stock transformer takes caches, with one cache
        steps: of a generation
        times: for PAB: of each evaluation, in [0, 1], 1 = noise
        pipeline: for PAB: which knows its timestep

    Raises:
        ValueError: if diffusers cannot express the cache, with the reason
    """
    cache = cache_of(denoiser)
    if not hasattr(denoiser.stock_class() if hasattr(denoiser, "stock_class") else None, "enable_cache"):
        raise refused(cache, HOST, f"the stock transformer of a {denoiser.name} takes no cache there")
    if isinstance(cache, FirstBlockCache):
        return _first_block_config(cache)
    if isinstance(cache, MagCache):
        return _mag_config(cache, denoiser, steps)
    if isinstance(cache, PAB):
        return _pab_config(cache, denoiser, evaluations(steps, times), bool(times), pipeline)
    if isinstance(cache, TaylorSeer | Reuse):
        return _taylor_config(cache, denoiser, steps)
    raise refused(
        cache,
        HOST,
        "it has caches of FirstBlockCache, MagCache, TaylorSeer and PAB alone: choose one of these, or cache-dit",
    )


def _first_block_config(cache: FirstBlockCache) -> Any:
    from diffusers.hooks import FirstBlockCacheConfig

    if isinstance(cache, DBCache) and cache != DBCache(cache.threshold, front=1, warmup=0):
        raise refused(cache, HOST, "its FirstBlockCache has front=1, warmup=0 and no limits")
    return FirstBlockCacheConfig(threshold=cache.threshold)


def _mag_config(cache: MagCache, denoiser: Denoiser, steps: int) -> Any:
    """diffusers rounds the number of retained steps, ours is the first evaluation that has reached the share."""
    from diffusers.hooks import MagCacheConfig

    table = denoiser.edits[cache.name].table.tolist()
    if not all(table):
        raise refused(cache, HOST, "its table is not measured: run recipe=calibrate first")
    retained = next((i for i in range(1, steps) if i >= cache.retention * steps), steps)
    return MagCacheConfig(
        threshold=cache.threshold,
        max_skip_steps=cache.most,
        retention_ratio=retained / steps,
        num_inference_steps=steps,
        mag_ratios=[table[nearest(i, steps, len(table))] for i in range(steps)],
    )


def _taylor_config(cache: TaylorSeer | Reuse, denoiser: Denoiser, steps: int) -> Any:
    from diffusers.hooks import TaylorSeerCacheConfig

    order, fp32 = 0, False
    if isinstance(cache, TaylorSeer):
        order, fp32 = cache.order, cache.fp32
        if order and (cache.form != "taylor" or cache.axis != "step"):
            raise refused(cache, HOST, "its polynomial is form=taylor in axis=step")
        if cache.site == "span":
            raise refused(cache, HOST, "it extrapolates outputs of modules, not what a span adds: site=last")
    mask = [cache.due(step, "") for step in evaluations(steps)]
    if (rule := _rule(mask)) is None:
        raise refused(
            cache,
            HOST,
            f"of {steps} evaluations it computes the first E and those s with (s - E - 1) mod N = 0, and ours are "
            f"{_listed(mask)}: TaylorSeer's schedule=diffusers is that one",
        )
    predicted, passed = _places(cache, denoiser)
    return TaylorSeerCacheConfig(
        cache_interval=rule[0],
        disable_cache_before_step=rule[1],
        max_order=order,
        taylor_factors_dtype=float32 if fp32 else next(denoiser.model.parameters()).dtype,
        cache_identifiers=[re.escape(p) for p in predicted],
        skip_predict_identifiers=[re.escape(p) for p in passed],
    )


def _rule(mask: Sequence[bool]) -> tuple[int, int] | None:
    """Interval N and first E of diffusers' TaylorSeer that compute these evaluations; None: none do."""
    leading = next((i for i, computed in enumerate(mask) if not computed), len(mask))
    for first in range(leading, 0, -1):
        for interval in range(1, len(mask) + 1):
            if all(c == (s < first or (s - first - 1) % interval == 0) for s, c in enumerate(mask)):
                return interval, first
    return None


def _places(cache: TaylorSeer | Reuse, denoiser: Denoiser) -> tuple[list[str], list[str]]:
    """Modules of the stock transformer whose outputs are predicted, and those that are passed by."""
    paths = {id(module): path for path, module in denoiser.model.named_modules()}
    units = [(paths[id(core(u))], core(u)) for u in denoiser.units]
    if isinstance(cache, TaylorSeer) and cache.site == "last":
        *others, last = (path for path, _ in units)
        return [last], others
    assert isinstance(cache, BranchCached)
    predicted, passed = [], []
    for path, unit in (units[i] for i in cache.units or range(len(units))):
        for name in names_of(unit):
            if cache.branches and name not in cache.branches:
                continue
            if unit.anatomy.fused and name != "fused":  # one layer writes both
                continue
            for found, part in ((predicted, 0), (passed, 1)):
                found += [f"{path}.{module}" for module in _modules(unit, name)[part]]
    return predicted, passed


def _modules(unit: Unit, branch: str) -> tuple[list[str], list[str]]:
    """Of a branch, modules of a stock block: whose outputs it is, and that need not run then."""
    a = unit.anatomy
    if branch == "fused":
        assert a.feed is not None and a.attention.count is not None
        return [a.attention.readers[0][0]], [a.attention.count[0], *(path for path, _ in a.feed.writers)]
    if branch == "feed":
        feeds = [f for f in (a.feed, a.text_feed) if f is not None]
        return [path.removesuffix(".net.2") for f in feeds for path, _ in f.readers], []
    features = {"attention": a.attention, "cross": a.cross, "second": a.second}[branch]
    assert features is not None and features.count is not None
    return [features.count[0]], []


def _pab_config(cache: PAB, denoiser: Denoiser, made: list[Step], timed: bool, pipeline: Any) -> Any:
    from diffusers.hooks import PyramidAttentionBroadcastConfig

    if not timed or pipeline is None:
        raise refused(cache, HOST, "it asks the pipeline for its timestep: give times and pipeline")
    units = [core(u) for u in denoiser.units]
    kinds = {name for u in units if not u.anatomy.fused for name in names_of(u)}
    if "second" in kinds:
        raise refused(cache, HOST, "a second attention of image tokens is none of its kinds")
    low, high = cache.window
    for kind, interval in (("attention", cache.attention), ("cross", cache.cross)):
        for s, step in enumerate(made):
            theirs = s % interval == 0 or not low < 1000 * step.sigma < high
            if kind in kinds and theirs != cache.due(step, kind):
                raise refused(
                    cache,
                    HOST,
                    f"it counts evaluations from the first one, ours from the first in the window, so that {kind} of "
                    f"evaluation {s} differs: choose a window that begins after a multiple of {interval} evaluations",
                )
    paths = {id(module): path for path, module in denoiser.model.named_modules()}
    own = [f"^{re.escape(paths[id(u)])}\\." for u in units if not u.anatomy.fused]
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=cache.attention,
        cross_attention_block_skip_range=cache.cross if "cross" in kinds else None,
        spatial_attention_timestep_skip_range=cache.window,
        cross_attention_timestep_skip_range=cache.window,
        spatial_attention_block_identifiers=tuple(own),
        cross_attention_block_identifiers=tuple(own),
        current_timestep_callback=lambda: pipeline.current_timestep,
    )


def _listed(mask: Iterable[bool]) -> str:
    return ", ".join(str(s) for s, computed in enumerate(mask) if computed)
