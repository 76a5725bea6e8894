"""The sentences about shapes, and the scenes that they mean: what there is, where, and how things stand.

a large red circle at the top left       one thing: size and place may be left out
three small blue crosses                 several alike
a green square above a white triangle    two things and how they stand
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations, product

import torch
from torch import Tensor

from data.sets.captioned import PALETTE, PLACES

KINDS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
FAMILIES = ("one", "several", "related")
COUNTS = ("a", "two", "three")
SIZES = ("small", "large")
RELATIONS = {"above": (0, 1), "below": (0, -1), "left of": (1, 0), "right of": (-1, 0)}  # from the first to the second
CONVERSE = {"below": "above", "right of": "left of"}  # the same with the things exchanged


@dataclass(frozen=True)
class Thing:
    colour: str
    kind: str
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, (self.size, self.colour, self.kind)))


@dataclass(frozen=True)
class Scene:
    """One thing and perhaps its place, two or three alike, or two in a relation."""

    things: tuple[Thing, ...]
    place: str | None = None
    relation: str | None = None

    def __str__(self) -> str:
        first, last = self.things[0], self.things[-1]
        if self.relation:
            return f"a {first} {self.relation} a {last}"
        if len(self.things) > 1:
            return f"{COUNTS[len(self.things) - 1]} {first}".replace(first.kind, KINDS[first.kind])
        return " ".join(filter(None, (f"a {first}", self.place)))

    @property
    def plain(self) -> Scene:
        """One form of all scenes that look alike: the upper or left thing first, three things always small."""
        if self.relation in CONVERSE:
            return Scene(self.things[::-1], relation=CONVERSE[self.relation])
        if len(self.things) == len(COUNTS):
            return Scene(tuple(replace(t, size="small") for t in self.things))
        return self


@cache
def grammar() -> dict[str, dict[str, Scene]]:
    """All captions and their scenes, by family."""
    plain = [Thing(colour, kind) for colour, kind in product(PALETTE, KINDS)]
    sized = [Thing(t.colour, t.kind, size) for t in plain for size in (None, *SIZES)]
    one = [Scene((t,), place) for t in sized for place in (None, *PLACES)]
    # three large things do not fit
    many = [Scene((t,) * n) for n in (2, 3) for t in sized if (n, t.size) != (3, "large")]
    related = [Scene(pair, relation=r) for pair in permutations(plain, 2) for r in RELATIONS]
    return {name: {str(s): s for s in scenes} for name, scenes in zip(FAMILIES, (one, many, related), strict=True)}


def meaning(caption: str) -> Scene:
    """The scene of a caption. Raises ValueError if the grammar lacks the sentence."""
    for family in grammar().values():
        if caption in family:
            return family[caption]
    raise ValueError(f"'{caption}' is no sentence about shapes; expected such as 'a red circle above a blue square'")


def gist(caption: str) -> str:
    """A sentence that all captions of the same meaning share."""
    return str(meaning(caption).plain)


def kinds(scenes: Sequence[Scene]) -> Tensor:
    """Colour and kind of the thing seen first, as one number."""
    colour, kind = list(PALETTE), list(KINDS)
    first = [s.plain.things[0] for s in scenes]  # the order of things in a sentence is not visible
    return torch.tensor([colour.index(t.colour) * len(kind) + kind.index(t.kind) for t in first])
