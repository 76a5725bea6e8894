"""Frozen models that losses look with, and decoders: a forward and its backward, measured without memory.

A `Look` answers a plan as a `Probe` does for a denoiser.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from edit.measuring.flops import Flops
from edit.measuring.probe import Activations, Asked, without_memory
from edit.measuring.timing import Ledger


class Look:
    """One frozen model at one shape of its input.

    Args:
        structure: returns the model, weights or none
        shape: of one input
    """

    def __init__(self, structure: Callable[[], nn.Module], shape: tuple[int, ...]):
        self.structure, self.shape = structure, shape
        self.known: dict[tuple, Any] = {}

    @cached_property
    def _on_meta(self) -> tuple[int, Any]:
        flops, x = Flops(), torch.zeros(1, *self.shape, device="meta")
        with torch.no_grad(), flops:
            out = deepcopy(self.structure()).to("meta")(x)
        return flops.total // 2, out

    def macs(self) -> int:
        """Multiply-accumulates of one forward of one input."""
        return self._on_meta[0]

    def stand_in(self, x: Tensor) -> Any:
        """Zeros as the model answers to `x`; a graph leads to it, where it has one."""
        link = x.sum() * 0
        return tree_map_only(Tensor, lambda v: x.new_zeros(len(x), *v.shape[1:]) + link, self._on_meta[1])

    def step(self, batch: int, half: bool, checkpointing: bool, dtype: torch.dtype, frozen: bool) -> Activations:
        """Forward, and backward to the input; arguments as of `Probe.step`, of which the last three do not matter:
        nothing is computed again, and weights are frozen in fp32."""
        return self._once(("step", batch, half), lambda model: self._step(model, batch, half))

    def ask(self, batch: int, half: bool, dtype: torch.dtype) -> Asked:
        """A forward without gradient."""
        return self._once(("ask", batch, half), lambda model: self._ask(model, batch, half))

    def _once(self, key: tuple, measure: Callable[[nn.Module], Any]) -> Any:
        if key not in self.known:
            model = deepcopy(self.structure()).to("meta").requires_grad_(False)
            with FakeTensorMode(), torch.device("cpu"):
                without_memory(model)
                self.known[key] = measure(model)
        return self.known[key]

    def _step(self, model: nn.Module, batch: int, half: bool) -> Activations:
        x = torch.zeros(batch, *self.shape, requires_grad=True)
        ledger = Ledger([x, *model.parameters(), *model.buffers()])
        base = ledger.bytes
        with ledger:
            with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
                loss = torch.stack([v.float().sum() for v in tensors(model(x))]).sum()
            forward, stored = ledger.peak, ledger.bytes - base
            loss.backward()
        peak = max(ledger.peak, forward) - base
        return Activations(forward - base, stored, peak, peak)

    def _ask(self, model: nn.Module, batch: int, half: bool) -> Asked:
        x = torch.zeros(batch, *self.shape)
        ledger = Ledger([x, *model.parameters(), *model.buffers()])
        base = ledger.bytes
        with torch.no_grad(), ledger, torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
            out = model(x)
        return Asked(ledger.peak - base, sum(v.nbytes for v in tensors(out)))


def tensors(out: Any) -> list[Tensor]:
    return [v for v in tree_leaves(out) if isinstance(v, Tensor)]


def pixels(x: Tensor) -> Tensor:
    """Stands in for a decoder that is not known: b c *sizes -> b 3 *sizes."""
    return x[:, :1].expand(-1, 3, *x.shape[2:])
