"""How the router of `edit.caching.harmonica` is trained: step-wise denoising (SDT), weighed by final errors (IEPO).

HarmoniCa (ICML 2025, arXiv 2410.01723). At evaluation i, at the student's own sample, with guided predictions of d
elements and the M routed branches m,

    L_i = lambda_i |student - teacher|^2 / d  +  beta sum_m r_(i,m) / M

The second term is the edit's. lambda_i is the change of the final latent z by replay, measured anew every C updates on
samples with the same noise. With z_S of a generation that replays, softly, at the evaluations S,

    incremental (released code):  lambda_i = mean (z_{1..i} - z_{1..i-1})^2
    single (paper):               lambda_i = mean (z_{i} - z_{})^2

Ours: the final errors of the soft and of the hard table as metrics.

Specification: methods/harmonica.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from edit.caching.engine import EXECUTED
from edit.caching.harmonica import HarmoniCa, Router
from edit.calibrating import OnData
from edit.denoiser import Denoiser
from edit.inputs.limits import Count, Positive, check_numbers
from edit.paths import mean
from edit.rollout import RolloutMethod, Visit
from edit.sampling import Sampler


class Effects(nn.Module):
    """What replay does to the final latent, as mean squares over samples and elements; made by `refresh`."""

    weights: Tensor  # T, lambda: of replay at an evaluation
    soft: Tensor  # of the soft table as a whole
    hard: Tensor  # of the hard table as a whole
    executed: Tensor  # share of the branches that the hard table computes

    def __init__(self, steps: int):
        super().__init__()
        self.register_buffer("weights", torch.zeros(steps))
        for name in ("soft", "hard", "executed"):
            self.register_buffer(name, torch.zeros(()))


@dataclass(frozen=True)
class StepWiseDenoising(RolloutMethod):
    """HarmoniCa's training (SDT): each evaluation follows the dense model at the sample that the cached one came to.

    `refresh` makes T + 1 generations ("single": T + 2) of recipe.samples samples.

    Args:
        iepo: lambda_i of replay at i after that at all evaluations before ("incremental"), or at i alone ("single")
        every: C, updates between two measurements of lambda
        limit: of |rho|, after each update
    """

    iepo: Literal["incremental", "single"] = "incremental"
    every: Count = 500
    limit: Positive = 5.0

    def __post_init__(self):
        check_numbers(self)
        if self.iepo not in ("incremental", "single"):
            raise ValueError(f"StepWiseDenoising: iepo is incremental or single, got {self.iepo!r}")

    def check(self, student: Denoiser, sampler: Sampler, times: tuple[float, ...]) -> None:
        routed(student)

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> nn.Module:
        return Effects(routed(student)[1].steps)

    def losses(self, visit: Visit) -> dict[str, Tensor]:
        assert visit.student is not None and visit.teacher is not None
        distance = mean((visit.student.prediction - visit.teacher.prediction).square())
        return {"distance": visit.own.weights[visit.step.index] * distance}

    def metrics(self, visit: Visit) -> dict[str, Tensor]:
        return {f"effect_{name}": getattr(visit.own, name) for name in ("soft", "hard", "executed")}

    def constrain(self, student: Denoiser, own: nn.Module | None) -> None:
        for p in student.edits[routed(student)[0]].rho:  # type: ignore[union-attr]
            p.clamp_(-self.limit, self.limit)

    def refresh(self, student: Denoiser, batches: OnData, own: nn.Module | None) -> None:
        assert isinstance(own, Effects)
        name, edit = routed(student)
        router = student.edits[name]
        assert isinstance(router, Router)

        def latents(watch=None) -> Tensor:
            return torch.cat(batches.generate(watch))

        router.train()  # soft, while the rest samples
        router.on.fill_(False)
        dense = before = latents()
        for i in range(1, edit.steps):
            if self.iepo == "single":
                router.on.fill_(False)
            router.on[i] = True
            now = latents()
            own.weights[i] = (now - before).square().mean()
            before = now if self.iepo == "incremental" else dense
        router.on.fill_(True)
        soft = latents() if self.iepo == "single" else before
        router.eval()
        shares: list[Tensor] = []
        hard = latents(lambda step, out: shares.append(edit.decisions(out.trace)[EXECUTED].mean()))
        own.soft.copy_((soft - dense).square().mean())
        own.hard.copy_((hard - dense).square().mean())
        own.executed.copy_(torch.stack(shares).mean())


def routed(denoiser: Denoiser) -> tuple[str, HarmoniCa]:
    """The one router of a denoiser, with its name.

    Raises:
        ValueError: if there is none, or several
    """
    found = [(name, e) for name, e in denoiser.applied.items() if isinstance(e, HarmoniCa)]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise ValueError(f"StepWiseDenoising trains one router, an edit {HarmoniCa.__name__}, and there are: {names}")
    return found[0]
