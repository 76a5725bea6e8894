"""Heads and hidden channels in order of magnitude, so that the largest stay on.

The order matters if width is a prefix of the channels (E-DiT), or if the first head and group always run (DyDiT, arXiv
2410.03456). Sorting is in place and keeps the unit's output: softmax attention treats its heads alike, an activation
its channels, positions are the same for every head, and so is QK-norm, or it is sorted along (across all heads). Layers
with low-rank additions (TD-LoRA) are sorted by their weights alone; fold a LoRA first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edit.routing.adapted import Adapted
from edit.unit import Features, Unit, heads_of, hidden_of


def order_heads(unit: Unit) -> None:
    """Those of largest |rows of q, k and v, biases included| x |columns that read them| come first, text's included.

    Raises:
        ValueError: if a layer is neither a plain linear one nor adapted
    """
    order(unit, heads_of(unit), unit.anatomy.heads)


def order_channels(unit: Unit) -> None:
    """Those of largest |row into it, its bias included| x |column out of it| come first, as width pruning ranks them.

    Raises:
        ValueError: if a layer is neither a plain linear one nor adapted
    """
    features = hidden_of(unit)
    order(unit, features, features.size)


def check_order(unit: Unit, *parts: Features) -> None:
    """Refuse features that cannot be sorted; change nothing.

    Args:
        unit: of any edit that orders it later
        parts: features that will be put in order; none given: heads and hidden channels

    Raises:
        ValueError: if a layer is neither a plain linear one nor adapted
    """
    for features in parts or (heads_of(unit), hidden_of(unit)):
        for path, _ in (*features.writers, *features.readers):
            plain_linear(unit, path)


@torch.no_grad()
def order(unit: Unit, features: Features, groups: int) -> None:
    """Contiguous groups of equal size by falling magnitude; nothing is moved on the meta device."""
    writers = [(plain_linear(unit, path), parts) for path, parts in features.writers]
    readers = [(plain_linear(unit, path), slice(first, first + features.size)) for path, first in features.readers]
    if readers[0][0].weight.is_meta:
        return
    written = [p for layer, _ in writers for p in (layer.weight, layer.bias) if p is not None]
    into = sum(energy(p.view(len(p), -1), groups, features.size) for p in written)
    out = sum(energy(layer.weight[:, columns].T, groups, features.size) for layer, columns in readers)
    assert isinstance(into, Tensor) and isinstance(out, Tensor)
    best = (into.sqrt() * out.sqrt()).argsort(descending=True, stable=True)
    places = torch.arange(features.size, device=best.device).view(groups, -1)[best].flatten()
    for layer, parts in writers:
        rows = torch.cat([places + i * features.size for i in range(parts)])
        up = layer.factors()[0] if isinstance(layer, Adapted) else None
        for p in (layer.weight, layer.bias, up):
            if p is not None:
                p.copy_(p[rows])
    for layer, columns in readers:
        for p in (layer.weight, layer.factors()[1]) if isinstance(layer, Adapted) else (layer.weight,):
            p[:, columns] = p[:, columns][:, places]
    for _, norm in features.norms:
        for p in unit.get_submodule(norm).parameters():
            p.copy_(p[places])


def energy(rows: Tensor, groups: int, size: int) -> Tensor:
    """Sum of squares of each group's rows, in every part of `size` rows: groups."""
    return rows.float().square().sum(1).view(-1, groups, size // groups).sum((0, 2))


def plain_linear(unit: Unit, path: str) -> nn.Linear:
    layer = unit.get_submodule(path)
    if not isinstance(layer, Adapted) and type(layer) is not nn.Linear:
        kind = type(layer)
        raise ValueError(
            f"only plain linear layers can be put in order, {path} of this {type(unit).__name__} is a "
            f"{kind.__module__}.{kind.__name__}: fold the LoRA first, or set order=false"
        )
    return layer
