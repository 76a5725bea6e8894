"""How often a few-step method calls its models in each step: counted by running it on tensors without memory.

The method declares nothing: its own losses run on fake tensors, with models that return the right shapes and count
their calls. Not counted: its heads, a decoder, a vision model, and the method's own arithmetic.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edit.few_step.method import FewStepMethod
from edit.few_step.roles import Draws, Field, Given, Roles
from edit.few_step.vision import Eye
from edit.measuring.probe import Probe, without_memory
from edit.stream import Condition, Output

Reach = Literal["nothing", "input", "weights"]
BATCH = 2  # samples of the run that is counted: methods average over no fewer


@dataclass(frozen=True)
class Call:
    """One forward."""

    role: str  # "student", "teacher" or "critic"
    samples: float = 1.0  # in units of the batch: 2 with classifier-free guidance
    reach: Reach = "nothing"  # how far its backward goes

    def flops(self, macs: int, checkpointing: bool) -> float:
        """FLOPs for one sample: of the forward, as many again of the backward to the input, to the weights, and of
        recomputation."""
        times = {"nothing": 1, "input": 2, "weights": 3}[self.reach]
        recomputed = checkpointing and self.reach != "nothing"
        return 2 * macs * self.samples * (times + recomputed)


class Shapes(Draws):
    """Draws without values, except those that decide how often a model is called."""

    def uniform(self, stream: int) -> Tensor:
        return torch.full_like(self.samples, 0.5, dtype=torch.float32)

    def gaussian(self, stream: int) -> Tensor:
        return self.samples.new_zeros(len(self.samples), *self.shape, dtype=torch.float32)


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
            reaches[call.reach] = reaches.get(call.reach, 0.0) + turn.share * call.samples
    return found


def turns(
    matching: FewStepMethod, student: Probe, teacher: Probe | None, own: nn.Module | None, guided: int, rounds: int = 12
) -> tuple[Turn, ...]:
    """The kinds of steps of a run.

    Args:
        matching: the method
        student: the student's probe
        teacher: the teacher's probe, with the method's taps; None: there is none, or it is tied to the student
        own: the module of `matching.build` on the meta device
        guided: batches that one call of the teacher takes: 2 with classifier-free guidance
        rounds: number of student's turns to count, spread over the run; lengths of rollouts are random

    Raises:
        ValueError: if the method's calls depend on values
    """
    steps = rounds * matching.every
    eye = None if matching.vision is None else matching.vision.structure()
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # not entered: a method's own constants keep their values
    own = deepcopy(own)
    with fake, torch.device("cpu"):
        if own is not None:
            without_memory(own)
        condition = student.condition.map(lambda v: torch.zeros(BATCH, *v.shape[1:], dtype=v.dtype))
        x, samples = torch.zeros(BATCH, *student.shape), torch.arange(BATCH)
        scale = torch.ones(BATCH)
        parts = getattr(matching, "parts", {"": matching}).values()
        states = math.lcm(*(getattr(part, "starts", 1) for part in parts)) - 1  # of a stored path, noise left out
        path = x, x[:, None].expand(-1, states, *x.shape[1:]), torch.ones(BATCH, states)

    def given(step: int) -> Given:
        draws = Shapes(0, samples, step, student.shape)
        data = (x, *path) if matching.needs_data else ()
        return Given(condition, condition, scale, draws, step / steps, *data)

    try:
        seen = Counter(_calls(matching, student, teacher, own, eye, guided, k, given(k)) for k in range(steps))
    except (RuntimeError, NotImplementedError) as error:  # torch's, for what cannot be decided without values
        reason = str(error).splitlines()[0]
        raise ValueError(f"{type(matching).__name__} cannot be counted without values: {reason}") from error
    return tuple(Turn(n / steps, calls) for calls, n in seen.items())


def _calls(
    matching: FewStepMethod,
    student: Probe,
    teacher: Probe | None,
    own: nn.Module | None,
    eye: Eye | None,
    guided: int,
    step: int,
    given: Given,
) -> tuple[Call, ...]:
    calls: list[Call] = []

    def ask(role: str, trained: bool, parts: int, x_t: Tensor) -> Tensor:
        graph = torch.is_grad_enabled() and (trained or x_t.requires_grad)
        reach: Reach = "nothing" if not graph else "weights" if trained else "input"
        calls.append(Call(role, parts * len(x_t) / BATCH, reach))
        return x_t.float() + x_t.new_zeros((), dtype=torch.float32, requires_grad=trained)

    def field(role: str, trained: bool = False, parts: int = 1) -> Field:
        return lambda x_t, t, condition: ask(role, trained, parts, x_t)

    def trace(probe: Probe, sample: Tensor) -> Mapping[str, Tensor]:
        link = sample.sum() * 0  # a graph to the sample, where it has one
        shapes = {k: v.shape[1:] for k, v in probe.answer().trace.items()}
        return {k: sample.new_zeros(len(sample), *shape) + link for k, shape in shapes.items()}

    def features(x_t: Tensor, t: Tensor, condition: Condition) -> Output:
        assert teacher is not None, "features are those of a teacher with weights of its own"
        sample = ask("teacher", False, 1, x_t)
        return Output(sample, None, trace(teacher, sample), teacher.answer().grid)

    def look(pixels: Tensor) -> Mapping[str, Tensor]:
        assert eye is not None, "a method that looks at images declares its vision"
        link = pixels.sum() * 0
        return {f"unit.{i}": pixels.new_zeros(len(pixels), eye.tokens, eye.width) + link for i in eye.layers}

    def roles(mine: bool) -> Roles:
        def output(x_t: Tensor, t: Tensor, condition: Condition) -> Output:
            sample = ask("student", mine, 1, x_t)
            return Output(sample, None, trace(student, sample), student.answer().grid)

        average, taught = (torch.no_grad()(f) for f in (field("student"), field("teacher", parts=guided)))
        asked = field("student", mine), output, average, taught, features, field("critic", not mine)
        return Roles(*asked, own, nn.Identity(), look)

    mine, theirs = matching.turns(step)
    if mine:
        matching.student_losses(roles(True), given)
    if theirs:
        matching.critic_losses(roles(False), given)
    return tuple(calls)
