"""Units with some of their heads and hidden channels: factors while training, slices of the weights afterwards.

What lies between two linear layers of a unit, the heads of its attention or the hidden channels of its feed-forward, is
described by the layers that write it and those that read it. Leaving a part out is then one thing in every family: the
writers' rows and the readers' columns are left out. A copy of a unit shares all its weights and calls some of its
layers otherwise; it is a unit like any other, of its own static shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.backbones.dit import DiTBlock, Mlp
from edit.backbones.dit_diffusers import BasicUnit
from edit.backbones.flux import DoubleUnit, SingleUnit
from edit.backbones.qwen_image import QwenImageUnit
from edit.backbones.sd3 import JointUnit
from edit.denoiser import Unit
from edit.stream import Layout, Routing, Step, Stream

Part = slice | Tensor  # of features: a range, or int64 indices in order


@dataclass(frozen=True)
class Features:
    """Hidden features of a unit, between the linear layers that write and those that read them, by path in the unit."""

    size: int
    writers: tuple[tuple[str, int], ...]  # with how many parts of `size` rows: 3 of a joint qkv, 2 of SwiGLU
    readers: tuple[tuple[str, int], ...]  # with the first column that reads them
    count: tuple[str, str] | None = None  # module and attribute that says how many heads there are


def hidden(unit: Unit) -> Features:
    """The hidden channels of a unit's (image) feed-forward.

    Raises:
        ValueError: if the unit has none that is known here, or an edit has put something else in its place
    """
    u: Any = unit
    match unit:
        case _ if "ffn" in vars(unit):
            raise ValueError(
                f"another edit replaced the feed-forward of this {type(unit).__name__}: leave one of them out"
            )
        case DiTBlock() if isinstance(unit.mlp, Mlp):
            return Features(u.mlp.fc2.in_features, (("mlp.fc1", 1),), (("mlp.fc2", 0),))
        case DiTBlock():
            return Features(u.mlp.w3.in_features, (("mlp.w12", 2),), (("mlp.w3", 0),))
        case SingleUnit():
            width = u.attn.inner_dim
            return Features(u.proj_out.in_features - width, (("proj_mlp", 1),), (("proj_out", width),))
        case BasicUnit() | DoubleUnit() | JointUnit() | QwenImageUnit():
            name = "img_mlp" if isinstance(unit, QwenImageUnit) else "ff"
            net = getattr(getattr(u, name), "net", ())
            if len(net) > 2 and hasattr(net[2], "in_features") and hasattr(net[0], "proj"):
                size = net[2].in_features
                parts = net[0].proj.out_features // size
                return Features(size, ((f"{name}.net.0.proj", parts),), ((f"{name}.net.2", 0),))
    raise ValueError(f"the feed-forward of a {type(unit).__name__} is not known here: two linear layers are expected")


def heads(unit: Unit) -> Features:
    """The heads' outputs of a unit's attention, in the (joint) order of its heads; PixArt's is the self-attention.

    Raises:
        ValueError: if the unit has none that is known here, or an edit has put something else in its place
    """
    u: Any = unit
    joint = (("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1))
    added = (("attn.add_q_proj", 1), ("attn.add_k_proj", 1), ("attn.add_v_proj", 1))
    out, text_out = ("attn.to_out.0", 0), ("attn.to_add_out", 0)
    match unit:
        case _ if "mixer" in vars(unit):
            raise ValueError(
                f"another edit replaced the attention of this {type(unit).__name__}: leave one of them out"
            )
        case DiTBlock():
            return Features(u.attn.proj.in_features, (("attn.qkv", 3),), (("attn.proj", 0),), ("attn", "num_heads"))
        case BasicUnit():
            size = u.attn1.to_out[0].in_features
            writers = tuple((name.replace("attn", "attn1"), parts) for name, parts in joint)
            return Features(size, writers, (("attn1.to_out.0", 0),), ("attn1", "heads"))
        case SingleUnit():
            return Features(u.attn.inner_dim, joint, (("proj_out", 0),))
        case JointUnit():
            readers = (out,) if unit.last else (out, text_out)
            return Features(u.attn.to_out[0].in_features, joint + added, readers, ("attn", "heads"))
        case DoubleUnit() | QwenImageUnit():
            return Features(u.attn.to_out[0].in_features, joint + added, (out, text_out))
    raise ValueError(f"the attention of a {type(unit).__name__} is not known here")


def number_of_heads(unit: Unit) -> int:
    """Heads of a unit's attention."""
    u: Any = unit
    match unit:
        case DiTBlock():
            return u.attn.num_heads
        case BasicUnit():
            return u.attn1.heads
        case SingleUnit() | DoubleUnit():
            return u.attn.inner_dim // u.attn.head_dim
    return u.attn.heads


# ---- a unit whose layers are called otherwise -----------------------------------------------------------------------


def variant(unit: Unit, layers: Mapping[str, nn.Module], counts: Mapping[tuple[str, str], int] | None = None) -> Unit:
    """A copy of a unit that shares all its weights and has other modules at some paths.

    Made before the unit is sharded or compiled, and before its slots are replaced, it shares the hooks that gather
    weights, and computes as the unit does now.

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
        for path, times in features.writers:
            rows = tuple(shifted(part, i * features.size) for i in range(times))
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


def merged(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """W + scale B A: out x in, out x r, r x in; added in B's precision, and then in W's."""
    return torch.addmm(weight.to(up.dtype), up, down, alpha=scale).to(weight.dtype)


Pieces = tuple[Part, ...]


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


# ---- linear layers that depend on the sample ------------------------------------------------------------------------


class Adapted(nn.Linear, ABC):
    """A linear layer with an addition that depends on the sample, too: W x + b + added(x).

    Args:
        layer: whose weights it takes over
    """

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)
        self._disable_adapters = False  # as peft's layers have it

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self._disable_adapters else self.part(x, self.weight, self.bias)

    @abstractmethod
    def part(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Pieces | None = None, columns: Pieces | None = None
    ) -> Tensor:
        """Some outputs from some inputs, ... in -> ... out, with their addition.

        Args:
            x: ... in, these inputs
            weight, bias: W and b of these outputs and inputs, out x in and out
            rows, columns: which they are; None: all
        """

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """(rows, columns): a tensor with a row for each output, and one with a column for each input."""


@dataclass(frozen=True)
class UnitCall:
    """The inputs of a unit's layers besides their tokens."""

    time: Tensor  # b d, or 1 d where all samples share one: in a generation
    samples: Tensor | None = None  # m: whose each token is, where tokens of several samples run as one sequence


class UnitCalls:
    """The calls of a unit that are under way, the innermost last. Between calls there are none.

    A layer is called with tokens alone. Hooks of the unit, which its copies share, say the rest for as long as it runs;
    checkpointing runs it once more, and so it is said once more.
    """

    def __init__(self, unit: Unit):
        self.open: list[UnitCall] = []
        unit.register_forward_pre_hook(self._begin)
        unit.register_forward_hook(self._end, always_call=True)  # checkpointing leaves early, by an exception
        unit.calls = self

    def _begin(self, unit: nn.Module, args: tuple[Stream]) -> None:
        (stream,) = args
        assert stream.time is not None
        self.open.append(UnitCall(stream.time if stream.step is None else stream.time[:1]))

    def _end(self, unit: nn.Module, args: tuple[Stream], after: Stream) -> None:
        self.open.pop()


@contextmanager
def one_sequence(unit: Unit, samples: Tensor) -> Iterator[None]:
    """Within a call of a unit: its layers are called with tokens of several samples as one sequence, (1) m c.

    Args:
        unit: or a copy of it
        samples: m, of each token the position of its sample in the batch
    """
    calls = vars(unit).get("calls")
    if calls is None:
        yield
        return
    calls.open.append(UnitCall(calls.open[-1].time, samples))
    try:
        yield
    finally:
        calls.open.pop()


# ---- parts while training: factors that gradients reach -------------------------------------------------------------


class MaskedFeed:
    """The slot `ffn` of a unit whose hidden channels have factors, `Layout.routing.channels`; without, what it was.

    Calls the unit's own layers, whatever wraps or shards them.

    Args:
        unit: before the slot is replaced
    """

    def __init__(self, unit: Unit):
        hidden(unit)  # raises for an unknown unit
        self.unit: Any = unit

    def __call__(self, tokens: Tensor, routing: Routing | None = None) -> Tensor:
        u = self.unit
        if isinstance(u, DiTBlock):
            mlp: Any = u.mlp
            if isinstance(mlp, Mlp):
                return mlp.fc2(masked(F.gelu(mlp.fc1(tokens), approximate="tanh"), routing))
            gate, value = mlp.w12(tokens).chunk(2, dim=-1)
            return mlp.w3(masked(F.silu(gate) * value, routing))
        if isinstance(u, SingleUnit):
            return u._project(masked(u.act_mlp(u.proj_mlp(tokens)), routing), u.attn.inner_dim)
        net = u.img_mlp.net if isinstance(u, QwenImageUnit) else u.ff.net
        return net[2](net[1](masked(net[0](tokens), routing)))


def masked(features: Tensor, routing: Routing | None) -> Tensor:
    """b n c, times the factors of its channels where there are any."""
    if routing is None or routing.channels is None:
        return features
    return features * routing.channels[:, None].to(features.dtype)


class MaskedHeads:
    """The slot `attention` of a unit whose heads have factors, `Layout.routing.heads`; without, what it was.

    Args:
        unit: before the slot is replaced
    """

    def __init__(self, unit: Unit):
        self.attention = unit.attention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, step: Step | None) -> Tensor:
        o = self.attention(q, k, v, layout, step)
        if layout.routing is None or layout.routing.heads is None:
            return o
        return o * layout.routing.heads[:, :, None, None].to(o.dtype)
