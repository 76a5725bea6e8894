"""What a loss sees (`edit.losses.Seen`), made by hand."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from edit.few_step.vision import VISION
from edit.losses import Draws, Seen
from edit.stream import Condition, Output


@dataclass
class Models:
    """The models of a run."""

    student: Callable
    predict: Callable
    average: Callable
    teacher: Callable
    features: Callable
    critic: Callable
    own: Any = None
    decode: Callable = nn.Identity()
    look: Any = None  # the vision model


def view(models: Models, batch: Seen) -> Seen:
    """The batch as a loss of a run with these models sees it."""
    fields = {name: value for name, value in vars(models).items() if name != "look"}
    return replace(batch, **fields, frozen={} if models.look is None else {VISION: models.look})


def passed(output: Output, t: Tensor, progress: float = 0.0, taught: Output | None = None, own: Any = None) -> Seen:
    """One forward of diffusion training, as a term sees it."""
    count, shape = len(t), tuple(output.sample.shape[1:])
    draws = Draws(0, torch.arange(count), 0, shape)
    return Seen(
        Condition(), Condition(), torch.ones(count), draws, progress, output=output, taught=taught, t=t, own=own
    )
