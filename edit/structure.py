"""What the structure of a model alone tells: what enters its units, and the grid of its tokens."""

from __future__ import annotations

import torch

from edit.denoiser import Denoiser
from edit.grid import Grid
from edit.stream import Stream


def entrance(denoiser: Denoiser) -> Stream:
    """The embedded stream of a sample on the meta device, from a model's structure alone: its weights may be shards."""
    with torch.device("meta"), torch.no_grad():
        bare = denoiser.family.from_config(denoiser.config)
        told = denoiser.example(1, text=1).map(lambda v: v.to("meta"))
        return bare.embed(**bare.pack(torch.empty(1, *denoiser.sample_shape), torch.empty(1), told))


def grid_of(denoiser: Denoiser) -> Grid:
    """Frames, rows and columns of a model's tokens, from its structure alone."""
    return entrance(denoiser).layout.grid
