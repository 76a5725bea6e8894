"""Gates on scripted signals: which evaluations they compute."""

from typing import Any

import torch
from torch import nn

from edit.caching.engine import Gate
from edit.stream import Layout, Step, Stream

UNIT: Any = nn.Identity()  # one that is on no other rank


def stream(value, index: int, count: int) -> Stream:
    image = torch.as_tensor(value, dtype=torch.float32).expand(2, 3, 4).clone()
    return Stream(image, torch.zeros(2, 1), Layout((1, 1, 3)), step=Step(index, count, 1 - index / count))


def decided(gate: Gate, values, front=None) -> list[int]:
    """Evaluations that are computed."""
    state: dict = {}
    found = []
    for i, value in enumerate(values):
        if front is not None:
            state["front"] = torch.full((2, 3, 4), float(front))
        if gate.computes(UNIT, stream(value, i, len(values)), state):
            found.append(i)
    return found
