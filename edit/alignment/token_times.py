"""Dual time with attention separation (DTS+AS, arXiv 2607.02508): two groups of tokens at times of their own.

Some tokens of a sample are at one noise level and the rest at another. Each group is modulated by its own condition,
c_i = emb(t_i) + emb(y) in every unit and the last layer, and attention runs within the groups:

    A_ij = 1 if i and j are of one group, else 0

A training term draws both (`edit.alignment.sra.SRA` with `dual`) and tells them as `Condition.second` and `apart`.
Without these, as in sampling, the model is the unedited one. The modulation of a unit is computed for two conditions
and spread over tokens, not for each token; attention sorts tokens by group and runs over both segments, without a mask.

Specification: methods/sra.md, follow-up options. Registers belong to the first group: ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.denoiser import Denoiser, Edit
from edit.inputs.limits import check_numbers
from edit.stream import Apart, Condition, Layout, Step, Stream
from edit.unit import Unit, core


@dataclass
class TokenTimes(Edit):
    """A model that is told a second time, of some of its tokens.

    Args:
        separate: attention runs within each group; False: over all tokens (Self-Flow)
    """

    separate: bool = True

    excludes = ("TokenTimes",)
    subsets = False

    def __post_init__(self):
        check_numbers(self)

    def apply(self, denoiser: Denoiser) -> Times:
        if not denoiser.facts.tokenwise:
            raise ValueError(
                f"TokenTimes: units of this {denoiser.name} take one condition for all tokens: use a DiT or SiT"
            )
        for i, unit in enumerate(map(core, denoiser.units) if self.separate else ()):
            if "attention" in unit.slots or "mixer" in unit.slots:
                raise ValueError(f"TokenTimes: another edit has replaced the attention of unit {i}: leave it out")
            unit.slots.attention = Separated(unit)
        return Times(denoiser.embed_times)

    def embed(self, stream: Stream, t: Tensor, condition: Condition, own: nn.Module | None) -> Stream:
        if condition.second is None or condition.apart is None:
            return stream
        if stream.layout.permutation is not None or stream.layout.further:
            raise ValueError("TokenTimes counts tokens in rows, and another edit has moved them or added some")
        assert isinstance(own, Times) and stream.time is not None
        other = stream.cond - stream.time + own.embed_times(condition.second)
        places = condition.apart + stream.layout.registers
        second = torch.zeros(stream.image.shape[:2], dtype=torch.bool, device=places.device).scatter(1, places, True)
        apart = Apart(second, second.long().argsort(dim=1, stable=True), places.shape[1])
        return replace(stream, cond=torch.stack((stream.cond, other), 1), layout=replace(stream.layout, apart=apart))

    def fold(self, denoiser: Denoiser) -> None:
        """Nothing to do: without a second time the model is the unedited one."""
        for unit in map(core, denoiser.units) if self.separate else ():
            del unit.slots.attention


class Times(nn.Module):
    """The family's embedding of times; no parameters."""

    def __init__(self, embed_times: Callable[[Tensor], Tensor]):
        super().__init__()
        self.embed_times = embed_times  # a copy of the denoiser has its own


class Separated:
    """The slot `attention` of a unit: each group of tokens sees itself."""

    def __init__(self, unit: Unit):
        self.unit = unit

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, step: Step | None = None) -> Tensor:
        """b h s e each -> b h s e."""
        apart = layout.apart
        if apart is None:
            return self.unit.own_attention(q, k, v, layout, step)
        if layout.maps is not None:
            raise ValueError("TokenTimes: attention in two groups has no map of all tokens: compare branches")
        order, sizes = apart.order, [q.shape[2] - apart.count, apart.count]
        groups = zip(*(moved(x, order).split(sizes, 2) for x in (q, k, v)), strict=True)
        parts = [F.scaled_dot_product_attention(*group) for group in groups if group[0].shape[2]]
        return moved(torch.cat(parts, 2), order.argsort(1))


def moved(x: Tensor, order: Tensor) -> Tensor:
    """Tokens in another order: b h s e, b s."""
    return x.gather(2, order[:, None, :, None].expand_as(x))
