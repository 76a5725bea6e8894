"""Read pictures of shapes without training: the things in them, and whether these follow a caption.

Pixels unlike the background form connected parts. A part's colour is the nearest of the palette, its kind the outline
that fits best among those of its area and centre of mass, so positions and sizes are finer than a pixel. A part that
resembles no colour or no outline has none, and follows no caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from data.sets.captioned import PALETTE, PLACES, background, cells, colours
from data.sets.shape_pictures import AREAS, along, coverage
from data.sets.shape_scenes import KINDS, RELATIONS, Scene, Thing, meaning

CONTRAST = 70.0  # distance in RGB at which a pixel is no longer background; the palette is 180 or more from it
SPECK = 0.008  # parts smaller than this share of the image are dirt; the smallest thing has 0.023
COLOUR_OFF = 90.0  # largest distance in RGB from the palette
OUTLINE_OFF = 0.4  # largest misfit, as a share of the area
LARGE = 0.16  # radius between small and large things
LIMITS = (0.08, 0.24)  # of radii


@dataclass(frozen=True)
class Seen:
    """A thing in a picture; colour and kind are None where it resembles none."""

    colour: str | None
    kind: str | None
    radius: float
    centre: tuple[float, float]

    @property
    def size(self) -> str | None:
        if not LIMITS[0] <= self.radius <= LIMITS[1]:
            return None
        return "large" if self.radius > LARGE else "small"

    def shows(self, thing: Thing) -> bool:
        known = self.size is not None and thing.size in (None, self.size)
        return known and (self.colour, self.kind) == (thing.colour, thing.kind)


def things_in(images: Tensor) -> list[list[Seen]]:
    """The things in each image: uint8 b y x 3.

    Raises:
        ValueError: if the images are not square colour images
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.shape[1] != images.shape[2] or images.dtype != torch.uint8:
        raise ValueError(f"expected square uint8 images b y x 3, got {images.dtype} of {tuple(images.shape)}")
    return [things for part in images.cpu().split(256) for things in _read(part)]


def _read(images: Tensor) -> list[list[Seen]]:
    from scipy import ndimage

    side = images.shape[1]
    off = images.float() - background()  # b y x 3
    flat = np.zeros((3, 3, 3), dtype=bool)
    flat[1] = True  # neighbours within an image, none across images
    labels: np.ndarray = ndimage.label((off.norm(dim=-1) > CONTRAST).numpy(), structure=flat)[0]  # type: ignore
    sizes = np.bincount(labels.ravel())
    large = np.flatnonzero(sizes >= SPECK * side * side)[1:]  # without the background
    renamed = np.zeros(len(sizes), dtype=labels.dtype)
    renamed[large] = np.arange(1, len(large) + 1)
    labels = renamed[labels]
    seen: list[list[Seen]] = [[] for _ in images]
    if not len(large):
        return seen
    places = ndimage.find_objects(labels)
    owner = torch.tensor([p[0].start for p in places])
    # each part with the blurred pixels around it
    region = torch.from_numpy(np.where(labels > 0, labels, ndimage.maximum_filter(labels, size=(1, 3, 3))))
    mine = (region[owner] == torch.arange(1, len(large) + 1)[:, None, None]).float()  # n y x
    off = off[owner] * mine[..., None]

    # the mean over a part, mostly of its inside: edges are mixed with the background
    weight = off.square().sum(-1, keepdim=True).square()
    mean = (off * weight).sum((1, 2)) / weight.sum((1, 2))
    distance = torch.cdist(mean, colours() - background())
    colour_off, colour = distance.min(1)

    ink = (colours() - background())[colour]  # n 3
    cover = (torch.einsum("nyxc,nc->nyx", off, ink) / ink.square().sum(-1)[:, None, None]).clamp(0, 1)
    area = cover.sum((1, 2)).clamp_min(1)
    at = (torch.arange(side) + 0.5) / side
    centre = torch.stack(((cover.sum(1) * at).sum(1), (cover.sum(2) * at).sum(1)), dim=1) / area[:, None]
    misfits, radii, centres = [], [], []
    for number, unit in enumerate(AREAS):
        radius = (area / unit).sqrt() / side
        middle = centre.clone()
        if list(KINDS)[number] == "triangle":  # its centre of mass is below its middle
            middle[:, 1] -= radius / 3
        outline = coverage(torch.full((len(area),), number), middle, radius, side)
        misfits.append((outline - cover).abs().sum((1, 2)) / area)
        radii.append(radius)
        centres.append(middle)
    misfit, kind = torch.stack(misfits).min(0)
    chosen = torch.arange(len(kind))
    radius, centre = torch.stack(radii)[kind, chosen], torch.stack(centres)[kind, chosen]
    for i, image in enumerate(owner.tolist()):
        seen[image].append(
            Seen(
                list(PALETTE)[colour[i]] if colour_off[i] <= COLOUR_OFF else None,
                list(KINDS)[kind[i]] if misfit[i] <= OUTLINE_OFF else None,
                radius[i].item(),
                (centre[i, 0].item(), centre[i, 1].item()),
            )
        )
    return seen


def follows(images: Tensor, captions: Sequence[str]) -> Tensor:
    """Whether each image, uint8 b y x 3, shows what its caption says and nothing else: b bool.

    Raises:
        ValueError: for a caption outside the grammar, or unequal numbers of images and captions
    """
    pairs = zip(things_in(images), _scenes(images, captions), strict=True)
    # the number is compared first: poor models scatter a dozen specks, which have too many orders
    return torch.tensor(
        [
            len(seen) == len(scene.things) and any(_holds(order, scene) for order in permutations(seen))
            for seen, scene in pairs
        ]
    )


def scores(images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """Parts of each caption that hold: 1, 0, or NaN where the caption does not name the part; b float32 each.

    Returns:
        count: as many things as named
        colour, kind, size: the things have the named ones, in any assignment
        place, relation: of things of the named colour and kind
    """
    pairs = zip(things_in(images), _scenes(images, captions), strict=True)
    rows = [_score(seen, scene) for seen, scene in pairs]
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def _scenes(images: Tensor, captions: Sequence[str]) -> list[Scene]:
    if len(images) != len(captions):
        raise ValueError(f"got {len(images)} images and {len(captions)} captions: expected one caption for each")
    return [meaning(caption) for caption in captions]


def _holds(seen: Sequence[Seen], scene: Scene) -> bool:
    """Whether these things, in this order, are those of the scene."""
    if not all(s.shows(t) for s, t in zip(seen, scene.things, strict=True)):
        return False
    return _placed(seen, scene.place) if scene.place else scene.relation is None or _related(seen, scene.relation)


def _placed(seen: Sequence[Seen], place: str) -> bool:
    return tuple(cells(torch.tensor(seen[0].centre)).tolist()) == PLACES[place]


def _related(seen: Sequence[Seen], relation: str) -> bool:
    way = torch.tensor(seen[1].centre) - torch.tensor(seen[0].centre)
    ahead, aside = along(way, torch.tensor(RELATIONS[relation], dtype=torch.float32))
    return bool(ahead > aside)


def _score(seen: Sequence[Seen], scene: Scene) -> dict[str, float]:
    def same(values: Sequence[str | None], wanted: Sequence[str | None]) -> float:
        return float(sorted(map(str, values)) == sorted(map(str, wanted)))

    def somewhere(test: str | None, right: bool) -> float:
        return float("nan") if test is None else float(right)

    alike = [
        order
        for order in permutations(seen, len(scene.things))
        if all((s.colour, s.kind) == (t.colour, t.kind) for s, t in zip(order, scene.things, strict=True))
    ]
    size = scene.things[0].size
    return {
        "count": float(len(seen) == len(scene.things)),
        "colour": same([s.colour for s in seen], [t.colour for t in scene.things]),
        "kind": same([s.kind for s in seen], [t.kind for t in scene.things]),
        "size": somewhere(size, bool(seen) and all(s.size == size for s in seen)),
        "place": somewhere(scene.place, any(scene.place and _placed(order, scene.place) for order in alike)),
        "relation": somewhere(
            scene.relation, any(scene.relation and _related(order, scene.relation) for order in alike)
        ),
    }
