"""The contracts: a `Denoiser` is `embed -> units -> readout`, an `Edit` changes a denoiser.

Letters in shape comments: b batch, n image tokens, l text tokens, d width, h heads, e head width, c channels,
f frames, y x grid rows and columns.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import is_dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edit.calibration import Calibration
from edit.facts import Facts, Prediction, check_units
from edit.groups import Group
from edit.stream import Branch, Condition, Forced, Output, Step, Stream, force, permuted, record_branch, restored
from edit.subset import subset, whole
from edit.unit import Unit, mapped, passed

_NOTHING: Mapping[int, Any] = MappingProxyType({})
ENDS = {"norm", "output"}
End = Callable[[Stream, Callable[[Stream], Stream]], Stream]  # (stream, run) -> stream; `run` is the family's own


class Edit(ABC):
    """One method's change to a denoiser. A subclass is a dataclass; its fields are the paper's hyper-parameters.

    `apply` may be called on the meta device: it must not read weights. From `apply` on, `name` is the edit's own. Its
    records in the trace and its memory of a generation carry it, so that two edits of one class stay apart.

    Without a step (`Stream.step` is None) there is no generation: an edit with memory predicts as the dense model, and
    remembers nothing. Training and `Moment.ask(dense=True)` rely on it.
    """

    name: ClassVar[str] = ""

    perturbs: ClassVar[bool] = False  # changes the prediction in the guidance branch "perturbed"
    separate: ClassVar[bool] = False  # treats guidance branches differently: each is an evaluation of its own
    last: ClassVar[bool] = False  # copies units, and later edits would miss the copies: none is applied after it
    adaptive: ClassVar[bool] = False  # the work depends on samples or times: its cost is counted on real samples
    caches: ClassVar[bool] = False  # keeps values of the model between evaluations, whose bytes reports count
    batchwise: ClassVar[bool] = False  # decides once for all samples of a batch: a picture depends on its batch
    starts: ClassVar[bool] = False  # sets the first values of all parameters, so that what was trained would be lost
    leads: ClassVar[bool] = False  # the model becomes a flow map: it takes the time at which a step ends
    # With all edits off that can be (`off`) and the same condition, the output equals the unedited model's.
    keeps: ClassVar[bool] = False
    subsets: ClassVar[bool] = True  # units may see some of the image tokens alone (`Condition.kept`)
    excludes: ClassVar[tuple[str, ...]] = ()  # class names of edits that cannot be applied together with this one
    alone: ClassVar[str] = ""  # the setting without which a forward makes `further` predictions; errors tell it
    records: ClassVar[tuple[str, ...]] = ()  # maps that `readout` adds to the trace, for solvers that use them
    decides: ClassVar[Mapping[str, str]] = {}  # of what `decisions` are shares, in plain words, for maps in reports

    @abstractmethod
    def apply(self, denoiser: Denoiser) -> nn.Module | None:
        """Change units, slots or modules. Return the edit's own parameters, which are registered under its name."""

    def initialise(self, denoiser: Denoiser) -> None:  # noqa: B027 - most edits need no weights to start from
        """Set own parameters from the weights (an SVD, a copy). Called once when the edit is new, never on reload."""

    def advance(self, progress: float, own: nn.Module | None) -> None:  # noqa: B027 - most edits have no schedule
        """Set scheduled values in the edit's own buffers. Called before every training step.

        Args:
            progress: fraction of the run that is done, in [0, 1)
            own: the module that `apply` returned
        """

    def check(self, sampler: Any, times: tuple[float, ...]) -> None:  # noqa: B027 - most edits fit every sampler
        """Refuse a sampler that the edit was not made for. Called before each generation, and when a run is assembled.

        Args:
            sampler: an `edit.sampling.Sampler`: its solver, guidance and interval
            times: of its evaluations, then 0, as `Step.times` has them

        Raises:
            ValueError: naming the edit, what is given and what is expected
        """

    def compact(self, own: nn.Module | None) -> tuple[Edit, nn.Module | None] | None:
        """What is left of the edit at inference, where that is less than was trained: a table in place of a network.

        Called by `edit.edits.compact` when training is over.

        Args:
            own: the module that `apply` returned, with its weights; it stays as it is

        Returns:
            The edit as it is stored from then on, and its module with weights, laid out as its own `apply` makes it.
            None: nothing is to be done.
        """
        return None

    def embed(self, stream: Stream, t: Tensor, condition: Condition, own: nn.Module | None) -> Stream:
        """Replace the input of the first unit: add a second time, a further token.

        Args:
            stream: embedded by the family
            t: b, times in [0, 1]
            condition: of the same batch
            own: the module that `apply` returned
        """
        return stream

    def readout(self, output: Output, stream: Stream, own: nn.Module | None) -> Output:
        """Replace the output: record a further head in its trace.

        Args:
            output: read out by the family
            stream: after the last unit
            own: the module that `apply` returned
        """
        return output

    def losses(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Named auxiliary losses, already weighted, each a scalar or one number per sample [b]."""
        return {}

    def metrics(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Numbers to log beside the losses: open rates, expert loads, confidence."""
        return {}

    def decisions(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Executed fraction of each unit, in [0, 1], for reports: u b, or u b n where tokens are chosen. Of experts
        (SwitchDiT), which always cost the same: the fraction that one of them serves, by its name."""
        return {}

    def loads(self, trace: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of each layer with experts ("3", "3.text"), the share of assignments that each has, for reports: b E."""
        return {}

    def further(self, output: Output) -> dict[str, Output]:
        """Further predictions of the same samples, from the trace; the objective scores them like the first."""
        return {}

    def trainable(self, name: str) -> bool:
        """Whether a parameter of the denoiser (full name) is still trained under this edit."""
        return True

    def owns(self, name: str) -> bool:
        """Whether this edit added a parameter inside the model (full name), which no other edit freezes."""
        return False

    def groups(self, denoiser: Denoiser) -> Mapping[str, Group]:
        """How the optimiser treats parameters (full names), beside the run's settings: of muP, of stacked experts."""
        return {}

    def adopt(self, denoiser: Denoiser, build: Callable[[Denoiser], Any], own: nn.Module) -> Mapping[str, Group]:
        """Change the start of a loss's new parameters, `build`'s for this model; tell their groups by name: of muP."""
        return {}

    def activated(self, denoiser: Denoiser) -> Mapping[str, float]:
        """Of parameters (full names): the fraction that a token is computed with, 0 to 1. Of E experts that each token
        takes K of (DiT-MoE, Dense2MoE) it is K / E. Parameters that are not named are used whole."""
        return {}

    def replaces(self, denoiser: Denoiser) -> Collection[str]:
        """Parameters of the model (full names, or those of modules around them) that no longer run, as something else
        is in their place: experts (DiT-MoE, Dense2MoE), a mixer (PT-DiT, LiT). Called after `initialise`, which may
        read them: then they are taken out, and nothing trains, counts or stores them."""
        return ()

    def shards(self, denoiser: Denoiser) -> Sequence[nn.Module]:
        """Modules that FSDP2 gathers by themselves, each for its own call: experts of a unit (DiT-MoE, Dense2MoE). All
        else that is in no unit is gathered together, for the whole forward."""
        return ()

    def off(self, denoiser: Denoiser) -> AbstractContextManager[Any] | None:
        """A block without the edit's effect, at no cost in memory (of LoRA, TD-LoRA: a tied teacher); None: none."""
        return None

    def stock_key(self, key: str) -> str | None:
        """The name that a key of `model.state_dict()` had before this edit; None if the key is the edit's own."""
        return key

    def calibrate(self, denoiser: Denoiser, batches: Calibration, own: nn.Module | None) -> None:  # noqa: B027
        """Determine values (scales, thresholds, tables) without an optimiser, and write them into own buffers.

        Called once, without gradients, by `edit.calibrating` after all edits were applied and those before this one
        were calibrated. Buffers keep their shapes: an artifact is read into those that `apply` made.

        Args:
            denoiser: in eval mode
            batches: an iterable of noisy batches; `batches.generate(watch)` samples
            own: the module that `apply` returned
        """

    def fold(self, denoiser: Denoiser) -> None:
        """Make the change permanent in the model's own weights.

        Raises:
            ValueError: if the change cannot be expressed in the stock model
        """
        raise ValueError(f"{type(self).__name__} cannot be folded into the weights: keep it as an edit of the artifact")


class Spec(ABC):
    """The configuration of a backbone: a dataclass whose `build()` takes nothing and makes a denoiser.

    No class derives from it: `isinstance` checks a configuration's `backbone` before `build` is called.
    """

    @abstractmethod
    def build(self) -> Denoiser: ...

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        build = getattr(other, "build", None)
        return is_dataclass(other) and callable(build) and list(inspect.signature(build).parameters) == ["self"]


class Denoiser(nn.Module, ABC):
    """A DiT of any family, seen as `embed -> units -> readout`.

    `model` holds the weights under their own names; `units` are ordered views on its blocks, which stay registered in
    `model` alone. `edits` holds the parameters that edits add. Every backbone has one calling convention: `x` is a
    latent or pixels b c *sizes (b c y x for images, b c f y x for video), `t` lies in [0, 1] with 1 = pure noise.

    A family implements `config`, `from_config`, `facts`, `sample_shape`, `pack`, `embed`, `readout`, `keep`, `null` and
    the two converters `to_stock` / `from_stock`; everything else is here. One whose readout has a last norm apart from
    its output layer gives both (`last_norm`, `last_layer`) and reads out what `projected` returns.
    """

    name: ClassVar[str]  # short family name for messages, e.g. "dit"
    stock: ClassVar[str | None] = None  # the class in `diffusers` that `model` is; None: its weights have other names
    masks: ClassVar[bool] = True  # attention honours the text mask; else padding is attended to
    # Published folders that this family reads: name of their stock class -> settings that they must have. The class of
    # today comes first, former names follow. No two families read the same folder.
    reads: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})

    def __init__(self, model: nn.Module, units: Sequence[Unit]):
        super().__init__()
        self.model = model
        self.units: list[Callable[[Stream], Stream]] = list(units)
        self.edits = nn.ModuleDict()
        self.applied: dict[str, Edit] = {}  # live edits by name, in order of application
        self.ends: dict[str, End] = {}  # slots around "norm" and "output", the two parts of `projected`
        self.folded: list[dict] = []  # provenance of the edits that are part of the weights
        self.base = self.config  # configuration to which live edits are applied when an artifact is read
        self.gradient_checkpointing = False

    # ---- what a family provides -------------------------------------------------------------------------------

    @property
    @abstractmethod
    def config(self) -> dict:
        """The constructor's arguments as JSON values, of the model in its present state."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Denoiser:
        """Build with fresh weights; `torch.device("meta")` allocates nothing."""

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """Width, heads, conditions: all that is asked of a model without knowing its family."""

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample without the batch: (c, *sizes), (c, y, x) for images."""

    @property
    def prediction(self) -> Prediction:
        """The quantity that the weights predict; the objective must predict the same."""
        return "velocity"

    @abstractmethod
    def pack(self, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        """Translate to the family's native arguments (time scale, ids, patching)."""

    @abstractmethod
    def embed(self, **native: Any) -> Stream: ...

    @abstractmethod
    def readout(self, stream: Stream) -> Output:
        """The output from the stream behind the last unit; of families with `last_norm`, from its `projected`."""

    def last_norm(self, stream: Stream) -> Stream:
        """Image tokens behind the last norm, modulated, b n d without registers; edits stand around it (`ends`)."""
        raise NotImplementedError

    def last_layer(self, stream: Stream) -> Stream:  # behind the output layer, b n c: `readout` arranges it
        raise NotImplementedError

    def embed_times(self, t: Tensor) -> Tensor:
        """`Stream.time` of times without their samples, b in [0, 1] -> b d, or ValueError: not all families can."""
        raise ValueError(f"this {self.name} embeds no times alone: use a family whose Denoiser.embed_times does")

    @abstractmethod
    def keep(self, indices: Sequence[int]) -> None:
        """Drop all other units for good: from `units`, from the model and from its configuration."""

    @abstractmethod
    def null(self, condition: Condition) -> Condition:
        """The unconditional counterpart of a condition, for label drop and classifier-free guidance."""

    def example(self, batch: int = 1, text: int = 512) -> Condition:
        """A condition of the right shape without meaning, on the CPU: costs do not depend on its values.

        Args:
            batch: samples
            text: tokens of a prompt, for families that read text
        """
        return Condition(label=torch.zeros(batch, dtype=torch.int64, device="cpu"))

    def sampler(self) -> Any:
        """The `edit.sampling.Sampler` with the defaults of the family's stock pipeline; None: there is no pipeline."""
        return None

    def need_length(self, length: int | None) -> None:  # noqa: B027 - most families mask padding, or read no text
        """Refuse texts of no fixed length (None) if the family attends to their padding."""

    def fix_guidance(self, who: str, scale: float) -> None:
        """Fold one guidance scale into the weights and drop the input; raises ValueError, naming `who`, without one."""
        raise ValueError(f"{who}: this {self.name} has no guidance input: there is nothing to fold")

    def add_guidance(self, who: str) -> None:
        """Add a guidance input that changes nothing at first; raises ValueError, naming `who`, where that cannot be."""
        raise ValueError(f"{who}: this {self.name} cannot be given a guidance input, or has one")

    def settle(self, shape: tuple[int, ...], spec: Any) -> None:  # noqa: B027 - most families have nothing to do
        """Take over values that are no structure: the shape of a sample, settings of the backbone's configuration."""

    def resize(self, spec: Any) -> None:  # noqa: B027 - most families take many sizes, or learn positions of one
        """Take over the size of samples of the backbone's configuration where positions are computed, not learned: a
        run that starts from a model of other sizes makes its tables anew, all weights stay."""

    def reset_buffers(self) -> None:  # noqa: B027 - most families have nothing to do
        """Recompute non-persistent buffers after the model left the meta device."""

    @classmethod
    @abstractmethod
    def to_stock(cls, config: Mapping, state: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
        """The stored `config.json` and state dict: those of stock `diffusers` where that has the model."""

    @classmethod
    @abstractmethod
    def from_stock(cls, config: Mapping, state: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
        """The inverse of `to_stock`: our configuration and the model's own state dict, empty for an empty state."""

    @property
    def family(self) -> type[Denoiser]:
        """The family's own class: FSDP2 replaces a module's class by a subclass at run time."""
        return next(c for c in type(self).__mro__ if "name" in vars(c))

    # ---- what every family shares -----------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        step: Step | None = None,
        taps: Collection[int | str] = (),
        branches: Collection[int] = (),
        forced: Mapping[int, Forced] = _NOTHING,
        maps: Mapping[int, int] = _NOTHING,
    ) -> Output:
        """Predict from a noisy sample.

        Args:
            x: b c *sizes, noisy
            t: b, times in [0, 1], 1 = pure noise
            condition: labels, text, ... of the same batch
            step: the sampling step; None outside of a generation, where edits with memory predict as the dense model
            taps: units whose output tokens are returned as trace["unit.<index>"], b n d, and in two-stream families
                trace["unit.<index>.text"], b l d. Negative indices count from the end. "norm" and "output": image
                tokens behind the last norm and the output layer, as trace["end.norm"] and trace["end.output"]
            branches: units whose branches before the gate are returned as trace["unit.<index>.attention"] and
                trace["unit.<index>.feed"] (or as the family names them), each with ".text" in two-stream families
            forced: replacements for the input tokens of units
            maps: number r of evenly spread query rows per unit whose attention map is returned as
                trace["unit.<index>.maps"]: b h r s, natural logarithms, over all tokens s in the joint order

        Raises:
            ValueError: if x does not have the model's shape, a tap names no unit, or a map is requested of a unit
                with another attention than plain softmax
        """
        self._check(x, t, (*taps, *branches, *forced, *maps))
        stream = replace(self.embed(**self.pack(x, t, condition)), step=step)
        return self.follow(stream, t, condition, taps, branches, forced, maps)

    def tapped(self, x: Tensor, t: Tensor, condition: Condition, taps: Collection[int]) -> Mapping[str, Tensor]:
        """The taps that `forward` has in its trace, at their cost: no unit behind the last of them runs, no readout."""
        self._check(x, t, taps)
        stream = self._entered(self.embed(**self.pack(x, t, condition)), t, condition)
        return self.run(stream, taps, until=max(i % len(self.units) for i in taps) + 1).trace

    def follow(
        self,
        stream: Stream,
        t: Tensor,
        condition: Condition,
        taps: Collection[int | str] = (),
        branches: Collection[int] = (),
        forced: Mapping[int, Forced] = _NOTHING,
        maps: Mapping[int, int] = _NOTHING,
    ) -> Output:
        """The prediction from the embedded stream on, with the hooks of edits; arguments as of `forward`."""
        stream = self._entered(stream, t, condition, bool(forced))
        stream = self.run(stream, [i for i in taps if i not in ENDS], branches, forced, maps)
        output = self.readout(replace(stream, tap=" ".join(f"end.{i}" for i in taps if i in ENDS)))
        for name, edit in self.applied.items():
            output = edit.readout(output, stream, self.edits[name] if name in self.edits else None)
        return output._replace(grid=stream.layout.grid, kept=stream.layout.kept)

    def _entered(self, stream: Stream, t: Tensor, condition: Condition, forced: bool = False) -> Stream:
        """The input of the first unit, with what edits put there, of kept tokens alone; tokens are `forced` on as many
        samples alone."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            stream = replace(stream, saving=True)
        for name, edit in self.applied.items():
            stream = edit.embed(stream, t, condition, self.edits[name] if name in self.edits else None)
            if forced and len(stream.image) != len(t):
                remedy = f"set edits.{name}.{edit.alone}" if edit.alone else "leave the edit out"
                raise ValueError(
                    f"edit {name!r} makes {len(stream.image)} samples of {len(t)}, on which tokens are to be forced: "
                    f"{remedy}, or leave out what forces them"
                )
        return subset(stream, condition.kept)

    def projected(self, stream: Stream) -> Stream:
        """The stream behind the output layer, each part with what an edit put around it; zeros where tokens were not
        kept."""
        for name, run in (("norm", self.last_norm), ("output", self.last_layer)):
            stream = self.ends[name](stream, run) if name in self.ends else run(stream)
            if (record := f"end.{name}") in (stream.tap or "").split():
                stream = stream.record(record, stream.image)
        return whole(stream)

    def run(
        self,
        stream: Stream,
        taps: Collection[int] = (),
        branches: Collection[int] = (),
        forced: Mapping[int, Forced] = _NOTHING,
        maps: Mapping[int, int] = _NOTHING,
        until: int | None = None,
    ) -> Stream:
        """All units in order, or the first `until`; other arguments as of `forward`.

        Where the layout has a permutation, units see image tokens and positions in that order; the stream that comes
        back, and what was traced, are row-major again. Further tokens of an edit are gone.
        """
        depth = len(self.units)
        if stream.layout.permutation is not None and maps:
            raise ValueError("attention maps are wanted of permuted tokens: leave one of the two out")
        stream = permuted(stream)
        taps, branches = {i % depth for i in taps}, {i % depth for i in branches}
        maps = {i % depth: rows for i, rows in maps.items()}
        for i, unit in enumerate(self.units[:until]):
            if i in forced:
                stream = force(stream, forced[i])
            if branches or maps:
                stream = replace(stream, tap=f"unit.{i}" if i in branches or i in maps else None)
            if i in maps:
                stream = replace(stream, layout=replace(stream.layout, maps=maps[i]))
            stream = passed(unit, stream)
            if i in maps:
                stream = mapped(stream, i, i in branches, self.name)
            if i in taps:
                stream = record_branch(stream, f"unit.{i}", Branch(stream.image, stream.text))
        return restored(stream)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether samples of this shape (without the batch) can be denoised."""
        return shape == self.sample_shape

    def _check(self, x: Tensor, t: Tensor, taps: Collection[int | str]) -> None:
        if not self.accepts(tuple(x.shape[1:])):
            given, wanted = "x".join(map(str, x.shape[1:])), "x".join(map(str, self.sample_shape))
            raise ValueError(f"{self.name} takes samples of {wanted}, got {given}: change the backbone or the data")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must be one time per sample, shape ({len(x)},), got {tuple(t.shape)}")
        depth = len(self.units)
        check_units("taps", (i for i in taps if i not in ENDS), depth, f"this {self.name}", -depth)  # type: ignore

    def extra_repr(self) -> str:
        return f"units={len(self.units)}, edits={list(self.applied)}"
