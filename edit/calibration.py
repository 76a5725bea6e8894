"""What an edit determines its own values from, without an optimiser: noisy batches, and whole generations.

`edit.calibrating` makes one of a model and data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from edit.stream import Condition, Output, Step


class Noisy(NamedTuple):
    """A batch of data at random times of the objective, as in training, but without label drop."""

    x_t: Tensor  # b c *sizes
    t: Tensor  # b, times in [0, 1], 1 = pure noise
    condition: Condition


class Scored(NamedTuple):
    """A noisy batch with the loss that training has there."""

    noisy: Noisy
    loss: Callable[[Output], Tensor]  # of a model's output at that batch, on the data: b, with its gradient


class Calibration(ABC):
    """Noisy batches and generations for one edit. Every pass gives the same: all is a function of the seed.

    for x_t, t, condition in calibration: ...
    for noisy, loss in calibration.scored(): loss(denoiser(*noisy))
    calibration.generate(watch=lambda step, output: ...)
    """

    sampler: Any  # the `edit.sampling.Sampler` of `generate`: solver with its steps, guidance
    seed: int

    @abstractmethod
    def __len__(self) -> int:
        """The number of batches in a pass."""

    @abstractmethod
    def __iter__(self) -> Iterator[Noisy]:
        """A pass over the batches, on the model's device.

        Raises:
            ValueError: if the data have conditions alone, and no samples
        """

    @abstractmethod
    def scored(self) -> Iterator[Scored]:
        """The same pass, each batch with the objective's loss on its data; raises likewise."""

    @abstractmethod
    def generate(
        self, watch: Callable[[Step, Output], None] | None = None, samples: int | None = None, seed: int | None = None
    ) -> list[Tensor]:
        """Sample from the model as it is now, under conditions of the data.

        Args:
            watch: called with each evaluation's step and output, whose trace holds what the edit's units record; of
                branch "joint", the first half of the samples is cond's
            samples: how many; None: as many as the calibration was made for
            seed: of the noise; None: the calibration's

        Returns:
            Denoised samples, b c *sizes for each batch.
        """
