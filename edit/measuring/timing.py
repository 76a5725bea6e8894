"""Time and memory of a call: seconds, with their spread, and the largest number of bytes alive at once."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `count` measurements."""

    median: float
    low: float
    high: float
    count: int

    @property
    def relative(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        v = torch.tensor(list(values), dtype=torch.float64)
        low, median, high = v.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        return cls(median, low, high, len(v))


def stopwatch(fn: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call: between two events on a GPU, by the monotonic clock elsewhere."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        fn()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    fn()
    return time.perf_counter() - begin


def latency(fn: Callable[[], Any], device: str | torch.device = "cpu", rounds: int = 20, warmup: int = 3) -> Spread:
    """Seconds per call after `warmup` calls that are thrown away."""
    device = torch.device(device)
    for _ in range(warmup):
        fn()
    return Spread.of(stopwatch(fn, device) for _ in range(rounds))


def in_turns(
    calls: Sequence[Callable[[], Any]], device: str | torch.device = "cpu", rounds: int = 20, warmup: int = 3
) -> list[list[float]]:
    """Seconds of each call in each round: all are called once in a round, and another one begins each time.

    Drift of clock speed or load falls on all of them, so that quotients within a round (`faster`) can be believed.

    Args:
        calls: to be timed
        device: that they run on
        rounds: timed
        warmup: rounds that are thrown away
    """
    device = torch.device(device)
    for _ in range(warmup):
        for fn in calls:
            fn()
    seconds: list[list[float]] = [[] for _ in calls]
    for k in range(rounds):
        for i in range(len(calls)):
            turn = (k + i) % len(calls)
            seconds[turn].append(stopwatch(calls[turn], device))
    return seconds


def steadiest(measure: Callable[[], list[list[float]]], limit: float = 0.2, most: int = 3) -> list[list[float]]:
    """Seconds of calls as `in_turns` gives them, measured again while a spread is above `limit`: the steadiest of all.

    Args:
        measure: times all calls
        limit: on half the distance of the quartiles, as a share of the median
        most: measurements
    """
    found, least = [], float("inf")
    for _ in range(most):
        seconds = measure()
        worst = max(Spread.of(values).relative for values in seconds)
        if worst < least:
            found, least = seconds, worst
        if least <= limit:
            break
    return found


def faster(mine: Sequence[float], others: Sequence[float]) -> Spread:
    """How many times faster: the quotients of others' and own seconds, round by round."""
    return Spread.of(other / own for own, other in zip(mine, others, strict=True))


def ratio(
    fn: Callable[[], Any],
    other: Callable[[], Any],
    device: str | torch.device = "cpu",
    rounds: int = 20,
    warmup: int = 3,
) -> Spread:
    """How many times faster `fn` is than `other`: time of `other` / time of `fn`, pair by pair, timed in turns."""
    return faster(*in_turns((fn, other), device, rounds, warmup))


def peak_memory(fn: Callable[[], Any], device: str | torch.device = "cpu", resident: Iterable[Tensor] = ()) -> int:
    """Largest number of bytes alive at once while `fn` runs.

    On a GPU, of what the caching allocator has handed out (`torch.cuda.max_memory_allocated`), without what was there
    before and is not `resident`: other models. Elsewhere, of the
    distinct storages of `resident` and of all tensors that operators read or return, each from its first appearance
    until it is freed; scratch memory inside one operator is not seen.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        own = {v.untyped_storage()._cdata: v.untyped_storage().nbytes() for v in resident if v.is_cuda}
        others = max(0, torch.cuda.memory_allocated(device) - sum(own.values())) if own else 0
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - others
    ledger = Ledger(resident)
    with ledger:
        fn()
    return ledger.peak


def distinct_bytes(values: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each once."""
    return sum({v.untyped_storage()._cdata: v.untyped_storage().nbytes() for v in values}.values())


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operator, in lists, tuples and mappings, too."""
    for v in values:
        if isinstance(v, Tensor):
            yield v
        elif isinstance(v, list | tuple):
            yield from tensors(v)
        elif isinstance(v, Mapping):
            yield from tensors(v.values())


class Ledger(TorchDispatchMode):
    """Bytes of the storages that are alive."""

    supports_higher_order_operators = True

    def __init__(self, resident: Iterable[Tensor]):
        super().__init__()
        self.bytes = self.peak = 0
        self.alive: set[int] = set()
        self.enter(resident)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # asked of a fake tensor, more often than anything is computed
            return func(*args)
        self.enter(tensors(args))
        if kwargs:
            self.enter(tensors(kwargs.values()))
        out = func(*args, **(kwargs or {}))
        self.enter(tensors((out,)))
        return out

    def enter(self, values: Iterable[Tensor]) -> None:
        for v in values:
            if (key := (storage := v.untyped_storage())._cdata) not in self.alive:
                self.alive.add(key)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self.leave, key, storage.nbytes()).atexit = False

    def leave(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.bytes -= size
