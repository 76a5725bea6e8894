"""Weights that prove something: for the tests of all packages."""

import torch
from torch import nn


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Move every parameter away from its initial value: fresh DiTs are zero everywhere and would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
