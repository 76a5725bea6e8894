"""Which numbers a setting may be: of its annotated kind, finite, within limits, and not so large that work never ends.

A dataclass calls `check_numbers(self)` first in its `__post_init__`. Limits are part of annotations, so that
`recipes.config.mistakes` compares a configuration with them before anything is built.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from numbers import Integral, Real
from types import SimpleNamespace, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

LARGEST = {int: 10**9, float: 1e9}  # in size, where an annotation has no limits of its own
TABLE = 2**30  # elements of a table of positions, which is computed on the CPU when a model is built, always
LAST_SEED = 2**32 - 1  # numpy's; recipes multiply a run's seed by 4.1e9, which torch takes up to 2^64 - 1


@dataclass(frozen=True)
class Limits:
    """Numbers from `low` to `high`, over `above` and under `below`."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def broken(self, value: float) -> str:
        """The limit that a number breaks, as in "at least 1"; '' where it keeps them."""
        if value < self.low:
            return f"at least {self.low:.15g}"
        if value <= self.above:
            return "positive" if self.above == 0 else f"above {self.above:.15g}"
        if value > self.high:
            return f"at most {self.high:.15g}"
        return f"below {self.below:.15g}" if value >= self.below else ""

    def __str__(self) -> str:
        limits = (("at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below))
        return " and ".join(f"{word} {limit:.15g}" for word, limit in limits if math.isfinite(limit))


Steps = Annotated[int, Limits(1, 10_000)]  # evaluations of a model one after the other
Count = Annotated[int, Limits(1, 1_000_000)]
Natural = Annotated[int, Limits(0, 1_000_000)]
Units = Annotated[int, Limits(1, 1024)]  # blocks, layers
Side = Annotated[int, Limits(1, 65_536)]  # of an image or a latent, in pixels
Seed = Annotated[int, Limits(0, LAST_SEED)]
Positive = Annotated[float, Limits(above=0)]
NotNegative = Annotated[float, Limits(0)]
Share = Annotated[float, Limits(0, 1)]
Inside = Annotated[float, Limits(above=0, below=1)]


def check_numbers(settings: Any) -> None:
    """Compare the fields of a dataclass with their annotations, as far as these ask for numbers.

    Raises:
        ValueError: naming the first wrong field, the accepted values, and its default
    """
    for f in fields(settings):
        value = getattr(settings, f.name)
        if expected := _expected(value, hint_of(type(settings), f.name)):
            usual = "" if f.default is MISSING else f"; the default is {f.default}"
            raise ValueError(f"{type(settings).__name__}: {f.name} must be {expected}, got {value!r}{usual}")


def check_table(who: str, width: int, side: int) -> None:
    """Refuse a table of positions that is larger than any model's; a family calls it before it computes one.

    Args:
        who: the family
        width: of a token
        side: rows = columns of tokens

    Raises:
        ValueError: naming both
    """
    if width * side**2 > TABLE:
        raise ValueError(
            f"{who}: positions of {side} x {side} tokens in {width} channels are more than a model here can hold"
        )


@cache
def hint_of(cls: type, name: str) -> Any:
    """The annotation of one field; its class may have others, of names that exist for type checkers only."""
    home = next(c for c in cls.__mro__ if name in c.__dict__.get("__annotations__", ()))
    alone = SimpleNamespace(__annotations__={name: home.__annotations__[name]})
    return get_type_hints(alone, vars(sys.modules[home.__module__]), include_extras=True)[name]


def _expected(value: Any, hint: Any) -> str:
    """The accepted values in words; '' if the value fits, or the annotation has no number."""
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        return _expected_number(value, args[0], args[1]) if args[0] in _KINDS else _expected(value, args[0])
    if _is_numeric(hint):
        if origin in _KINDS:
            return _expected_number(value, origin, Limits())
        if origin in (Union, UnionType):
            return _expected_of(value, args)
        if origin in (tuple, Sequence, Mapping):
            return _expected_items(value, origin, args)
    return ""


_KINDS = {int: "a whole number", float: "a finite number"}


def _expected_number(value: Any, kind: type, limits: Limits) -> str:
    number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not number or not abs(value) < math.inf:
        return _KINDS[kind]
    if limits.high == math.inf and abs(value) > LARGEST[kind]:
        return f"at most {LARGEST[kind]:.15g} in size"
    return limits.broken(value)


def _expected_of(value: Any, arms: Sequence[Any]) -> str:
    """Of a union: a number, or None, or a class such as `Ramp`."""
    others = [get_origin(arm) or arm for arm in arms if not _is_numeric(arm)]
    expected = [_expected(value, arm) for arm in arms if _is_numeric(arm)]
    if "" in expected or isinstance(value, tuple(others)):
        return ""
    return " or ".join((*expected, *("None" if arm is type(None) else f"a {arm.__name__}" for arm in others)))


def _expected_items(value: Any, origin: Any, args: tuple[Any, ...]) -> str:
    """The accepted values for the first wrong item of a list or mapping."""
    if not isinstance(value, Mapping if origin is Mapping else (list, tuple)):
        return "numbers by name" if origin is Mapping else "a list of numbers"
    items = list(value.values() if isinstance(value, Mapping) else value)
    each = args if origin is tuple and args[-1] is not Ellipsis else args[:1] if origin is tuple else args[-1:]
    if len(each) != 1 and len(each) != len(items):
        return f"a list of {len(each)} numbers"
    hints = each * len(items) if len(each) == 1 else each
    found = (_expected(item, hint) for item, hint in zip(items, hints, strict=True))
    return next((f"{words} in each place" for words in found if words), "")


def _is_numeric(hint: Any) -> bool:
    """Whether an annotation accepts numbers, alone or among others."""
    return hint is int or hint is float or any(map(_is_numeric, get_args(hint)))
