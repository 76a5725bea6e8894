"""Latents back to pixels with a graph, for losses that look at images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from data import pixel_codec
from edit.frames import folded, unfolded


class Codec(nn.Module):
    """The fixed transform: b 12 *frames y x -> pixels b 3 *frames 4y 4x in about [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return unfolded(pixel_codec.pixels(folded(x)), x)


class Decoder(nn.Module):
    """A frozen image VAE of `diffusers`: latents as trained on, b c *sizes -> pixels b 3 *sizes in about [-1, 1].

    The frames of a video are decoded each by itself.

    Args:
        model: the VAE
        shift: c 1 1 or 1 1 1
        scale: likewise; the latents are (z - shift) * scale
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, model: Any, shift: Tensor, scale: Tensor):
        super().__init__()
        self.model = model
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return unfolded(self.model.decode(folded(x).float() / self.scale + self.shift).sample, x)
