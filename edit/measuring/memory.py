"""How much memory each device of a training run needs, and how long a step takes: arithmetic on parameter counts.

`held` counts the memory that a model occupies between two steps: weights, gradients, optimiser, average. `Probe`
measures what a step adds. A `Draft` puts both together into the `Plan` of a run; `changes` looks for smaller runs.
Keep some 5 % of the memory free: neither sees the allocator's fragmentation, workspaces of kernels, or temporaries of
loss terms.
Sizes are bytes, 1 GB = 1e9 bytes. Specification: methods/distillation.md, D0 and D6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import nn

from edit.denoiser import Denoiser
from edit.edits import shards, trains
from edit.measuring.looks import Look
from edit.measuring.probe import Probe
from edit.measuring.turns import Call, Turn
from edit.unit import Unit

Placement = Literal["replicated", "sharded", "offloaded", "tied"]  # of a frozen model
GB = 1e9
PCIE = 25 * GB  # bytes/s from main memory to a device
BUCKETS = 2 * 200_000_000  # elements: DeepSpeed's reduce and gather buckets as Lightning sets them
LIVE = 1_000_000_000  # elements: what ZeRO-3 may keep gathered, stage3_max_live_parameters


# ---- what a device holds --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Optimizer:
    """Bytes per trained parameter."""

    weights: int
    gradients: int
    state: int  # moments and, where there is one, the fp32 master copy

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.state


ADAMW = Optimizer(4, 4, 8)  # fp32 weights under autocast, as our recipes train
ADAMW_MIXED = Optimizer(2, 2, 12)  # bf16 weights and gradients, fp32 master and moments
ADAMW_MIXED_FP32_GRADIENTS = Optimizer(2, 4, 12)
ADAMW_ZERO = Optimizer(4, 4, 12)  # DeepSpeed makes an fp32 master copy even of fp32 weights
ADAMW_8BIT = Optimizer(4, 4, 2)  # fp32 weights, which are their own master, as our recipes train
ADAM_8BIT = Optimizer(2, 2, 2)  # bf16 weights with stochastic rounding
ADAM_8BIT_MASTER = Optimizer(2, 2, 6)
OPTIMIZERS = {"adamw": ADAMW, "adamw8bit": ADAMW_8BIT}  # by optimizer.kind


@dataclass(frozen=True)
class Strategy:
    """A parallelism strategy: which states of a trained model are divided by the number of devices."""

    name: str
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    average: bool = False


STRATEGIES = {
    s.name: s
    for s in (
        Strategy("single"),
        Strategy("ddp"),
        Strategy("fsdp2", weights=True, gradients=True, optimizer=True, average=True),
        Strategy("zero2", gradients=True, optimizer=True),
        Strategy("zero3", weights=True, gradients=True, optimizer=True, average=True),
    )
}


@dataclass(frozen=True)
class Role:
    """One model of a run: student, teacher, critic."""

    name: str
    params: int
    trained: int = 0  # parameters that are trained
    optimizer: Optimizer = ADAMW
    frozen_bytes: int = 2  # per parameter that is not trained
    placement: Placement = "replicated"  # of a frozen role; the strategy places a trained one
    average_bytes: int = 0  # per parameter of its moving average, which shares frozen weights unless FSDP2 shards them
    unit: int = 0  # parameters of its largest unit
    shard: int = 0  # parameters of the largest module that is gathered by itself beside the units (`Edit.shards`)
    outside: int = 0  # parameters outside all of these
    layer: int = 0  # parameters of its largest single layer

    def __post_init__(self):
        if not 0 <= self.trained <= self.params:
            raise ValueError(f"{self.name}: cannot train {self.trained} of {self.params} parameters")
        if self.trained and self.placement != "replicated":
            raise ValueError(f"{self.name} is trained, so its strategy places it: it cannot be {self.placement}")

    @property
    def gathered(self) -> int:
        """Elements gathered at once under sharding: a unit, what it calls by itself, the prefetched next of either, and
        all outside of these."""
        return min(self.params, self.unit + self.shard + max(self.unit, self.shard) + self.outside)


@dataclass(frozen=True)
class Held:
    """Bytes that one model occupies on a device between two steps."""

    weights: float
    gradients: float = 0
    optimizer: float = 0
    average: float = 0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.average


def held(role: Role, strategy: Strategy, devices: int) -> Held:
    """Bytes that a role occupies on each of `devices` between two steps.

    Raises:
        ValueError: if there is no device
    """
    if devices < 1:
        raise ValueError(f"a run needs at least 1 device, got {devices}")
    if not role.trained:
        share = {"replicated": 1, "sharded": 1 / devices, "offloaded": 0, "tied": 0}[role.placement]
        return Held(role.params * role.frozen_bytes * share)

    def share(divided: bool) -> float:
        return 1 / devices if divided else 1

    o, frozen = role.optimizer, (role.params - role.trained) * role.frozen_bytes
    return Held(
        weights=(role.trained * o.weights + frozen) * share(strategy.weights),
        gradients=role.trained * o.gradients * share(strategy.gradients),
        optimizer=role.trained * o.state * share(strategy.optimizer),
        average=(role.params if strategy.name == "fsdp2" else role.trained)
        * role.average_bytes
        * share(strategy.average),
    )


def transient(role: Role, strategy: Strategy, half: bool) -> float:
    """Bytes that a role needs for a moment while sharded or offloaded weights and gradients are gathered.

    Args:
        half: compute in bf16
    """
    if not role.trained:
        elements = {"replicated": 0, "sharded": role.gathered, "offloaded": 2 * role.layer, "tied": 0}[role.placement]
        return elements * role.frozen_bytes
    if strategy.name == "fsdp2":  # weights of two units, gradients of one, and its fp32 copy for the reduction
        return role.gathered * (2 if half else 4) + min(max(role.unit, role.shard), role.trained) * (6 if half else 4)
    buckets = min(role.trained, BUCKETS // 2) * 2 * 4 if strategy.name.startswith("zero") else 0
    return buckets + (min(role.params, LIVE) * 4 if strategy.name == "zero3" else 0)


def role_of(denoiser: Denoiser, name: str, optimizer: Optimizer = ADAMW, frozen: bool = False) -> Role:
    """A role from a structure on the meta device. Parameters that its edits freeze are not trained."""
    sizes = {n: p.numel() for n, p in denoiser.named_parameters()}
    live = dict(denoiser.named_parameters())
    trained = 0 if frozen else sum(s for n, s in sizes.items() if live[n].requires_grad and trains(denoiser, n))
    further = shards(denoiser)
    units = [m for m in denoiser.model.modules() if isinstance(m, Unit)]
    claimed: set[int] = set()

    def elements(module: nn.Module) -> int:
        """Of the parameters that no module inside of it has claimed."""
        mine = {id(p): p.numel() for p in module.parameters() if id(p) not in claimed}
        claimed.update(mine)
        return sum(mine.values())

    apart, whole = [elements(m) for m in further], [elements(u) for u in units]
    layers = [sum(p.numel() for p in m.parameters(recurse=False)) for m in denoiser.modules()]
    total = sum(sizes.values())
    outside = total - sum(whole) - sum(apart)
    largest = {"unit": max(whole), "shard": max(apart, default=0), "layer": max(layers)}
    return Role(name, total, trained, optimizer, outside=outside, **largest)


def stored(shape: Sequence[int], bytes: int = 2) -> int:
    """Bytes of a cached latent, text embedding or tap; `bytes` per element, 2 for bf16."""
    return math.prod(shape) * bytes


# ---- time -----------------------------------------------------------------------------------------------------------


def seconds(flops: float, peak: float, mfu: float = 0.45, devices: int = 1) -> float:
    """Seconds for `flops` of work on `devices` devices that reach the share `mfu` of their `peak` FLOP/s.

    Raises:
        ValueError: if the share does not lie in (0, 1]
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu is the share of the peak that is reached, above 0 and at most 1, got {mfu}")
    return flops / (peak * mfu * devices)


# ---- the plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Bytes per device at the worst moment of a training step, and the step's time."""

    weights: float
    gradients: float  # of all that is trained
    optimizer: float
    average: float
    critic: float  # its weights and optimiser
    teacher: float
    activations: float
    transients: float
    caches: float  # what edits remember between the evaluations of a rollout
    inputs: float
    seconds: float | None  # mean per optimiser step; None: the device's peak is unknown

    @property
    def total(self) -> float:
        return sum(self.memory().values())

    def memory(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if name != "seconds"}


@dataclass(frozen=True)
class Draft:
    """The numbers that decide the memory and time of a run; `dataclasses.replace` makes a changed run."""

    student: Probe
    strategy: Strategy = STRATEGIES["single"]
    devices: int = 1  # over all nodes
    batch: int = 1  # samples per device and micro-batch
    accumulate: int = 1
    half: bool = True  # bf16 autocast
    checkpointing: bool = False
    teacher: Probe | None = None  # None: there is none, or it is tied
    placement: Placement | None = None  # of the teacher; None: there is none
    teacher_bytes: int = 2
    calls: int = 1  # teacher forwards per sample, in one batch: 2 with classifier-free guidance
    critic: Probe | None = None
    based: bool = False  # the critic started as the student: it shares frozen weights unless FSDP2 shards them
    turns: tuple[Turn, ...] = ()  # kinds of steps; empty: the teacher is asked, then the student is trained
    own: int = 0  # parameters of loss terms, or of a few-step method
    optimizer: Optimizer = ADAMW  # of every trained parameter; DeepSpeed adds to it
    frozen: int = 0  # parameters of frozen models that losses look with, in fp32 and whole on each device
    remembered: int = 0  # bytes that edits remember of one sample between two steps
    peak: float | None = 989e12  # FLOP/s of a device
    mfu: float = 0.45

    def __post_init__(self):
        if self.devices > 1 and self.strategy.name == "single":
            raise ValueError(f"trainer.strategy=single uses 1 device, got {self.devices}: choose trainer=ddp or fsdp2")
        if min(self.devices, self.batch, self.accumulate) < 1:
            raise ValueError("devices, batch and accumulate are numbers of at least 1")
        if self.optimizer is not ADAMW and self.strategy.name.startswith("zero"):
            raise ValueError(f"trainer={self.strategy.name} takes optimizer.kind=adamw alone: use it, or trainer=fsdp2")
        if (self.teacher is None) != (self.placement in (None, "tied")):
            raise ValueError("a teacher is probed exactly if it has weights of its own: it is not tied")

    @property
    def kinds(self) -> tuple[Turn, ...]:
        """The kinds of optimiser steps."""
        asked = (Call("teacher", self.calls),) if self.placement else ()
        return self.turns or (Turn(1.0, (*asked, Call("student", reach="weights"))),)

    def probe(self, call: Call) -> Probe | Look:
        """The probe of the model that is called; a tied teacher has the student's."""
        if call.look is not None:
            return call.look
        found = {"student": self.student, "critic": self.critic, "teacher": self.teacher or self.student}[call.role]
        assert found is not None, "a method that asks a critic has one"
        return found

    def roles(self) -> dict[str, Role]:
        """Student, critic and teacher, as far as they exist and have weights of their own."""
        kind = ADAMW_ZERO if self.strategy.name.startswith("zero") else self.optimizer
        student = replace(role_of(self.student.denoiser, "student", kind), frozen_bytes=4, average_bytes=4)
        found = {"student": student}
        if self.critic is not None:
            shares = self.based and self.strategy.name != "fsdp2"
            found["critic"] = replace(role_of(self.critic.denoiser, "critic", kind), frozen_bytes=0 if shares else 4)
        if self.teacher is not None:
            teacher = role_of(self.teacher.denoiser, "teacher", frozen=True)
            assert self.placement is not None
            found["teacher"] = replace(teacher, frozen_bytes=self.teacher_bytes, placement=self.placement)
        return found

    def states(self) -> dict[str, Held]:
        """Memory of each role between two of its steps; "own": the parameters of loss terms or of the method."""
        roles = self.roles()
        own = Role("own", self.own, self.own, roles["student"].optimizer)
        return {name: held(role, self.strategy, self.devices) for name, role in {**roles, "own": own}.items()}

    @property
    def alternates(self) -> bool:
        """Whether no step trains both student and critic: then their gradients never exist at the same time."""
        trained = [{c.role for c in turn.calls if c.reach == "weights"} for turn in self.kinds]
        apart = self.critic is not None and all(len(roles) < 2 for roles in trained)
        return apart and self.strategy.name in ("single", "fsdp2")

    def moment(self, turn: Turn, checkpointing: bool) -> tuple[float, float]:
        """Transients and activations at the worst moment of a step.

        Outputs of no-grad calls stay alive; graphs are freed last-in, first-out.
        """
        roles, states = self.roles(), self.states()
        keeps = (
            self.strategy.name == "single" and self.accumulate == 1
        )  # else gradients are in buckets or shards, or older
        alive, moments, ends = 0.0, [(0.0, 0.0)], []
        for call in turn.calls:
            there = transient(roles[call.role], self.strategy, self.half) if call.role in roles else 0.0
            samples, dtype = math.ceil(call.samples * self.batch), self._dtype(call.role)
            if call.reach == "nothing":
                a = self.probe(call).ask(samples, self.half, dtype)
                moments.append((there, alive + a.peak))
                alive += a.kept
                continue
            recomputed = checkpointing and call.checkpointed
            a = self.probe(call).step(samples, self.half, recomputed, dtype, call.reach == "input")
            # Lightning drops the last step's gradients between forward and backward
            made = a.kept - states[call.role].gradients if keeps and call.reach == "weights" else a.flowing
            moments.append((there, alive + a.forward))
            ends.append((there, alive + made))  # later graphs are gone by then
            alive += a.stored
        return max(moments + ends, key=sum)

    def _dtype(self, role: str) -> torch.dtype:
        if role == "teacher" and self.teacher is not None:
            return torch.bfloat16 if self.teacher_bytes == 2 else torch.float32
        sharded = self.strategy.name == "fsdp2"  # gives units bf16 weights: autocast makes no copies
        return torch.bfloat16 if sharded and self.half else torch.float32

    def seconds(self) -> float | None:
        """Seconds of an optimiser step, mean over the run; None: the device's peak is unknown."""
        if self.peak is None:
            return None
        calls = [(turn.share, call) for turn in self.kinds for call in turn.calls]
        flops = sum(
            share * call.flops(self.probe(call).macs(), self.checkpointing and call.checkpointed)
            for share, call in calls
        )
        took = seconds(flops * self.batch, self.peak, self.mfu)
        if self.placement == "offloaded":
            teacher = self.roles()["teacher"]
            took += sum(s for s, c in calls if c.role == "teacher") * teacher.params * teacher.frozen_bytes / PCIE
        return took * self.accumulate

    def plan(self) -> Plan:
        """Memory and time of this run.

        Raises:
            ValueError: if the structure cannot be run without weights
        """
        states = self.states()
        mine, own, critic = states["student"], states["own"], states.get("critic", Held(0))
        transients, activations = max((self.moment(turn, self.checkpointing) for turn in self.kinds), key=sum)
        both = mine.gradients, critic.gradients + own.gradients
        sample = stored(self.student.shape, 4)
        told = sum(v.nbytes for v in vars(self.student.condition).values() if v is not None)
        return Plan(
            weights=mine.weights + own.weights + 4 * self.frozen,
            gradients=max(both) if self.alternates else sum(both),
            optimizer=mine.optimizer + own.optimizer,
            average=mine.average,
            critic=critic.weights + critic.optimizer,
            teacher=states["teacher"].total if self.teacher else 0.0,
            activations=activations,
            transients=transients,
            caches=self.batch * self.remembered,
            inputs=self.batch * (3 * sample + told),  # clean, noise, noisy
            seconds=self.seconds(),
        )


@dataclass(frozen=True)
class Change:
    words: str  # what to type
    total: float  # bytes per device with it


def changes(draft: Draft, capacity: float) -> Iterator[Change]:
    """Changes that make a run smaller: each alone and then, if none is enough, several together until the run fits.

    The images per step stay the same, unless devices are added.
    """
    steps = list(_smaller(draft))
    singles = [Change(words, alter(draft).plan().total) for words, alter in steps]
    yield from singles
    if any(c.total <= capacity for c in singles):
        return
    said: list[str] = []
    for words, alter in steps:
        if words.startswith("teacher.placement=offloaded") and "teacher.placement=sharded" in said:
            said.remove("teacher.placement=sharded")
        draft, said = alter(draft), [*said, words]
        total = draft.plan().total
        if len(said) > 1 and total <= capacity:
            yield Change(" ".join(said), total)
            return


def _smaller(draft: Draft) -> Iterator[tuple[str, Callable[[Draft], Draft]]]:
    if not draft.checkpointing:
        yield "trainer.gradient_checkpointing=true", lambda d: replace(d, checkpointing=True)
    if draft.strategy.name not in ("fsdp2", "zero3"):
        more = draft.devices if draft.devices > 1 else 8
        fsdp2 = STRATEGIES["fsdp2"]  # whose trainer group has checkpointing on
        words = f"trainer=fsdp2 trainer.devices={more}"
        yield words, lambda d: replace(d, strategy=fsdp2, devices=more, checkpointing=True)
    zero = draft.strategy.name.startswith("zero")  # which does not share with FSDP2
    if draft.teacher is not None and draft.placement == "replicated" and draft.devices > 1 and not zero:
        yield "teacher.placement=sharded", lambda d: replace(d, placement="sharded")
    tapped = any(c.role == "teacher" and c.reach == "input" for turn in draft.kinds for c in turn.calls)
    if draft.teacher is not None and draft.placement in ("replicated", "sharded") and not tapped:
        yield "teacher.placement=offloaded", lambda d: replace(d, placement="offloaded")
    if draft.batch > 1:
        half, times = draft.batch // 2, draft.accumulate * 2
        words = f"data.batch_size={half} trainer.accumulate={times}"
        yield words, lambda d: replace(d, batch=half, accumulate=times)
        if half > 1:
            one, all_ = 1, draft.accumulate * draft.batch
            words = f"data.batch_size={one} trainer.accumulate={all_}"
            yield words, lambda d: replace(d, batch=one, accumulate=all_)


def refuse(draft: Draft, capacity: float) -> Plan:
    """Return the plan of a run that fits, and refuse one that does not.

    Args:
        capacity: bytes of a device's memory

    Raises:
        ValueError: if it does not fit; the message lists changes that help
    """
    plan = draft.plan()
    if plan.total <= capacity:
        return plan
    fitting = [c for c in changes(draft, capacity) if c.total <= capacity]
    advice = " or ".join(f"{c.words} ({c.total / GB:.1f} GB)" for c in fitting[:3])
    advice = advice or "a smaller backbone, or more devices that share it (trainer=fsdp2)"
    raise ValueError(
        f"a training step needs {plan.total / GB:.1f} GB on each device, which has {capacity / GB:.1f} GB: use {advice}"
    )
