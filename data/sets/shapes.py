"""Captioned rendered shapes: a text-to-image world that needs no download and whose prompts can be checked.

The captions are the sentences of `data.sets.shape_scenes`, such as "a green square above a white triangle".
A tenth of the captions has no training image, and neither has any that says the same in other words: with a circle
above a square a square below a circle is held out. All of their words, and pairs of neighbouring words, are trained on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data import pixel_codec
from data.sets import shape_reader
from data.sets.captioned import APART, PALETTE, Captioned, World, divided, shuffled
from data.sets.shape_pictures import draw
from data.sets.shape_scenes import FAMILIES, KINDS, gist, grammar, kinds, meaning


class Shapes(World):
    """Rendered shapes as latents of a fixed codec, with embedded captions.

    Args:
        size: pixels; a multiple of 4, at least 32
        count: training images; the default has every training caption at least once
        held: held-out images, of held-out captions
        captions: samples have their captions as strings too
        seed: of the pictures
        scenes: families of sentences: one thing, several alike, two things in a relation

    Raises:
        ValueError: for an impossible size or count, or an unknown family
    """

    judged = len(PALETTE) * len(KINDS)  # number of kinds

    def __init__(
        self,
        size: int = 32,
        count: int = 6144,
        held: int = 1020,
        captions: bool = False,
        seed: int = 0,
        scenes: Sequence[str] = FAMILIES,
    ):
        if size < 32 or size % pixel_codec.BLOCK:
            raise ValueError(f"size is a multiple of {pixel_codec.BLOCK} pixels from 32 on, got {size}")
        if not scenes or set(scenes) - set(FAMILIES) or len(set(scenes)) < len(scenes):
            raise ValueError(f"scenes are some of {', '.join(FAMILIES)}, each once, got {list(scenes)}")
        super().__init__(count, held)
        self.shape = (pixel_codec.CHANNELS, size // pixel_codec.BLOCK, size // pixel_codec.BLOCK)
        families = [divided(shuffled(list(family)), gist) for name, family in grammar().items() if name in scenes]
        self._train, self._heldout = (
            self._split([f[part] for f in families], numbers, size, seed, captions)
            for part, numbers in enumerate((torch.arange(count), APART + torch.arange(held)))
        )

    def _split(self, families: list[list[str]], numbers: Tensor, size: int, seed: int, told: bool) -> Captioned:
        """Image k has a sentence of family k modulo their number: all are as frequent, and all sentences of one are."""
        turns = [divmod(k, len(families)) for k in range(len(numbers))]
        captions = [families[f][turn % len(families[f])] for turn, f in turns]
        scenes = [meaning(caption) for caption in captions]
        return Captioned(draw(scenes, numbers, size, seed), captions, kinds(scenes), self.encoders, told)

    def follows(self, frames: Tensor, captions: Sequence[str]) -> Tensor:
        """Whether each picture, uint8 b 1 y x 3, shows what its caption says, and nothing else: b bool."""
        return shape_reader.follows(frames[:, 0], captions)

    def scores(self, frames: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Parts of the caption that hold, b float32 each: 1, 0, or NaN where the caption does not speak of it."""
        return shape_reader.scores(frames[:, 0], captions)
