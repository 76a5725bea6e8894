"""TD-LoRA of DyDiT++ (arXiv 2504.06803): low-rank additions to frozen linear layers that are mixed by the time.

    y = W x + b + (alpha / rank) sum_e w_e(E_t) B_e A x,    w = softmax(Linear(E_t))

A layer has one A, which all experts share, E matrices B_e, zero at first, and its own w. As w depends on the embedded
time alone, W + sum_e w_e B_e A is one plain weight at each time (`weights_at`). In a generation, where all samples have
one time, a layer with enough tokens is run with that weight: the addition then costs r multiply-accumulates for each of
its elements per evaluation, however many samples there are. Beside routers (E-DiT, DyDiT), which train with it, apply
TD-LoRA first: a slice of a layer (`slices.Narrow`) then includes the same slice of its addition.

Specification: methods/dydit.md, TD-LoRA, where rank, experts and targets are ours: rank 4 on all of a unit's layers
that DyDiT narrows makes 0.9 % of DiT-XL/2, with DyDiT's routers 1.4 % as published. w starts as any linear layer, for
with equal experts and equal w all B_e would stay equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.denoiser import Denoiser, Edit
from edit.inputs.limits import Count, Positive, check_numbers
from edit.routing.adapted import Adapted, Pieces, UnitCalls
from edit.routing.slices import merged, taken
from edit.tuning.lora import switched_off
from edit.unit import Unit, heads_of, hidden_of


@dataclass
class TDLoRA(Edit):
    """Additions to linear layers of the units; all else is frozen, except for parameters of other edits.

    Args:
        rank: r, of the addition
        experts: E
        targets: name endings of linear layers inside units, e.g. "attn.qkv"; none given: the attention's and the
            (image) feed-forward's, in and out
        alpha: scale numerator
        modulation: train the weights that make shifts, scales and gates, too
    """

    rank: Count = 4
    experts: Count = 4
    targets: tuple[str, ...] = ()
    alpha: Positive = 4.0
    modulation: bool = False

    _modulates: ClassVar[tuple[str, ...]] = ()  # from `apply` on, as the family's facts have it

    def __post_init__(self):
        check_numbers(self)
        self.targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)

    def apply(self, denoiser: Denoiser) -> None:
        object.__setattr__(self, "_modulates", denoiser.facts.modulation)
        units = [self._checked(denoiser, i) for i in range(len(denoiser.units))]
        found = [self._paths(unit) for unit in units]
        if unmet := [t for t in self.targets if not any(path.endswith(t) for paths in found for path in paths)]:
            names = [n for n, m in units[0].named_modules() if isinstance(m, nn.Linear)]
            raise ValueError(
                f"TDLoRA: no linear layer inside a unit has a name that ends in {unmet[0]!r}; there are "
                f"{', '.join(names)}"
            )
        for i, (unit, paths) in enumerate(zip(units, found, strict=True)):
            if bad := next((path for path in paths if type(unit.get_submodule(path)) is not nn.Linear), None):
                raise ValueError(
                    f"TDLoRA: {bad} of unit {i} of this {denoiser.name} is no plain linear layer any more: put TDLoRA "
                    "before the edit that changed it, or fold that one first"
                )
        for unit, paths in zip(units, found, strict=True):
            calls, width = UnitCalls(unit), width_of(unit)
            for path in paths:
                parent, _, name = path.rpartition(".")
                layer = unit.get_submodule(path)
                assert isinstance(layer, nn.Linear)
                new = Timed(layer, calls, width, self.rank, self.experts, self.alpha / self.rank)
                setattr(unit.get_submodule(parent), name, new)

    @property
    def keeps(self) -> bool:  # type: ignore[override]
        return not self.modulation

    def trainable(self, name: str) -> bool:
        modulates = self.modulation and any(part in name for part in self._modulates)
        return self.owns(name) or name.startswith("edits.") or modulates

    def owns(self, name: str) -> bool:
        return ".td_" in name

    def stock_key(self, key: str) -> str | None:
        return None if self.owns(key) else key

    def off(self, denoiser: Denoiser) -> AbstractContextManager[None]:
        return switched_off(m for m in denoiser.model.modules() if isinstance(m, Timed))

    def _checked(self, denoiser: Denoiser, i: int) -> Unit:
        unit = denoiser.units[i]
        if not isinstance(unit, Unit) or unit.filled or "calls" in vars(unit):
            raise ValueError(
                f"TDLoRA: another edit has changed unit {i} of this {denoiser.name} already: put TDLoRA before it"
            )
        return unit

    def _paths(self, unit: Unit) -> list[str]:
        if self.targets:
            return [n for n, m in unit.named_modules() if isinstance(m, nn.Linear) and n.endswith(self.targets)]
        parts = (heads_of(unit), hidden_of(unit))
        return list(dict.fromkeys(path for f in parts for path, _ in (*f.writers, *f.readers)))  # some are shared


def width_of(unit: Unit) -> int:
    """Of the embedded time, which in every family is that of the tokens."""
    return unit.get_submodule(heads_of(unit).readers[0][0]).out_features  # type: ignore[return-value]


class Timed(Adapted):
    """A linear layer with the addition.

    Args:
        layer: whose weights it takes over
        calls: of the unit it is in
        width: d, of the embedded time
        rank, experts: r and E
        scale: of the addition
    """

    def __init__(self, layer: nn.Linear, calls: UnitCalls, width: int, rank: int, experts: int, scale: float):
        super().__init__(layer)
        self.calls, self.experts, self.scale = calls, experts, scale
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.td_down = nn.Parameter(torch.empty(rank, layer.in_features, **like))
        self.td_up = nn.Parameter(torch.zeros(layer.out_features, experts * rank, **like))
        self.td_mixture = nn.Linear(width, experts, **like)
        nn.init.kaiming_uniform_(self.td_down, a=math.sqrt(5))  # as a LoRA's A

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.td_up, self.td_down

    def mixture(self, time: Tensor) -> Tensor:
        """w, b E: of the embedded time, b d."""
        return self.td_mixture(time.to(self.td_mixture.weight.dtype)).softmax(-1)

    def mixed(self, w: Tensor, up: Tensor) -> Tensor:
        """sum_e w_e B_e: b E, out (E r) -> b out r."""
        return torch.einsum("be,oer->bor", w.to(up.dtype), up.unflatten(1, (self.experts, -1)))

    def part(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Pieces | None = None, columns: Pieces | None = None
    ) -> Tensor:
        if not self.calls.open:
            raise RuntimeError("TDLoRA: a layer was called outside of its unit, which knows the time: call the unit")
        call = self.calls.open[-1]
        down, up, w = taken(self.td_down, columns, 1), taken(self.td_up, rows, 0), self.mixture(call.time)
        if len(w) == 1:
            up = self.mixed(w, up)[0]
            # not with a graph, for then the whole matrix would get a gradient on its way to A and B
            if not torch.is_grad_enabled() and merging_saves(x, weight):
                return F.linear(x, merged(weight, up, down, self.scale), bias)
            y, h = F.linear(x, weight, bias), F.linear(x, down)
            # in one pass over y
            return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), up.mT, alpha=self.scale).view(y.shape)
        return F.linear(x, weight, bias) + self.scale * self.of_each(F.linear(x, down), w, up, call.samples)

    def of_each(self, h: Tensor, w: Tensor, up: Tensor, samples: Tensor | None) -> Tensor:
        """B(t) h where samples have their own times: b n r (or rows b r, or, with `samples`, tokens m r) -> .. out."""
        if samples is not None or h.shape[:-1] == w.shape[:1]:  # each token, or row, has its own w
            w = w if samples is None else w[samples]
            return F.linear((w[:, :, None] * h[..., None, :]).flatten(-2).to(h.dtype), up)
        if len(h) not in (1, len(w)) or (h.ndim > 2 and len(h) == 1):
            raise RuntimeError(
                f"TDLoRA: a layer got {len(h)} sequence for {len(w)} samples, each with its own time: say whose tokens "
                "these are with edit.routing.slices.one_sequence"
            )
        return h @ self.mixed(w, up).mT  # B(t) is small beside as many tokens

    def weight_at(self, time: Tensor) -> Tensor:
        """W + (alpha / rank) sum_e w_e B_e A at one embedded time, d: out x in."""
        return merged(self.weight, self.mixed(self.mixture(time[None]), self.td_up)[0], self.td_down, self.scale)


def merging_saves(x: Tensor, weight: Tensor) -> bool:
    """Whether B A, r out in, is less work than B (A x) of that many tokens, r (out + in) each."""
    return math.prod(x.shape[:-1]) * sum(weight.shape) > weight.numel()


def weights_at(denoiser: Denoiser, time: Tensor) -> dict[str, Tensor]:
    """Weights, by stock names, with which the stock model makes the same prediction at one time.

    Args:
        denoiser: with TD-LoRA
        time: d, embedded (`Stream.time` of one sample)

    Raises:
        ValueError: if a LoRA lies on a layer, whose addition would be missing
    """
    if lora := next((name for name, _ in timed(denoiser) if name.endswith(".base_layer")), None):
        raise ValueError(f"a LoRA lies on {lora.removesuffix('.base_layer')}, which has no plain weight: fold it first")
    return {f"{name}.weight": layer.weight_at(time) for name, layer in timed(denoiser)}


def timed(denoiser: Denoiser) -> Iterator[tuple[str, Timed]]:
    """The layers with additions, by their names in the model."""
    return ((name, m) for name, m in denoiser.model.named_modules() if isinstance(m, Timed))
