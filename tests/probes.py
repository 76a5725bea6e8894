"""Probes of small and of published structures, for tests of what a run takes."""

import torch

from edit.backbones.dit import DiTConfig
from edit.measuring.probe import Probe


def probe(spec, size: int | None = None, text: int = 512, **taps) -> Probe:
    with torch.device("meta"):
        denoiser = spec.build()
    shape = denoiser.sample_shape if size is None else (denoiser.sample_shape[0], size, size)
    return Probe(spec.build, shape, denoiser.example(text=text), **taps)


def small(**options) -> Probe:
    return probe(DiTConfig(8, 2, 4, hidden_size=64, depth=6, num_heads=2, num_classes=10), **options)
