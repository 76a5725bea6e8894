"""Captioned handwriting: the digits of scikit-learn (UCI, 1998), coloured, sized and placed as captions say.

    a large red seven at the top left        size and place may be left out

Held-out pictures have held-out captions, and digits that no training picture shows. A reader without training
checks them: colour, size and place by pixels, which digit by the nearest of the training digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product

import torch
import torch.nn.functional as F
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
    cells,
    colours,
    divided,
    shuffled,
    uniforms,
)
from data.sets.digits import heldout_indices

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDES = {"small": 0.34, "large": 0.5}  # of the square that a digit is written into, as a share of the image
MARGIN = 0.02
CONTRAST = 70.0  # distance in RGB at which a pixel is no longer background
HUE_OFF = 0.95  # least cosine with a colour of the palette, from the background; two of them have 0.9 at most
LARGE = 0.41  # height between small and large digits
HEIGHTS = (0.24, 0.6)  # of what may be a digit
GLANCE = 12  # pixels of the square in which digits are compared
UNLIKE = 0.42  # largest distance of two digits there, of ink of length 1


@dataclass(frozen=True)
class Numeral:
    """The meaning of a caption."""

    digit: int
    colour: str
    size: str | None = None
    place: str | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, ("a", self.size, self.colour, NAMES[self.digit], self.place)))


@cache
def grammar() -> dict[str, Numeral]:
    """All captions and their meanings."""
    parts = product(range(10), PALETTE, (None, *SIDES), (None, *PLACES))
    return {str(numeral): numeral for numeral in (Numeral(*p) for p in parts)}


def meaning(caption: str) -> Numeral:
    """The meaning of a caption. Raises ValueError if the grammar lacks the sentence."""
    if caption not in grammar():
        raise ValueError(f"'{caption}' is no sentence about digits; expected such as 'a red seven at the top left'")
    return grammar()[caption]


class CaptionedDigits(World):
    """Placed and coloured handwritten digits of 32 pixels as latents of a fixed codec, with embedded captions.

    Args:
        count: training images; the default has every training caption at least three times
        held: held-out images, of held-out captions
        captions: samples have their captions as strings too
        seed: of the pictures

    Raises:
        ValueError: for an impossible count
    """

    SIZE = 32
    shape = (pixel_codec.CHANNELS, SIZE // pixel_codec.BLOCK, SIZE // pixel_codec.BLOCK)
    judged = len(NAMES)

    def __init__(self, count: int = 6144, held: int = 1020, captions: bool = False, seed: int = 0):
        from sklearn.datasets import load_digits

        super().__init__(count, held)
        digits = load_digits()
        ink, label = torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target).long()
        kept = torch.ones(len(label), dtype=torch.bool).index_fill_(0, heldout_indices(label), False)
        self._ink, self._label = ink[kept], label[kept]  # known to the reader
        splits = []
        numbers = (torch.arange(count), APART + torch.arange(held))
        sources = ((ink[kept], label[kept]), (ink[~kept], label[~kept]))
        for own, some, source in zip(divided(shuffled(list(grammar()))), numbers, sources, strict=True):
            sentences = [own[k % len(own)] for k in range(len(some))]
            said = [meaning(s) for s in sentences]
            images = draw(said, *source, some, self.SIZE, seed)
            splits.append(Captioned(images, sentences, torch.tensor([s.digit for s in said]), self.encoders, captions))
        self._train, self._heldout = splits

    def follows(self, frames: Tensor, captions: Sequence[str]) -> Tensor:
        """Whether each picture, uint8 b 1 y x 3, shows what its caption says: b bool."""
        return torch.stack([s.nan_to_num(1) for s in self.scores(frames, captions).values()]).amin(0) > 0

    def scores(self, frames: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Parts of the caption that hold, b float32 each: 1, 0, or NaN where the caption does not name the part.

        Raises:
            ValueError: for a caption outside the grammar, or unequal numbers of images and captions
        """
        if len(frames) != len(captions):
            raise ValueError(f"got {len(frames)} images and {len(captions)} captions: expected one caption for each")
        said = [meaning(caption) for caption in captions]
        colour, height, centre, glance = look(frames[:, 0].cpu())
        distance, nearest = torch.cdist(glance, self._known[0]).min(1)
        column, row = cells(centre).T
        right = {"digit": torch.where(distance <= UNLIKE, self._known[1][nearest], -1).eq(_tensor(said, "digit"))}
        right["colour"] = colour == torch.tensor([list(PALETTE).index(s.colour) for s in said])
        seen = torch.where(height > LARGE, 1, 0).where((height > HEIGHTS[0]) & (height < HEIGHTS[1]), -1)
        right["size"] = seen == torch.tensor([list(SIDES).index(s.size) if s.size else 0 for s in said])
        places = torch.tensor([PLACES[s.place] if s.place else (0, 0) for s in said])
        right["place"] = (column == places[:, 0]) & (row == places[:, 1])
        silent = {name: torch.tensor([getattr(s, name) is None for s in said]) for name in right}
        return {name: r.float().masked_fill(silent[name], float("nan")) for name, r in right.items()}

    @cached_property
    def _known(self) -> tuple[Tensor, Tensor]:
        """Training digits as the reader sees them in both sizes, sharp and through the codec; and which they are."""
        seen = []
        for number, size in enumerate(SIDES):
            said = [Numeral(d, "white", size) for d in self._label.tolist()]
            each = torch.arange(len(said))
            images = render(said, self._ink, *arrange(said, APART * (2 + number) + each, 0), self.SIZE)
            seen += [look(images)[-1], look(pixel_codec.decode(pixel_codec.encode(images)))[-1]]
        return torch.cat(seen), self._label.repeat(len(seen))


def _tensor(said: Sequence[Numeral], name: str) -> Tensor:
    return torch.tensor([getattr(s, name) for s in said])


# ---- drawing --------------------------------------------------------------------------------------------------------


def draw(said: Sequence[Numeral], ink: Tensor, label: Tensor, numbers: Tensor, size: int, seed: int) -> Tensor:
    """Pictures of captions, each with one of the given digits (n 8 8 in [0, 1]): uint8 n size size 3."""
    places = [(label == d).nonzero().flatten() for d in range(10)]
    lots = uniforms(seed, numbers, 0, 1)[:, 0].tolist()
    chosen = [places[s.digit][int(lot * len(places[s.digit]))] for s, lot in zip(said, lots, strict=True)]
    return render(said, ink[torch.stack(chosen)], *arrange(said, numbers, seed), size)


def arrange(said: Sequence[Numeral], numbers: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Centres n 2 and sides n of the squares that the digits are written into."""
    u = uniforms(seed, numbers, 1, 3)
    side, line = torch.empty(len(said)), torch.full((len(said), 2), float("nan"))
    for i, s in enumerate(said):
        side[i] = SIDES[s.size or ("small", "large")[int(2 * u[i, 2])]]
        if s.place:
            line[i] = torch.tensor([LINES[k] for k in PLACES[s.place]])
    reach = side[:, None] / 2 + MARGIN
    low = torch.maximum((line - JITTER).nan_to_num(0), reach)
    high = torch.minimum((line + JITTER).nan_to_num(1), 1 - reach)
    return low + u[:, :2] * (high - low), side


def render(said: Sequence[Numeral], ink: Tensor, centre: Tensor, side: Tensor, size: int) -> Tensor:
    """uint8 n size size 3."""
    # the square [-1, 1] of a digit, seen from the pixels of the picture; beyond it is no ink
    scale = 1 / side
    zero = torch.zeros_like(scale)
    shift = (1 - 2 * centre) * scale[:, None]
    view = torch.stack((scale, zero, shift[:, 0], zero, scale, shift[:, 1]), dim=1).view(-1, 2, 3)
    grid = F.affine_grid(view, [len(said), 1, size, size], align_corners=False)
    cover = F.grid_sample(ink[:, None], grid, align_corners=False)[:, 0, :, :, None]
    colour = colours()[[list(PALETTE).index(s.colour) for s in said]][:, None, None]
    return (background() + cover * (colour - background()) + 0.5).clamp_(0, 255).to(torch.uint8)


# ---- reading --------------------------------------------------------------------------------------------------------


def look(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ink of each image, uint8 b y x 3, taken as one digit.

    Returns:
        Colour's number b, -1 if it is none; height b; centre b 2; ink b 144 of length 1, upright in a square.
    """
    size = images.shape[1]
    off = images.float() - background()
    weight = off.square().sum(-1, keepdim=True).square() + 1e-9
    mean = (off * weight).sum((1, 2))  # thin strokes are paler than the palette: only the direction counts
    alike, colour = (F.normalize(mean, dim=-1) @ F.normalize(colours() - background(), dim=-1).T).max(1)
    paint = (colours() - background())[colour]
    cover = (torch.einsum("byxc,bc->byx", off, paint) / paint.square().sum(-1)[:, None, None]).clamp(0, 1)
    written = (off.norm(dim=-1) > CONTRAST) & (cover > 0.3)
    (left, right), (top, bottom) = _ends(written.any(1)), _ends(written.any(2))
    height, width = (bottom - top) / size, (right - left) / size
    centre = torch.stack((left + right, top + bottom), dim=1) / (2 * size)
    reach = torch.maximum(height, width).clamp_min(1 / size) * 1.1
    zero = torch.zeros_like(reach)
    shift = 2 * centre - 1
    view = torch.stack((reach, zero, shift[:, 0], zero, reach, shift[:, 1]), dim=1).view(-1, 2, 3)
    grid = F.affine_grid(view, [len(images), 1, GLANCE, GLANCE], align_corners=False)
    glance = F.grid_sample(cover[:, None], grid, align_corners=False).flatten(1)
    return colour.where(alike >= HUE_OFF, -1), torch.maximum(height, width), centre, F.normalize(glance, dim=1)


def _ends(marked: Tensor) -> tuple[Tensor, Tensor]:
    """The first marked place and the one after the last, b n bool -> b, b; 0 and 0 where there is none."""
    n = marked.shape[1]
    places = torch.arange(n)
    first = torch.where(marked, places, n).amin(1)
    last = torch.where(marked, places + 1, 0).amax(1)
    return torch.minimum(first, last).float(), last.float()
