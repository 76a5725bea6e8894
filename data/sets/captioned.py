"""Parts of the embedded worlds with captions: colours, places, and splits that are held in memory.

A world is a list of captions with a rule that draws each, and a reader that says whether a picture shows what its
caption says. Lengths are shares of the image's side, from the top left corner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data import pixel_codec
from data.decoder import Codec
from data.sets.toy_text import LENGTH, Embedded, ToyText
from data.split import held_out
from edit import noise
from edit.frames import by_sample, folded

BACKGROUND = (20, 20, 20)
PALETTE = {
    "red": (240, 50, 50),
    "green": (40, 190, 80),
    "blue": (60, 110, 250),
    "yellow": (250, 215, 40),
    "purple": (190, 70, 230),
    "white": (245, 245, 245),
}
PLACES = {  # column and row of a 3 x 3 grid
    "at the top left": (0, 0),
    "at the top": (1, 0),
    "at the top right": (2, 0),
    "at the left": (0, 1),
    "in the centre": (1, 1),
    "at the right": (2, 1),
    "at the bottom left": (0, 2),
    "at the bottom": (1, 2),
    "at the bottom right": (2, 2),
}
LINES = (0.27, 0.5, 0.73)  # centres of columns and rows
JITTER = 0.055  # largest distance of a drawn thing from them
EDGES = (0.385, 0.615)  # borders between them for the reader, half way between drawn things
HELD = 0.1  # share of the captions that no training image has
APART = 10_000_000  # numbers of held-out images start here, those of training images at 0
SCENE = 200  # random streams of a world's pictures start here


def colours(device: torch.device | None = None) -> Tensor:
    """The palette in its order, 6 3 float32."""
    return torch.tensor(list(PALETTE.values()), dtype=torch.float32, device=device)


def background() -> Tensor:
    return torch.tensor(BACKGROUND, dtype=torch.float32)


def uniforms(seed: int, numbers: Tensor, stream: int, count: int) -> Tensor:
    """Numbers in [0, 1) of each sample: n int64 -> n count float32, exactly the same on every machine."""
    return ((noise.hashes(seed, numbers, SCENE + stream, count) >> 40) & 0xFFFFFF).float() * 2.0**-24


def cells(centre: Tensor) -> Tensor:
    """Column and row, 0 to 2, of points: n 2 -> n 2 int64."""
    return torch.bucketize(centre, torch.tensor(EDGES, device=centre.device))


def divided(captions: Sequence[str], gist: Callable[[str], str] = str) -> tuple[list[str], list[str]]:
    """Captions to train on, and held-out ones; captions of equal `gist` are on the same side."""
    parts: tuple[list[str], list[str]] = ([], [])
    for caption in captions:
        parts[held_out(gist(caption), HELD)].append(caption)
    return parts


def shuffled(captions: Sequence[str]) -> list[str]:
    """Captions in a fixed order that mixes neighbours in the grammar."""
    keys = noise.hashes(0, torch.arange(len(captions)), SCENE, 1)[:, 0].argsort().tolist()
    return [captions[int(i)] for i in keys]


class Captioned:
    """A split held in memory.

    Args:
        images: uint8 n y x 3; of videos n f y x 3, whose samples are c f y x, each frame encoded by itself
        captions: n sentences, one per sample
        kind: n int64, class of the main thing in the picture: for a feature space, never a condition
        encoders: of the sentences
        told: samples have their captions as strings
    """

    def __init__(self, images: Tensor, captions: Sequence[str], kind: Tensor, encoders: ToyText, told: bool):
        self.captions, self.kind, self.told = list(captions), kind, told
        x = torch.cat([pixel_codec.encode(part) for part in images.flatten(0, -4).split(512)])
        self._x = x.unflatten(0, images.shape[:-3]).movedim(-3, 1).contiguous()
        distinct = list(dict.fromkeys(captions))
        self._embedded: Embedded = encoders(distinct)
        place = {caption: i for i, caption in enumerate(distinct)}
        self._caption = [place[caption] for caption in captions]

    def __len__(self) -> int:
        return len(self.captions)

    def sample(self, index: int, draw: int) -> dict:
        text, mask, pooled = (part[self._caption[index]] for part in self._embedded)
        sample = {"x": self._x[index], "kind": self.kind[index], "text": text, "text_mask": mask, "pooled": pooled}
        return {**sample, "caption": self.captions[index]} if self.told else sample


class World:
    """A data set of two such splits, on latents of the fixed codec; a subclass draws and reads pictures.

    Raises:
        ValueError: for a number of training or of held-out images below 1
    """

    num_classes = None
    classes = None
    text_length = LENGTH
    _train: Captioned
    _heldout: Captioned

    def __init__(self, count: int, held: int):
        if count < 1 or held < 1:
            raise ValueError(f"count and held are at least 1, got {count} and {held}")
        self.encoders = ToyText()
        self.null = self.encoders.null()

    def train(self) -> Captioned:
        return self._train

    def heldout(self) -> Captioned:
        return self._heldout

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """New prompts of the world's words, as its captions are embedded. Raises ValueError for another word."""
        return dict(zip(("text", "text_mask", "pooled"), self.encoders(prompts), strict=True))

    def to_frames(self, x: Tensor) -> Tensor:
        """Latents b c *sizes -> uint8 b f 4y 4x 3."""
        return by_sample(pixel_codec.decode(folded(x)), x)

    def decoder(self) -> Codec:
        """The same with a graph."""
        return Codec()
