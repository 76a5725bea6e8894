"""The values that pass through a denoiser: condition, stream of tokens with its layout, sampling step, output.

Letters in shape comments: b batch, n image tokens, l text tokens, d width, h heads, e head width, c channels,
f frames, y x grid rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import register_pytree_node


@dataclass(frozen=True)
class Condition:
    """The inputs of a denoiser besides the noisy sample and the time. New conditioning is a new named field."""

    label: Tensor | None = None  # b, int64; the family's null class for the unconditional pass
    text: Tensor | None = None  # b l c, text-encoder states
    text_mask: Tensor | None = None  # b l, bool, True = a real token
    pooled: Tensor | None = None  # b c, pooled text embedding
    guidance: Tensor | None = None  # b, the scale that a guidance-distilled model takes as an input
    end: Tensor | None = None  # b, the time at which the step of a flow map ends, at most t
    second: Tensor | None = None  # b, the time of the image tokens that are set apart; all others have t
    apart: Tensor | None = None  # b k, int64: these tokens
    kept: Tensor | None = None  # b k, int64, ascending: the image tokens that units see; None: all

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Condition:
        """The condition of a batch that has more: its entries of the fields' names."""
        return cls(**{name: batch[name] for name in _CONDITION_FIELDS if name in batch})

    def map(self, f: Callable[[Tensor], Tensor]) -> Condition:
        """Apply `f` to every field that is present (move, slice, repeat)."""
        values = {name: getattr(self, name) for name in _CONDITION_FIELDS}
        return Condition(**{name: value if value is None else f(value) for name, value in values.items()})

    def join(self, other: Condition) -> Condition:
        """Both as one batch, so that two branches share a forward.

        The shorter text is padded: see `_level`.

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

        One mask drops all fields of a sample together, as classifier-free guidance needs. The shorter text is padded:
        see `_level`.

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
    """Both with texts of one length: the shorter text is padded with zeros, which its mask leaves out.

    Raises:
        ValueError: if the lengths differ and a text has no mask
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

    `memory` lives exactly as long as the generation: caches and cross-step statistics go there and nowhere else. What
    is made of tensors, numbers, texts, None, `Branch`, tuples, lists and dicts alone can be saved with the generation
    (`pack`).
    """

    index: int  # evaluations made so far in this generation
    count: int  # evaluations the whole generation makes
    sigma: float  # time in [0, 1], 1 = pure noise
    branch: str = "cond"  # guidance pass: "cond", "uncond", "perturbed", or "joint": cond and uncond in one batch
    memory: dict = field(default_factory=dict, repr=False, compare=False)
    times: tuple[float, ...] = field(default=(), repr=False)  # count + 1: of each evaluation, then 0; (): unknown
    # of each time s / (a + s), where x = a data + s noise (`Objective.level`); (): the times are levels, as of a flow
    levels: tuple[float, ...] = field(default=(), repr=False)

    @property
    def level(self) -> float:
        """The noise level of this evaluation."""
        return self.levels[self.index] if self.levels else self.sigma

    def recall(self, owner: str, unit: int) -> dict:
        """The memory of one edit at one unit in this guidance branch.

        It is empty at the start of a generation, and where the sampler begins or ends to join cond and uncond.
        """
        return self.memory.setdefault((owner, unit, self.branch), {})


def pack(memory: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """A memory as lists, tensors, numbers and texts alone, which `torch.load(weights_only=True)` reads.

    Args:
        memory: of a step, or a value in it
        f: applied to each tensor; a tensor that is there twice becomes two

    Raises:
        ValueError: if it holds anything else
    """
    if isinstance(memory, Tensor):
        return f(memory)
    if type(memory) is dict:
        return ["dict", *([pack(k, f), pack(v, f)] for k, v in memory.items())]
    if type(memory) in _SEQUENCES.values():
        return [type(memory).__name__, *(pack(v, f) for v in memory)]
    if memory is None or type(memory) in (bool, int, float, str):
        return memory
    raise ValueError(
        f"the memory of this generation holds a {type(memory).__name__}, which can be neither saved nor copied: keep "
        "tensors, numbers, texts, None, Branch, tuples, lists and dicts, or do without"
    )


def unpack(packed: Any) -> Any:
    """The inverse of `pack`."""
    if not isinstance(packed, list):
        return packed
    kind, *parts = packed
    if kind == "dict":
        return {unpack(k): unpack(v) for k, v in parts}
    values = [unpack(v) for v in parts]
    return Branch(*values) if kind == "Branch" else _SEQUENCES[kind](values)


def map_rows(q: Tensor, k: Tensor, rows: int) -> Tensor:
    """The logarithms of evenly spread rows of softmax(q k' / sqrt(e)): b h s e each -> b h r s, r at most `rows`."""
    s = q.shape[2]
    rows = min(rows, s)
    chosen = q[:, :, torch.arange(rows, device=q.device) * s // rows]
    return (chosen * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).float().log_softmax(-1)


@dataclass(frozen=True)
class Routing:
    """An edit's decisions for the next unit, as factors: 0 or 1, with a gradient while training. None: all are on."""

    heads: Tensor | None = None  # b h, of attention heads
    channels: Tensor | None = None  # b c, of hidden channels of the image's feed-forward
    tokens: Tensor | None = None  # b n, of image tokens in the feed-forward


@dataclass(frozen=True)
class Apart:
    """Two groups of a stream's tokens, each with a condition of its own."""

    second: Tensor  # b s, bool: those of the second
    order: Tensor  # b s, int64: all tokens, first those of the first
    count: int  # of the second group, in every sample

    def map(self, f: Callable[[Tensor], Tensor]) -> Apart:
        return replace(self, second=f(self.second), order=f(self.order))


@dataclass(frozen=True)
class Layout:
    """The order and positions of tokens, for attention-like methods.

    Image tokens stand in the stream as registers, image, further tokens; a joint sequence has the text in front of them
    or behind them.
    """

    grid: tuple[int, int, int]  # frames, rows, columns of the image tokens
    registers: int = 0  # learned tokens in front of the image tokens
    further: int = 0  # tokens of an edit behind the image tokens; `run` takes them off after the last unit
    text_length: int = 0
    text_mask: Tensor | None = None  # b l, bool
    side: Literal["front", "back"] = "front"  # of the text in joint sequences
    permutation: Tensor | None = None  # n, int64: which image token each place has; None: row-major
    rope: Tensor | None = None  # ... s e, position table, of all tokens or of all but the text; ... b 1 s e of `kept`
    kept: Tensor | None = None  # b k, int64, ascending: the image tokens that are there; None: all of the grid
    maps: int | None = None  # query rows of the next unit's attention map that are wanted
    routing: Routing | None = None  # an edit's decisions for the parts of the next unit
    apart: Apart | None = None  # groups of tokens; the stream's `cond` is then b 2 d, in families that know of it
    notes: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)  # of the unit's call under way

    def map(self, f: Callable[[Tensor], Tensor]) -> Layout:
        """Apply `f` to every tensor with one row per sample (select, repeat), a family's own ones included."""
        parts = {"text_mask": self.text_mask, "kept": self.kept}
        parts = {name: None if value is None else f(value) for name, value in parts.items()}
        rope = self.rope
        if rope is not None and self.kept is not None:
            rope = f(rope.movedim(-4, 0)).movedim(0, -4)
        return replace(self, rope=rope, apart=None if self.apart is None else self.apart.map(f), **parts)

    def note(self, name: str, value: Tensor) -> None:
        """Hand a value to the trace, from a slot that sees tokens alone.

        Raises:
            RuntimeError: outside of a unit's call
        """
        if self.notes is None:
            raise RuntimeError(f"{name} was noted outside of a unit's call, so nobody would find it: call the unit")
        self.notes[name] = value

    def spread(self, values: Tensor, image: bool = False) -> Tensor:
        """Values of a sample over its tokens, b d -> b 1 d, or those of its two groups, b 2 d -> b s d.

        Args:
            values: what is made of the stream's `cond`
            image: over image tokens alone, where there are groups
        """
        if self.apart is None:
            return values[:, None]
        second = self.of_image(self.apart.second) if image else self.apart.second
        return torch.where(second[..., None], values[:, 1:], values[:, :1])

    def of_image(self, tokens: Tensor) -> Tensor:
        """The image tokens among those of the stream: b (registers + n + further) d -> b n d."""
        return tokens[:, self.registers : tokens.shape[1] - self.further]

    def joined(self, text: Tensor, image: Tensor) -> Tensor:
        """Text and image tokens in the joint order: b l d, b n d -> b (l + n) d."""
        return torch.cat((text, image) if self.side == "front" else (image, text), 1)

    def split(self, joint: Tensor) -> Branch:
        """The inverse of `joined`, along the second axis."""
        length, others = self.text_length, joint.shape[1] - self.text_length
        if self.side == "front":
            text, image = joint.split_with_sizes((length, others), 1)
        else:
            image, text = joint.split_with_sizes((others, length), 1)
        return Branch(image, text)

    def joint_mask(self, tokens: int) -> Tensor | None:
        """Which of `tokens` keys in the joint order are no padding: b s, bool; None: all."""
        if self.text_mask is None:
            return None
        others = tokens - self.text_length
        return F.pad(self.text_mask, (0, others) if self.side == "front" else (others, 0), value=True)


@dataclass(frozen=True)
class Stream:
    """The input and output of a unit. Replaced, never mutated (`dataclasses.replace`)."""

    image: Tensor  # b n d
    cond: Tensor  # the input of the family's own modulation, of a shape that only its units know
    layout: Layout
    text: Tensor | None = None  # b l d
    time: Tensor | None = None  # b d, the timestep alone, without class or text
    signal: Tensor | None = None  # b d, all that modulates the units: time, class, pooled text, guidance; for routers
    step: Step | None = None  # None: outside of a generation, where nothing is remembered; so while training
    trace: Mapping[str, Tensor] = field(default_factory=dict)
    # prefix under which the next unit records its branches and maps; behind the last one, records of the readout with
    # spaces between them; None: nothing is recorded
    tap: str | None = None
    saving: bool = False  # gradient checkpointing: of a unit its input alone is kept, and the backward runs it again

    def map(self, f: Callable[[Tensor], Tensor]) -> Stream:
        """Apply `f` to every tensor with one row per sample but the trace (select, repeat)."""
        parts = {"image": self.image, "cond": self.cond, "text": self.text, "time": self.time, "signal": self.signal}
        parts = {name: None if value is None else f(value) for name, value in parts.items()}
        return replace(self, layout=self.layout.map(f), **parts)

    def record(self, name: str, value: Tensor) -> Stream:
        """The same stream with one more auxiliary output, which the caller finds in `Output.trace`."""
        return replace(self, trace={**self.trace, name: value})


# FSDP2 finds the tensors of a unit's input and output by walking a pytree; layout and step are context, not children.
def _flatten_stream(s: Stream):
    return [s.image, s.text, s.cond, s.time, s.signal, dict(s.trace)], (s.layout, s.step, s.tap, s.saving)


def _unflatten_stream(children, context) -> Stream:
    image, text, cond, time, signal, trace = children
    layout, step, tap, saving = context
    return Stream(image, cond, layout, text, time, signal, step, trace, tap, saving)


register_pytree_node(Stream, _flatten_stream, _unflatten_stream)


class Output(NamedTuple):
    """The output of a denoiser, always."""

    sample: Tensor  # the prediction, shaped as x
    variance: Tensor | None  # the learned-variance half, shaped as x, where the model has one
    trace: Mapping[str, Tensor]  # taps as "unit.<index>", and the records of edits
    grid: tuple[int, int, int] | None = None  # frames, rows, columns of the image tokens, set by `Denoiser.forward`
    kept: Tensor | None = None  # b k: the image tokens that were seen, set likewise; elsewhere predictions are zeros


class Branch(NamedTuple):
    """Image tokens and, in two-stream families, text tokens: a residual branch of a unit, its gates, its input."""

    image: Tensor
    text: Tensor | None = None


_SEQUENCES: dict[str, type] = {"list": list, "tuple": tuple, "Branch": Branch}  # of a memory


class Forced(NamedTuple):
    """The input of a unit on some samples, in place of its predecessor's output (teacher forcing)."""

    tokens: Branch  # b n d image tokens without registers, b l d text tokens
    where: Tensor  # b, bool


def record_branch(stream: Stream, name: str, branch: Branch) -> Stream:
    """Trace a pair of tokens as `name` (without registers) and, where there is text, `name`.text."""
    stream = stream.record(name, stream.layout.of_image(branch.image))
    return stream if branch.text is None else stream.record(f"{name}.text", branch.text)


def force(stream: Stream, forced: Forced) -> Stream:
    """The stream with the tokens of the marked samples replaced.

    Raises:
        ValueError: if there are more or fewer samples in the stream
    """
    if len(forced.where) != len(stream.image):
        raise ValueError(
            f"tokens of {len(forced.where)} samples were to be forced on a stream of {len(stream.image)}: leave out "
            "the edit that changes the number of samples, or what forces tokens"
        )

    def choose(own: Tensor, other: Tensor) -> Tensor:
        return torch.where(forced.where.view(-1, 1, 1), other, own)

    layout, image, text = stream.layout, forced.tokens.image, stream.text
    if layout.permutation is not None:
        image = image[:, layout.permutation]
    if layout.registers or layout.further:
        behind = stream.image[:, stream.image.shape[1] - layout.further :]
        image = torch.cat((stream.image[:, : layout.registers], image, behind), 1)
    if text is not None and forced.tokens.text is not None:
        text = choose(text, forced.tokens.text)
    return replace(stream, image=choose(stream.image, image), text=text)


def permuted(stream: Stream) -> Stream:
    """Image tokens and their positions in the order of the layout's permutation; without one, the stream as it is."""
    layout, order = stream.layout, stream.layout.permutation
    if order is None:
        return stream
    if layout.kept is not None:
        raise ValueError(
            "some of the tokens are kept, and an edit has put all in another order: leave one of the two out"
        )
    image, rope, n = stream.image, layout.rope, len(order)
    if rope is not None:
        start = layout.registers
        if rope.shape[-2] > layout.registers + n + layout.further and layout.side == "front":
            start += layout.text_length
        rope = rope.index_select(-2, moved(order, start, rope.shape[-2]))
    image = image.index_select(1, moved(order, layout.registers, image.shape[1]))
    return replace(stream, image=image, layout=replace(layout, rope=rope))


def moved(order: Tensor, start: int, total: int) -> Tensor:
    """The positions 0 .. total - 1 with those from `start` on in the given order."""
    places = torch.arange(total, device=order.device)
    places[start : start + len(order)] = order + start
    return places


def restored(stream: Stream) -> Stream:
    """After the last unit: image tokens and the units' traces row-major again, further tokens taken off."""
    layout, image, trace = stream.layout, stream.image, stream.trace
    if layout.further:
        image = image[:, : image.shape[1] - layout.further]
    if layout.permutation is not None:
        back = layout.permutation.argsort()
        image = image.index_select(1, moved(back, layout.registers, image.shape[1]))
        tokens = {k for k in trace if k.startswith("unit.") and not k.endswith(".text")}
        trace = {k: v.index_select(1, back) if k in tokens else v for k, v in trace.items()}
    elif not layout.further:
        return stream
    return replace(stream, image=image, trace=trace, layout=replace(layout, further=0, permutation=None))


def add(stream: Stream, branch: Branch, gate: Branch | None) -> Stream:
    """Join a residual branch: x + gate * branch, on image and, where there is one, text; None: a gate of 1."""
    s, text = stream, stream.text
    if gate is None:
        image = s.image + branch.image
        text = text if branch.text is None else text + branch.text  # type: ignore[operator]
    else:
        image = torch.addcmul(s.image, gate.image, branch.image)
        if branch.text is not None:
            text = torch.addcmul(text, gate.text, branch.text)
    # written out: `replace` would cost time here
    return Stream(image, s.cond, s.layout, text, s.time, s.signal, s.step, s.trace, s.tap, s.saving)
