"""Heavy imports without the walks of Python's collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Import inside: the collector is off, and afterwards as it was before.

    An import of torch, Lightning or diffusers makes hundreds of thousands of objects that stay. The collector would
    walk over all of them again and again: a tenth of the time of such an import.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
