"""Cost of a denoiser: parameters, executed multiply-accumulates, time, memory.

MACs are counted on the operators that really run (`torch.utils.flop_counter`), never from a formula: a unit an edit
skips, a narrowed layer or a dropped token is absent from the count because it is absent from the run. Counting on the
meta device computes nothing; a model whose control flow depends on its activations must be run for real.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edit import edits as editing
from edit.denoiser import Denoiser
from edit.measuring.devices import device_name
from edit.measuring.flops import Flops, Uncounted, uncounted
from edit.measuring.timing import Spread, distinct_bytes, in_turns, peak_memory, steadiest, tensors
from edit.objectives import Objective
from edit.predictions import default_objective
from edit.sampling import Sampler, default_sampler
from edit.stream import Condition, Output, Step


@dataclass(frozen=True)
class Cost:
    """Of one denoiser; see `cost`."""

    parameters: int
    activated: int  # of them, read by one forward of `batch` samples
    buffers: int  # elements of fixed tables, such as position embeddings
    macs: int  # multiply-accumulates of one forward, per sample
    evaluations: int  # forwards per image: solver steps times guidance branches
    macs_per_image: int  # over the whole generation
    batch: int
    device: str
    forward: Spread | None = None  # seconds per forward of `batch` samples
    generation: Spread | None = None  # seconds per image, generated `batch` at a time
    peak_memory: int | None = None  # bytes during a generation of `batch` images, weights and tables included
    resident: int | None = None  # of these bytes, those of weights and tables
    uncounted: tuple[str, ...] = ()  # operators without a FLOP formula that ran: with any, MACs are a lower bound
    per_token: int | None = None  # of the parameters, those that a token is computed with (`Edit.activated`); None: all
    held: int | None = None  # bytes that caches remember of one image between evaluations, at most; None: no cache

    @property
    def training_flops(self) -> int:
        """Per image, by the convention that the backward pass costs twice the forward: 3 x 2 x MACs."""
        return 6 * self.macs

    def as_dict(self) -> dict[str, Any]:
        """JSON values, spreads as nested objects; without `per_token` where a token takes all parameters, and without
        `held` where there is no cache."""
        values = asdict(self) | {"training_flops": self.training_flops, "uncounted": list(self.uncounted)}
        return {name: v for name, v in values.items() if name not in ("per_token", "held") or v is not None}


def cost(
    denoiser: Denoiser,
    sampler: Sampler | None = None,
    objective: Objective | None = None,
    condition: Condition | None = None,
    batch: int = 1,
    real: bool = False,
    rounds: int = 0,
) -> Cost:
    """Count, and if `rounds` is given time, one forward and one generation.

    Args:
        denoiser: its edits are honoured; on the meta device if nothing is to be run for real
        sampler: how images are generated; None: as the family's stock pipeline does, else by 50 steps of Euler or DDIM
        objective: of the denoiser; None: by its convention
        condition: `batch` entries; None: the family's example, with prompts of 512 tokens where it reads text
        batch: samples at a time; counts are divided by it
        real: count on the denoiser itself, in eval mode, with its weights, instead of on a twin without any: for edits
            whose decisions depend on activations
        rounds: timed forwards, and timed generations; 0: none, and no memory is measured

    Warns:
        Uncounted: if an operator without a FLOP formula has run; `Cost.uncounted` names it

    Raises:
        ValueError: if it cannot be counted without weights, or has none to be timed with
    """
    objective = objective or default_objective(denoiser)
    sampler = sampler or default_sampler(denoiser, objective)
    condition = condition or denoiser.example(batch)
    if rounds and _device(denoiser).type == "meta":
        raise ValueError("this denoiser is on the meta device, which has no clock: load or build it with weights")
    subject = denoiser if real else twin(denoiser)
    meter = _Meter(subject)  # of both: a forward is not counted twice
    one = _forward_count(meter, condition, batch)
    meter.macs = meter.samples = 0
    whole = _generation_count(meter, sampler, objective, condition, batch)
    parameters, taken = sum(p.numel() for p in denoiser.parameters()), editing.per_token(denoiser)
    counted = Cost(
        parameters=parameters,
        activated=one.activated,
        buffers=sum(b.numel() for b in denoiser.buffers()),
        macs=round(one.macs / batch),
        evaluations=whole.forwards,
        macs_per_image=round(whole.macs / batch),
        batch=batch,
        device=device_name(_device(denoiser)),
        uncounted=tuple(sorted({*one.uncounted, *whole.uncounted})),
        per_token=None if taken == parameters else taken,
        held=None if whole.held is None else round(whole.held / batch),
    )
    if not rounds:
        return counted
    (timed,) = with_times((Timed(counted, denoiser, sampler, objective, condition),), rounds)
    return timed.counted


@dataclass(frozen=True)
class Timed:
    """A denoiser, how images are generated with it, and their cost; `with_times` adds what a clock says."""

    counted: Cost
    denoiser: Denoiser
    sampler: Sampler
    objective: Objective
    condition: Condition  # `counted.batch` entries
    seconds: tuple[float, ...] = ()  # of each timed generation of `counted.batch` samples


def with_times(models: Sequence[Timed], rounds: int) -> list[Timed]:
    """The same with seconds and memory: all forwards are timed in turns, then all generations; again if unsteady.

    Args:
        models: on one device
        rounds: timed forwards and generations of each
    """
    device = _device(models[0].denoiser)
    with torch.no_grad():
        forwards = steadiest(partial(in_turns, [_forward(m) for m in models], device, rounds))
    generations = steadiest(partial(in_turns, [_generation(m) for m in models], device, rounds, warmup=1))
    found = []
    for m, forward, generation in zip(models, forwards, generations, strict=True):
        per_image = Spread.of(seconds / m.counted.batch for seconds in generation)
        held = (*m.denoiser.parameters(), *m.denoiser.buffers())
        memory = peak_memory(_generation(m), device, held)
        counted = replace(m.counted, forward=Spread.of(forward), generation=per_image, peak_memory=memory)
        counted = replace(counted, resident=distinct_bytes(held))
        found.append(replace(m, counted=counted, seconds=tuple(generation)))
    return found


def _forward(m: Timed) -> Callable[[], Any]:
    device, batch = _device(m.denoiser), m.counted.batch
    x, t = torch.randn(batch, *m.denoiser.sample_shape, device=device), torch.full((batch,), 0.5, device=device)
    told = m.condition.map(lambda v: v.to(device))
    return lambda: m.denoiser(x, t, told)


def _generation(m: Timed) -> Callable[[], Any]:
    device = _device(m.denoiser)
    told, samples = m.condition.map(lambda v: v.to(device)), torch.arange(m.counted.batch)
    return lambda: m.sampler(m.denoiser, m.objective, told, samples)


def _device(denoiser: Denoiser) -> torch.device:
    return next(denoiser.parameters()).device


# ---- counting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    macs: int  # multiply-accumulates of matrix products, convolutions and attention
    activated: int  # parameter elements that were computed with
    forwards: int  # per image: two branches in one batch are two
    uncounted: tuple[str, ...] = ()  # operators without a formula: with any, `macs` is a lower bound
    held: int | None = None  # bytes that caches remember of all samples between evaluations, at most; None: no cache


def macs(denoiser: Denoiser, condition: Condition | None = None) -> int:
    """Multiply-accumulates of one forward of one sample, counted on the meta device."""
    return count_forward(twin(denoiser), condition or denoiser.example(), 1).macs


def twin(denoiser: Denoiser, adaptive: bool = True) -> Denoiser:
    """The same denoiser without weights: on the meta device and in eval mode.

    Args:
        denoiser: on any device
        adaptive: keep the edits whose work depends on samples or times; without them all of it is run
    """
    if _device(denoiser).type == "meta" and adaptive:
        return denoiser.eval()
    live = {
        name: editing.rebuild(editing.describe(e), _homes(denoiser), editing.Edit)
        for name, e in denoiser.applied.items()
        if adaptive or not e.adaptive
    }
    with torch.device("meta"):
        return editing.apply(denoiser.family.from_config(denoiser.base), live, fresh=False).eval()


def _homes(denoiser: Denoiser) -> tuple[str, ...]:
    """Packages of edits that are applied already, so that trusting them is no new decision."""
    return tuple({type(e).__module__.split(".")[0] for e in denoiser.applied.values()})


def count_forward(denoiser: Denoiser, condition: Condition, batch: int) -> Count:
    """One forward at t = 0.5, outside a generation, where the denoiser is; on the meta device nothing is computed."""
    return _forward_count(_Meter(denoiser), condition, batch)


def _forward_count(meter: _Meter, condition: Condition, batch: int) -> Count:
    meter(torch.zeros(batch, *meter.denoiser.sample_shape), torch.full((batch,), 0.5), condition)
    return meter.total(batch)


def count_generation(
    denoiser: Denoiser, sampler: Sampler, objective: Objective, condition: Condition, batch: int
) -> Count:
    """All evaluations of one generation of `batch` images: the sampler itself runs, and each call is counted."""
    return _generation_count(_Meter(denoiser), sampler, objective, condition, batch)


def _generation_count(meter: _Meter, sampler: Sampler, objective: Objective, condition: Condition, batch: int) -> Count:
    sampler(cast(Denoiser, meter), objective, condition, torch.arange(batch))
    return meter.total(batch)


class _Meter:
    """Stands before a denoiser, counts its calls, and lets the sampler run on the CPU where the model cannot run.

    A denoiser without edits does the same work whenever its inputs have the same shapes: such a call is counted once.
    """

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.device = denoiser, _device(denoiser)
        self.macs = self.samples = 0
        self.reads = _Reads()
        self.known: dict[tuple, tuple[int, Output]] = {}  # by the shapes of sample and text, and the taps
        self.caches = {name for name, e in denoiser.applied.items() if e.caches}
        self.held = 0  # bytes of what caches remember, at most

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)

    def parameters(self) -> Iterator[Tensor]:
        yield torch.empty(0, device="cpu" if self.device.type == "meta" else self.device)

    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, step: Step | None = None, taps: Collection[int] = ()
    ) -> Output:
        self.samples += len(x)
        shapes = x.shape, None if condition.text is None else condition.text.shape, tuple(taps)
        if shapes not in self.known:
            executed, out = self._run(x, t, condition, step, taps)
            if self.caches and step is not None:
                remembered = (v for key, v in step.memory.items() if key[0] in self.caches)
                self.held = max(self.held, distinct_bytes(tensors(remembered)))
            if self.device.type != "meta":
                self.macs += executed
                return out
            trace = {name: torch.zeros(v.shape) for name, v in out.trace.items()}
            answer = Output(*(None if v is None else torch.zeros(v.shape) for v in out[:2]), trace, out.grid)
            if self.denoiser.applied:
                self.macs += executed
                return answer
            self.known[shapes] = executed, answer
        executed, answer = self.known[shapes]
        self.macs += executed
        return answer

    def _run(
        self, x: Tensor, t: Tensor, condition: Condition, step: Step | None, taps: Collection[int]
    ) -> tuple[int, Output]:
        flops = Flops()
        try:
            with torch.no_grad(), self.reads, flops:
                told = condition.map(lambda v: v.to(self.device))
                out = self.denoiser(x.to(self.device), t.to(self.device), told, step=step, taps=taps)
        except (RuntimeError, ValueError) as error:  # torch raises them for operations that the meta device cannot run
            if self.device.type != "meta" or (isinstance(error, ValueError) and "meta" not in str(error)):
                raise
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{self.denoiser.name} cannot be counted without weights, count a real run (real=True; a command: "
                f"--real): {reason}"
            ) from error
        return flops.total // 2, out

    def total(self, batch: int) -> Count:
        missed = tuple(sorted(self.reads.uncounted))
        if missed:
            warnings.warn(
                f"{self.denoiser.name}: no FLOP formula for {', '.join(missed)}: MACs are a lower bound; "
                "torch.utils.flop_counter.register_flop_formula takes one",
                Uncounted,
                stacklevel=3,
            )
        held = self.held if self.caches else None
        return Count(self.macs, self.reads.elements(self.denoiser), self.samples // batch, missed, held)


class _Reads(TorchDispatchMode):
    """Records the parts of storages that operators read, and operators without a FLOP formula.

    Taking a view reads nothing: of a stack of experts, or of a layer narrowed by slicing, only the slices that enter
    an operator count.
    """

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self.views: dict[int, set[tuple]] = {}  # by storage: (size, stride, offset)
        self.uncounted: set[str] = set()  # names of operators without a FLOP formula

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if uncounted(func):
            self.uncounted.add(str(func))
        if not getattr(func, "is_view", False):
            for v in tensors((args, kwargs)):
                seen = self.views.setdefault(v.untyped_storage()._cdata, set())
                seen.add((tuple(v.shape), v.stride(), v.storage_offset()))
        return func(*args, **(kwargs or {}))

    def elements(self, module: nn.Module) -> int:
        """Distinct parameter elements of `module` that were read."""
        return sum(self._elements(p) for p in module.parameters())

    def _elements(self, p: Tensor) -> int:
        views = self.views.get(p.untyped_storage()._cdata, set())
        if any(torch.Size(size).numel() == p.numel() and 0 not in stride for size, stride, _ in views):
            return p.numel()
        mask = torch.zeros(p.untyped_storage().nbytes() // p.element_size(), dtype=torch.bool, device="cpu")
        for size, stride, offset in views:
            size = [1 if step == 0 else n for n, step in zip(size, stride, strict=True)]  # expanded, not more memory
            mask.as_strided(size, stride, offset).fill_(True)
        return int(mask.sum())
