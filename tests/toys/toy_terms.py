"""The cores of two alignment terms: of SRA, the average at another noise level; of HASTE, a vision model and an end."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from edit.losses import Frozen, Seen, Term
from edit.paths import corrupt, mean


@dataclass
class SelfAlignment(Term):
    """Tokens of an early unit follow those of a later unit of the average, which sees less noise of its own draw."""

    shift: float = 0.2

    taps = (0,)

    def build(self, student, teacher=None):
        return nn.Linear(student.facts.width, student.facts.width)

    def losses(self, seen: Seen):
        less = (seen.t - self.shift * seen.draws.uniform(0)).clamp_min(0)
        shown = seen.averaged(corrupt(seen.x, seen.noise, less), less, seen.whole, taps=(1,)).trace["unit.1"]
        guess = seen.own(seen.output.trace["unit.0"])
        return {"self": 0.5 * mean((guess - shown).square())}


@dataclass(frozen=True)
class Eye(Frozen):
    """A vision model of random weights."""

    width: int = 8

    def load(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return self.structure().to_empty(device="cpu").apply(initialised).requires_grad_(False).eval()

    def structure(self):
        with torch.device("meta"):
            return nn.Conv2d(1, self.width, 2, 2)


def initialised(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        module.reset_parameters()


@dataclass
class VisionAlignment(Term):
    """Tokens of a unit follow what a frozen vision model sees in the clean sample, until a step."""

    ends: int | None = None

    taps = (0,)

    @property
    def frozen(self) -> Mapping[str, Frozen]:
        return {"eye": Eye()}

    def build(self, student, teacher=None):
        return nn.Linear(student.facts.width, 8)

    def losses(self, seen: Seen):
        shown = seen.frozen["eye"](seen.x).mean((2, 3))
        return {"align": 0.5 * mean((seen.own(seen.output.trace["unit.0"]).mean(1) - shown).square())}


@dataclass
class Weightless(VisionAlignment):
    """The same with a gradient of zero."""

    def losses(self, seen: Seen):
        return {name: 0.0 * value for name, value in super().losses(seen).items()}
