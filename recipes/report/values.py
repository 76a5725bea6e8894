"""Values of files that may be damaged: what is not there, or of another kind, is None."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def at(node: Any, *path: str) -> Any:
    """The value at a path of keys; None where there is none."""
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


def number(value: Any) -> float | None:
    """A number; None for anything else, truth values included."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def dotted(node: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings; a list is one value, and so is an empty mapping."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from dotted(value, f"{before}.{key}" if before else str(key))
    elif before:
        yield before, node
