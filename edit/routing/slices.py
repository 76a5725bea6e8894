"""Units with some of their heads and hidden channels: factors while training, slices of the weights afterwards.

Features between two linear layers of a unit (heads of its attention, hidden channels of its feed-forward) are told by
its anatomy: the layers that write them and the layers that read them. In every family, leaving features out means
leaving out the writers' rows and the readers' columns. A copy of a unit shares all its weights and replaces some of its
layers; it is a unit with its own static shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.routing.adapted import Adapted, Part, Pieces
from edit.unit import Features, Unit

# ---- a unit whose layers are called otherwise -----------------------------------------------------------------------


def variant(unit: Unit, layers: Mapping[str, nn.Module], counts: Mapping[tuple[str, str], int] | None = None) -> Unit:
    """A copy of a unit that shares all its weights and has other modules at some paths.

    Made before the unit is sharded or compiled, it shares the hooks that gather weights. Its slots are its own: filled
    as the unit's are now.

    Args:
        unit: stays as it is
        layers: by path in the unit
        counts: attributes that say how many heads are left, by module path and name
    """
    other = copy(unit)
    copied: dict[str, Any] = {"": other}

    def own(path: str) -> Any:
        """The copy of the module at `path`, with a list of children of its own."""
        if path not in copied:
            parent, _, name = path.rpartition(".")
            copied[path] = own(parent)._modules[name] = copy(own(parent)._modules[name])
            copied[path].__dict__["_modules"] = dict(copied[path]._modules)
        return copied[path]

    other.__dict__["_modules"] = dict(other._modules)
    other.__dict__["filled"] = dict(unit.filled)
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        own(parent)._modules[name] = layer
    for (path, name), value in (counts or {}).items():
        setattr(own(path), name, value)
    return other


def compiled_as(unit: Unit, other: Unit) -> Unit:
    """Compile the copy `other` if the unit has been compiled since."""
    if unit._compiled_call_impl is not None and other._compiled_call_impl is None:
        other.compile()
    return other


def narrowed(unit: Unit, parts: Sequence[tuple[Features, Part]], heads: int | None = None, keep: bool = False) -> Unit:
    """A copy of a unit that has some of its features alone.

    Args:
        unit: shares its weights with the copy
        parts: features, and which of them are left
        heads: how many of the attention's heads that leaves
        keep: slices are made at the first call and stay with the copy, which must then not outlive a change of the
            weights; otherwise they are taken at every call, which costs nothing where they are ranges
    """
    layers: dict[str, nn.Module] = {}
    counts = {}
    cuts: dict[str, list[tuple[int, int, Part]]] = {}  # by reader: first column, how many, which are left
    for features, part in parts:
        norms = dict(features.norms)
        for path, times in features.writers:
            rows = tuple(shifted(part, i * features.size) for i in range(times))
            if path in norms:
                layers[norms[path]] = Taken(unit.get_submodule(norms[path]), rows)
            else:
                layers[path] = Narrow(unit.get_submodule(path), rows=rows, keep=keep)
        for path, first in features.readers:
            cuts.setdefault(path, []).append((first, features.size, part))
        if features.count is not None and heads is not None:
            counts[features.count] = heads
    for path, found in cuts.items():
        reader = unit.get_submodule(path)
        columns, end = [], 0
        for first, size, part in sorted(found, key=lambda cut: cut[0]):
            columns += [slice(end, first), shifted(part, first)]
            end = first + size
        columns.append(slice(end, reader.in_features))
        layers[path] = Narrow(reader, columns=tuple(columns), keep=keep)
    return variant(unit, layers, counts)


def shifted(part: Part, by: int) -> Part:
    return slice(part.start + by, part.stop + by) if isinstance(part, slice) else part + by


class Narrow(nn.Module):
    """Some rows and columns of a linear layer, plain, adapted or with a LoRA: what they cost is run, and no more.

    Args:
        layer: keeps its weights
        rows: pieces of its outputs, in order; None: all
        columns: pieces of its inputs, in order; None: all
        keep: see `narrowed`

    Raises:
        ValueError: if the layer is of another kind
    """

    def __init__(self, layer: nn.Module, rows: Pieces | None = None, columns: Pieces | None = None, keep: bool = False):
        super().__init__()
        from peft.tuners.lora import LoraLayer

        base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        if type(base) is not nn.Linear and not isinstance(base, Adapted):
            raise ValueError(
                f"only a part of a plain linear layer can be run, this is a {type(base).__name__}: fold what changed "
                "it first, or apply it later"
            )
        self.layer, self.base, self.keep = layer, base, keep
        self.rows, self.columns = rows and joined_pieces(rows), columns and joined_pieces(columns)
        self.lora = layer if isinstance(layer, LoraLayer) else None
        self.kept: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self.base.weight, "ds_id") or self.base.weight.device != x.device:
            return self._whole(x)  # ZeRO-3 and offloading fetch what is called whole: the same result, not cheaper
        weight, bias = self._kept() if self.keep else self._weights()
        if isinstance(self.base, Adapted) and not self.base._disable_adapters:
            y = self.base.part(x, weight, bias, self.rows, self.columns)
        else:
            y = F.linear(x, weight, bias)
        return y if self.keep else self._with_loras(x, y)

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        weight = taken(taken(self.base.weight, self.rows, 0), self.columns, 1)
        return weight, None if self.base.bias is None else taken(self.base.bias, self.rows, 0)

    def _with_loras(self, x: Tensor, y: Tensor) -> Tensor:
        dtype = y.dtype
        for down, up, scale in self._additions():
            y = y + scale * F.linear(F.linear(x.to(down.dtype), down), up)  # as peft does in mixed precision
        return y.to(dtype)

    def _kept(self) -> tuple[Tensor, Tensor | None]:
        if not self.kept:
            weight, bias = self._weights()
            for down, up, scale in self._additions():
                weight = merged(weight, up, down, scale)
            self.kept.append((weight, bias))
        return self.kept[0]

    def _additions(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """A r x in, B out x r and the scale of each LoRA, of these rows and columns."""
        if self.lora is None or self.lora.disable_adapters or self.lora.merged:
            return
        for name in self.lora.active_adapters:
            if name in self.lora.lora_A:
                down, up = self.lora.lora_A[name].weight, self.lora.lora_B[name].weight
                yield taken(down, self.columns, 1), taken(up, self.rows, 0), self.lora.scaling[name]

    def _whole(self, x: Tensor) -> Tensor:
        if self.columns is not None:
            every = torch.arange(self.base.in_features, device=x.device)
            places = taken(every, self.columns, 0)
            x = x.new_zeros(*x.shape[:-1], len(every)).index_copy(-1, places, x)
        return taken(self.layer(x), self.rows, -1)


class Taken(nn.Module):
    """Some outputs of a module that runs whole: of a norm of all features together."""

    def __init__(self, layer: nn.Module, rows: Pieces):
        super().__init__()
        self.layer, self.rows = layer, joined_pieces(rows)

    def forward(self, x: Tensor) -> Tensor:
        return taken(self.layer(x), self.rows, -1)


def merged(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """W + scale B A: out x in, out x r, r x in; added in B's precision, and then in W's."""
    return torch.addmm(weight.to(up.dtype), up, down, alpha=scale).to(weight.dtype)


def joined_pieces(pieces: Pieces) -> Pieces:
    """Without empty ranges, and ranges that follow each other as one."""
    out: list[Part] = []
    for piece in pieces:
        if isinstance(piece, slice):
            if piece.start == piece.stop:
                continue
            if out and isinstance(last := out[-1], slice) and last.stop == piece.start:
                out[-1] = slice(last.start, piece.stop)
                continue
        out.append(piece)
    return tuple(out)


def taken(x: Tensor, pieces: Pieces | None, dim: int) -> Tensor:
    """Pieces of a tensor along one axis: a view where it is one range."""
    if pieces is None:
        return x
    parts = [
        x.narrow(dim, p.start, p.stop - p.start) if isinstance(p, slice) else x.index_select(dim, p) for p in pieces
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
