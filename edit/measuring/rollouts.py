"""What a rollout costs: the calls of its updates, and what edits remember between the evaluations of a generation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from edit.denoiser import Denoiser
from edit.edits import trains
from edit.measuring.turns import Call, Reach, Turn
from edit.objectives import Objective
from edit.rollout import RolloutMethod, trained
from edit.sampling import Sampler
from edit.stream import Condition, pack

MOST = 16  # evaluations of a generation that are followed: by then memories have their size


def turns_of(
    method: RolloutMethod, sampler: Sampler, times: Sequence[float], student: Denoiser, teacher: str | None
) -> tuple[Turn, ...]:
    """The kinds of updates of a rollout. A cached student counts as a dense one, which it is at most.

    Args:
        method: of the rollout
        sampler: of the generations
        times: of its evaluations, then 0
        student: with its edits; where these freeze the model, the backward pass makes no gradients of its weights
        teacher: role of the model that teaches: "student", without gradient, or "teacher"; None: its answers are stored
    """
    count = len(times) - 1
    updates = trained(method, count)
    separate = any(e.separate for e in student.applied.values())
    reach: Reach = "weights" if any(trains(student, n) for n, _ in stock(student)) else "input"

    def calls(index: int, role: str | None, reach: Reach) -> list[Call]:
        if role is None:
            return []
        inside = sampler.interval[0] <= times[index] <= sampler.interval[1]
        branches = 1 + (sampler.guidance != 1 and inside)
        shared = [1.0] * branches if separate else [float(branches)]
        return [Call(role, n, reach) for n in [*shared, *([1.0] if sampler.perturbation and inside else [])]]

    found: Counter[tuple[Call, ...]] = Counter()
    begin = 0
    for update in updates:
        made: list[Call] = []
        for index in range(begin, update):
            made += calls(index, "student", "nothing")
            made += calls(index, teacher, "nothing") if method.asks == "path" else []
        made += calls(update, teacher, "nothing") if method.asks is not None else []
        found[*made, *calls(update, "student", reach)] += 1
        begin = update + 1
    return tuple(Turn(n / len(updates), calls) for calls, n in found.items())


def stock(denoiser: Denoiser) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the model, without those that edits added beside it."""
    return ((n, p) for n, p in denoiser.named_parameters() if not n.startswith("edits."))


def remembered(
    denoiser: Denoiser, sampler: Sampler, objective: Objective, shape: tuple[int, ...], condition: Condition
) -> int | None:
    """Bytes that edits remember of one sample in fp32, at most, in the first evaluations of a generation.

    Args:
        denoiser: with its edits, on the meta device
        sampler, objective: of the generation
        shape: of a sample
        condition: of one sample

    Returns:
        None: it cannot be followed without values.
    """
    most = 0
    try:
        with torch.no_grad(), torch.device("meta"):
            told = condition.map(lambda v: v.to("meta"))
            walk = sampler.walk(denoiser, objective, told, torch.arange(1), shape=shape)
            for moment in walk:
                moment.give(moment.ask())
                most = max(most, weight(walk.memory))
                if moment.step.index + 1 == MOST:
                    break
    except (RuntimeError, NotImplementedError, ValueError):  # what cannot be decided, copied or packed without values
        return None
    return most


def weight(memory: Mapping[Any, Any]) -> int:
    """Bytes of the tensors of a memory.

    Raises:
        ValueError: if it holds something else than `edit.stream.pack` takes
    """
    sizes: list[int] = []

    def look(v: torch.Tensor) -> torch.Tensor:
        sizes.append(v.nbytes)
        return v

    pack(dict(memory), look)
    return sum(sizes)
