"""Units that are compared."""

from __future__ import annotations

from collections.abc import Sequence


def as_units(who: str, units: Sequence[int]) -> tuple[int, int]:
    """The unit m of a student and n of its teacher, from configuration.

    Raises:
        ValueError: if they are not two, counted from 0, or n comes before m
    """
    whole = len(units) == 2 and all(isinstance(i, int) and i >= 0 for i in units)
    if not whole or units[1] < units[0]:
        raise ValueError(
            f"{who}: units are two, m of the student and n of its teacher, counted from 0, and n is no shallower than "
            f"m; got {list(units)}"
        )
    return units[0], units[1]
