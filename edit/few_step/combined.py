"""Several few-step methods at once: their losses are added.

rCM (arXiv 2510.08431) is 100 sCM + 1 DMD, its consistency loss on the student's turns alone. sCM + LADD is SANA-Sprint
(2503.09641) but for its share of samples at the largest time, which neither method draws; DMD + 0.03 LADD is DMD2
(2405.14867) with LADD's heads and times instead of its own. Specification: methods/distillation.md, D3.6, D3.8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from edit.denoiser import Denoiser
from edit.few_step.method import FewStepMethod
from edit.inputs.limits import check_numbers
from edit.losses import Frozen, Seen
from edit.objectives import Weight, weight_at
from edit.solvers import Solver

APART = 1 << 40  # between the seeds of two parts: no run's seed is as large


@dataclass(frozen=True)
class Combined(FewStepMethod):
    """A sum of methods. Each draws random numbers of its own; the first one those it would draw alone.

    Args:
        parts: methods by names, which their losses and parameters carry
        weights: of the student's losses of a part, beside the part's own; 1 where none is given
        critic_weights: of the critic's; DMD2: 0.01 for its discriminator
    """

    parts: Mapping[str, FewStepMethod]
    weights: Mapping[str, Weight] = field(default_factory=dict)
    critic_weights: Mapping[str, Weight] = field(default_factory=dict)

    def __post_init__(self):
        check_numbers(self)
        if not self.parts or any("." in name for name in self.parts):
            raise ValueError(f"Combined: parts are methods by names without dots, got {list(self.parts)}")
        if unknown := [name for name in (*self.weights, *self.critic_weights) if name not in self.parts]:
            raise ValueError(f"Combined: a weight for {unknown[0]!r}, the parts are {', '.join(self.parts)}")
        plans = {(p.every, p.together): name for name, p in self.parts.items() if p.adversarial}
        if len(plans) > 1:
            (first, a), (second, b) = list(plans.items())[:2]
            raise ValueError(
                f"Combined: {a} takes turns by every={first[0]} together={first[1]}, {b} by every={second[0]} "
                f"together={second[1]}: give both the same"
            )
        every, together = next(iter(plans), (1, False))
        taps = sorted({i for p in self.parts.values() for i in p.teacher_taps})
        looks: dict[str, tuple[str, Frozen]] = {}
        for name, part in self.parts.items():
            for model, frozen in part.frozen.items():
                first, other = looks.setdefault(model, (name, frozen))
                if frozen != other:
                    raise ValueError(f"Combined: {first} and {name} look with two {model} models: give both one")
        derived = {
            "needs_teacher": any(p.needs_teacher for p in self.parts.values()),
            "needs_data": any(p.needs_data for p in self.parts.values()),
            "has_critic": any(p.has_critic for p in self.parts.values()),
            "teacher_taps": tuple(taps),
            "every": every,
            "together": together,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def frozen(self) -> Mapping[str, Frozen]:
        return {model: frozen for part in self.parts.values() for model, frozen in part.frozen.items()}

    @property
    def decodes(self) -> bool:
        return any(part.decodes for part in self.parts.values())

    @property
    def adversarial(self) -> bool:
        return any(p.adversarial for p in self.parts.values())

    def check(self, solver: Solver) -> None:
        for part in self.parts.values():
            part.check(solver)

    def check_stored(self, stored: Sequence[float]) -> None:
        for part in self.parts.values():
            part.check_stored(stored)

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> Parts | None:
        built = {name: part.build(student, teacher) for name, part in self.parts.items()}
        own = {name: module for name, module in built.items() if module is not None}
        return Parts(own) if own else None

    def judges(self, own: Parts) -> list[nn.Parameter]:  # type: ignore[override] - returned by `build`
        return [p for name, module in own.parts.items() for p in self.parts[name].judges(module)]

    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        losses = {}
        for name, part, mine in self._each(seen):
            weight = weight_at(self.weights.get(name, 1.0), seen.progress)
            losses |= {f"{name}/{k}": weight * v for k, v in part.student_losses(mine).items()}
        return losses

    def critic_losses(self, seen: Seen) -> dict[str, Tensor]:
        losses = {}
        for name, part, mine in self._each(seen):
            if part.adversarial:
                weight = weight_at(self.critic_weights.get(name, 1.0), seen.progress)
                losses |= {f"{name}/{k}": weight * v for k, v in part.critic_losses(mine).items()}
        return losses

    def _each(self, seen: Seen) -> Iterator[tuple[str, FewStepMethod, Seen]]:
        """Parts, and what each of them sees."""
        modules = _parts(seen)
        for k, (name, part) in enumerate(self.parts.items()):
            own = Own(seen.own, name) if name in modules else None
            draws = replace(seen.draws, seed=seen.draws.seed + k * APART)
            yield name, part, replace(seen, own=own, draws=draws)


class Parts(nn.Module):
    """The modules of all parts. Sharding gathers parameters around `forward` alone, so each is called through it."""

    def __init__(self, parts: Mapping[str, nn.Module]):
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, name: str, *inputs: Any) -> Any:
        return self.parts[name](*inputs)


class Own:
    """The module of one part: its calls go through the owner of all, everything else to the module itself."""

    def __init__(self, parts: Parts, name: str):
        self.parts, self.name = parts, name

    def __call__(self, *inputs: Any) -> Any:
        return self.parts(self.name, *inputs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.parts.parts[self.name], attribute)


def _parts(seen: Seen) -> Mapping[str, nn.Module]:
    return dict(seen.own.parts.items()) if isinstance(seen.own, Parts) else {}
