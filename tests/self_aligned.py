"""One step of diffusion training as a term that asks the average or the teacher sees it, with real models."""

from dataclasses import replace

import torch
from torch import Tensor

from edit.denoiser import Denoiser
from edit.distillation.guidance import TeacherGuidance
from edit.losses import Draws, Seen, Term
from edit.objectives import FlowMatching, Objective
from edit.stream import Condition
from recipes.roles import Teacher
from recipes.seen import Asked


def look(
    term: Term,
    student: Denoiser,
    average: Denoiser | None = None,
    teacher: Denoiser | None = None,
    objective: Objective | None = None,
    t: Tensor | None = None,
    drop: Tensor | None = None,
    count: int = 4,
    own: torch.nn.Module | None = None,
) -> Seen:
    """After the student's forward; `drop` marks samples whose condition is dropped."""
    objective = objective or FlowMatching()
    g = torch.Generator().manual_seed(2)
    shape = tuple(student.sample_shape)
    x, noise = torch.randn(count, *shape, generator=g), torch.randn(count, *shape, generator=g)
    whole = told(student, count)
    null = student.null(whole)
    condition = whole if drop is None else whole.where(drop, null)
    t = objective.times(torch.linspace(0.1, 0.9, count)) if t is None else t
    x_t, scale = objective.corrupt(x, noise, t), torch.ones(count)
    role = None
    if teacher is not None:
        role = Teacher(lambda: teacher, None, TeacherGuidance())
        role.configure(student, (), ())
    asked = Asked(objective, student, average or student, role, None, null, scale, None)
    out = student(x_t, t, condition, taps=term.taps)
    draws = Draws(0, torch.arange(count), 0, shape)
    seen = Seen(condition, null, scale, draws, x=x, noise=noise, **asked.callables())
    own = term.build(student, teacher) if own is None else own
    return replace(seen, output=out, x_t=x_t, t=t, whole=whole, own=own)


def told(denoiser: Denoiser, count: int) -> Condition:
    g = torch.Generator().manual_seed(3)
    example = denoiser.example(count, text=5)
    if example.label is not None:
        return replace(example, label=torch.arange(count) % 10)
    return example.map(lambda v: torch.randn(v.shape, generator=g) if v.is_floating_point() else v)


def gradients(module: torch.nn.Module) -> set[str]:
    """Names of the parameters that have a gradient other than zero."""
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
