"""What the losses of one step see: a recipe's models as callables at any time and input, and frozen models.

Velocities are those of the linear path; `edit.losses.Seen` documents each callable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from edit.denoiser import Denoiser
from edit.losses import Frozen, Loss
from edit.objectives import Objective
from edit.stream import Condition, Output
from recipes.roles import Teacher


@dataclass
class Sight:
    """The frozen models of losses and the data set's decoder. No module: checkpoints leave them out."""

    decoder: nn.Module | None  # None: no loss asks for pixels
    models: dict[Frozen, nn.Module]

    def of(self, loss: Loss) -> dict[str, Any]:
        """The fields of `edit.losses.Seen` that a loss has declared."""
        found: dict[str, Any] = {"frozen": {name: self.models[spec] for name, spec in loss.frozen.items()}}
        return found | ({"decode": self.decoder} if loss.decodes else {})

    def place(self, device: torch.device) -> None:
        for module in (self.decoder, *self.models.values()):
            if module is not None:
                module.to(device)

    def keep(self, losses: Iterable[Loss]) -> None:
        """Drop what none of these losses has declared."""
        losses = list(losses)
        used = {spec for loss in losses for spec in loss.frozen.values()}
        self.models = {spec: module for spec, module in self.models.items() if spec in used}
        if not any(loss.decodes for loss in losses):
            self.decoder = None


@dataclass
class Asked:
    """The models of a run in one step.

    Args:
        objective: of the denoisers
        denoiser: the student
        ema: its moving average
        teacher: None: there is none
        critic: None: there is none
        null: the unconditional counterpart of the batch's condition
        scale: guidance scales of the teacher, b
        told: scales for models with a guidance input, b; None: those of the condition
        casting: context in which models run
    """

    objective: Objective
    denoiser: Denoiser
    ema: Denoiser
    teacher: Teacher | None
    critic: Denoiser | None
    null: Condition
    scale: Tensor
    told: Tensor | None
    casting: Callable[[], AbstractContextManager] = nullcontext
    # traces of the calls with a graph, by role: the losses of edits are made of them
    traces: dict[str, list[Mapping[str, Tensor]]] = field(default_factory=lambda: {"student": [], "critic": []})

    def callables(self) -> dict[str, Any]:
        """The fields of `edit.losses.Seen`."""
        found: dict[str, Any] = {"student": self.ask_student, "predict": self.ask_predict}
        found |= {"average": self.ask_average, "averaged": self.ask_averaged}
        found |= {"tapped_average": self.ask_tapped_average}
        found |= {"corrupt": self.objective.corrupt, "discrete": self.objective.discrete}
        if self.teacher is not None:
            found |= {"teacher": self.ask_teacher, "features": self.ask_features}
            found |= {"tapped_teacher": self.ask_tapped_teacher}
        return found if self.critic is None else found | {"critic": self.ask_critic}

    def _ask(
        self, denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition, taps: Collection[int] = ()
    ) -> Output:
        condition = self._told(denoiser, condition)
        with self.casting():
            out = denoiser(*self.objective.native(x_t, t), condition, taps=taps)
        refuse_further(denoiser, out)
        return out._replace(sample=self.objective.velocity(out.sample, x_t, t))

    def _told(self, denoiser: Denoiser, condition: Condition) -> Condition:
        if self.told is None:
            return condition
        return replace(condition, guidance=self.told if denoiser.facts.told else None)

    def ask_predict(self, x_t: Tensor, t: Tensor, condition: Condition, taps: Collection[int] = ()) -> Output:
        out = self._ask(self.denoiser, x_t, t, condition, taps)
        if torch.is_grad_enabled():
            self.traces["student"].append(out.trace)
        return out

    def ask_student(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.ask_predict(x_t, t, condition).sample

    @torch.no_grad()
    def ask_averaged(self, x_t: Tensor, t: Tensor, condition: Condition, taps: Collection[int] = ()) -> Output:
        return self._ask(self.ema, x_t, t, condition, taps)

    @torch.no_grad()
    def ask_tapped_average(
        self, x_t: Tensor, t: Tensor, condition: Condition, taps: Collection[int]
    ) -> Mapping[str, Tensor]:
        with self.casting():
            return self.ema.tapped(x_t, t, self._told(self.ema, condition), taps)

    def ask_average(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.ask_averaged(x_t, t, condition).sample

    def ask_critic(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert self.critic is not None
        out = self._ask(self.critic, x_t, t, condition)
        if torch.is_grad_enabled():
            self.traces["critic"].append(out.trace)
        return out.sample

    def ask_teacher(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert self.teacher is not None
        native = self.objective.native(x_t, t)
        with self.casting():
            out = self.teacher(self.denoiser, *native, condition, self.null, self.scale)
        return self.objective.velocity(out.sample, x_t, t)

    def ask_features(self, x_t: Tensor, t: Tensor, condition: Condition) -> Output:
        assert self.teacher is not None
        native = self.objective.native(x_t, t)
        with self.casting():
            return self.teacher.features(self.denoiser, *native, condition, self.scale)

    def ask_tapped_teacher(
        self, x_t: Tensor, t: Tensor, condition: Condition, taps: Collection[int]
    ) -> Mapping[str, Tensor]:
        assert self.teacher is not None
        scale = self.scale.repeat(len(x_t) // len(self.scale))  # of a batch of both guidance branches
        with self.casting():
            return self.teacher.tapped(self.denoiser, x_t, t, condition, scale, taps)


def refuse_further(denoiser: Denoiser, out: Output) -> None:
    """Raises ValueError if an edit makes further predictions of each sample: losses that ask a model score one."""
    for name, edit in denoiser.applied.items():
        if further := edit.further(out):
            raise ValueError(
                f"edit {name!r} predicts every sample a second time ({', '.join(further)}), and losses that ask models "
                f"score one prediction: {f'set edits.{name}.{edit.alone}' if edit.alone else 'leave the edit out'}"
            )


def edit_losses(denoiser: Denoiser, traces: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The losses of a role's edits, for its last call."""
    trace = traces[-1] if traces else {}
    return {f"{name}/{k}": v for name, edit in denoiser.applied.items() for k, v in edit.losses(trace).items()}
