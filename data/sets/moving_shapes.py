"""Captioned videos of one shape that moves: a text-to-video world that needs no download and can be checked.

a large red circle moving right     along a line
a white cross bouncing up           to the border and back

The shapes are those of `data.sets.shapes`. A tenth of the captions has no training video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

from data import pixel_codec
from data.sets import shape_reader
from data.sets.captioned import APART, PALETTE, Captioned, World, background, divided, shuffled, uniforms
from data.sets.shape_pictures import MARGIN, RADII, SPREAD, paint
from data.sets.shape_scenes import KINDS, SIZES, Scene, Thing, kinds

MANNERS = ("moving", "bouncing")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # columns and rows
WAY = (0.6, 0.9)  # how far a thing goes, of the way between the borders
FAR, NEAR = 0.18, 0.1  # shares of the image's side: a way that is seen as motion, and one that is not


@dataclass(frozen=True)
class Motion:
    thing: Thing
    manner: str
    direction: str

    def __str__(self) -> str:
        return f"{self.scene} {self.manner} {self.direction}"

    @property
    def scene(self) -> Scene:
        """What each frame shows."""
        return Scene((self.thing,))


@cache
def grammar() -> dict[str, Motion]:
    """All captions and their motions."""
    things = [Thing(colour, kind, size) for colour, kind, size in product(PALETTE, KINDS, (None, *SIZES))]
    return {str(m): m for m in (Motion(*parts) for parts in product(things, MANNERS, DIRECTIONS))}


def meaning(caption: str) -> Motion:
    """The motion of a caption. Raises ValueError if the grammar lacks the sentence."""
    if caption not in grammar():
        raise ValueError(f"'{caption}' is no sentence about moving shapes; expected such as 'a red circle moving up'")
    return grammar()[caption]


class MovingShapes(World):
    """Rendered moving shapes as latents c f y x of a fixed codec, frame by frame, with embedded captions.

    Args:
        size: pixels; a multiple of 4, at least 32
        frames: of a video, at least 4
        count: training videos; the default has every training caption at least twice
        held: held-out videos, of held-out captions
        captions: samples have their captions as strings too
        seed: of the videos

    Raises:
        ValueError: for an impossible size or count
    """

    judged = len(PALETTE) * len(KINDS)  # number of kinds

    def __init__(
        self, size: int = 32, frames: int = 8, count: int = 1024, held: int = 256, captions: bool = False, seed: int = 0
    ):
        if size < 32 or size % pixel_codec.BLOCK:
            raise ValueError(f"size is a multiple of {pixel_codec.BLOCK} pixels from 32 on, got {size}")
        if not 4 <= frames <= 1024:
            raise ValueError(f"frames are 4 to 1024, got {frames}: fewer show no motion there and back")
        super().__init__(count, held)
        self.shape = (pixel_codec.CHANNELS, frames, size // pixel_codec.BLOCK, size // pixel_codec.BLOCK)
        self._train, self._heldout = (
            self._split([own[k % len(own)] for k in range(len(numbers))], numbers, frames, size, seed, captions)
            for own, numbers in zip(
                divided(shuffled(list(grammar()))), (torch.arange(count), APART + torch.arange(held)), strict=True
            )
        )

    def _split(self, captions: list[str], numbers: Tensor, frames: int, size: int, seed: int, told: bool) -> Captioned:
        motions = [meaning(caption) for caption in captions]
        kind = kinds([m.scene for m in motions])
        return Captioned(draw(motions, numbers, frames, size, seed), captions, kind, self.encoders, told)

    def follows(self, frames: Tensor, captions: Sequence[str]) -> Tensor:
        """Whether each video, uint8 b f y x 3, shows what its caption says, and nothing else: b bool."""
        return torch.stack(list(self.scores(frames, captions).values())).amin(0) > 0

    def scores(self, frames: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Parts of the caption that hold, b float32 each: 1 or 0.

        Returns:
            thing: the caption's thing alone is in every frame
            motion: it goes in the direction, and back if it bounces

        Raises:
            ValueError: for a caption outside the grammar, or unequal numbers of videos and captions
        """
        if len(frames) != len(captions):
            raise ValueError(f"got {len(frames)} videos and {len(captions)} captions: expected one caption for each")
        motions, (b, f) = [meaning(caption) for caption in captions], frames.shape[:2]
        shown = shape_reader.follows(frames.flatten(0, 1), [str(m.scene) for m in motions for _ in range(f)])
        ways = torch.tensor([DIRECTIONS[m.direction] for m in motions], dtype=torch.float32)  # b 2
        off = centroids(frames) - centroids(frames[:, :1])  # b f 2
        ahead = (off * ways[:, None]).sum(-1)  # b f
        straight = (off * ways.flip(-1)[:, None]).sum(-1).abs().amax(1) < NEAR
        bounces = torch.tensor([m.manner == "bouncing" for m in motions])
        arrived = torch.where(bounces, ahead[:, -1].abs() < NEAR, ahead[:, -1] > FAR)
        moved = straight & arrived & (ahead.amax(1) > FAR) & (ahead.amin(1) > -NEAR)
        return {"thing": shown.view(b, f).all(1).float(), "motion": moved.float()}


def draw(motions: Sequence[Motion], numbers: Tensor, frames: int, size: int, seed: int) -> Tensor:
    """Videos of motions: uint8 n frames size size 3, each a pure function of (seed, number, motion)."""
    u = uniforms(seed, numbers, 0, 5)  # n 5
    sizes = [m.thing.size or ("small" if lot < 0.5 else "large") for m, lot in zip(motions, u[:, 0], strict=True)]
    radius = torch.tensor([RADII[s] for s in sizes]) * (1 + SPREAD * (2 * u[:, 1] - 1))  # n
    low, room = radius + MARGIN, 1 - 2 * (radius + MARGIN)  # the least place of a centre, and the way to the greatest
    way = (WAY[0] + (WAY[1] - WAY[0]) * u[:, 2]) * room
    bounces = torch.tensor([m.manner == "bouncing" for m in motions])
    start = torch.where(bounces, room - way, (room - way) * u[:, 3])  # one that bounces turns at the border
    part = torch.arange(frames) / (frames - 1)
    gone = torch.where(bounces[:, None], 1 - (2 * part - 1).abs(), part)  # n f, of the way
    along, across = start[:, None] + way[:, None] * gone, (room * u[:, 4])[:, None].expand(-1, frames)
    ways = torch.tensor([DIRECTIONS[m.direction] for m in motions])[:, None]  # n 1 2
    along = torch.where(ways.sum(-1) > 0, along, room[:, None] - along)
    centre = low[:, None, None] + torch.where(ways != 0, along[..., None], across[..., None])  # n f 2
    scenes = [m.scene for m in motions for _ in range(frames)]
    pictures = paint(scenes, centre.flatten(0, 1)[:, None], radius.repeat_interleave(frames)[:, None], size)
    return pictures.unflatten(0, (len(motions), frames))


def centroids(frames: Tensor) -> Tensor:
    """Centres of mass of all that differs from the background, as shares of the image: uint8 b f y x 3 -> b f 2.

    NaN where a frame is empty.
    """
    off = (frames.cpu().float() - background()).norm(dim=-1)  # b f y x
    mass = torch.where(off > shape_reader.CONTRAST, off, 0)
    rows, columns = ((torch.arange(n) + 0.5) / n for n in mass.shape[-2:])
    x, y = (mass.sum(-2) * columns).sum(-1), (mass.sum(-1) * rows).sum(-1)
    return torch.stack((x, y), -1) / mass.sum((-2, -1))[..., None]
