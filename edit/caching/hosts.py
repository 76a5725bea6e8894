"""What exports of a cache to other libraries share: `host_diffusers` and `host_cache_dit`.

Both are for generations of so many evaluations of a stock pipeline, and refuse with the reason what the library cannot
express. Pictures equal ours up to the rounding of another order of sums; in bf16 the libraries round differences of
features earlier, too. Both count steps themselves; ours are told them by the sampler.
"""

from __future__ import annotations

from collections.abc import Sequence

from edit.caching.engine import Cached
from edit.denoiser import Denoiser
from edit.stream import Step


def cache_of(denoiser: Denoiser) -> Cached:
    """The one cache of a denoiser.

    Raises:
        ValueError: if it has none, or several
    """
    found = [e for e in denoiser.applied.values() if isinstance(e, Cached)]
    if len(found) != 1:
        names = ", ".join(e.name for e in found) or "none"
        raise ValueError(f"other libraries take one cache at a time, and of this {denoiser.name} these are: {names}")
    return found[0]


def evaluations(steps: int, times: Sequence[float] = ()) -> list[Step]:
    """The evaluations of a generation.

    Args:
        steps: of the generation
        times: of each evaluation, in [0, 1], 1 = noise; (): caches that read none

    Raises:
        ValueError: if there are others than `steps` times
    """
    if times and len(times) != steps:
        raise ValueError(f"there is a time for each of the {steps} steps, got {len(times)}: leave out the 0 at the end")
    even = times or [1 - i / steps for i in range(steps)]
    return [Step(i, steps, t, times=(*even, 0.0)) for i, t in enumerate(even)]


def refused(cache: Cached, library: str, reason: str) -> ValueError:
    return ValueError(f"{cache.name} ({type(cache).__name__}) cannot be told to {library}: {reason}")
