"""How often losses call the models of a run in each step: counted by running them on tensors without memory.

Losses declare nothing: they run on fake tensors, with models that return the right shapes and count their calls. Not
counted: heads and projectors, and the losses' own arithmetic.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edit.few_step.method import FewStepMethod
from edit.losses import Draws, Frozen, Loss, Seen, Term, teaches
from edit.measuring.looks import Look, pixels
from edit.measuring.probe import Probe, without_memory
from edit.stream import Condition, Output

Reach = Literal["nothing", "input", "weights"]
BATCH = 2  # samples of the run that is counted: methods average over no fewer


@dataclass(frozen=True)
class Call:
    """One forward."""

    role: str  # "student", which stands for its average too, "teacher", "critic", or the name of what `look` measures
    samples: float = 1.0  # in units of the batch: 2 with classifier-free guidance
    reach: Reach = "nothing"  # how far its backward goes
    look: Look | None = None  # of a frozen model or a decoder
    share: float = 1.0  # of the work: a forward for tapped tokens ends behind the last, tokens may be dropped

    @property
    def checkpointed(self) -> bool:
        """Whether gradient checkpointing reaches the model."""
        return self.role != "teacher" and self.look is None

    def flops(self, macs: int, checkpointing: bool) -> float:
        """FLOPs for one sample: of the forward, as many again of the backward to the input, to the weights, and of
        recomputation."""
        times = {"nothing": 1, "input": 2, "weights": 3}[self.reach]
        recomputed = checkpointing and self.reach != "nothing"
        return 2 * macs * self.samples * self.share * (times + recomputed)


@dataclass(frozen=True)
class Turn:
    """A kind of optimiser step: its calls in order, and its share of the run's steps."""

    share: float
    calls: tuple[Call, ...]


def calls_of(turns: Sequence[Turn]) -> dict[str, dict[str, float]]:
    """Forwards of one sample in a step, mean over the run: by role, and by how far their backward goes."""
    found: dict[str, dict[str, float]] = {}
    for turn in turns:
        for call in turn.calls:
            reaches = found.setdefault(call.role, {})
            reaches[call.reach] = reaches.get(call.reach, 0.0) + turn.share * call.samples * call.share
    return found


# ---- two kinds of losses --------------------------------------------------------------------------------------------


def turns(
    matching: FewStepMethod,
    student: Probe,
    teacher: Probe | None,
    own: nn.Module | None,
    guided: int,
    decoder: nn.Module | None = None,
    rounds: int = 12,
) -> tuple[Turn, ...]:
    """The kinds of steps of a few-step run.

    Args:
        matching: the method
        student: the student's probe
        teacher: the teacher's probe, with the method's taps; None: there is none, or it is tied to the student
        own: the module of `matching.build` on the meta device
        guided: batches that one call of the teacher takes: 2 with classifier-free guidance
        decoder: of the data set; None: it is not counted
        rounds: number of student's turns to count, spread over the run; lengths of rollouts are random

    Raises:
        ValueError: if the method's calls depend on values
    """
    steps = rounds * matching.every
    stand_in = StandIn(student, teacher, guided, decoder)
    parts = getattr(matching, "parts", {"": matching}).values()
    states = math.lcm(*(getattr(part, "starts", 1) for part in parts)) - 1  # of a stored path, noise left out
    declared = stand_in.declared(matching, own)
    found = []
    for k in range(steps):
        seen = replace(stand_in.seen(k, k / steps, matching.needs_data, states), **declared)
        mine, theirs = matching.turns(k)
        calls: list[Call] = []
        if mine:
            calls += stand_in.count(matching, matching.student_losses, seen, "student")
        if theirs:
            calls += stand_in.count(matching, matching.critic_losses, seen, "critic")
        found.append(tuple(calls))
    return tuple(Turn(n / steps, calls) for calls, n in Counter(found).items())


def phases(
    terms: Mapping[str, Term],
    student: Probe,
    teacher: Probe | None,
    own: Mapping[str, nn.Module | None],
    guided: int,
    steps: int,
    asks: bool,
    decoder: nn.Module | None = None,
) -> tuple[Turn, ...]:
    """The kinds of steps of diffusion training: one forward, of some tokens while a term drops others, and models that
    terms ask until they end.

    Args:
        terms: by name
        student: the student's probe, with all taps, branches and maps
        teacher: likewise; None: there is none, or it is tied to the student
        own: modules of `Term.build` on the meta device
        guided: batches that one call of the teacher takes: 2 with classifier-free guidance
        steps: optimiser steps of the run
        asks: whether the run has a teacher
        decoder: of the data set; None: it is not counted

    Raises:
        ValueError: if a term's calls depend on values
    """
    stand_in = StandIn(student, teacher, guided, decoder)
    masking = next((term for term in terms.values() if term.drops), None)
    ends = {min(term.ends, steps) for term in terms.values() if term.ends is not None} | {steps}
    if masking is not None:
        ends.add(max(1, math.ceil(masking.drops_until * steps)))
    needed = [term for term in terms.values() if term.needs_teacher]
    found, begin = [], 0
    for end in sorted(ends):
        live = {name: term for name, term in terms.items() if term.ends is None or term.ends > begin}
        taught = asks and teaches(live.values()) and (not needed or any(term in live.values() for term in needed))
        calls = [Call("teacher", guided)] if taught else []
        masked = masking is not None and begin < masking.drops_until * steps
        calls.append(Call("student", reach="weights", share=student.thinned(masking.drops) if masked else 1.0))
        for name, term in live.items():
            seen = replace(stand_in.passed(begin, begin / steps, term), **stand_in.declared(term, own[name]))
            calls += stand_in.count(term, term.losses, seen, "student")
        found.append(Turn((end - begin) / steps, tuple(calls)))
        begin = end
    return tuple(found)


# ---- models without values ------------------------------------------------------------------------------------------


class Shapes(Draws):
    """Draws without values, except those that decide how often a model is called."""

    def uniform(self, stream: int) -> Tensor:
        return torch.full_like(self.samples, 0.5, dtype=torch.float32)

    def gaussian(self, stream: int) -> Tensor:
        return self.samples.new_zeros(len(self.samples), *self.shape, dtype=torch.float32)


class StandIn:
    """The batch and the models of a run without values; calls are counted.

    Fake tensors are made under a mode that is not entered afterwards: a loss's own constants keep their values.

    Args:
        student: the student's probe
        teacher: None: there is none, or it is tied to the student
        guided: batches that one call of the teacher takes
        decoder: of the data set; None: it is not counted, and pixels have the size of samples
    """

    def __init__(self, student: Probe, teacher: Probe | None, guided: int, decoder: nn.Module | None = None):
        self.student, self.teacher, self.guided, self.decoder = student, teacher, guided, decoder
        self.frozen: dict[Frozen, nn.Module] = {}
        self.looks: dict[tuple[Hashable, tuple[int, ...]], Look] = {}
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake, torch.device("cpu"):
            self.condition = student.condition.map(lambda v: torch.zeros(BATCH, *v.shape[1:], dtype=v.dtype))
            self.x, self.samples = torch.zeros(BATCH, *student.shape), torch.arange(BATCH)
            self.ones = torch.ones(BATCH)

    def declared(self, loss: Loss, own: nn.Module | None) -> dict[str, Any]:
        """The loss's own parameters; `own` on the meta device."""
        own = deepcopy(own)
        if own is not None:
            with self.fake, torch.device("cpu"):
                without_memory(own)
        return {"own": own}

    def seen(self, step: int, progress: float, data: bool = True, states: int = 0) -> Seen:
        """The batch of a step; `states` of a stored path to the data."""
        draws = Shapes(0, self.samples, step, self.student.shape)
        seen = Seen(self.condition, self.condition, self.ones, draws, progress, step=step, whole=self.condition)
        if not data:
            return seen
        path = self.x[:, None].expand(-1, states, *self.x.shape[1:])
        times = self.ones[:, None].expand(-1, states)
        return replace(seen, x=self.x, noise=self.x, trajectory=path, times=times)

    def passed(self, step: int, progress: float, term: Term) -> Seen:
        """What a term sees in a step of diffusion training, after the forward."""
        taught = None if self.teacher is None else self._output(self.teacher, self.x)
        sample = self.x + self.x.new_zeros((), requires_grad=True)
        output = self._output(self.student, sample)
        seen = replace(self.seen(step, progress), output=output, taught=taught or output)
        shapes = term.reads  # outside the mode: it may build a model to know them
        with self.fake, torch.device("cpu"):
            read = {name: torch.zeros(BATCH, *shape) for name, shape in shapes.items()}
        return replace(seen, x_t=self.x, t=self.ones, batch={"x": self.x, "draw": self.samples, **read})

    def count(self, loss: Loss, losses: Any, seen: Seen, trained: str) -> list[Call]:
        """The calls that `losses(seen)` makes, where the role `trained` has trained weights."""
        calls: list[Call] = []
        try:
            losses(replace(seen, **self._callables(calls, trained), **self._looking(calls, loss)))
        except (RuntimeError, NotImplementedError) as error:  # torch's, for what cannot be decided without values
            reason = str(error).splitlines()[0]
            raise ValueError(f"{type(loss).__name__} cannot be counted without values: {reason}") from error
        return calls

    def _callables(self, calls: list[Call], trained: str) -> dict[str, Any]:
        def ask(role: str, graph: bool, parts: int, x_t: Tensor, share: float = 1.0) -> Tensor:
            weights = graph and role == trained
            reaches = torch.is_grad_enabled() and graph and (weights or x_t.requires_grad)
            reach: Reach = "nothing" if not reaches else "weights" if weights else "input"
            calls.append(Call(role, parts * len(x_t) / BATCH, reach, share=share))
            sample = x_t.float() + x_t.new_zeros((), dtype=torch.float32, requires_grad=weights)
            return sample if graph else sample.detach()

        def predict(x_t: Tensor, t: Tensor, condition: Condition, taps: Collection[int] = ()) -> Output:
            return self._output(self.student, ask("student", True, 1, x_t), taps)

        def averaged(x_t: Tensor, t: Tensor, condition: Condition, taps: Collection[int] = ()) -> Output:
            return self._output(self.student, ask("student", False, 1, x_t), taps)

        def features(x_t: Tensor, t: Tensor, condition: Condition) -> Output:
            assert self.teacher is not None, "features are those of a teacher with weights of its own"
            return self._output(self.teacher, ask("teacher", True, 1, x_t))

        def tapped(role: str, probe: Probe | None, x_t: Tensor, taps: Collection[int]) -> Mapping[str, Tensor]:
            probe = probe or self.student  # which a tied teacher is
            depth = len(probe.denoiser.units)
            share = (max(i % depth for i in taps) + 1) / depth
            return self._output(probe, ask(role, False, 1, x_t, share), taps).trace

        return {
            "tapped_average": lambda x_t, t, condition, taps: tapped("student", None, x_t, taps),
            "tapped_teacher": lambda x_t, t, condition, taps: tapped("teacher", self.teacher, x_t, taps),
            "corrupt": lambda x, noise, t: x,
            "student": lambda x_t, t, condition: ask("student", True, 1, x_t),
            "predict": predict,
            "average": lambda x_t, t, condition: ask("student", False, 1, x_t),
            "averaged": averaged,
            "teacher": lambda x_t, t, condition: ask("teacher", False, self.guided, x_t),
            "features": features,
            "critic": lambda x_t, t, condition: ask("critic", True, 1, x_t),
        }

    def _looking(self, calls: list[Call], loss: Loss) -> dict[str, Any]:
        """Frozen models and the decoder: each is measured once for a shape of its input, and then answers in shapes."""

        def look(name: str, key: Hashable, structure: Callable[[], nn.Module], x: Tensor) -> Any:
            shape = tuple(x.shape[1:])
            if (key, shape) not in self.looks:
                self.looks[key, shape] = Look(structure, shape)
            found = self.looks[key, shape]
            reach: Reach = "input" if torch.is_grad_enabled() and x.requires_grad else "nothing"
            calls.append(Call(f"{name} of {'x'.join(map(str, shape))}", len(x) / BATCH, reach, found))
            return found.stand_in(x)

        for name, spec in loss.frozen.items():
            if spec not in self.frozen:
                self.frozen[spec] = spec.structure()
            self.frozen[spec].forward = partial(look, name, spec, spec.structure)
        frozen = {name: self.frozen[spec] for name, spec in loss.frozen.items()}
        decoder = self.decoder
        if decoder is None:
            return {"frozen": frozen, "decode": pixels}
        return {"frozen": frozen, "decode": partial(look, "decoder", "decoder", lambda: decoder)}

    def _output(self, probe: Probe, sample: Tensor, taps: Collection[int] = ()) -> Output:
        """The prediction with the probe's trace, and taps; a graph leads to the sample, where it has one."""
        link, answer = sample.sum() * 0, probe.answer()
        shapes = {k: v.shape[1:] for k, v in answer.trace.items()}
        if taps:
            shapes |= {k: v.shape[1:] for k, v in probe.tapped(tuple(taps)).items()}
        trace = {k: sample.new_zeros(len(sample), *shape) + link for k, shape in shapes.items()}
        variance = None if answer.variance is None else torch.zeros_like(sample)
        return Output(sample, variance, trace, answer.grid)
