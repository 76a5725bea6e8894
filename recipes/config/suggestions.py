"""How a sentence about a wrong name ends: the names that were probably meant, and those that are accepted."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any

FEW, MANY = 12, 30  # names listed beside a near one, and where none is near
# the end of a sentence about an unknown method, edit, backbone or solver
LISTS = "; python -m recipes.list lists them"
LISTED = ("backbone", "edits", "experiment", "method", "sampler")  # groups whose files name such classes


def listed(group: str) -> str:
    """Where the choices of a group are told of, if they are methods."""
    return LISTS if group in LISTED else ""


def nearest(word: str, options: Iterable[str]) -> list[str]:
    """Up to three options that look like `word`, best first."""
    return difflib.get_close_matches(word, list(options), n=3)


def suggest(word: Any, options: Collection[str]) -> str:
    """The end of a sentence: '; did you mean 'x'?' and, where they are few or none is near, the accepted names."""
    options = sorted(str(option) for option in options)
    close = nearest(str(word), options)
    text = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    if close and len(options) <= FEW:
        return f"{text} (accepted: {', '.join(options)})"
    if options and not close:
        return "; accepted: " + ", ".join(options[:MANY]) + (", ..." if len(options) > MANY else "")
    return text
