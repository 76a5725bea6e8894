"""The cores of two methods that train on the sampler's own path: of HarmoniCa, a table of soft decisions per evaluation
and branch; of LESA, the last hidden tokens predicted from their history."""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import nn

from edit.denoiser import Edit
from edit.inputs.limits import Limits
from edit.paths import mean
from edit.rollout import RolloutMethod
from edit.unit import Wrapper, core

# ---- HarmoniCa ------------------------------------------------------------------------------------------------------


class Router(nn.Module):
    def __init__(self, steps: int, count: int):
        super().__init__()
        self.rho = nn.Parameter(torch.zeros(steps, count))
        self.register_buffer("on", torch.ones(steps, dtype=torch.bool))  # evaluations at which anything is replayed


class Table(nn.Module):
    def __init__(self, steps: int, count: int):
        super().__init__()
        self.register_buffer("computed", torch.ones(steps, count, dtype=torch.bool))


@dataclass
class Mixed(Edit):
    """Branches that are computed with weight r = sigmoid(rho) and replayed with 1 - r; hard in eval mode."""

    steps: int = 4
    theta: float = 0.5
    beta: float = 0.0

    def apply(self, denoiser):
        own = Router(self.steps, 2 * len(denoiser.units))
        for i, unit in enumerate(denoiser.units):
            core(unit).slots.branch = Mix(core(unit).slots.branch, i, self, own)
        return own

    def trainable(self, name):
        return name.startswith("edits.")

    def check(self, sampler, times):
        if len(times) - 1 != self.steps:
            raise ValueError(f"Mixed has {self.steps} steps, the sampler {len(times) - 1}: use as many")

    def losses(self, trace):
        kept = [v for k, v in trace.items() if k.startswith(f"{self.name}.r.")]
        return {"kept": self.beta * torch.stack(kept).sum(0)} if kept else {}

    def compact(self, own):
        fixed = Fixed(self.steps)
        table = Table(*own.rho.shape)
        table.computed.copy_(own.rho.sigmoid() > self.theta)
        return fixed, table


@dataclass
class Fixed(Edit):
    """What is left of it: a table."""

    steps: int = 4

    def apply(self, denoiser):
        own = Table(self.steps, 2 * len(denoiser.units))
        for i, unit in enumerate(denoiser.units):
            core(unit).slots.branch = Mix(core(unit).slots.branch, i, self, own)
        return own


class Mix:
    def __init__(self, before, index, edit, own):
        self.before, self.index, self.edit, self.own = before, index, edit, own

    def __call__(self, stream, name, run):
        if stream.step is None:
            return self.before(stream, name, run)
        memory = stream.step.recall(self.edit.name, self.index)
        old, column, row = memory.get(name), 2 * self.index + (name == "feed"), stream.step.index
        if isinstance(self.edit, Fixed) or not self.own.training:
            table = self.own.computed if isinstance(self.edit, Fixed) else self.own.rho.sigmoid() > self.edit.theta
            if old is None or table[row, column]:
                memory[name] = self.before(stream, name, run)
            return memory[name]
        fresh = self.before(stream, name, run)
        r = torch.where(self.own.on[row], self.own.rho[row, column].sigmoid(), 1.0)
        stream.layout.note(f"{self.edit.name}.r.{self.index}.{name}", r.expand(len(stream.image)))
        mixed = fresh if old is None else fresh._replace(image=torch.lerp(old.image, fresh.image, r))
        if old is None or r > self.edit.theta:
            memory[name] = mixed._replace(image=mixed.image.detach())
        return mixed


class Weights(nn.Module):
    def __init__(self, steps: int):
        super().__init__()
        self.register_buffer("lambdas", torch.zeros(steps))


@dataclass(frozen=True)
class Harmony(RolloutMethod):
    """Match the dense model at the student's own samples, by how much each evaluation's replay changes the result."""

    edit: str = "mixed"
    steps: int = 4
    every: Annotated[int, Limits(0, 10**6)] = 0
    limit: float = 5.0

    def build(self, student, teacher=None):
        return Weights(self.steps)

    def losses(self, visit):
        delta = visit.student.prediction - visit.teacher.prediction
        weight = visit.own.lambdas[visit.step.index] if self.every else 1.0
        return {"match": weight * mean(delta.square())}

    def constrain(self, student, own):
        student.edits[self.edit].rho.clamp_(-self.limit, self.limit)

    def refresh(self, student, batches, own):
        router = student.edits[self.edit].train()  # soft, while the rest samples
        router.on.zero_()
        before = torch.cat(batches.generate())
        for i in range(1, self.steps):
            router.on[i] = True
            now = torch.cat(batches.generate())
            own.lambdas[i] = (now - before).square().mean()
            before = now
        router.on.fill_(True)


# ---- LESA -----------------------------------------------------------------------------------------------------------


class Predictor(nn.Module):
    def __init__(self, window: int):
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(window))  # newest last


@dataclass
class Ahead(Edit):
    """Every n-th evaluation runs the units; of the others the last hidden tokens are h' = h + sum_k w_k h_k."""

    interval: int = 2
    window: int = 2

    def apply(self, denoiser):
        own, last = Predictor(self.window), len(denoiser.units) - 1
        denoiser.units[:] = [Skipped(u, i == last, self, own) for i, u in enumerate(denoiser.units)]
        return own

    def trainable(self, name):
        return name.startswith("edits.")

    def full(self, index):
        return index % self.interval == 0


class Skipped(Wrapper):
    def __init__(self, unit, last, edit, own):
        super().__init__(unit)
        self.last, self.edit, self.own = last, edit, own

    def __call__(self, stream):
        step = stream.step
        if step is None:
            return self.unit(stream)
        full = self.edit.full(step.index)
        stream = self.unit(stream) if full else stream
        if not self.last:
            return stream
        history = step.recall(self.edit.name, 0).setdefault("hidden", [])
        if not full:
            window = torch.stack([history[max(len(history) - k, 0)] for k in range(self.edit.window, 0, -1)], -1)
            stream = replace(stream, image=window[..., -1] + window @ self.own.mix)
            stream = stream.record(f"{self.edit.name}.hidden", stream.image)
        history.append(stream.image)
        return stream


@dataclass(frozen=True)
class Lesson(RolloutMethod):
    """The predicted tokens follow those of the un-accelerated generation; `forced`: with its history, not one's own."""

    edit: str = "ahead"
    interval: int = 2
    unit: int = 1
    forced: bool = False

    asks = "path"

    @property
    def teacher_taps(self):
        return (self.unit,)

    def trains(self, index, count):
        return index % self.interval != 0

    def passing(self, visit):
        if not self.forced:
            return None
        for branch, tokens in self.truth(visit).items():
            history = replace(visit.step, branch=branch).recall(self.edit, 0).setdefault("hidden", [])
            history.append(tokens)
        return visit.teacher.prediction

    def truth(self, visit):
        return {branch: out.trace[f"unit.{self.unit}"] for branch, out in visit.teacher.outputs.items()}

    def losses(self, visit):
        found, truth = visit.student.record(f"{self.edit}.hidden"), visit.teacher.record(f"unit.{self.unit}")
        return {"hidden": mean((found - truth).abs())}

    def proceed(self, visit):
        if not self.forced:
            return visit.student.prediction
        for branch, memory in visit.memory(self.edit, 0).items():
            memory["hidden"][-1] = self.truth(visit)[branch]
        return visit.teacher.prediction


@dataclass(frozen=True)
class Planted(Lesson):
    """The tokens follow a predictor with known weights, -0.3 and 0.5, at the student's own history."""

    asks = None
    teacher_taps = ()

    def losses(self, visit):
        (memory,) = visit.memory(self.edit, 0).values()
        *_, before, newest, found = [memory["hidden"][0], *memory["hidden"]]
        return {"hidden": mean((found - (newest - 0.3 * before + 0.5 * newest).detach()).square())}
