"""Captioned rendered shapes: a text-to-image world that needs no download and whose prompts can be checked.

    a large red circle at the top left       one thing: size and place may be left out
    three small blue crosses                 several alike
    a green square above a white triangle    two things and how they stand

A tenth of the captions has no training image, and neither has any that says the same in other words: with a circle
above a square a square below a circle is held out. All of their words, and pairs of neighbouring words, are trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations, product

import torch
from torch import Tensor

from data import pixel_codec
from data.sets.captioned import (
    APART,
    JITTER,
    LINES,
    PALETTE,
    PLACES,
    Captioned,
    World,
    background,
    colours,
    divided,
    shuffled,
    uniforms,
)

KINDS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
COUNTS = ("a", "two", "three")
RADII = {"small": 0.13, "large": 0.19}  # half the width and height, give or take SPREAD of it
SPREAD = 0.06
RELATIONS = {"above": (0, 1), "below": (0, -1), "left of": (1, 0), "right of": (-1, 0)}  # from the first to the second
CONVERSE = {"below": "above", "right of": "left of"}  # the same with the things exchanged
GAP = 3 / 32  # least distance between two things
MARGIN = 0.02  # to the border
ARM = 0.38  # half the width of a cross's arms, of its radius
AREAS = (torch.pi, 4.0, 2.0, 8 * ARM - 4 * ARM**2)  # by kind, of radius 1


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
        """The same for all scenes that look alike: the upper or left thing comes first, and three things are small."""
        if self.relation in CONVERSE:
            return Scene(self.things[::-1], relation=CONVERSE[self.relation])
        if len(self.things) == len(COUNTS):
            return Scene(tuple(replace(t, size="small") for t in self.things))
        return self


@cache
def grammar() -> tuple[dict[str, Scene], ...]:
    """All captions and what they mean: of one thing, of several alike, of two in a relation."""
    plain = [Thing(colour, kind) for colour, kind in product(PALETTE, KINDS)]
    sized = [Thing(t.colour, t.kind, size) for t in plain for size in (None, *RADII)]
    one = [Scene((t,), place) for t in sized for place in (None, *PLACES)]
    # three large things do not fit
    many = [Scene((t,) * n) for n in (2, 3) for t in sized if (n, t.size) != (3, "large")]
    related = [Scene(pair, relation=r) for pair in permutations(plain, 2) for r in RELATIONS]
    return tuple({str(s): s for s in scenes} for scenes in (one, many, related))


def meaning(caption: str) -> Scene:
    """Raises ValueError if the grammar does not have this sentence."""
    for family in grammar():
        if caption in family:
            return family[caption]
    raise ValueError(f"'{caption}' is no sentence about shapes; expected such as 'a red circle above a blue square'")


def gist(caption: str) -> str:
    """One sentence for all that say the same."""
    return str(meaning(caption).plain)


class Shapes(World):
    """Rendered shapes as latents of a fixed codec, with embedded captions.

    Args:
        size: pixels; a multiple of 4, at least 32
        count: training images; the default has every training caption at least once
        held: held-out images, of held-out captions
        captions: hand captions on as strings too
        seed: of the pictures

    Raises:
        ValueError: for a size or a count that makes no sense
    """

    judged = len(PALETTE) * len(KINDS)  # how many kinds the samples have

    def __init__(self, size: int = 32, count: int = 6144, held: int = 1020, captions: bool = False, seed: int = 0):
        if size < 32 or size % pixel_codec.BLOCK:
            raise ValueError(f"size is a multiple of {pixel_codec.BLOCK} pixels from 32 on, got {size}")
        super().__init__(count, held)
        self.shape = (pixel_codec.CHANNELS, size // pixel_codec.BLOCK, size // pixel_codec.BLOCK)
        families = [divided(shuffled(list(family)), gist) for family in grammar()]
        self._train, self._heldout = (
            self._split([f[part] for f in families], numbers, size, seed, captions)
            for part, numbers in enumerate((torch.arange(count), APART + torch.arange(held)))
        )

    def _split(self, families: list[list[str]], numbers: Tensor, size: int, seed: int, told: bool) -> Captioned:
        """Image k has a sentence of family k modulo 3: all three are as frequent, and all sentences of one are."""
        turns = [divmod(k, len(families)) for k in range(len(numbers))]
        captions = [families[f][turn % len(families[f])] for turn, f in turns]
        scenes = [meaning(caption) for caption in captions]
        return Captioned(draw(scenes, numbers, size, seed), captions, kinds(scenes), self.encoders, told)

    def follows(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Whether each image, uint8 b y x 3, shows what its caption says, and nothing else: b bool."""
        from data.sets.shape_reader import follows

        return follows(images, captions)

    def scores(self, images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Parts of the caption that hold, b float32 each: 1, 0, or NaN where the caption does not speak of it."""
        from data.sets.shape_reader import scores

        return scores(images, captions)


def kinds(scenes: Sequence[Scene]) -> Tensor:
    """Colour and kind of the thing seen first, as one number."""
    colour, kind = list(PALETTE), list(KINDS)
    first = [s.plain.things[0] for s in scenes]  # visible, as what a sentence names first is not
    return torch.tensor([colour.index(t.colour) * len(kind) + kind.index(t.kind) for t in first])


# ---- drawing --------------------------------------------------------------------------------------------------------


def draw(scenes: Sequence[Scene], numbers: Tensor, size: int, seed: int) -> Tensor:
    """Pictures of scenes: uint8 n size size 3, each a pure function of (seed, number, scene)."""
    centre, radius = arrange(scenes, numbers, seed)
    colour, kind = list(PALETTE), list(KINDS)
    picture = background().expand(len(scenes), size, size, 3).clone()
    owner = torch.tensor([i for i, s in enumerate(scenes) for _ in s.things])
    which = torch.tensor([[colour.index(t.colour), kind.index(t.kind)] for s in scenes for t in s.things])
    present = radius > 0
    centre, radius = centre[present], radius[present]
    for part in torch.arange(len(owner)).split(1024):
        cover = coverage(which[part, 1], centre[part], radius[part], size)[..., None]
        # things do not overlap: their shares of a pixel add up
        picture.index_add_(0, owner[part], cover * (colours()[which[part, 0]] - background())[:, None, None])
    return picture.add_(0.5).clamp_(0, 255).to(torch.uint8)


def arrange(scenes: Sequence[Scene], numbers: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Where things are and how large: centres n 3 2, radii n 3 (0: no such thing).

    By rejection: places are drawn until no two things are too close, and relations hold with something to spare.
    """
    n, most = len(scenes), len(COUNTS)
    u = uniforms(seed, numbers, 1, 2 * most).view(n, 2, most)
    radius = torch.zeros(n, most)
    low, high = torch.zeros(n, 1, 2), torch.ones(n, 1, 2)
    direction = torch.zeros(n, 2)
    for i, scene in enumerate(scenes):
        for j, thing in enumerate(scene.things):
            lot = u[i, 0, j if scene.relation else 0]  # things alike have one size
            drawn = "small" if len(scene.things) == most or lot < 0.5 else "large"
            radius[i, j] = RADII[thing.size or drawn] * (1 + SPREAD * (2 * u[i, 1, j] - 1))
        if scene.place:
            line = torch.tensor([LINES[k] for k in PLACES[scene.place]])
            low[i], high[i] = line - JITTER, line + JITTER
        if scene.relation:
            direction[i] = torch.tensor(RELATIONS[scene.relation], dtype=torch.float32)
    reach = radius[..., None] + MARGIN
    low, high = torch.maximum(low, reach), torch.minimum(high, 1 - reach)

    centre, todo, attempt = torch.zeros(n, most, 2), torch.arange(n), 2
    while len(todo):
        u = uniforms(seed, numbers[todo], attempt, 2 * most).view(-1, most, 2)
        centre[todo] = low[todo] + u * (high - low)[todo]
        todo = todo[~allowed(centre[todo], radius[todo], direction[todo])]
        attempt += 1
    return centre, radius


def allowed(centre: Tensor, radius: Tensor, direction: Tensor) -> Tensor:
    """Whether things keep their distance and the second lies in its direction from the first: n bool."""
    fine = torch.ones(len(centre), dtype=torch.bool)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        apart = (centre[:, a] - centre[:, b]).abs().amax(-1) >= radius[:, a] + radius[:, b] + GAP
        fine &= apart | (radius[:, a] == 0) | (radius[:, b] == 0)
    ahead, aside = along(centre[:, 1] - centre[:, 0], direction)
    return fine & ((ahead - aside >= 0.1) | (direction == 0).all(-1))


def along(way: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """How far a way leads in a direction (along an axis), and how far to its side: n 2, n 2 -> n, n."""
    return (way * direction).sum(-1), (way * direction.flip(-1)).sum(-1).abs()


def coverage(kind: Tensor, centre: Tensor, radius: Tensor, size: int) -> Tensor:
    """The share of each pixel that a thing covers: n, n 2, n -> n size size, by the distance to its outline."""
    at = (torch.arange(size) + 0.5) / size
    x, y = (at - centre[:, :1])[:, None, :], (at - centre[:, 1:])[:, :, None]
    r = radius[:, None, None]
    distance = torch.empty(len(kind), size, size)
    for number, outline in enumerate((_circle, _square, _triangle, _cross)):
        mine = kind == number
        distance[mine] = outline(x[mine], y[mine], r[mine])
    return (0.5 - distance * size).clamp_(0, 1)


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (x.square() + y.square()).sqrt() - r


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - r


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Upright, as high as wide."""
    return torch.maximum(y - r, (2 * x.abs() - y - r) * 5**-0.5)


def _cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - r, y - ARM * r), torch.maximum(x - ARM * r, y - r))
