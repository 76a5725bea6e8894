"""A denoiser's cache of whole units as a configuration of `cache-dit`.

    config, calibrator = to_cache_dit(denoiser, steps=28)
    cache_dit.enable_cache(pipeline, cache_config=config, calibrator_config=calibrator)

SpanReuse and TaylorSeer of the sites "span" and "last" become a static mask of steps, FirstBlockCache and DBCache the
dynamic gate, and what is left of a trained LESA a mask with a calibrator of ours. cache-dit's own TaylorSeer stands in
where it does the same: it takes no difference at the first three steps. Elsewhere, and for the form newton and other
axes, ours is registered with it (`LadderCalibrator`). With site="last" and LESA cache-dit runs its first block at each
step, which changes nothing. Its calibrators DMD and FoCa are none of ours.

Where a pipeline calls the transformer twice in a step, cache-dit takes every other call for the other guidance branch.

Specification: methods/feature-cache-baselines.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from edit.caching.engine import Cached, Predictor, place
from edit.caching.first_block_cache import DBCache, FirstBlockCache
from edit.caching.hosts import cache_of, evaluations, refused
from edit.caching.lesa import BakedLESA
from edit.caching.lesa_predictor import Mixed
from edit.caching.span_reuse import SpanReuse
from edit.caching.taylor import Ladder
from edit.caching.taylorseer import TaylorSeer
from edit.denoiser import Denoiser
from edit.sampling import Sampler
from edit.stream import Branch, Step

HOST = "cache-dit"
CALIBRATOR = "edit"  # the type of ours among cache-dit's calibrators


def to_cache_dit(denoiser: Denoiser, steps: int, times: Sequence[float] = ()) -> tuple[Any, Any]:
    """A cache of whole units as cache-dit's configuration and, where it is extrapolated, that of a calibrator.

    Args:
        denoiser: with one cache
        steps: of a generation
        times: for another axis than "step": of each evaluation, in [0, 1], 1 = noise

    Returns:
        `cache_config` and `calibrator_config` (or None) of `cache_dit.enable_cache`

    Raises:
        ImportError: if cache-dit is not installed
        ValueError: if cache-dit cannot express the cache, with the reason
    """
    cache = cache_of(denoiser)
    made = evaluations(steps, times)
    if isinstance(cache, FirstBlockCache):
        return _dynamic(cache, steps)
    if isinstance(cache, SpanReuse):
        return _masked(cache, [cache.due(step) for step in made], cache.spared), None
    if isinstance(cache, BakedLESA):
        return _by_table(cache, denoiser.edits[cache.name], made)
    if not isinstance(cache, TaylorSeer) or cache.site == "module":
        raise refused(
            cache,
            HOST,
            "it caches a span of whole blocks, by a mask of steps or the change of the first ones: choose SpanReuse, "
            "DBCache, or TaylorSeer with site=span or site=last",
        )
    cache.check(Sampler(), (*(s.sigma for s in made), 0.0))
    if cache.axis != "step" and not times:
        raise refused(cache, HOST, f"a polynomial in axis={cache.axis} needs the times of the evaluations")
    mask = [cache.due(step, "") for step in made]
    whole = cache.site == "last"
    config = _masked(cache, mask, (1, 0) if whole else cache.spared)
    if not whole and cache.order == 0:
        return config, None
    exact = cache.form == "taylor" and cache.axis == "step" and _builds_up_alike(mask, cache.order)
    places = None if exact else [place(step, cache.axis) for step in made]
    return config, _calibrated(cache.predictor, places, "hidden_states" if whole else "residual")


def _masked(cache: Cached, mask: list[bool], spared: tuple[int, int]) -> Any:
    """A static mask of steps around a span."""
    return _config(cache, spared, len(mask), steps_computation_mask=list(map(int, mask)), max_warmup_steps=0)


def _by_table(cache: BakedLESA, own: Any, made: Sequence[Step]) -> tuple[Any, Any]:
    """A trained predictor of the last hidden state; the first block runs at each step, which changes nothing."""
    if cache.guided:
        raise refused(cache, HOST, "its calibrators do not know the guidance branch: train one with guided=false")
    if cache.site != "last_hidden":
        raise refused(cache, HOST, f"it caches tokens behind blocks, and not at {cache.site}: train at last_hidden")
    cache.check(Sampler(), (*(step.sigma for step in made), 0.0))
    levels = () if cache.schedule is None else cache.schedule.levels
    made = [replace(step, levels=levels) for step in made]
    config = _masked(cache, [cache.computed(step.index) for step in made], (1, 0))
    return config, _calibrated(Mixed(cache, own), made, "hidden_states")


def _dynamic(cache: FirstBlockCache, steps: int) -> tuple[Any, Any]:
    if cache.threshold >= 1:
        raise refused(cache, HOST, "a threshold of 1 or more means there that all is predicted")
    if not isinstance(cache, DBCache):
        return _config(cache, cache.spared, steps, residual_diff_threshold=cache.threshold, max_warmup_steps=0), None
    if cache.budget is not None:
        raise refused(cache, HOST, "its budget is of a whole generation, ours since the last computed one")
    if cache.predictor is not None:
        raise refused(cache, HOST, f"it has no {type(cache.predictor).__name__}: choose order, or the last value")
    config = _config(
        cache,
        cache.spared,
        steps,
        residual_diff_threshold=cache.threshold,
        max_warmup_steps=cache.warmup,
        max_cached_steps=-1 if cache.most is None else cache.most,
        max_continuous_cached_steps=-1 if cache.most_in_a_row is None else cache.most_in_a_row,
    )
    if not cache.order:
        return config, None
    alike = cache.warmup >= 3 + cache.order
    return config, _calibrated(Ladder(cache.order), None if alike else [float(i) for i in range(steps)], "residual")


def _config(cache: Cached, spared: tuple[int, int], steps: int, **settings: Any) -> Any:
    from cache_dit import DBCacheConfig  # an extra: pip install edit-dit[bench]

    front, back = spared
    if front < 1:
        raise refused(cache, HOST, "its first block always runs: front (spare) is 1 or more there")
    return DBCacheConfig(
        Fn_compute_blocks=front,
        Bn_compute_blocks=back,
        num_inference_steps=steps,
        steps_computation_policy="static" if "steps_computation_mask" in settings else "dynamic",
        **settings,
    )


def _builds_up_alike(mask: Sequence[bool], order: int) -> bool:
    """Whether cache-dit's own polynomial has our degree wherever one is predicted: it takes no difference at the first
    three steps."""
    computed = [s for s, c in enumerate(mask) if c]
    before = [[s for s in computed if s < p] for p, c in enumerate(mask) if not c]
    return all(min(order, len(b) - 1) == min(order, sum(s >= 3 for s in b)) for b in before)


def _calibrated(ladder: Predictor, places: Sequence[float | Step] | None, kind: str) -> Any:
    """A calibrator's configuration; without places cache-dit's own TaylorSeer."""
    from cache_dit.caching.cache_contexts.calibrators import CalibratorConfig, TaylorSeerCalibratorConfig

    if places is None:
        assert isinstance(ladder, Ladder)
        return TaylorSeerCalibratorConfig(taylorseer_order=ladder.order, calibrator_cache_type=kind)
    _register()
    return CalibratorConfig(
        enable_calibrator=True,
        enable_encoder_calibrator=True,
        calibrator_type=CALIBRATOR,
        calibrator_cache_type=kind,
        calibrator_kwargs={"ladder": ladder, "places": places},
    )


def _register() -> None:
    """Put ours among cache-dit's calibrators, whose factory knows its own list alone."""
    from cache_dit.caching.cache_contexts.calibrators import Calibrator

    if CALIBRATOR in Calibrator._supported_calibrators:
        return
    theirs = Calibrator.__new__

    def made(cls: Any, calibrator_config: Any) -> Any:
        if calibrator_config.calibrator_type == CALIBRATOR:
            return LadderCalibrator(**calibrator_config.to_kwargs())
        return theirs(cls, calibrator_config)

    Calibrator.__new__ = made
    Calibrator._supported_calibrators.append(CALIBRATOR)


class LadderCalibrator:
    """One of our predictors as a calibrator of cache-dit, which calls these four methods.

    Args:
        ladder: the predictor
        places: of the evaluations, as the predictor takes them
    """

    def __init__(self, ladder: Predictor, places: Sequence[float | Step]):
        self.ladder, self.places = ladder, places
        self.reset_cache()

    def reset_cache(self) -> None:
        self.step, self.states = -1, {}

    def mark_step_begin(self) -> None:
        self.step += 1

    def update(self, value: Tensor, name: str = "default") -> None:
        """Take a computed value: b s d."""
        self.ladder.observe(self.states.setdefault(name, {}), self.places[self.step], Branch(value))

    def approximate(self, name: str = "default") -> Tensor:
        """The value at this step."""
        return self.ladder.predict(self.states[name], self.places[self.step]).image
