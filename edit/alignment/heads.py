"""What learned alignment heads are made of. They are trained with a run and are no part of its artifact."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer that starts as those of a DiT do: Xavier-uniform weights, zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers from each width to the next, with SiLU between them: ... d -> ... the last width."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.SiLU()] * bool(layers) + [linear(inputs, outputs)]
    return nn.Sequential(*layers)
