"""The contract of a unit: one transformer block, written out as residual branches with replaceable parts.

A family's file says how its blocks compute (`compute` and the parts `own_...`) and what they are made of (`anatomy`).
Methods replace parts (`unit.slots`) and read the anatomy; none tests for a family's class.

Letters in shape comments: b batch, n image tokens, l text tokens, s tokens in the joint order, d width, h heads,
e head width, c hidden channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edit.stream import Branch, Layout, Routing, Step, Stream, add, map_rows, record_branch

SLOTS = ("attention", "cross", "mixer", "ffn", "text_ffn", "fused", "branch")
Run = Callable[[Stream], Branch]  # computes a residual branch from the stream, norm included


# ---- anatomy --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """Hidden features of a unit, between the linear layers that write and those that read them, by path in the unit."""

    size: int
    writers: tuple[tuple[str, int], ...]  # with how many parts of `size` rows: 3 of a joint qkv, 2 of SwiGLU
    readers: tuple[tuple[str, int], ...]  # with the first column that reads them
    count: tuple[str, str] | None = None  # module and attribute that says how many heads there are
    activation: Callable[[Tensor], Tensor] | None = None  # of each channel by itself; None: gated, or of heads
    # Writers whose outputs one module normalises together, with its path (an RMSNorm across all heads): such a writer
    # runs whole whichever features are left, for the others are in the mean.
    norms: tuple[tuple[str, str], ...] = ()
    gate: Callable[[Tensor], Tensor] | None = None  # of a gated feed-forward: the activation of the first of two parts


@dataclass(frozen=True)
class Anatomy:
    """The parts of a unit that methods change.

    `text` tells what becomes of the text tokens: "none", there are none; "aside", a cross-attention reads them and no
    unit writes them; "along", they are tokens of the joint sequence, read and written; "ends", they are so for the last
    time and the unit leaves None.
    """

    heads: int
    attention: Features  # the heads' outputs, in the (joint) order of the heads
    feed: Features | None  # hidden channels of the (image) feed-forward; None: it is not two linear layers
    text_feed: Features | None = None  # of a feed-forward of the text's own
    second: Features | None = None  # heads of a further self-attention of the image tokens
    cross: Features | None = None  # heads of a cross-attention to the text
    text: Literal["none", "aside", "along", "ends"] = "none"
    fused: bool = False  # attention and feed-forward read the same tokens and share the output layer

    @property
    def joint(self) -> bool:
        """Whether attention runs over text and image tokens."""
        return self.text in ("along", "ends")


def heads_of(unit: Unit) -> Features:
    """The heads' outputs of a unit's attention, where the unit's own mixer runs.

    Raises:
        ValueError: if an edit has put something else in its place
    """
    if "mixer" in unit.slots:
        raise ValueError(f"another edit replaced the attention of this {type(unit).__name__}: leave one of them out")
    return unit.anatomy.attention


def hidden_of(unit: Unit) -> Features:
    """The hidden channels of a unit's (image) feed-forward, where the unit's own runs.

    Raises:
        ValueError: if it is not two linear layers, or an edit has put something else in its place
    """
    if "ffn" in unit.slots:
        raise ValueError(f"another edit replaced the feed-forward of this {type(unit).__name__}: leave one of them out")
    if unit.anatomy.feed is None:
        raise ValueError(f"the feed-forward of a {type(unit).__name__} is not known here: two linear layers are needed")
    return unit.anatomy.feed


# ---- slots ----------------------------------------------------------------------------------------------------------


class Slots:
    """The replaceable parts of one unit: `unit.slots.ffn` is the present one, `unit.slots.ffn = moe` replaces it, and
    `del unit.slots.ffn` brings the unit's own back. `"ffn" in unit.slots` tells whether it is replaced.

    | slot        | signature                                                                                      |
    |-------------|------------------------------------------------------------------------------------------------|
    | `attention` | `(q, k, v, layout, step) -> o`, all b h s e, after QK-norm and RoPE, in the joint order         |
    | `cross`     | `(q, k, v, layout, step) -> o`: cross-attention, q b h n e, k and v b h l e                     |
    | `mixer`     | `(stream, tokens) -> tokens`: the whole attention module on normalised tokens                   |
    | `ffn`       | `(tokens, layout) -> tokens`                                                                   |
    | `text_ffn`  | the same for the text tokens of two-stream families                                            |
    | `fused`     | `(attended, tokens, layout) -> tokens`: output layer and feed-forward where they are one        |
    | `branch`    | `(stream, name, run) -> Branch`: every residual branch, before its gate; `run(stream)` makes it |

    A new value is *not* registered as a sub-module: an edit's parameters live in `denoiser.edits`, so that the weights
    of the block keep their names. A slot hands a value to the trace with `layout.note(name, value)`. A part that is
    replaced switches the faster path off that would leave it out. A slot with a memory, which changes at every step,
    is decorated with `torch.compiler.disable(recursive=False)`: the unit around it, and `run`, stay compiled. One of
    `branch` that wants attention and feed-forward of a fused unit apart says so: `Divides`.
    """

    __slots__ = ("_unit",)

    def __init__(self, unit: Unit):
        object.__setattr__(self, "_unit", unit)

    def __contains__(self, name: str) -> bool:
        return name in self._unit.filled

    def __getattr__(self, name: str) -> Any:
        return self._unit.part(self._known(name))

    def __setattr__(self, name: str, value: Any) -> None:
        if not callable(value):
            raise TypeError(f"the slot {name} takes a function or a module, got {type(value).__name__}: del restores")
        self._unit.filled[self._known(name)] = value

    def __delattr__(self, name: str) -> None:
        self._unit.filled.pop(self._known(name), None)

    def _known(self, name: str) -> str:
        if name not in SLOTS or not hasattr(self._unit, f"own_{name}"):
            there = ", ".join(s for s in SLOTS if hasattr(self._unit, f"own_{s}"))
            raise AttributeError(f"a {type(self._unit).__name__} has no slot {name!r}; there are {there}")
        return name


class Divides(ABC):
    """A value of the slot `branch` that takes fused units to pieces: their branches are then "attention" and "feed"."""

    @abstractmethod
    def divides(self, stream: Stream) -> bool:
        """Whether the unit's call on this stream is to have two branches in place of one."""


# ---- units ----------------------------------------------------------------------------------------------------------


class Unit(nn.Module, ABC):
    """One transformer block written out as its equations: `Stream -> Stream`.

    A family implements `anatomy`, `modulate`, `enter`, `attend`, `feed`, `expand`, `contract`, the parts `own_mixer`
    and, where it has them, `own_text_ffn`, `own_cross`, `own_fused`; and `compute` where there are other branches than
    two. Their names are no names of children of a stock block.
    """

    filled: dict[str, Any]  # slots that are replaced; `slots` reads and writes it
    apart: ClassVar[tuple[str, ...]] = ()  # methods that a denoiser calls, and no unit, which read weights

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "filled", {})

    @property
    def slots(self) -> Slots:
        return Slots(self)

    def part(self, name: str) -> Any:
        """The present part of a slot."""
        return self.filled[name] if name in self.filled else getattr(self, f"own_{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises AttributeError for a slot, which `unit.slots` takes, and for a method, which would go on being run."""
        if name in SLOTS and name not in self._modules:
            raise AttributeError(f"{name} is a slot: assign to unit.slots.{name}")
        owner = next((c for c in type(self).__mro__ if name in vars(c)), None)
        hooked = ("forward", *self.apart)  # FSDP2 and offloading stand before these
        if owner is not None and issubclass(owner, Unit) and callable(vars(owner)[name]) and name not in hooked:
            raise AttributeError(
                f"{name} is a method of {type(self).__name__}, so a value assigned to it would never run: fill a slot "
                f"({', '.join(SLOTS)}), or wrap the unit"
            )
        super().__setattr__(name, value)

    @property
    @abstractmethod
    def anatomy(self) -> Anatomy: ...

    # ---- the parts --------------------------------------------------------------------------------------------

    def own_attention(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, step: Step | None) -> Tensor:
        """Softmax attention over all tokens: b h s e each -> b h s e."""
        if layout.maps is not None:
            layout.note("maps", map_rows(q, k, layout.maps))
        return F.scaled_dot_product_attention(q, k, v)

    def own_ffn(self, tokens: Tensor, layout: Layout) -> Tensor:
        """The (image) feed-forward: b s d -> b s d."""
        return self.contract(masked(self.expand(tokens), layout.routing))

    def own_branch(self, stream: Stream, name: str, run: Run) -> Branch:
        return run(stream)

    def divided(self, stream: Stream) -> bool:
        """Whether a fused unit runs its attention and its feed-forward as two branches, of the same tokens."""
        if stream.tap or ("fused" not in self.filled and not {"mixer", "ffn"}.isdisjoint(self.filled)):
            return True
        branch = self.filled.get("branch")
        return isinstance(branch, Divides) and branch.divides(stream)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, stream: Stream) -> Tensor:
        """The slot `attention` with the factors of its heads, the heads joined: b h s e each -> b s (h e)."""
        layout = stream.layout
        o = self.part("attention")(q, k, v, layout, stream.step)
        if layout.routing is not None and layout.routing.heads is not None:
            o = o * layout.routing.heads[:, :, None, None].to(o.dtype)
        return o.transpose(1, 2).flatten(2)

    # ---- what a family provides -------------------------------------------------------------------------------

    @abstractmethod
    def modulate(self, stream: Stream) -> Any:
        """Shifts, scales and gates, computed once per call and handed to the branches; no token is read."""

    @abstractmethod
    def enter(self, stream: Stream, modulation: Any) -> Branch:
        """The tokens that the attention reads, normalised and modulated."""

    def attend(self, stream: Stream, modulation: Any) -> Branch:
        """The attention branch before its gate, norm included; as here, of image tokens alone."""
        return Branch(self.part("mixer")(stream, self.enter(stream, modulation).image))

    @abstractmethod
    def feed(self, stream: Stream, modulation: Any) -> Branch:
        """The feed-forward branch before its gate, norm included."""

    @abstractmethod
    def expand(self, tokens: Tensor) -> Tensor:
        """Hidden channels of the (image) feed-forward: b s d -> b s c."""

    @abstractmethod
    def contract(self, features: Tensor) -> Tensor:
        """The (image) feed-forward from its hidden channels on: b s c -> b s d."""

    def compute(self, stream: Stream) -> Stream:
        """All residual branches in order."""
        m = self.modulate(stream)
        stream = self.residual(stream, "attention", lambda s: self.attend(s, m), m.attention_gate)
        return self.residual(stream, "feed", lambda s: self.feed(s, m), m.feed_gate)

    # ---- a call -----------------------------------------------------------------------------------------------

    def forward(self, stream: Stream) -> Stream:
        if not self.filled and stream.layout.maps is None:
            return self.compute(stream)
        notes: dict[str, Tensor] = {}  # of this call alone: checkpointing makes another
        given, noted = stream.layout, replace(stream.layout, notes=notes)
        stream = self.compute(laid(stream, noted, stream.trace))
        if "maps" in notes:
            notes[f"{stream.tap}.maps"] = notes.pop("maps")
        layout = given if stream.layout is noted else replace(stream.layout, notes=None)
        return laid(stream, layout, {**stream.trace, **notes} if notes else stream.trace)

    def residual(self, stream: Stream, name: str, run: Run, gate: Branch | None, read: Stream | None = None) -> Stream:
        """x + gate * branch. Every branch of every family passes here.

        Args:
            stream: before the branch
            name: "attention", "feed", "fused", "cross" or "second"
            run: computes the branch, its norm included; not called if the slot `branch` has an answer of its own. A
                closure: compiled, torch 2.11 takes one `functools.partial` for another
            gate: of image and, where the branch writes it, text; None: the branch has none
            read: what the branch reads, where that is not `stream`; the slot `branch` sees it
        """
        branch = self.part("branch")(stream if read is None else read, name, run)
        if stream.tap:
            stream = record_branch(stream, f"{stream.tap}.{name}", branch)
        return add(stream, branch, gate)


def laid(s: Stream, layout: Layout, trace: Mapping[str, Tensor]) -> Stream:
    """The stream with another layout and trace, written out: `replace` would cost time in every unit."""
    return Stream(s.image, s.cond, layout, s.text, s.time, s.signal, s.step, trace, s.tap, s.saving)


def passed(unit: Callable[[Stream], Stream], stream: Stream) -> Stream:
    """The stream behind a unit, or behind a block of an edit that is like one; checkpointed where it is `saving`."""
    return checkpoint(unit, stream, use_reentrant=False) if stream.saving else unit(stream)


def mapped(stream: Stream, unit: int, branches: bool, family: str) -> Stream:
    """The stream after a unit with a map: its branches leave the trace unless `branches` are wanted.

    Raises:
        ValueError: if the unit has recorded no map
    """
    name = f"unit.{unit}.maps"
    if name not in stream.trace:
        raise ValueError(
            f"unit {unit} of this {family} has another attention than plain softmax over all tokens, so there is no "
            "map to record: name other units, or compare branches"
        )
    kept = {k: v for k, v in stream.trace.items() if branches or k == name or not k.startswith(f"unit.{unit}.")}
    return replace(stream, trace=kept, layout=replace(stream.layout, maps=None))


def masked(features: Tensor, routing: Routing | None) -> Tensor:
    """b s c, times the factors of the hidden channels where there are any."""
    if routing is None or routing.channels is None:
        return features
    return features * routing.channels[:, None].to(features.dtype)


class Wrapper(ABC):
    """Stands in `denoiser.units` in place of a unit, which it calls or leaves out: gates, routers, caches of units."""

    def __init__(self, unit: Any):
        self.unit = unit  # a Unit, or another wrapper

    @abstractmethod
    def __call__(self, stream: Stream) -> Stream: ...


def core(unit: Any) -> Unit:
    """The unit inside all wrappers, whose slots and layers edits change.

    Raises:
        ValueError: if there is none
    """
    while isinstance(unit, Wrapper):
        unit = unit.unit
    if not isinstance(unit, Unit):
        raise ValueError(
            f"a {type(unit).__name__} stands in place of a unit and is no edit.unit.Wrapper: wrap the unit"
        )
    return unit
