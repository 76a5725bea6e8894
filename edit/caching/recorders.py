"""Recorders of `edit.caching.graphs`: a call is recorded, and run again without Python in between.

On CUDA the record is a CUDA graph. Elsewhere it is a `Tape`, which shows the same on a CPU: what was recorded is all
that an evaluation needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from edit.measuring.timing import tensors

Run = Callable[[], Any]


class CudaGraph:
    """Kernels that were captured while `run` was called; nothing was computed by them.

    Args:
        run: reads and writes tensors at fixed places
        kept: the tensors that it writes
        pool: of memory, shared by all graphs
    """

    def __init__(self, run: Run, kept: Sequence[Tensor], pool: Any):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.result = run()

    def replay(self) -> None:
        self.graph.replay()


class Tape(TorchDispatchMode):
    """The same of operators, for devices without graphs; arguments as of `CudaGraph`.

    Raises:
        RuntimeError: if the host reads a number of a tensor, or makes one of its own numbers, as a CUDA graph cannot
    """

    HOST = ("_local_scalar_dense", "lift_fresh", "nonzero")

    def __init__(self, run: Run, kept: Sequence[Tensor], pool: Any = None):
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        before = [v.clone() for v in kept]
        with self:
            self.result = run()
        for v, old in zip(kept, before, strict=True):
            v.copy_(old)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (name := func.overloadpacket.__name__) in self.HOST:
            raise RuntimeError(f"{name}: what host and device tell each other cannot be recorded")
        out = func(*args, **kwargs)
        places = {v.untyped_storage()._cdata for v in tensors((args, kwargs))}
        own = [v for v in tensors((out,)) if v.untyped_storage()._cdata not in places]
        if own or func._schema.is_mutable:  # a view has what its tensor has
            self.calls.append((func, args, kwargs, own))
        return out

    def replay(self) -> None:
        for func, args, kwargs, own in self.calls:
            out = func(*args, **kwargs)
            for old, new in zip(own, tensors((out,)), strict=False):
                old.copy_(new)
