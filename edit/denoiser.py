"""The contracts: a `Denoiser` is `embed -> units -> readout`, a `Unit` maps a `Stream` to a `Stream`, an `Edit` changes
a denoiser.

Letters in shape comments: b batch, n image tokens, l text tokens, d width, h heads, e head width, c channels,
f frames, y x grid rows and columns.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import is_dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edit.stream import Branch, Condition, Forced, Layout, Maps, Output, Step, Stream, force, record_branch, residual


def check_layout(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Refuse a state dict whose keys or shapes differ from what a model wants, in one sentence.

    Both may be on the meta device: only names and shapes are compared.
    """
    if missing := [k for k in wanted if k not in given]:
        raise ValueError(
            f"{what} does not fit this model: {len(missing)} keys are missing, such as {first_names(missing)}"
        )
    if extra := [k for k in given if k not in wanted]:
        raise ValueError(
            f"{what} does not fit this model: it has {len(extra)} unknown keys, such as {first_names(extra)}"
        )
    for k, v in wanted.items():
        if v.shape != given[k].shape:
            shapes = f"{k} has shape {tuple(given[k].shape)}, expected {tuple(v.shape)}"
            raise ValueError(f"{what} does not fit this model: {shapes}")


def first_names(names: Sequence[str]) -> str:
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


class Edit(ABC):
    """A final subclass is a dataclass. Its `apply` may be called on the meta device: it must not read weights."""

    perturbs: ClassVar[bool] = False  # changes what the guidance branch "perturbed" computes
    # what is run depends on samples or times: its cost is counted on real ones, and it is applied last, for it runs
    # copies of the units, which a later edit would not change
    decides: ClassVar[bool] = False
    leads: ClassVar[bool] = False  # the model becomes a flow map, which is told where a step ends (Condition.end)
    keeps: ClassVar[bool] = False  # without a LoRA, and told the same, the model predicts what it did without this edit
    excludes: ClassVar[tuple[str, ...]] = ()  # class names of edits this one cannot live with
    records: ClassVar[tuple[str, ...]] = ()  # maps that `readout` adds to the trace, for solvers that are given them

    @abstractmethod
    def apply(self, denoiser: Denoiser) -> nn.Module | None:
        """Change units, slots or modules; return the edit's own parameters, to be registered under its name."""

    def initialise(self, denoiser: Denoiser) -> None:  # noqa: B027 - most edits need no weights to start from
        """Set own parameters from the weights (an SVD, a copy). Called once when the edit is new, never on reload."""

    def advance(self, progress: float, own: nn.Module | None) -> None:  # noqa: B027 - most edits have no schedule
        """Called before every training step: set what has a schedule, in buffers of the edit's own.

        Args:
            progress: part of the run that is done, in [0, 1)
            own: what `apply` returned
        """

    def embed(self, stream: Stream, t: Tensor, condition: Condition, own: nn.Module | None) -> Stream:
        """What the first unit gets in place of the embedded stream: a second time, a further token.

        Args:
            stream: as the family embeds it
            t: b, times in [0, 1]
            condition: of the same batch
            own: what `apply` returned
        """
        return stream

    def readout(self, output: Output, stream: Stream, own: nn.Module | None) -> Output:
        """What is returned in place of the family's output: a further head, recorded in its trace.

        Args:
            output: as the family reads it out
            stream: after the last unit
            own: what `apply` returned
        """
        return output

    def losses(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Named auxiliary losses, already weighted, each a scalar or one number per sample [b]."""
        return {}

    def metrics(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What to log beside the losses: open rates, expert loads, confidence."""
        return {}

    def decisions(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What was run of each unit, in [0, 1], for pictures and reports: u b each, u b n where tokens are chosen."""
        return {}

    def further(self, output: Output) -> dict[str, Output]:
        """More predictions of the same samples, recorded in the trace, which the objective scores like the first."""
        return {}

    def trainable(self, name: str) -> bool:
        """Whether a parameter of the denoiser (by its full name) is still trained under this edit."""
        return True

    def owns(self, name: str) -> bool:
        """Whether a parameter inside the model (by its full name) is new with this edit: no other edit freezes it."""
        return False

    def stock_key(self, key: str) -> str | None:
        """The name that a key of `model.state_dict()` had before this edit; None if the key is the edit's own."""
        return key

    def fold(self, denoiser: Denoiser) -> None:
        """Make the change permanent in the model's own weights, leaving nothing to apply.

        Raises:
            ValueError: if the change cannot be expressed in the stock model
        """
        raise ValueError(f"{type(self).__name__} cannot be folded into the weights: keep it as an edit of the artifact")


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

    def sampler(self) -> Any:
        """The `edit.sampling.Sampler` with the defaults of the family's stock pipeline; None: there is no pipeline."""
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
