"""Whether a training run fits on its devices and how long it takes, before anything is launched.

    python -m recipes.plan experiment=dit_xl_2/baseline devices=8 gpu=40
    python -m recipes.plan backbone=flux_dev data=latents trainer=fsdp2 devices=8 image=1024

What a device holds all the time (weights, gradients, optimiser, average, teacher) is arithmetic on parameter counts:
`held`. What a step adds is measured: `edit.measuring.probe`. Keep some 5 % of the memory free for what neither
sees: the allocator's fragmentation, workspaces of kernels, temporaries of loss terms.
Sizes are bytes, 1 GB = 1e9 bytes. Specification: methods/distillation.md, D0 and D6.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from edit.denoiser import Denoiser, Unit
from edit.edits import trains
from edit.inputs.command import Parser, guarded
from edit.measuring.devices import peak_flops
from edit.measuring.probe import Probe
from edit.measuring.turns import Call, Turn, turns
from edit.objectives import wanted
from edit.stream import Condition
from recipes.cost import short

Placement = Literal["replicated", "sharded", "offloaded", "tied"]
GB = 1e9
MOST_DEVICES = 1_000_000
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


ADAMW = Optimizer(4, 4, 8)  # on fp32 weights under autocast: what our recipe does
ADAMW_MIXED = Optimizer(2, 2, 12)  # bf16 weights and gradients, fp32 master and moments
ADAMW_MIXED_FP32_GRADIENTS = Optimizer(2, 4, 12)
ADAMW_ZERO = Optimizer(4, 4, 12)  # DeepSpeed makes its own fp32 master, of fp32 weights too
ADAMW_8BIT = Optimizer(4, 4, 2)  # on fp32 weights, which are their own master: what our recipe does
ADAM_8BIT = Optimizer(2, 2, 2)  # on bf16 weights, rounded at random
ADAM_8BIT_MASTER = Optimizer(2, 2, 6)
OPTIMIZERS = {"adamw": ADAMW, "adamw8bit": ADAMW_8BIT}  # by optimizer.kind


@dataclass(frozen=True)
class Strategy:
    """Which states of the trained model are divided by the number of devices."""

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
    trained: int = 0  # of them
    optimizer: Optimizer = ADAMW
    frozen_bytes: int = 2  # per parameter that is not trained
    placement: Placement = "replicated"  # of a role that is not trained; the strategy places the others
    average_bytes: int = 0  # per parameter of its moving average, which shares what is not trained unless sharded
    unit: int = 0  # parameters of its largest unit
    outside: int = 0  # parameters outside all units
    layer: int = 0  # parameters of its largest single layer

    def __post_init__(self):
        if not 0 <= self.trained <= self.params:
            raise ValueError(f"{self.name}: cannot train {self.trained} of {self.params} parameters")
        if self.trained and self.placement != "replicated":
            raise ValueError(f"{self.name} is trained, so its strategy places it: it cannot be {self.placement}")

    @property
    def gathered(self) -> int:
        """Elements that sharding has gathered at once: a unit, the one prefetched, and what is outside of units."""
        return min(self.params, 2 * self.unit + self.outside)


@dataclass(frozen=True)
class Held:
    """Bytes per device."""

    weights: float
    gradients: float = 0
    optimizer: float = 0
    average: float = 0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.average


def held(role: Role, strategy: Strategy, devices: int) -> Held:
    """What a role occupies on each of `devices`, between two steps.

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
    """Bytes that a role's weights and gradients need on top for a moment, because they are not where they are used.

    Args:
        half: computes in bf16
    """
    if not role.trained:
        elements = {"replicated": 0, "sharded": role.gathered, "offloaded": 2 * role.layer, "tied": 0}[role.placement]
        return elements * role.frozen_bytes
    if strategy.name == "fsdp2":  # weights of two units, gradients of one, and these once more in fp32 to be reduced
        return role.gathered * (2 if half else 4) + min(role.unit, role.trained) * (6 if half else 4)
    buckets = min(role.trained, BUCKETS // 2) * 2 * 4 if strategy.name.startswith("zero") else 0
    return buckets + (min(role.params, LIVE) * 4 if strategy.name == "zero3" else 0)


def role_of(denoiser: Denoiser, name: str, optimizer: Optimizer = ADAMW, frozen: bool = False) -> Role:
    """A role from a structure on the meta device; what its edits freeze is not trained."""
    sizes = {n: p.numel() for n, p in denoiser.named_parameters()}
    live = dict(denoiser.named_parameters())
    trained = 0 if frozen else sum(s for n, s in sizes.items() if live[n].requires_grad and trains(denoiser, n))
    units = [sum(p.numel() for p in u.parameters()) for u in denoiser.model.modules() if isinstance(u, Unit)]
    layers = [sum(p.numel() for p in m.parameters(recurse=False)) for m in denoiser.modules()]
    total = sum(sizes.values())
    return Role(name, total, trained, optimizer, unit=max(units), outside=total - sum(units), layer=max(layers))


def stored(shape: Sequence[int], bytes: int = 2) -> int:
    """Bytes of a cached latent, text embedding or tap, in bf16 unless said otherwise."""
    return math.prod(shape) * bytes


# ---- time -----------------------------------------------------------------------------------------------------------


def seconds(flops: float, peak: float, mfu: float = 0.45, devices: int = 1) -> float:
    """Time of `flops` of work that is spread over devices of `peak` FLOP/s, of which it reaches the share `mfu`.

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
    inputs: float
    seconds: float | None  # per optimiser step, in the mean; None: the device's peak is unknown

    @property
    def total(self) -> float:
        return sum(self.memory().values())

    def memory(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if name != "seconds"}


@dataclass(frozen=True)
class Draft:
    """A run as it would be launched; `dataclasses.replace` makes another."""

    student: Probe
    strategy: Strategy = STRATEGIES["single"]
    devices: int = 1  # of all nodes
    batch: int = 1  # samples per device and micro-batch
    accumulate: int = 1
    half: bool = True  # bf16 autocast
    checkpointing: bool = False
    teacher: Probe | None = None  # None, too, if it is tied
    placement: Placement | None = None  # of the teacher; None: there is none
    teacher_bytes: int = 2
    calls: int = 1  # teacher forwards per sample, in one batch: 2 with classifier-free guidance
    critic: Probe | None = None
    based: bool = False  # the critic started as the student, whose frozen weights it shares unless sharded
    turns: tuple[Turn, ...] = ()  # kinds of steps; empty: the teacher is asked, then the student is trained
    own: int = 0  # parameters of loss terms, or of a few-step method
    optimizer: Optimizer = ADAMW  # of all that is trained; DeepSpeed's adds to it
    vision: int = 0  # of its frozen vision model, in fp32 and whole on each device
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
        """Of steps."""
        asked = (Call("teacher", self.calls),) if self.placement else ()
        return self.turns or (Turn(1.0, (*asked, Call("student", reach="weights"))),)

    def probe(self, role: str) -> Probe:
        """What a role's forward runs; a tied teacher's is the student's."""
        found = {"student": self.student, "critic": self.critic, "teacher": self.teacher or self.student}[role]
        assert found is not None, "a method that asks a critic has one"
        return found

    def roles(self) -> dict[str, Role]:
        """Student, critic and teacher, those that there are with weights of their own."""
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
        """What each role occupies between two steps of its own, and "own" what loss terms or method train."""
        roles = self.roles()
        own = Role("own", self.own, self.own, roles["student"].optimizer)
        return {name: held(role, self.strategy, self.devices) for name, role in {**roles, "own": own}.items()}

    @property
    def alternates(self) -> bool:
        """No step trains both student and critic, so that gradients of one are gone when the other's are made."""
        trained = [{c.role for c in turn.calls if c.reach == "weights"} for turn in self.kinds]
        apart = self.critic is not None and all(len(roles) < 2 for roles in trained)
        return apart and self.strategy.name in ("single", "fsdp2")

    def moment(self, turn: Turn, checkpointing: bool) -> tuple[float, float]:
        """Transients and activations at the worst moment of a step: what was asked is kept, graphs end in reverse."""
        roles, states = self.roles(), self.states()
        keeps = self.strategy.name == "single" and self.accumulate == 1  # elsewhere in buckets, shards or from before
        alive, moments, ends = 0.0, [(0.0, 0.0)], []
        for call in turn.calls:
            there = transient(roles[call.role], self.strategy, self.half) if call.role in roles else 0.0
            samples, dtype = math.ceil(call.samples * self.batch), self._dtype(call.role)
            if call.reach == "nothing":
                a = self.probe(call.role).ask(samples, self.half, dtype)
                moments.append((there, alive + a.peak))
                alive += a.kept
                continue
            recomputed = checkpointing and call.role != "teacher"
            a = self.probe(call.role).step(samples, self.half, recomputed, dtype, call.reach == "input")
            # Lightning drops the last step's gradients between forward and backward
            made = a.kept - states[call.role].gradients if keeps and call.reach == "weights" else a.flowing
            moments.append((there, alive + a.forward))
            ends.append((there, alive + made))  # later graphs are gone by then
            alive += a.stored
        return max(moments + ends, key=sum)

    def _dtype(self, role: str) -> torch.dtype:
        if role == "teacher" and self.teacher is not None:
            return torch.bfloat16 if self.teacher_bytes == 2 else torch.float32
        sharded = self.strategy.name == "fsdp2"  # hands bf16 weights to units: autocast has nothing to copy
        return torch.bfloat16 if sharded and self.half else torch.float32

    def seconds(self) -> float | None:
        """Of an optimiser step, in the mean over the run."""
        if self.peak is None:
            return None
        calls = [(turn.share, call) for turn in self.kinds for call in turn.calls]
        flops = sum(
            share * call.flops(self.probe(call.role).macs(), self.checkpointing and call.role != "teacher")
            for share, call in calls
        )
        took = seconds(flops * self.batch, self.peak, self.mfu)
        if self.placement == "offloaded":
            teacher = self.roles()["teacher"]
            took += sum(s for s, c in calls if c.role == "teacher") * teacher.params * teacher.frozen_bytes / PCIE
        return took * self.accumulate

    def plan(self) -> Plan:
        """Raises ValueError if the structure cannot be run without weights."""
        states = self.states()
        mine, own, critic = states["student"], states["own"], states.get("critic", Held(0))
        transients, activations = max((self.moment(turn, self.checkpointing) for turn in self.kinds), key=sum)
        both = mine.gradients, critic.gradients + own.gradients
        sample = stored(self.student.shape, 4)
        told = sum(v.nbytes for v in vars(self.student.condition).values() if v is not None)
        return Plan(
            weights=mine.weights + own.weights + 4 * self.vision,
            gradients=max(both) if self.alternates else sum(both),
            optimizer=mine.optimizer + own.optimizer,
            average=mine.average,
            critic=critic.weights + critic.optimizer,
            teacher=states["teacher"].total if self.teacher else 0.0,
            activations=activations,
            transients=transients,
            inputs=self.batch * (3 * sample + told),  # clean, noise, noisy
            seconds=self.seconds(),
        )


@dataclass(frozen=True)
class Change:
    words: str  # what to type
    total: float  # bytes per device with it


def changes(draft: Draft, capacity: float) -> Iterator[Change]:
    """What would make a run smaller: each change alone and then, if none is enough, one after another until it fits.

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
    """The plan of a run that fits.

    Args:
        capacity: bytes of a device's memory

    Raises:
        ValueError: if it does not fit, with what to change
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


# ---- command line ---------------------------------------------------------------------------------------------------

EXAMPLES = """examples:
  python -m recipes.plan                                                     the default run
  python -m recipes.plan experiment=dit_digits/depth init=runs/digits
  python -m recipes.plan experiment=dit_xl_2/baseline devices=8 gpu=40
  python -m recipes.plan backbone=flux_dev trainer=fsdp2 devices=8 image=1024 data.batch_size=1 --json

settings are those of train.py, in the same words, and:
  devices=N       short for trainer.devices=N
  gpu=GB          memory of a device (80)
  image=PX        rows and columns of an image, or ROWSxCOLUMNS; a model of more than 3 channels reads latents of an
                  eighth of that. Without it: the data set's, where it can be read here or before tells how it is
                  made, or the backbone's own
  text=N          tokens of a prompt (512), where the data set does not tell
  peak=TFLOPS     of a device in bf16 (the GPU of this machine where it is known, else an H100's 989); on a CPU there
                  is no estimate of time without it
  mfu=SHARE       of the peak that a step reaches (0.45)
Settings that are still missing, such as a path, do not matter here unless they decide the structure."""
MOST_TOKENS = 100_000
OWN = ("gpu", "image", "text", "peak", "mfu")


@dataclass(frozen=True)
class Request:
    """The words of the command line that are not train.py's."""

    gpu: float = 80
    image: tuple[int, int] | None = None
    text: int = 512
    peak: float | None = None  # TFLOP/s
    mfu: float = 0.45
    overrides: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, words: Sequence[str]) -> Request:
        """Raises ValueError for a value that is not of its kind."""
        values: dict[str, Any] = {}
        overrides = []
        for word in words:
            key, _, text = word.partition("=")
            if key == "devices":
                overrides.append(f"trainer.devices={text}")
            elif key not in OWN:
                overrides.append(word)
            elif key == "image":
                parts = text.split("x") * (1 if "x" in text else 2)
                if len(parts) != 2 or not all(re.fullmatch("[0-9]{1,5}", p) and int(p) for p in parts):
                    raise ValueError(f"image is a number of pixels, or rows x columns as in 1024x768, got {text!r}")
                values[key] = int(parts[0]), int(parts[1])
            else:
                kind = int if key == "text" else float
                try:
                    values[key] = kind(text)
                except ValueError:
                    usual = getattr(cls, key) or 989
                    raise ValueError(f"{key} is a number, as in {key}={usual}, got {text!r}") from None
                if not 0 < values[key] < math.inf:
                    raise ValueError(f"{key} must be more than 0, got {text}")
                if key == "text" and values[key] > MOST_TOKENS:
                    raise ValueError(f"text must be at most {MOST_TOKENS} tokens, got {text}")
        return cls(**values, overrides=tuple(overrides))


@guarded
def main(argv: list[str]) -> int:
    """The command line: 0 if the run fits, 1 if it does not, 2 after one sentence about what the user can mend."""
    parser = Parser(
        prog="python -m recipes.plan",
        description="Memory per device and time of a training run, without weights, data or a GPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="the run, see below")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    configs = Path(__file__).parents[1] / "configs"
    parser.add_argument("--configs", type=Path, default=configs, help="folder of the configuration groups")
    args = parser.parse_intermixed_args(argv)
    try:
        with Console(stderr=True).status("planning"):
            request = Request.of(args.settings)
            report = resolve(request, compose(args.configs, request.overrides))
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2)) if args.json else show(report)
    return 0 if report["fits"] else 1


def compose(configs: Path, overrides: Sequence[str]) -> Any:
    """The configuration that train.py would run, as far as it is given.

    Raises:
        ValueError: for the first mistake in it; values that are missing are none, except in the backbone
    """
    import hydra

    from recipes.config.check import TRUSTED
    from recipes.config.conflicts import unbuilt
    from recipes.config.explain import explain
    from recipes.config.mistakes import mistakes
    from recipes.config.sources import register

    register()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(configs.resolve())):
            cfg = hydra.compose("train", list(overrides))
    except Exception as error:  # what Hydra makes of words that are no settings is of many kinds
        raise ValueError(explain(error, configs, overrides)) from error
    found = mistakes(cfg, "", (*TRUSTED, *cfg.trusted))
    wrong = [m for m in found if " has no value; " not in m or m.startswith("backbone")] or list(unbuilt(cfg))
    if wrong:
        raise ValueError(wrong[0])
    return cfg


def resolve(request: Request, cfg: Any) -> dict[str, Any]:
    """Plan the run that a configuration describes."""
    notes: list[str] = []
    draft = draft_of(request, cfg, notes)
    plan, capacity = draft.plan(), request.gpu * GB
    fits = plan.total <= capacity
    roles = draft.roles()
    condition = draft.student.condition
    both = {c: max((draft.moment(turn, c) for turn in draft.kinds), key=sum)[1] for c in (False, True)}
    return {
        "strategy": draft.strategy.name,
        "devices": draft.devices,
        "batch": draft.batch,
        "accumulate": draft.accumulate,
        "checkpointing": draft.checkpointing,
        "precision": "bf16-mixed" if draft.half else "32-true",
        "sample": draft.student.shape,
        "parameters": roles["student"].params,
        "trained": roles["student"].trained,
        "teacher_parameters": roles["teacher"].params if draft.teacher else 0,
        "critic_parameters": roles["critic"].params if draft.critic else 0,
        "matching": cfg.matching is not None,
        "calls": calls_of(draft.kinds),
        "placement": draft.placement,
        "memory": plan.memory(),
        "activations_without_checkpointing": both[False],
        "activations_with_checkpointing": both[True],
        "latent_per_image": stored(draft.student.shape),
        "text_per_prompt": 0 if condition.text is None else stored(condition.text.shape[1:]),
        "total": plan.total,
        "capacity": capacity,
        "fits": fits,
        "changes": [] if fits else [asdict(c) for c in changes(draft, capacity)],
        "macs": draft.student.macs(),
        "seconds_per_step": plan.seconds,
        "steps": cfg.trainer.max_steps,
        "seconds": None if plan.seconds is None else plan.seconds * cfg.trainer.max_steps,
        "peak": draft.peak,
        "mfu": draft.mfu,
        "notes": notes,
    }


def calls_of(turns: Sequence[Turn]) -> dict[str, dict[str, float]]:
    """Forwards of one sample in a step, in the mean over the run: by role, and by what their backward reaches."""
    found: dict[str, dict[str, float]] = {}
    for turn in turns:
        for call in turn.calls:
            reaches = found.setdefault(call.role, {})
            reaches[call.reach] = reaches.get(call.reach, 0.0) + turn.share * call.samples
    return found


def draft_of(request: Request, cfg: Any, notes: list[str]) -> Draft:
    """A draft from a composed configuration; what had to be assumed is appended to `notes`.

    Raises:
        ValueError: if its parts do not fit together
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    from edit import edits as editing
    from edit.artifacts.checkpoint import skeleton

    def made(node: Any) -> Any:
        try:
            return instantiate(node, _convert_="all")
        except InstantiationException as error:
            raise ValueError(str(error.__cause__ or error).split("\nfull_key")[0]) from error

    trainer, trusted = cfg.trainer, tuple(cfg.trusted)
    cpu = trainer.accelerator == "cpu"
    half = trainer.precision == "bf16-mixed" or (trainer.precision == "auto" and not cpu)
    spec, edits, terms = made(cfg.backbone), made(cfg.edits) or {}, made(cfg.terms) or {}
    matching = made(cfg.get("matching"))
    needy = any(t.needs_teacher for t in terms.values()) or (matching is not None and matching.needs_teacher)

    def read(path: str | None, what: str) -> Callable[[], Denoiser]:
        """The structure that lies at a path, or the backbone group's."""
        if path and not str(path).endswith((".pt", ".pth")):
            try:
                skeleton(path, trusted)
                return lambda: skeleton(path, trusted)
            except (OSError, ValueError) as error:
                notes.append(
                    f"{what}={path} cannot be read here ({error}), so the backbone group's structure stands in"
                )
        return spec.build

    def settled(structure: Callable[[], Denoiser]) -> Callable[[], Denoiser]:
        def build() -> Denoiser:
            denoiser = structure()
            denoiser.settle(shape, spec)
            return denoiser

        return build

    start = read(cfg.init, "init")
    with torch.device("meta"):
        plain = start()
    shape, condition = _sample(request, cfg, plain, notes)
    base = settled(start)
    student = Probe(lambda: editing.apply(base(), edits, fresh=False), shape, condition, *wanted(terms.values()))

    teacher, placement, calls, kind = None, None, 1, "auto"
    node, path = cfg.get("teacher") or {}, (cfg.get("teacher") or {}).get("path")
    if path or node.get("placement") == "tied" or needy:
        placement, kind, scale = node.get("placement", "replicated"), node.get("dtype", "auto"), node.get("guidance", 1)
        calls = 1 if scale in (1, [1, 1]) else 2
        if placement != "tied":
            if not path:
                notes.append("teacher.path is not given, so the backbone group's structure stands in")
            asked = wanted(terms.values(), teacher=True) if matching is None else (matching.teacher_taps,)
            teacher = Probe(settled(read(path, "teacher.path")), shape, condition, *asked)
        if placement == "sharded" and trainer.strategy == "single":
            raise ValueError("teacher.placement=sharded needs several devices: use trainer=ddp or trainer=fsdp2")
        if placement == "sharded" and trainer.strategy.startswith("zero"):
            raise ValueError("teacher.placement=sharded is FSDP2's, not DeepSpeed's: use trainer=fsdp2 or replicated")
    with torch.device("meta"):
        models = student.denoiser, (teacher or student).denoiser
        makers = [*terms.values(), *([] if matching is None else [matching])]
        owns = [m.build(models[0], models[1] if placement else None) for m in makers]
    calls = 1 if models[1].config.get("guidance_embeds") else calls
    critic, based, kinds = None, False, ()
    if matching is not None:
        if matching.teacher_taps and placement in ("tied", "offloaded"):
            raise ValueError(
                f"teacher.placement={placement}: {type(matching).__name__} looks at the teacher's taps, whose weights "
                "must stay in place: use replicated or sharded"
            )
        if matching.has_critic:
            based = cfg.critic.start == "student" or teacher is None
            critic = Probe(student.structure if based else teacher.structure, shape, condition)
        kinds = turns(matching, student, teacher, owns[-1], calls)
    vision = 0
    if matching is not None and matching.vision is not None:
        vision = sum(p.numel() for p in matching.vision.structure().parameters())
        notes.append(
            "the vision model's weights are counted, but neither the data set's decoder nor what both keep for the "
            "backward pass: 8 to 10 GB for an image of 1024 px, in proportion to its pixels with matching.vision.crop"
        )
    peak = request.peak * 1e12 if request.peak else (None if cpu else _peak_here() or 989e12)
    return Draft(
        student=student,
        strategy=STRATEGIES[trainer.strategy],
        devices=_devices(trainer),
        batch=cfg.data.batch_size,
        accumulate=trainer.accumulate,
        half=half,
        checkpointing=trainer.gradient_checkpointing,
        teacher=teacher,
        placement=placement,
        teacher_bytes=2 if kind == "bf16" or (kind == "auto" and half) else 4,
        calls=calls,
        critic=critic,
        based=based,
        turns=kinds,
        own=sum(p.numel() for o in owns if o is not None for p in o.parameters()),
        optimizer=OPTIMIZERS[cfg.optimizer.kind],
        vision=vision,
        peak=peak,
        mfu=request.mfu,
    )


def _devices(trainer: Any) -> int:
    if trainer.devices != "auto":
        given = trainer.devices
        if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= MOST_DEVICES:
            raise ValueError(f"devices is a number from 1 to {MOST_DEVICES}, or auto, got {given!r}")
        return trainer.devices * trainer.num_nodes
    if trainer.accelerator != "cpu" and torch.cuda.device_count():
        return torch.cuda.device_count() * trainer.num_nodes
    raise ValueError("trainer.devices=auto counts the GPUs of a machine, and this one has none: say devices=8")


def _peak_here() -> float | None:
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _sample(request: Request, cfg: Any, denoiser: Denoiser, notes: list[str]) -> tuple[tuple[int, ...], Condition]:
    """Shape and condition of one sample."""
    if request.image is not None:
        channels = denoiser.sample_shape[0]
        shrink = 8 if channels > 3 else 1
        if any(side % shrink for side in request.image):
            raise ValueError(f"image must be a multiple of {shrink} pixels, which its latents shrink it by")
        return (channels, *(side // shrink for side in request.image)), denoiser.example(text=request.text)
    from hydra.utils import instantiate

    from recipes.config.errors import one_line
    from recipes.data_set import conditions

    try:
        data = instantiate(cfg.data.set, _convert_="all")
        return tuple(data.shape), conditions(data)(torch.arange(1))
    except Exception as error:  # whatever a data set raises that is not here: it is not needed
        told = _told_before(cfg)
        c, y, x = denoiser.sample_shape
        y, x = told.get("size") or y, told.get("size") or x
        text = told.get("max_tokens", request.text)
        whose = "as data.generate is told in before" if told else "the backbone's own"
        notes.append(
            f"the data set cannot be read here ({one_line(error)}), so samples are {whose}, {c}x{y}x{x}, and prompts "
            f"have {text} tokens; image= and text= change that"
        )
        return (c, y, x), denoiser.example(text=text)


def _told_before(cfg: Any) -> dict[str, Any]:
    """Settings of the data.generate that `before` has for the data set; none if it makes another or none.

    Raises:
        ValueError: for a setting that data.generate does not have
    """
    from data.generate import parse

    orders = [parse(words[1:]) for words in cfg.before if list(words)[:1] == ["data.generate"]]
    return next((order for order in orders if order["out"] == cfg.data.set.get("path")), {})


def show(r: dict[str, Any]) -> None:
    """Print a report as a table."""
    m, console = r["memory"], Console()
    title = f"{r['devices']} x {r['strategy']}, {r['batch']} samples each, {r['precision']}"
    table = Table("per device", "GB", title=title, title_justify="left")
    trained = "" if r["trained"] == r["parameters"] else f", {short(r['trained'])} trained"
    table.add_row(f"weights ({short(r['parameters'])}{trained})", gigabytes(m["weights"]))
    table.add_row("gradients", gigabytes(m["gradients"]))
    table.add_row("optimiser", gigabytes(m["optimizer"]))
    table.add_row("moving average", gigabytes(m["average"]))
    if r["placement"]:
        size = f", {short(r['teacher_parameters'])}" if r["teacher_parameters"] else ""
        table.add_row(f"teacher ({r['placement']}{size})", gigabytes(m["teacher"]))
    if r["critic_parameters"]:
        table.add_row(f"critic ({short(r['critic_parameters'])}), its optimiser", gigabytes(m["critic"]))
    with_, without = (r[f"activations_{k}_checkpointing"] for k in ("with", "without"))
    state = "with" if r["checkpointing"] else "without"
    table.add_row(f"activations, {state} checkpointing", gigabytes(m["activations"]))
    other = ("without", without) if r["checkpointing"] else ("with", with_)
    table.add_row(f"  {other[0]} it", f"({gigabytes(other[1])})")
    table.add_row("transients: gathered weights, buckets", gigabytes(m["transients"]))
    table.add_row("inputs", gigabytes(m["inputs"]), end_section=True)
    table.add_row("total", gigabytes(r["total"]))
    table.add_row("memory of a device", gigabytes(r["capacity"]), end_section=True)
    if r["seconds"] is not None:
        table.add_row("seconds per step", f"{r['seconds_per_step']:.3g}")
        table.add_row(f"the run of {r['steps']} steps", duration(r["seconds"]))
    console.print(table)
    if r["matching"]:
        console.print(f"Forwards of a sample per step: {forwards(r['calls'])}.")
    text = f", {r['text_per_prompt'] / 1e6:.3g} MB of text per prompt" if r["text_per_prompt"] else ""
    console.print(f"To store in bf16: {r['latent_per_image'] / 1e6:.3g} MB per sample{text}.")
    if r["seconds"] is not None:
        speed = f"{r['mfu']:.0%} of {r['peak'] / 1e12:.0f} TFLOP/s"
        console.print(f"Time at {speed}, without waiting for data or other devices.")
    for note in r["notes"]:
        console.print(f"Note: {note}.", markup=False)
    if not r["fits"]:
        console.print("It does not fit. With", style="bold red")
        for c in r["changes"]:
            fits = ", fits" if c["total"] <= r["capacity"] else ""
            console.print(f"  {c['words']}: {gigabytes(c['total'])} GB{fits}")
        if not any(c["total"] <= r["capacity"] for c in r["changes"]):
            console.print("  none of these fits: take a smaller backbone, or more devices that share it")


def forwards(calls: Mapping[str, Mapping[str, float]]) -> str:
    """As in "student 0.2 and 0.5 without gradient, critic 0.8"."""

    def said(reaches: Mapping[str, float]) -> str:
        words = {"weights": "", "input": " to its input", "nothing": " without gradient"}
        return " and ".join(f"{reaches[r]:.3g}{w}" for r, w in words.items() if r in reaches)

    return ", ".join(f"{role} {said(reaches)}" for role, reaches in calls.items())


def gigabytes(bytes: float) -> str:
    return f"{bytes / GB:.2f}" if bytes >= 1e8 else f"{bytes / GB:.4f}"


def duration(seconds: float) -> str:
    for size, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} seconds"


if __name__ == "__main__":
    raise SystemExit(main())
