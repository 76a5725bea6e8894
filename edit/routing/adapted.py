"""Linear layers that depend on the sample, whole or a part, and what is said of a unit's call to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from edit.stream import Stream
from edit.unit import Unit

Part = slice | Tensor  # of features: a range, or int64 indices in order
Pieces = tuple[Part, ...]


class Adapted(nn.Linear, ABC):
    """A linear layer with an addition that depends on the sample, too: W x + b + added(x).

    Args:
        layer: whose weights it takes over
    """

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)
        self._disable_adapters = False  # as peft's layers have it

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self._disable_adapters else self.part(x, self.weight, self.bias)

    @abstractmethod
    def part(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Pieces | None = None, columns: Pieces | None = None
    ) -> Tensor:
        """Some outputs from some inputs, ... in -> ... out, with their addition.

        Args:
            x: ... in, these inputs
            weight, bias: W and b of these outputs and inputs, out x in and out
            rows, columns: which they are; None: all
        """

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """(rows, columns): a tensor with a row for each output, and one with a column for each input."""


@dataclass(frozen=True)
class UnitCall:
    """The inputs of a unit's layers besides their tokens."""

    time: Tensor  # b d, or 1 d where all samples share one: in a generation
    samples: Tensor | None = None  # m: whose each token is, where tokens of several samples run as one sequence


class UnitCalls:
    """The calls of a unit that are under way, the innermost last. Between calls there are none.

    A layer is called with tokens alone. Hooks of the unit, which its copies share, say the rest for as long as it runs;
    checkpointing runs it once more, and so it is said once more.
    """

    def __init__(self, unit: Unit):
        self.open: list[UnitCall] = []
        unit.register_forward_pre_hook(self._begin)
        unit.register_forward_hook(self._end, always_call=True)  # checkpointing leaves early, by an exception
        unit.calls = self

    def _begin(self, unit: nn.Module, args: tuple[Stream]) -> None:
        (stream,) = args
        assert stream.time is not None
        self.open.append(UnitCall(stream.time if stream.step is None else stream.time[:1]))

    def _end(self, unit: nn.Module, args: tuple[Stream], after: Stream) -> None:
        self.open.pop()


@contextmanager
def one_sequence(unit: Unit, samples: Tensor) -> Iterator[None]:
    """Within a call of a unit: its layers are called with tokens of several samples as one sequence, (1) m c.

    Args:
        unit: or a copy of it
        samples: m, of each token the position of its sample in the batch
    """
    calls = vars(unit).get("calls")
    if calls is None:
        yield
        return
    calls.open.append(UnitCall(calls.open[-1].time, samples))
    try:
        yield
    finally:
        calls.open.pop()
