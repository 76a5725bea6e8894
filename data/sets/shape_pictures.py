"""Pictures of scenes of shapes: where things are placed, and the share of each pixel that they cover."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data.sets.captioned import JITTER, LINES, PALETTE, PLACES, background, colours, uniforms
from data.sets.shape_scenes import COUNTS, KINDS, RELATIONS, Scene

RADII = {"small": 0.13, "large": 0.19}  # half the width and height, give or take SPREAD of it
SPREAD = 0.06
GAP = 3 / 32  # least distance between two things
MARGIN = 0.02  # to the border
ARM = 0.38  # half the width of a cross's arms, of its radius
AREAS = (torch.pi, 4.0, 2.0, 8 * ARM - 4 * ARM**2)  # by kind, of radius 1


def draw(scenes: Sequence[Scene], numbers: Tensor, size: int, seed: int) -> Tensor:
    """Pictures of scenes: uint8 n size size 3, each a pure function of (seed, number, scene)."""
    return paint(scenes, *arrange(scenes, numbers, seed), size)


def paint(scenes: Sequence[Scene], centre: Tensor, radius: Tensor, size: int) -> Tensor:
    """Pictures of scenes whose things have these places n k 2 and sizes n k (0: no such thing): uint8 n size size 3."""
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
    """Places and sizes of things: centres n 3 2, radii n 3 (0: no such thing).

    By rejection: places are drawn until no two things are too close and relations hold with a margin.
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
    """Components of a vector along an axis and, absolute, across it: n 2, n 2 -> n, n."""
    return (way * direction).sum(-1), (way * direction.flip(-1)).sum(-1).abs()


def coverage(kind: Tensor, centre: Tensor, radius: Tensor, size: int) -> Tensor:
    """The share of each pixel that a thing covers, from the distance to its outline: n, n 2, n -> n size size."""
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
