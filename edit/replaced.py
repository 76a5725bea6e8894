"""Layers whose weights are gone because an edit put something else in their place (`Edit.replaces`).

Such weights are no parameters any more: nothing trains, averages, counts, shards or stores them. The layer's place in
the model stays, with its sizes, so that the anatomy of a unit can still be read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn


class Gone(nn.Module):
    """Stands in the place of a layer that no longer runs, and knows the layer's sizes.

    Args:
        layer: whose plain attributes (`in_features`, `num_heads`) are kept
        path: of the layer in the model
        by: name of the edit that replaced it
    """

    def __init__(self, layer: nn.Module, path: str, by: str):
        super().__init__()
        self.path, self.by = path, by
        for name, value in vars(layer).items():
            if not name.startswith("_") and name != "training" and not isinstance(value, Tensor | nn.Module):
                setattr(self, name, value)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        raise RuntimeError(f"{self.path} was run, but the edit {self.by!r} has replaced it: leave one of the two out")

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            raise AttributeError(f"{self.path} has no {name}: the edit {self.by!r} has replaced the layer")
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"replaced by {self.by}"


def within(model: nn.Module, names: Collection[str]) -> list[str]:
    """The parameters of a model that are named, themselves or by a module around them.

    Raises:
        ValueError: if a name is neither a parameter nor a module with parameters
    """
    there = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found: dict[str, None] = {}
    for name in names:
        inside = [p for p in there if p == name or p.startswith(f"{name}.")]
        if not inside:
            raise ValueError(f"{name} is no parameter and no module with parameters")
        found |= dict.fromkeys(inside)
    return list(found)


def drop(model: nn.Module, parameters: Collection[str], by: str) -> None:
    """Take parameters out of a model. A layer that has lost all of its own becomes `Gone`.

    Args:
        model: changed in place
        parameters: by their names in it
        by: name of the edit that replaced them
    """
    owners: dict[str, list[str]] = {}
    for name in parameters:
        path, _, leaf = name.rpartition(".")
        owners.setdefault(path, []).append(leaf)
    for path, leaves in owners.items():
        owner = model.get_submodule(path)
        for leaf in leaves:
            owner.register_parameter(leaf, None)
        if path and not any(True for _ in owner.children()) and all(p is None for p in owner._parameters.values()):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, Gone(owner, path, by))


def gone(model: nn.Module, by: str | None = None) -> Iterator[Gone]:
    """The layers that are gone; of one edit, or of any."""
    return (m for m in model.modules() if isinstance(m, Gone) and by in (None, m.by))
