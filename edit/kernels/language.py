"""Triton, or a stand-in with which files of kernels can be imported where it is absent."""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class Absent:
        """Lets decorators and annotations of kernels be read; a kernel is then a plain function that nobody calls."""

        def __getattr__(self, name: str) -> Absent:
            return Absent()

        def __call__(self, *args: Any, **options: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) and not options else Absent()

    triton = tl = Absent()

__all__ = ["HAS_TRITON", "tl", "triton"]
