"""Images as latents without a trained VAE: a fixed block transform, for worlds that must need no download.

RGB is turned into luma and two chromas (YCoCg, orthonormal here), each cut into blocks of 4 x 4 pixels; a block's
lowest cosine frequencies (DCT-II, orthonormal) are the channels, shifted and scaled to about zero mean and unit
variance over `data.sets.shapes`. 3 x 32 x 32 pixels become 12 x 8 x 8 numbers: a quarter. What is lost is fine
texture, and the sharpness of edges between colours of equal luma.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 4  # pixels
LUMA = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))  # kept frequencies: rows, columns
CHROMA = ((0, 0), (0, 1), (1, 0))
CHANNELS = len(LUMA) + 2 * len(CHROMA)

# luma, orange - blue, green - magenta: orthonormal rows
ROTATION = ((3**-0.5,) * 3, (2**-0.5, 0.0, -(2**-0.5)), (-(6**-0.5), 2 * 6**-0.5, -(6**-0.5)))

# measured once over 6144 shapes of 32 pixels, pixels in [-1, 1]; test_pixel_codec.py measures them again
SHIFT = (-4.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.055, 0.0, 0.0, -0.041, 0.0, 0.0)
SCALE = (0.471, 1.29, 1.31, 2.81, 3.05, 3.06, 1.07, 3.19, 3.25, 1.41, 4.22, 4.29)


def encode(images: Tensor) -> Tensor:
    """uint8 b y x 3 -> b 12 y/4 x/4 float32.

    Raises:
        ValueError: if the sides are no multiples of 4
    """
    height, width = images.shape[1:3]
    if height % BLOCK or width % BLOCK:
        raise ValueError(f"the codec takes sides that are multiples of {BLOCK} pixels, got {height} x {width}")
    rgb = images.float() / 127.5 - 1
    blocks = rgb.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))  # b y i x j 3
    return torch.einsum("byixjc,kijc->bkyx", blocks, basis().to(images.device)).sub(_shift(images)).mul(_scale(images))


def decode(x: Tensor) -> Tensor:
    """b 12 y x -> uint8 b 4y 4x 3, clamped."""
    return (127.5 * pixels(x).permute(0, 2, 3, 1) + 128).clamp(0, 255).to(torch.uint8)


def pixels(x: Tensor) -> Tensor:
    """b 12 y x -> b 3 4y 4x, of images in [-1, 1]; gradients reach x."""
    coefficients = x.float() / _scale(x) + _shift(x)
    blocks = torch.einsum("bkyx,kijc->byixjc", coefficients, basis().to(x.device))
    return blocks.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def basis() -> Tensor:
    """The images that one unit of each channel stands for, orthonormal: 12 4 4 3."""
    n = torch.arange(BLOCK, dtype=torch.float64)
    cosines = torch.cos(math.pi / BLOCK * (n + 0.5) * n[:, None]) * (2 / BLOCK) ** 0.5  # frequency, place
    cosines[0] /= 2**0.5
    colours = torch.tensor(ROTATION, dtype=torch.float64)
    kept = [(f, colours[0]) for f in LUMA] + [(f, c) for c in colours[1:] for f in CHROMA]
    return torch.stack([torch.einsum("i,j,c->ijc", cosines[u], cosines[v], c) for (u, v), c in kept]).float()


def _shift(like: Tensor) -> Tensor:
    return torch.tensor(SHIFT, device=like.device).view(-1, 1, 1)


def _scale(like: Tensor) -> Tensor:
    return torch.tensor(SCALE, device=like.device).view(-1, 1, 1)
