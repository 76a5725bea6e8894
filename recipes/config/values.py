"""Which values a setting accepts: the `rule`s of the schema, the annotations of constructors, and both in words."""

from __future__ import annotations

import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from math import inf, isfinite
from typing import Annotated, Any, Literal, Union

from omegaconf import DictConfig, ListConfig

from edit.inputs.limits import Limits
from recipes.config.suggestions import suggest

MOST = 1e9  # of a number without a limit of its own: a run that goes further never ends


# ---- rules ----------------------------------------------------------------------------------------------------------


def rule(
    default: Any,
    of: Sequence[str] = (),
    low: float = -MOST,
    high: float = MOST,
    above: float = -inf,
    below: float = inf,
    count: int | None = None,
) -> Any:
    """A dataclass field whose value, or each of its `count` items, is one of `of`, or a number in [low, high] and
    between `above` and `below`."""
    limits = {"of": tuple(of), "low": low, "high": high, "above": above, "below": below, "count": count}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=limits)
    return field(default=default, metadata=limits)


def breaches(
    value: Any,
    place: str,
    or_null: str,
    of: Sequence[str],
    low: float,
    high: float,
    above: float,
    below: float,
    count: int | None,
) -> Iterator[str]:
    """One sentence for each way in which the value of the key `place` breaks a `rule`; the rest are its limits."""
    if isinstance(value, ListConfig) and count not in (None, len(value)):
        yield f"{place}: expected {count} values, got {len(value)}: {value}"
        return
    for item in value if isinstance(value, ListConfig) else [value]:
        if item is None:
            continue
        if of and item not in of:
            yield f"{place}: expected one of {', '.join(of)}, got {item!r}{suggest(item, of).split(' (')[0]}"
        elif not of and not (low <= item <= high and above < item < below):
            least = f"more than {above:g}" if above > -inf else f"at least {low:g}"
            most = f" and below {below:g}" if below < inf else f" and at most {high:.15g}" if high < item else ""
            limit = f"a number from {low:g} to {high:.15g}" if high not in (MOST, inf) else least + most
            yield f"{place}: expected {limit}{or_null}, got {item}"


# ---- annotations ----------------------------------------------------------------------------------------------------


_SCALARS = {int: int, float: (int, float), str: str, bool: bool, type(None): type(None)}
_LISTS = (list, tuple, set, frozenset, Sequence, Iterable, Collection)
_DICTS = (dict, Mapping)


def fits(value: Any, hint: Any) -> bool:
    """Whether a configured value can be an instance of the annotation; True for annotations that are not judged."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Annotated:
        limits = [limit for limit in args[1:] if isinstance(limit, Limits) and isinstance(value, int | float)]
        return fits(value, args[0]) and not any(limit.broken(value) for limit in limits)
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if isinstance(value, DictConfig) and "_target_" in value:
        return origin not in _SCALARS  # an object that will be built: `mistakes` judges its class
    if origin in _SCALARS:
        number = not isinstance(value, float) or isfinite(value)
        return isinstance(value, _SCALARS[origin]) and number and (origin is bool or not isinstance(value, bool))
    if origin in _LISTS:
        if not isinstance(value, ListConfig):
            return False
        if origin is tuple and args and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(map(fits, value, args))
        return not args or all(fits(item, args[0]) for item in value)
    if origin in _DICTS:
        return isinstance(value, DictConfig) and (len(args) < 2 or all(fits(item, args[1]) for item in value.values()))
    return True


def spell(hint: Any) -> str:
    """An annotation in words: 'int', 'float or None', "one of 'flow', 'sit'", 'list of int'."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Annotated:
        return " ".join((spell(args[0]), *(str(limits) for limits in args[1:] if isinstance(limits, Limits))))
    if origin in (Union, types.UnionType):
        return " or ".join(spell(arg) for arg in args)
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin is type(None):
        return "None"
    if origin is tuple and args and args[-1] is not Ellipsis:
        return f"list of {len(args)} ({', '.join(spell(arg) for arg in args)})"
    if origin in _LISTS:
        return "list" + (f" of {spell(args[0])}" if args else "")
    if origin in _DICTS:
        return "mapping" + (f" to {spell(args[1])}" if len(args) > 1 else "")
    return getattr(origin, "__name__", str(origin))


def choices(hint: Any) -> list[str]:
    """The words that the Literals of an annotation accept."""
    if typing.get_origin(hint) is Literal:
        return [str(arg) for arg in typing.get_args(hint)]
    return [name for arg in typing.get_args(hint) for name in choices(arg)]


def accepts_text(hint: Any) -> bool:
    """Whether an annotation names text, alone or among others."""
    return hint is str or any(map(accepts_text, typing.get_args(hint)))


# ---- values that do not fit each other -------------------------------------------------------------------------------


def unplaceable(placement: str, strategy: str) -> str:
    """The sentence that refuses a teacher's placement under a strategy; empty if there are such."""
    if placement == "sharded" and strategy == "single":
        return "teacher.placement=sharded needs several devices: use trainer=ddp or fsdp2, or placement=replicated"
    if placement == "sharded" and strategy.startswith("zero"):
        return "teacher.placement=sharded is FSDP2's, not DeepSpeed's: use trainer=fsdp2, or placement=replicated"
    return ""
