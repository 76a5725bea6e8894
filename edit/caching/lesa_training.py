"""How the predictor of `edit.caching.lesa` is trained, in two runs of the rollout recipe.

LESA (arXiv 2602.20497). At every evaluation that is not computed

    L = mean |h_s - h'_s|,   h'_s of the un-accelerated model's own generation from the same noise

is one update. First with the true history: h'_s is remembered in place of h_s, and no unit runs. Then with the
predictor's own: computed evaluations run the units on the student's sample, and h_s is remembered, without its graph.
Unlike the release, each run has its own optimiser and schedule, parameters in fp32 and gradients of all ranks. The
un-accelerated generation runs beside the student's, or was stored (`data.generate taps=...`).

Specification: methods/lesa.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from edit.caching.lesa import LESA, SITES, Site, full
from edit.caching.lesa_predictor import remember
from edit.denoiser import Denoiser
from edit.inputs.limits import Count, Natural, check_numbers
from edit.paths import mean
from edit.predictions import default_objective
from edit.rollout import Answer, RolloutMethod, Visit
from edit.sampling import Sampler
from edit.stream import Output


@dataclass(frozen=True)
class FollowHistory(RolloutMethod):
    """Predicted tokens follow those of the un-accelerated generation.

    Args:
        edit: name of the edit
        interval, first, forced, site: of that edit, which say what is predicted
        true_history: remember the un-accelerated generation, as the first stage does; else what was predicted
    """

    edit: str = "lesa"
    interval: Count = 7
    first: Count = 3
    forced: Natural | None = 3
    site: Site = "last_hidden"
    true_history: bool = False

    asks = "path"

    def __post_init__(self):
        check_numbers(self)
        if self.site not in SITES:
            raise ValueError(f"FollowHistory: site is one of {', '.join(SITES)}, got {self.site!r}")

    @property
    def taps(self) -> tuple[int | str, ...]:  # type: ignore[override]
        end = SITES[self.site]
        return (-1 if end == "units" else end,)

    @property
    def teacher_taps(self) -> tuple[int | str, ...]:  # type: ignore[override]
        return self.taps

    def check(self, student: Denoiser, sampler: Sampler, times: tuple[float, ...]) -> None:
        edit = student.applied.get(self.edit)
        if not isinstance(edit, LESA):
            there = ", ".join(f"{n} ({type(e).__name__})" for n, e in student.applied.items()) or "none"
            raise ValueError(f"the student has no LESA named {self.edit!r}, its edits: {there}: choose edits=lesa")
        for name in ("interval", "first", "forced", "site"):
            if (mine := getattr(self, name)) != (theirs := getattr(edit, name)):
                raise ValueError(f"{name} is {mine}, and that of the edit {self.edit} is {theirs}: give one number")
        objective = default_objective(student) if edit.schedule is None else edit.schedule.objective
        used = {edit.stage(objective.level(t)) for i, t in enumerate(times[:-1]) if not edit.computed(i)}
        if used and (idle := sorted({*range(len(edit.windows))} - used)):
            raise ValueError(
                f"of the {len(times) - 1} evaluations none is predicted in stage {idle[0]} of {len(edit.windows)}, and "
                f"its weights would not train: sample in more steps, or give edits.{self.edit} fewer boundaries"
            )
        if edit.guided and sampler.guidance == 1:
            raise ValueError(
                f"{self.edit} has weights for uncond, which guidance 1 does not train: set edits.{self.edit}.guided to "
                "false, or sampler.guidance"
            )

    def trains(self, index: int, count: int) -> bool:
        return not full(index, self.interval, self.first, self.forced)

    def passing(self, visit: Visit) -> Tensor | None:
        if not self.true_history:
            return None
        assert visit.teacher is not None
        for branch, output in visit.teacher.outputs.items():
            state = replace(visit.step, branch=branch).recall(self.edit, 0).setdefault("value", {})
            remember(state, tokens(output))
        return visit.teacher.prediction

    def losses(self, visit: Visit) -> dict[str, Tensor]:
        found, truth = behind(visit.student), behind(visit.teacher)
        return {"tokens": mean((found.float() - truth.float()).abs())}

    def proceed(self, visit: Visit) -> Tensor:
        assert visit.student is not None and visit.teacher is not None
        if not self.true_history:
            return visit.student.prediction
        for branch, memory in visit.memory(self.edit, 0).items():
            memory["value"]["history"][-1] = tokens(visit.teacher.outputs[branch])
        return visit.teacher.prediction


def tapped(output: Output) -> str:
    """The name of the record of the tapped image tokens."""
    return next(name for name in output.trace if name.startswith(("unit.", "end.")) and not name.endswith(".text"))


def tokens(output: Output) -> Tensor:
    """At the site: b n d."""
    return output.trace[tapped(output)]


def behind(answer: Answer | None) -> Tensor:
    """Tokens at the site of all guidance branches, one after the other: k b n d."""
    assert answer is not None
    return answer.record(tapped(next(iter(answer.outputs.values()))))
