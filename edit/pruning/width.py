"""Width pruning of feed-forward networks: narrower by magnitude, or one linear map where there were two and a GELU.

Both cut weights for good, at once, and leave a model that is trained on, usually by distillation. Specification:
methods/distillation.md D2.7; stage 2 of PPCL (arXiv 2511.16156), methods/ppcl.md. No stock class has such widths, so
these edits stay edits of the artifact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edit.denoiser import Denoiser, Edit
from edit.edits import chosen
from edit.inputs.limits import check_numbers
from edit.unit import Unit, core

TEXT = ("ff_context", "txt_mlp")
NODES = 1025  # of the integrals over a Gaussian


@dataclass
class FeedForwardWidth(Edit):
    """Drop the hidden channels that weigh least: |row into it, its bias included| x |column out of it|.

    With a gated activation (SwiGLU, GEGLU) a channel's row is those of gate and value together. FLUX's single units
    lose rows of `proj_mlp` and the columns of `proj_out` that read them.

    Args:
        ratio: share of the hidden channels to drop, in (0, 1); at least one stays
        units: in which units, counted from 0; none given: in all
    """

    ratio: float = 0.5
    units: tuple[int, ...] = ()

    def __post_init__(self):
        check_numbers(self)
        self.units = tuple(self.units)
        if not 0 < self.ratio < 1:
            raise ValueError(f"FeedForwardWidth: ratio is the share to drop, in (0, 1), got {self.ratio}")

    def apply(self, denoiser: Denoiser) -> None:
        found = [(i, feed_forwards(core(denoiser.units[i]))) for i in chosen("FeedForwardWidth", self.units, denoiser)]
        for i, layers in found:  # all are looked at before the first is cut
            if not layers or any(type(layer) is not nn.Linear for into, out, _ in layers for layer in (into, out)):
                raise ValueError(
                    f"FeedForwardWidth: unit {i} of this {denoiser.name} has no feed-forward network of plain linear "
                    "layers: prune before other edits change it (a LoRA, experts), or leave the unit out"
                )
        for _, layers in found:
            for into, out, first in layers:
                hidden = out.in_features - first
                shrink(into, out, first, max(1, round(hidden * (1 - self.ratio))))


def feed_forwards(unit: Unit) -> list[tuple[nn.Module, nn.Module, int]]:
    """Each network of a unit: the layer into it, the layer out of it, that one's first column that reads it."""
    if "ffn" in unit.slots or "text_ffn" in unit.slots:
        return []
    found = (f for f in (unit.anatomy.feed, unit.anatomy.text_feed) if f is not None)
    parts = ((f.writers[0][0], *f.readers[0]) for f in found)
    return [(unit.get_submodule(into), unit.get_submodule(out), first) for into, out, first in parts]


@torch.no_grad()
def shrink(into: nn.Linear, out: nn.Linear, first: int, count: int) -> None:
    """Keep the `count` hidden channels of largest magnitude, in their order; nothing is read on the meta device."""
    hidden = out.in_features - first
    rows = into.weight.float().unflatten(0, (-1, hidden))  # one part, or gate and value
    energy = rows.square().sum((0, 2))
    if into.bias is not None:
        energy = energy + into.bias.float().view(-1, hidden).square().sum(0)
    size = energy.sqrt() * out.weight[:, first:].float().norm(dim=0)
    kept = size.topk(count).indices.sort().values
    narrow(into, 0, torch.cat([kept + part * hidden for part in range(len(rows))]))
    narrow(out, 1, torch.cat((torch.arange(first, device=kept.device), kept + first)))


def narrow(layer: nn.Linear, side: int, kept: Tensor) -> None:
    """Keep rows (side 0, with their bias) or columns (side 1) of a layer."""
    layer.weight = nn.Parameter(layer.weight.index_select(side, kept), layer.weight.requires_grad)
    if side == 0 and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[kept], layer.bias.requires_grad)
    layer.out_features, layer.in_features = layer.weight.shape


@dataclass
class TextFeedForwardLinear(Edit):
    """The text's feed-forward network of some units becomes one linear layer, of 1/8 of the weights in FLUX.

    It starts as the least-squares fit to the network on normal inputs N(0, 1), which is what a layer norm puts out,
    and without drawing any: for a hidden channel h = w x + b the best affine stand-in for gelu(h) is
    E[gelu(h)] + E[gelu'(h)] (h - b), two integrals over one Gaussian (Bussgang's theorem).

    PPCL fits to the tokens of a calibration set instead, on the state before norm and modulation, and drops those with
    the gate; here both stay, so that the layer fits into the unit and needs no data.

    Args:
        units: which, counted from 0, two-stream units that write text
    """

    units: tuple[int, ...]

    def __post_init__(self):
        check_numbers(self)
        self.units = tuple(self.units)
        if not self.units:
            raise ValueError("TextFeedForwardLinear: name at least one unit, counted from 0")

    def apply(self, denoiser: Denoiser) -> None:
        found = []
        for i in chosen("TextFeedForwardLinear", self.units, denoiser):
            unit = core(denoiser.units[i])
            network = unit.anatomy.text_feed
            if network is None or "text_ffn" in unit.slots or network.activation is None:
                raise ValueError(
                    f"TextFeedForwardLinear: unit {i} of this {denoiser.name} has no text feed-forward network with a "
                    "GELU: name two-stream units (FLUX, SD3, Qwen-Image), and no other edit on the same network"
                )
            found.append((unit, network))
        for unit, network in found:
            (into, _), (out, _) = network.writers[0], network.readers[0]
            new = linearised(unit.get_submodule(into), network.activation, unit.get_submodule(out))
            setattr(unit, into.partition(".")[0], new)

    def stock_key(self, key: str) -> str | None:
        return None if self._new(key) else key

    def owns(self, name: str) -> bool:
        return self._new(name)

    def _new(self, name: str) -> bool:
        return name.rpartition(".")[0].endswith(TEXT)


@torch.no_grad()
def linearised(into: nn.Linear, activation: Callable[[Tensor], Tensor], out: nn.Linear) -> nn.Linear:
    """The affine map nearest to out(activation(into(x))) in mean square over x ~ N(0, 1), in closed form."""
    w, b, back = into.weight.double(), into.bias.double(), out.weight.double()
    spread = w.norm(dim=1).clamp_min(1e-6)
    z, weight = normal_nodes(w.device)  # h = b + spread z
    at = activation(b[:, None] + spread[:, None] * z)  # hidden x nodes
    mean, slope = at @ weight, at @ (weight * z) / spread
    with out.weight.device:
        layer = nn.Linear(into.in_features, out.out_features, dtype=out.weight.dtype)
    layer.weight.copy_(back @ (slope[:, None] * w))
    layer.bias.copy_(back @ mean + out.bias.double())
    return layer


def normal_nodes(device: torch.device) -> tuple[Tensor, Tensor]:
    """Points and weights that integrate over N(0, 1), float64: evenly spaced, for a GELU may turn within 1/30 of it."""
    z = torch.linspace(-8, 8, NODES, dtype=torch.float64, device=device)
    weight = (-0.5 * z.square()).exp()
    return z, weight / weight.sum()
