"""The contracts: a `Denoiser` is `embed -> units -> readout`, a `Unit` maps a `Stream` to a `Stream`.

Letters in shape comments: b batch, n image tokens, l text tokens, d width, h heads, e head width, c channels,
f frames, y x grid rows and columns.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from edit.edits import Edit
    from edit.sampling import Sampler


@dataclass(frozen=True)
class Condition:
    """What a denoiser is told besides the noisy sample and the time. New conditioning is a new named field."""

    label: Tensor | None = None  # b, int64; the family's null class for the unconditional pass
    text: Tensor | None = None  # b l c, text-encoder states
    text_mask: Tensor | None = None  # b l, bool, True = a real token
    pooled: Tensor | None = None  # b c, pooled text embedding
    guidance: Tensor | None = None  # b, the guidance scale a guidance-distilled model was told
    control: Tensor | None = None  # b c y x, control latents
    end: Tensor | None = None  # b, the time a flow map is asked to lead to, at most t; for models that take one

    def map(self, f: Callable[[Tensor], Tensor]) -> Condition:
        """Apply `f` to every field that is present (move, slice, repeat)."""
        values = {name: getattr(self, name) for name in _CONDITION_FIELDS}
        return Condition(**{name: value if value is None else f(value) for name, value in values.items()})

    def join(self, other: Condition) -> Condition:
        """Both as one batch, for denoisers that are asked for two branches at once.

        Texts of different lengths are brought to one: see `_level`.

        Raises:
            ValueError: if a field is present in one of them only, or texts differ in length and have no mask
            RuntimeError: if shapes differ otherwise beyond the batch
        """
        mine, other = _level(self, other)
        both = {name: (getattr(mine, name), getattr(other, name)) for name in _CONDITION_FIELDS}
        if lone := next((name for name, (a, b) in both.items() if (a is None) != (b is None)), None):
            raise ValueError(f"only one of the two conditions to join has {lone}: give it to both, or to neither")
        return Condition(**{name: None if pair == (None, None) else torch.cat(pair) for name, pair in both.items()})

    def where(self, drop: Tensor, null: Condition) -> Condition:
        """This condition with the samples marked in `drop` [b, bool] replaced by those of `null`.

        One mask drops all fields of a sample together, as classifier-free guidance needs. Texts of different lengths
        are brought to one: see `_level`.

        Raises:
            ValueError: if texts differ in length and have no mask
        """
        mine, null = _level(self, null)

        def choose(mine: Tensor | None, other: Tensor | None) -> Tensor | None:
            if mine is None or other is None:
                return mine
            return torch.where(drop.view(-1, *[1] * (mine.ndim - 1)), other, mine)

        return Condition(**{name: choose(getattr(mine, name), getattr(null, name)) for name in _CONDITION_FIELDS})


_CONDITION_FIELDS = tuple(f.name for f in fields(Condition))


def _level(a: Condition, b: Condition) -> tuple[Condition, Condition]:
    """Both with texts of one length: the shorter is filled up with zeros that its mask leaves out.

    Raises:
        ValueError: if there is anything to fill up, and no mask
    """
    if a.text is None or b.text is None or a.text.shape[1] == b.text.shape[1]:
        return a, b
    lengths = a.text.shape[1], b.text.shape[1]
    if a.text_mask is None or b.text_mask is None:
        raise ValueError(
            f"texts of {lengths[0]} and {lengths[1]} tokens do not fit together without a text_mask, as the model "
            "would attend to the padding and answer otherwise: encode both to one length"
        )

    def fill(c: Condition) -> Condition:
        missing = (0, max(lengths) - c.text.shape[1])  # type: ignore[union-attr]
        return replace(c, text=F.pad(c.text, (0, 0, *missing)), text_mask=F.pad(c.text_mask, missing))  # type: ignore

    return fill(a), fill(b)


@dataclass(frozen=True)
class Step:
    """One denoiser evaluation of one generation. Only the sampler makes steps, so only the sampler counts.

    `memory` lives exactly as long as the generation: caches and cross-step statistics go there and nowhere else.
    """

    index: int  # evaluations made so far in this generation
    count: int  # evaluations the whole generation makes
    sigma: float  # time in [0, 1], 1 = pure noise
    branch: str = "cond"  # "cond", "uncond" or "perturbed": the guidance pass
    memory: dict = field(default_factory=dict, repr=False, compare=False)

    def recall(self, owner: str, unit: int) -> dict:
        """The memory of one edit at one unit in this guidance branch; empty at the start of a generation."""
        return self.memory.setdefault((owner, unit, self.branch), {})


@dataclass(frozen=True)
class Maps:
    """How many query rows of a unit's attention map are wanted; what attention leaves here, its unit traces.

    One is made per unit and call. `found` is filled and emptied within the unit, whose trace alone hands the map on:
    that is how checkpointing, compilation and FSDP2 see it.
    """

    rows: int
    found: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    def see(self, q: Tensor, k: Tensor) -> None:
        """Logarithms of evenly spread rows of softmax(q k' / sqrt(e)), all rows if there are not so many."""
        s = q.shape[2]
        rows = min(self.rows, s)
        chosen = q[:, :, torch.arange(rows, device=q.device) * s // rows]
        self.found.append((chosen * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).float().log_softmax(-1))


@dataclass(frozen=True)
class Routing:
    """What an edit decided for the unit ahead, as factors, 0 or 1 with a gradient while training; None: all of it."""

    heads: Tensor | None = None  # b h, of the attention
    channels: Tensor | None = None  # b c, hidden ones of the image's feed-forward
    tokens: Tensor | None = None  # b n, image tokens that the feed-forward is run on


@dataclass(frozen=True)
class Layout:
    """Where tokens are: what attention-like methods need to know about their order."""

    grid: tuple[int, int, int]  # frames, rows, columns of the image tokens
    registers: int = 0  # tokens in front of the image tokens that are no pixels
    text_length: int = 0
    text_mask: Tensor | None = None  # b l, bool
    permutation: Tensor | None = None  # n, token order if not row-major
    kept: Tensor | None = None  # b k, indices of the tokens still present
    rope: Tensor | None = None  # (registers + n) e, position table: cosines then sines
    maps: Maps | None = None  # of the attention ahead, where they are wanted
    routing: Routing | None = None  # for the slots of the unit ahead, where an edit decides


@dataclass(frozen=True)
class Stream:
    """What flows through the units. Replaced, never mutated (`dataclasses.replace`)."""

    image: Tensor  # b n d
    cond: Tensor  # b d, what adaLN receives
    layout: Layout
    text: Tensor | None = None  # b l d
    time: Tensor | None = None  # b d, the timestep alone, without class or text
    step: Step | None = None  # None while training
    trace: Mapping[str, Tensor] = field(default_factory=dict)
    tap: str | None = None  # the name under which the unit ahead records its branches and maps, where wanted

    def record(self, name: str, value: Tensor) -> Stream:
        """The same stream with one more auxiliary output. It reaches the caller through `Output.trace`."""
        return replace(self, trace={**self.trace, name: value})


# FSDP2 finds the tensors of a unit's input and output by walking a pytree; layout and step ride along untouched.
def _flatten_stream(s: Stream):
    return [s.image, s.text, s.cond, s.time, dict(s.trace)], (s.layout, s.step, s.tap)


def _unflatten_stream(children, context) -> Stream:
    image, text, cond, time, trace = children
    layout, step, tap = context
    return Stream(image=image, text=text, cond=cond, time=time, trace=trace, layout=layout, step=step, tap=tap)


register_pytree_node(Stream, _flatten_stream, _unflatten_stream)


class Output(NamedTuple):
    """What a denoiser returns, always."""

    sample: Tensor  # the prediction, shaped as x
    variance: Tensor | None  # the learned-variance half, shaped as x, where the model has one
    trace: Mapping[str, Tensor]  # taps as "unit.<index>" and whatever edits recorded


class Branch(NamedTuple):
    """Image tokens and, in two-stream families, text tokens: a residual branch of a unit, its gates, its input."""

    image: Tensor
    text: Tensor | None = None


class Forced(NamedTuple):
    """What a unit is given instead of its predecessor's output, on some samples (teacher forcing)."""

    tokens: Branch  # b n d image tokens without registers, b l d text tokens
    where: Tensor  # b, bool


def check_layout(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Refuse a state dict whose keys or shapes differ from what a model wants, in one sentence.

    Both may be on the meta device: only names and shapes are compared.
    """
    if missing := [k for k in wanted if k not in given]:
        raise ValueError(f"{what} does not fit this model: {len(missing)} keys are missing, such as {some(missing)}")
    if extra := [k for k in given if k not in wanted]:
        raise ValueError(f"{what} does not fit this model: it has {len(extra)} unknown keys, such as {some(extra)}")
    for k, v in wanted.items():
        if v.shape != given[k].shape:
            shapes = f"{k} has shape {tuple(given[k].shape)}, expected {tuple(v.shape)}"
            raise ValueError(f"{what} does not fit this model: {shapes}")


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:3])


_NOTHING: Mapping[int, Any] = MappingProxyType({})
SLOTS = ("attention", "mixer", "ffn", "text_ffn")


class Unit(nn.Module, ABC):
    """One transformer block written out as its equations.

    Slots are methods that an edit may replace on one unit by assigning to them (`unit.ffn = moe`); `del unit.ffn`
    brings the block's own back. What is assigned is *not* registered as a sub-module: an edit's parameters live in
    `denoiser.edits`, so that the weights of the block keep their names.

    | slot        | signature                                                                                 |
    |-------------|-------------------------------------------------------------------------------------------|
    | `attention` | `(q, k, v, layout, step) -> o`, all b h s e, after QK-norm and RoPE, in the joint order    |
    | `mixer`     | `(stream, tokens) -> tokens`: the whole attention module on normalised tokens              |
    | `ffn`       | `(tokens, routing=None) -> tokens`, `routing` as in the layout                             |
    | `text_ffn`  | the same for the text tokens of two-stream families                                        |
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SLOTS:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, step: Step | None) -> Tensor:
        """Softmax attention over all tokens: b h s e each -> b h s e."""
        if layout.maps is not None:
            layout.maps.see(q, k)
        return F.scaled_dot_product_attention(q, k, v)

    @abstractmethod
    def modulate(self, stream: Stream) -> Any:
        """Shifts, scales and gates of this unit, computed once per call and handed to the branches."""

    @abstractmethod
    def attend(self, stream: Stream, modulation: Any) -> Branch:
        """The attention branch before its gate."""

    @abstractmethod
    def feed(self, stream: Stream, modulation: Any) -> Branch:
        """The feed-forward branch before its gate."""

    def forward(self, stream: Stream) -> Stream:
        modulation = self.modulate(stream)
        stream = residual(stream, "attention", self.attend(stream, modulation), modulation.attention_gate)
        return residual(stream, "feed", self.feed(stream, modulation), modulation.feed_gate)


def record_branch(stream: Stream, name: str, branch: Branch) -> Stream:
    """Trace a pair of tokens as `name` (without registers) and, where there is text, `name`.text."""
    stream = stream.record(name, branch.image[:, stream.layout.registers :])
    return stream if branch.text is None else stream.record(f"{name}.text", branch.text)


def force(stream: Stream, forced: Forced) -> Stream:
    """The stream with the tokens of the marked samples replaced.

    Raises:
        ValueError: if there are more or fewer samples in the stream
    """
    if len(forced.where) != len(stream.image):
        raise ValueError(
            f"tokens of {len(forced.where)} samples were to be forced on a stream of {len(stream.image)}: if an edit "
            "doubles the batch (DyDiT's complete), set complete=0"
        )

    def choose(own: Tensor, other: Tensor) -> Tensor:
        return torch.where(forced.where.view(-1, 1, 1), other, own)

    registers, image, text = stream.layout.registers, forced.tokens.image, stream.text
    if registers:
        image = torch.cat((stream.image[:, :registers], image), 1)
    if text is not None and forced.tokens.text is not None:
        text = choose(text, forced.tokens.text)
    return replace(stream, image=choose(stream.image, image), text=text)


def residual(stream: Stream, name: str, branch: Branch, gate: Branch) -> Stream:
    """Add a branch, and trace it as `name` of the unit, with the map that made it, where they are wanted."""
    if stream.tap:
        stream = record_branch(stream, f"{stream.tap}.{name}", branch)
        if stream.layout.maps is not None and stream.layout.maps.found:
            stream = stream.record(f"{stream.tap}.maps", stream.layout.maps.found.pop())
    return add(stream, branch, gate)


def add(stream: Stream, branch: Branch, gate: Branch) -> Stream:
    """Join a residual branch: x + gate * branch, on image and, where there is one, text."""
    s, text = stream, stream.text
    image = torch.addcmul(s.image, gate.image, branch.image)
    if branch.text is not None:
        text = torch.addcmul(text, gate.text, branch.text)
    # spelt out: on this path `replace` is felt
    return Stream(image, s.cond, s.layout, text, s.time, s.step, s.trace, s.tap)


class Spec(ABC):
    """The configuration of a backbone: a dataclass whose `build()` takes nothing and makes a denoiser.

    Nothing derives from it: it is what a configuration's `backbone` is compared with before it is called.
    """

    @abstractmethod
    def build(self) -> Denoiser: ...

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        build = getattr(other, "build", None)
        return is_dataclass(other) and callable(build) and list(inspect.signature(build).parameters) == ["self"]


class Denoiser(nn.Module, ABC):
    """A DiT of any family, seen as `embed -> units -> readout`.

    `model` holds the weights under their own names; `units` are ordered views on its blocks, registered once, there.
    `edits` holds the parameters that edits add. One calling convention for every backbone: `x` is a latent or pixels
    b c y x (b c f y x for video), `t` in [0, 1] with 1 = pure noise.

    A family implements `config`, `from_config`, `sample_shape`, `pack`, `embed`, `readout`, `keep`, `null` and the two
    converters `to_stock` / `from_stock`; everything else is here.
    """

    name: ClassVar[str]  # short family name for messages, e.g. "dit"

    def __init__(self, model: nn.Module, units: Sequence[Unit]):
        super().__init__()
        self.model = model
        self.units: list[Callable[[Stream], Stream]] = list(units)
        self.edits = nn.ModuleDict()
        self.applied: dict[str, Edit] = {}  # live edits by name, in order of application
        self.folded: list[dict] = []  # provenance of edits that are part of the weights by now
        self.base = self.config  # the configuration that live edits are applied to when an artifact is read
        self.gradient_checkpointing = False

    # ---- what a family provides -------------------------------------------------------------------------------

    @property
    @abstractmethod
    def config(self) -> dict:
        """The constructor's arguments as plain JSON values, describing the model as it now stands."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Denoiser:
        """Build with fresh weights. Under `torch.device("meta")` nothing is allocated."""

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample without the batch: (c, y, x)."""

    @property
    def prediction(self) -> Literal["velocity", "noise"]:
        """What the weights are made to predict; an objective must predict the same."""
        return "velocity"

    @abstractmethod
    def pack(self, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        """From the framework's convention to the family's native arguments (time scale, ids, patching)."""

    @abstractmethod
    def embed(self, **native: Any) -> Stream: ...

    @abstractmethod
    def readout(self, stream: Stream) -> Output: ...

    @abstractmethod
    def keep(self, indices: Sequence[int]) -> None:
        """Drop all units but these, for good: from `units`, from the model and from its configuration."""

    @abstractmethod
    def null(self, condition: Condition) -> Condition:
        """The unconditional counterpart of a condition, for label drop and classifier-free guidance."""

    def example(self, batch: int = 1, text: int = 512) -> Condition:
        """A condition of the right shape that means nothing, on the CPU: costs do not depend on what is said.

        Args:
            batch: samples
            text: tokens of a prompt, where the family reads text
        """
        return Condition(label=torch.zeros(batch, dtype=torch.int64, device="cpu"))

    def sampler(self) -> Sampler | None:
        """How the family's stock pipeline samples with its default settings; None: there is none."""
        return None

    def settle(self, shape: tuple[int, ...], spec: Any) -> None:  # noqa: B027 - most families have nothing to do
        """Take over what is no structure: the shape of a sample, and settings of the backbone's configuration."""

    def reset_buffers(self) -> None:  # noqa: B027 - most families have nothing to do
        """Recompute non-persistent buffers after the model left the meta device."""

    @classmethod
    @abstractmethod
    def to_stock(cls, config: Mapping, state: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
        """`config.json` and state dict that are stored: those of stock `diffusers` where it has the model."""

    @classmethod
    @abstractmethod
    def from_stock(cls, config: Mapping, state: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
        """The inverse of `to_stock`: our configuration and the model's own state dict."""

    @property
    def family(self) -> type[Denoiser]:
        """The family's own class: sharding (FSDP2) puts a subclass in its place at run time."""
        return next(c for c in type(self).__mro__ if "name" in vars(c))

    # ---- what every family shares -----------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        step: Step | None = None,
        taps: Collection[int] = (),
        branches: Collection[int] = (),
        forced: Mapping[int, Forced] = _NOTHING,
        maps: Mapping[int, int] = _NOTHING,
    ) -> Output:
        """Predict from a noisy sample.

        Args:
            x: b c y x, noisy
            t: b, times in [0, 1], 1 = pure noise
            condition: labels, text, ... of the same batch
            step: where a generation stands; None while training
            taps: units whose output tokens are wanted; they come back as trace["unit.<index>"], b n d, and in
                two-stream families trace["unit.<index>.text"], b l d. Negative indices count from the end.
            branches: units whose branches before the gate are wanted, as trace["unit.<index>.attention"] and
                trace["unit.<index>.feed"], each with its ".text" where there is one
            forced: input tokens of some units on some samples
            maps: units whose attention maps are wanted, and how many evenly spread query rows r of them, as
                trace["unit.<index>.maps"]: b h r s, natural logarithms, over all tokens s in the joint order

        Raises:
            ValueError: if x does not have the model's shape, a tap names no unit, or a unit with another attention
                than plain softmax is asked for a map
        """
        self._check(x, t, (*taps, *branches, *forced, *maps))
        stream = replace(self.embed(**self.pack(x, t, condition)), step=step)
        for name, edit in self.applied.items():
            stream = edit.embed(stream, t, condition, self.edits[name] if name in self.edits else None)
        stream = self.run(stream, taps, branches, forced, maps)
        output = self.readout(stream)
        for name, edit in self.applied.items():
            output = edit.readout(output, stream, self.edits[name] if name in self.edits else None)
        return output

    def run(
        self,
        stream: Stream,
        taps: Collection[int] = (),
        branches: Collection[int] = (),
        forced: Mapping[int, Forced] = _NOTHING,
        maps: Mapping[int, int] = _NOTHING,
    ) -> Stream:
        """All units, from the embedded stream to the one that is read out."""
        depth = len(self.units)
        taps, branches = {i % depth for i in taps}, {i % depth for i in branches}
        maps = {i % depth: rows for i, rows in maps.items()}
        for i, unit in enumerate(self.units):
            if i in forced:
                stream = force(stream, forced[i])
            if branches or maps:
                stream = replace(stream, tap=f"unit.{i}" if i in branches or i in maps else None)
            if i in maps:
                stream = replace(stream, layout=replace(stream.layout, maps=Maps(maps[i])))
            if self.gradient_checkpointing and torch.is_grad_enabled():
                stream = checkpoint(unit, stream, use_reentrant=False)
            else:
                stream = unit(stream)
            if i in maps:
                stream = self._mapped(stream, i, i in branches)
            if i in taps:
                stream = record_branch(stream, f"unit.{i}", Branch(stream.image, stream.text))
        return stream

    def _mapped(self, stream: Stream, i: int, branches: bool) -> Stream:
        """The stream after a unit that was asked for its map; what else it traced goes unless `branches` are wanted."""
        name = f"unit.{i}.maps"
        if name not in stream.trace:
            raise ValueError(
                f"unit {i} of this {self.name} has another attention than plain softmax over all tokens, so there is "
                "no map to record: name other units, or compare branches"
            )
        kept = {k: v for k, v in stream.trace.items() if branches or k == name or not k.startswith(f"unit.{i}.")}
        return replace(stream, trace=kept, layout=replace(stream.layout, maps=None))

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether samples of this shape (without the batch) can be denoised; families of any size say so here."""
        return shape == self.sample_shape

    def _check(self, x: Tensor, t: Tensor, taps: Collection[int]) -> None:
        if not self.accepts(tuple(x.shape[1:])):
            given, wanted = "x".join(map(str, x.shape[1:])), "x".join(map(str, self.sample_shape))
            raise ValueError(f"{self.name} takes samples of {wanted}, got {given}: change the backbone or the data")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must be one time per sample, shape ({len(x)},), got {tuple(t.shape)}")
        depth = len(self.units)
        if bad := [i for i in taps if not -depth <= i < depth]:
            raise ValueError(f"cannot tap unit {bad[0]} of a {self.name} with {depth} units (0 to {depth - 1})")

    def extra_repr(self) -> str:
        return f"units={len(self.units)}, edits={list(self.applied)}"
