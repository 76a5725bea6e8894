"""How much memory a training step needs besides the weights: measured on the real structure, without any memory.

Forward and backward run on fake tensors, which have a shape and no data; after every operator the live storages are
added up. So skipped units, taps and frozen layers count as they do in the run. Not measured: workspaces of kernels, the
allocator's fragmentation, temporaries of loss terms.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edit.denoiser import Denoiser
from edit.edits import trains
from edit.measuring.flops import Flops
from edit.measuring.timing import Ledger
from edit.stream import Condition, Output
from edit.subset import left


@dataclass(frozen=True)
class Activations:
    """Bytes above the weights at the worst moment of one forward and backward."""

    forward: int  # peak of the forward
    stored: int  # kept for the backward when the forward ends
    flowing: int  # peak of both, if each gradient is freed as soon as it is made
    kept: int  # peak of both, if gradients stay


@dataclass(frozen=True)
class Asked:
    """Bytes of a forward without gradient."""

    peak: int  # above the weights, at the worst moment
    kept: int  # of the output, with its taps


class Probe:
    """Measure steps of a structure on tensors without memory; results are remembered.

    The fake tensors are on the CPU, whose autocast keeps a few small tensors in bf16 that a GPU keeps in fp32.

    Args:
        structure: makes the denoiser; called under `torch.device("meta")`
        shape: of one sample
        condition: of one sample
        taps: units whose tokens are wanted
        branches: units whose branches are wanted
        maps: units whose attention maps are wanted, and how many rows
    """

    def __init__(
        self,
        structure: Callable[[], Denoiser],
        shape: tuple[int, ...],
        condition: Condition,
        taps: tuple[int, ...] = (),
        branches: tuple[int, ...] = (),
        maps: Mapping[int, int] = MappingProxyType({}),
    ):
        self.structure, self.shape, self.condition = structure, shape, condition
        self.taps, self.branches, self.maps = taps, branches, maps
        self.denoiser = self.build()
        refuse_shape(self.denoiser, shape)
        self.known: dict[tuple, Any] = {}

    def build(self) -> Denoiser:
        with torch.device("meta"):
            return self.structure()

    def macs(self) -> int:
        """Multiply-accumulates of one forward of one sample."""
        return self._on_meta()[0]

    def answer(self) -> Output:
        """The output for one sample, on the meta device."""
        return self._on_meta()[1]

    def thinned(self, ratio: float) -> float:
        """The share of a forward's work that is left where this share of the image tokens is dropped."""
        key = ("thinned", ratio)
        if key not in self.known:
            grid = self.answer().grid
            assert grid is not None
            kept = torch.zeros(1, left(math.prod(grid), ratio), dtype=torch.int64)
            told = replace(self.condition, kept=kept)
            other = Probe(self.structure, self.shape, told, self.taps, self.branches, self.maps)
            self.known[key] = other.macs() / self.macs()
        return self.known[key]

    def tapped(self, taps: tuple[int, ...]) -> Mapping[str, Tensor]:
        """The trace of one sample with these taps, on the meta device."""
        key = ("tapped", taps)
        if key not in self.known:
            other = Probe(self.structure, self.shape, self.condition, taps)
            self.known[key] = other.answer().trace
        return self.known[key]

    def _on_meta(self) -> tuple[int, Output]:
        if ("meta",) not in self.known:
            flops = Flops()
            with torch.no_grad(), flops, torch.device("meta"):
                out = self.run(self.denoiser.eval(), 1, self.condition.map(lambda v: v.to("meta")))
            self.known["meta",] = flops.total // 2, out
        return self.known["meta",]

    def run(self, denoiser: Denoiser, batch: int, condition: Condition, graph: bool = False) -> Output:
        x, t = torch.zeros(batch, *self.shape, requires_grad=graph), torch.full((batch,), 0.5)
        told = condition.map(lambda v: v.new_zeros(batch, *v.shape[1:]))
        return denoiser(x, t, told, taps=self.taps, branches=self.branches, maps=self.maps)

    def step(
        self,
        batch: int,
        half: bool,
        checkpointing: bool,
        dtype: torch.dtype = torch.float32,
        frozen: bool = False,
    ) -> Activations:
        """Forward and backward of `batch` samples.

        Args:
            half: under bf16 autocast without a cache. bf16 copies of fp32 weights count as activations: they live as
                long as the graph that holds them.
            checkpointing: the backward computes units again
            dtype: of the weights
            frozen: the backward reaches the noisy sample, and the weights get no gradient
        """
        key = ("step", batch, half, checkpointing, dtype, frozen)
        if key not in self.known:
            self.known[key] = self._simulate(lambda d: self._step(d, batch, half, frozen), dtype, checkpointing)
        return self.known[key]

    def ask(self, batch: int, half: bool, dtype: torch.dtype) -> Asked:
        """A forward of `batch` samples without gradient; arguments as of `step`."""
        key = ("ask", batch, half, dtype)
        if key not in self.known:
            self.known[key] = self._simulate(lambda d: self._ask(d, batch, half), dtype, False)
        return self.known[key]

    def _simulate(self, measure: Callable[[Denoiser], Any], dtype: torch.dtype, checkpointing: bool) -> Any:
        denoiser = self.build().train()
        denoiser.gradient_checkpointing = checkpointing
        try:
            with FakeTensorMode(), torch.device("cpu"), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Mismatch dtype")  # about kernels that do not run here
                without_memory(denoiser, dtype)
                return measure(denoiser)
        except RuntimeError as error:  # torch's, for what cannot be decided without values
            reason = str(error).splitlines()[0]
            raise ValueError(f"{denoiser.name} cannot be measured without weights: {reason}") from error

    def _step(self, denoiser: Denoiser, batch: int, half: bool, frozen: bool) -> Activations:
        weights = [*denoiser.parameters(), *denoiser.buffers()]
        ledger = Ledger(weights)
        base, done, flowing, kept = ledger.bytes, 0, 0, 0

        def look() -> None:
            nonlocal flowing, kept
            flowing, kept = max(flowing, ledger.peak), max(kept, ledger.peak + done)
            ledger.peak = ledger.bytes

        def leave(p: Tensor) -> None:
            nonlocal done
            look()
            assert p.grad is not None
            done += p.grad.nbytes
            p.grad = None

        for name, p in denoiser.named_parameters():
            p.requires_grad_(not frozen and p.requires_grad and trains(denoiser, name))
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(leave)
        with ledger:
            with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
                out = self.run(denoiser, batch, self.condition.map(_copy), frozen)
            loss = (out.sample.float() - torch.zeros(batch, *self.shape)).square().mean()
            forward, stored = ledger.peak, ledger.bytes - base
            loss.backward()
        look()
        return Activations(forward - base, stored, max(flowing, forward) - base, max(kept, forward) - base)

    def _ask(self, denoiser: Denoiser, batch: int, half: bool) -> Asked:
        ledger = Ledger([*denoiser.parameters(), *denoiser.buffers()])
        base = ledger.bytes
        with torch.no_grad(), ledger:
            with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
                out = self.run(denoiser, batch, self.condition.map(_copy))
        storages = {s._cdata: s for s in (v.untyped_storage() for v in (out.sample, *out.trace.values()))}
        return Asked(ledger.peak - base, sum(s.nbytes() for s in storages.values()))


def refuse_shape(denoiser: Denoiser, shape: tuple[int, ...]) -> None:
    """Raises ValueError if the denoiser takes no samples of this shape."""
    if not denoiser.accepts(shape):
        given, wanted = ("x".join(map(str, s)) for s in (shape, denoiser.sample_shape))
        raise ValueError(
            f"{denoiser.name} takes samples of {wanted}, got {given}: give another image=, frames=, backbone= or size="
        )


def _copy(v: Tensor) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype)


def without_memory(module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Replace tensors on the meta device by fake ones on the CPU; called under FakeTensorMode."""
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=dtype), p.requires_grad)
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = _copy(b)
