"""Few-step distillation: the contract of a method, and checks that several methods share.

Every method combines states (noised data, the student's rollout, a trajectory of the teacher) with targets (the
teacher's trajectory, the student at another time, a difference of scores, a discriminator). Each is one file beside
this one. Velocities are those of the linear path (`edit.paths`). Specification: methods/distillation.md, D3.5 to D3.10.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from edit.few_step.vision import VISION, Vision
from edit.losses import Frozen, Loss, Seen
from edit.paths import mean
from edit.solvers import Grid, Solver


class FewStepMethod(Loss):
    """One few-step method, in place of the objective's losses.

    A step is the student's turn, the critic's, or both (`turns`). The losses of a turn are minimised over the
    parameters of that role alone: detach the other role's outputs.
    """

    needs_teacher: bool = True
    needs_data: bool = True
    has_critic: ClassVar[bool] = False  # a second model of the teacher's or student's structure
    vision: Vision | None = None  # the model that looks at decoded samples
    every: int = 1  # the student's turn is every n-th step; the others are the critic's
    together: bool = False  # the critic is trained on the student's turns as well

    @property
    def frozen(self) -> Mapping[str, Frozen]:
        return {} if self.vision is None else {VISION: self.vision}

    @property
    def decodes(self) -> bool:  # type: ignore[override] - here a consequence
        return self.vision is not None

    def check(self, solver: Solver) -> None:  # noqa: B027 - many accept every solver
        """Refuse a solver whose steps this method does not train.

        Raises:
            ValueError: naming both, and an alternative
        """

    def check_stored(self, stored: Sequence[float]) -> None:  # noqa: B027 - few look at stored paths
        """Refuse stored paths whose times this method does not train.

        Args:
            stored: of the states between noise and data, decreasing

        Raises:
            ValueError: naming both
        """

    def judges(self, own: nn.Module) -> list[nn.Parameter]:
        """The parameters of `own` that are trained on the critic's turns; the rest on the student's."""
        return list(own.parameters()) if self.adversarial else []

    def turns(self, step: int) -> tuple[bool, bool]:
        """Whether optimiser step `step` is the student's turn, and whether it is the critic's."""
        mine = step % self.every == 0
        return mine, self.adversarial and (self.together or not mine)

    @property
    def adversarial(self) -> bool:
        """Whether there are critic's turns at all."""
        return self.has_critic

    @abstractmethod
    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        """Named, already weighted losses of the student, one number per sample [b]."""

    def critic_losses(self, seen: Seen) -> dict[str, Tensor]:
        """The same of critic and heads."""
        raise NotImplementedError(f"{type(self).__name__} has no critic")


# ---- shared by several methods ---------------------------------------------------------------------------------------


def need_turns(method: FewStepMethod, role: str) -> None:
    """Raises ValueError if every step is the student's turn alone: its opponent would never learn."""
    if method.every < 2 and not method.together:
        raise ValueError(
            f"{type(method).__name__}: every={method.every} leaves the {role} no turn: set every to 2 or more, or "
            "together=true"
        )


def check_times(name: str, known: Sequence[float], solver: Solver) -> None:
    """Raises ValueError unless the sampler steps to data, and only from times that the method trains."""
    steps = solver.grid[:-1] if isinstance(solver, Grid) and (solver.renoise or solver.steps == 1) else ()
    if not steps or any(min(abs(t - own) for own in known) > 1e-3 for t in steps):
        raise ValueError(
            f"{name} trains steps to data from the times {list(known)}, the sampler is {solver}: choose sampler=grid "
            "with renoise=true and times among these"
        )


def decreasing(times: Sequence[float]) -> bool:
    """Whether there are one or more times, decreasing, in (0, 1]."""
    return bool(times) and list(times) == sorted(set(times), reverse=True) and 0 < times[-1] <= times[0] <= 1


def pseudo_huber(delta: Tensor, c: float) -> Tensor:
    """Mean over elements of sqrt(delta^2 + c^2) - c, without its cancellation: b ... -> [b]."""
    square = delta.square()
    return mean(square / ((square + c * c).sqrt() + c))
