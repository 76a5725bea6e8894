"""How an optimiser treats a parameter: what an edit says of it, beside the settings of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["matrix", "stack", "vector"]


@dataclass(frozen=True)
class Group:
    """Changes to the run's settings for one parameter; several edits' changes multiply.

    Args:
        lr: factor of the learning rate, at least 0; schedules keep it
        decay: factor of the weight decay, at least 0
        betas: of Adam, each in [0, 1); None: the run's
        kind: for optimisers that treat matrices in their own way: "matrix", "stack" (matrices along the first axis, as
            experts are stored) or "vector" (anything else); None: nothing is said
    """

    lr: float = 1.0
    decay: float = 1.0
    betas: tuple[float, float] | None = None
    kind: Kind | None = None

    def __post_init__(self):
        if not 0 <= self.lr < float("inf") or not 0 <= self.decay < float("inf"):
            raise ValueError(f"Group: lr and decay are factors of at least 0, got {self.lr} and {self.decay}")
        if self.betas is not None and not (len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)):
            raise ValueError(f"Group: betas are two numbers of at least 0 and below 1, got {self.betas}")
        if self.kind not in (None, "matrix", "stack", "vector"):
            raise ValueError(f"Group: kind is matrix, stack or vector, got {self.kind!r}")

    def joined(self, other: Group) -> Group:
        """Both changes: factors multiply.

        Raises:
            ValueError: if both say betas or a kind, and not the same
        """
        for what in ("betas", "kind"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if None not in (mine, theirs) and mine != theirs:
                raise ValueError(f"one edit asks for {what} {mine}, another for {theirs}")
        return Group(self.lr * other.lr, self.decay * other.decay, self.betas or other.betas, self.kind or other.kind)

    @property
    def place(self) -> tuple:
        """The order of optimiser groups, which a resumed run must find again: parameters without changes come first."""
        return self != PLAIN, self.lr, self.decay, self.betas or (), self.kind or ""


PLAIN = Group()
