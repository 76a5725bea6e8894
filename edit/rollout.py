"""Training on the sampler's own path: what a method declares, and what it sees at one evaluation of a generation.

A generation is walked with the student (`edit.walk`), from noise, under conditions of the data. Some of its evaluations
train, and each of these is one update; the next sample is what the student's own prediction leads to. No gradient
reaches from one evaluation to the next. The recipe is `recipes.rollout`.

    HarmoniCa (methods/harmonica.md): the teacher is the dense model at the same x, the first evaluation trains nothing,
    weights of the evaluations are made anew every C updates, parameters are clamped.
    LESA (methods/lesa.md): the teacher's features on its own path, full evaluations train nothing; its first phase goes
    on with the teacher's features in place of the predicted ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from edit.calibrating import OnData, calibrate
from edit.denoiser import Denoiser
from edit.losses import Draws, Loss, absent
from edit.sampling import Sampler
from edit.stream import Condition, Output, Step

Asks = Literal["here", "path"]


class Answer(NamedTuple):
    """A model's answer at one evaluation."""

    prediction: Tensor  # b c *sizes float32, guided; behind it, as further channels, what the solver takes besides
    outputs: Mapping[str, Output]  # by guidance branch, as asked; of "joint", the first b samples are cond's

    def record(self, name: str) -> Tensor:
        """A record of all branches, one after the other: k b ..., where k is the number of branches, cond's first.

        So it is of the same order whether the branches shared a batch or not.

        Raises:
            ValueError: if a branch has no such record
        """
        if lacking := next((branch for branch, out in self.outputs.items() if name not in out.trace), None):
            there = ", ".join(self.outputs[lacking].trace) or "none"
            raise ValueError(f"the model recorded no {name!r} in branch {lacking!r}; its records there: {there}")
        return torch.cat([out.trace[name] for out in self.outputs.values()])


@dataclass(frozen=True)
class Visit:
    """One evaluation of one generation of a batch."""

    step: Step  # index, count, time and all times; its memory is the student's
    x: Tensor  # b c *sizes, on the student's own path
    condition: Condition
    draws: Draws  # others at each evaluation
    updates: int  # that the run has made before
    progress: float  # the part of the run that is done, in [0, 1)
    batch: Mapping[str, Tensor]  # all that the data set gives
    student: Answer | None = None  # with a graph where the evaluation trains; None before it was asked
    teacher: Answer | None = None  # as `RolloutMethod.asks` wants it, without a graph
    own: Any = None  # the module that `Loss.build` returned
    frozen: Mapping[str, nn.Module] = field(default_factory=dict)  # of `Loss.frozen`
    decode: Callable[[Tensor], Tensor] = absent  # samples b c *sizes -> pixels b 3 *sizes in [-1, 1]

    def memory(self, edit: str, unit: int) -> dict[str, dict]:
        """What an edit of the student remembers at a unit, by the branches that were evaluated; may be changed."""
        memory = self.step.memory
        return {k[2]: v for k, v in memory.items() if isinstance(k, tuple) and k[:2] == (edit, unit)}


class RolloutMethod(Loss):
    """One training on the student's own path. Subclasses are frozen dataclasses.

    A method says nothing of parameters: what is trained is what the student's edits leave open (`Edit.trainable`), and
    what `build` returns. With `needs_teacher` the run gives a model of its own (`teacher.path`) as the teacher; without
    it the student without a step is its own, dense teacher, unless the run has another.
    """

    taps: tuple[int, ...] = ()  # units whose tokens the student's answer records as "unit.<index>"; from 0
    # Where the teacher is asked: at the student's x, where that trains; or at every evaluation on its own path from the
    # same noise, live or stored. None: nowhere.
    asks: ClassVar[Asks | None] = "here"
    every: int = 0  # updates between two calls of `refresh`, the first before the first update; 0: never

    def check(self, student: Denoiser, sampler: Sampler, times: tuple[float, ...]) -> None:  # noqa: B027
        """Refuse a student or a sampler that the method does not train.

        Args:
            student: with its edits, on the meta device
            sampler: of the generations
            times: of its evaluations, then 0

        Raises:
            ValueError: naming what is given and what is expected
        """

    def trains(self, index: int, count: int) -> bool:
        """Whether evaluation `index` of `count` is an update; else it is made without a graph. Not the first."""
        return index > 0

    def passing(self, visit: Visit) -> Tensor | None:
        """The prediction with which an evaluation that trains nothing goes on, without asking the student: from the
        teacher's features. None: the student is asked."""
        return None

    @abstractmethod
    def losses(self, visit: Visit) -> dict[str, Tensor]:
        """Named, already weighted losses of an evaluation that trains, one number per sample or a scalar each. Those of
        the student's edits (`Edit.losses`) are added to them."""

    def metrics(self, visit: Visit) -> dict[str, Tensor]:
        """Numbers to log beside the losses of an evaluation that trains, and not to minimise: a scalar each."""
        return {}

    def proceed(self, visit: Visit) -> Tensor:
        """The prediction with which the generation goes on, after the student was asked; called without gradients. The
        last chance to change what the student's edits remember (teacher forcing: `Visit.memory`)."""
        assert visit.student is not None
        return visit.student.prediction

    def constrain(self, student: Denoiser, own: nn.Module | None) -> None:  # noqa: B027 - most need no limits
        """Bring parameters back into their limits, after each update and without gradients (under FSDP2, DTensors)."""

    def refresh(self, student: Denoiser, batches: OnData, own: nn.Module | None) -> None:
        """Determine weights or tables anew, every `every` updates and without gradients: from whole generations, which
        are the same each time but for the student. As it is here, the student's edits calibrate.

        Args:
            student: in eval mode
            batches: noisy data and generations (`edit.calibration`), the same on every rank
            own: the module that `build` returned; what is kept between updates is in its buffers
        """
        calibrate(student, batches)


def trained(method: RolloutMethod, count: int) -> list[int]:
    """The evaluations of `count` that are updates.

    Raises:
        ValueError: if there is none
    """
    if not (found := [i for i in range(count) if method.trains(i, count)]):
        raise ValueError(f"{type(method).__name__} trains none of {count} evaluations: sample in more steps")
    return found
