"""Latents back to pixels with a graph, for losses that look at images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from data import pixel_codec


class Codec(nn.Module):
    """The fixed transform: b 12 y x -> pixels b 3 4y 4x in about [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return pixel_codec.pixels(x)


class Decoder(nn.Module):
    """A frozen VAE of `diffusers`: latents as trained on, b c y x -> pixels b 3 y x in about [-1, 1].

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
        return self.model.decode(x.float() / self.scale + self.shift).sample
