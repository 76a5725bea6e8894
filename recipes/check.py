"""What can be found wrong with a configuration without building anything, one sentence for each mistake.

Values of typed sections are compared with their `rule`s, `_target_` nodes with the signatures that they name.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import field, fields, is_dataclass
from math import inf, isfinite
from typing import Annotated, Any, Literal, Union

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from edit.limits import Limits

MOST = 1e9  # of any number that has no limit of its own: a run that goes further never ends
FEW, MANY = 12, 30  # names listed beside a near one, and where none is near


# ---- sentences ------------------------------------------------------------------------------------------------------


def nearest(word: str, options: Iterable[str]) -> list[str]:
    """Up to three of the options that `word` may have been meant to be, best first."""
    return difflib.get_close_matches(word, list(options), n=3)


def suggest(word: Any, options: Collection[str]) -> str:
    """The end of a sentence: '; did you mean 'x'?' and, where they are few or none is near, what is accepted."""
    options = sorted(str(option) for option in options)
    close = nearest(str(word), options)
    text = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    if close and len(options) <= FEW:
        return f"{text} (accepted: {', '.join(options)})"
    if options and not close:
        return "; accepted: " + ", ".join(options[:MANY]) + (", ..." if len(options) > MANY else "")
    return text


def flat(error: BaseException) -> str:
    """The message on one line, without the search paths, key traces and addresses that frameworks append."""
    text = re.split(r"\n\s*(?:Config search path|full_key:|See https?:)", str(error))[0]
    if "Original Traceback" in text:  # a DataLoader worker's: the error itself is the last entry
        text = re.split(r"\n(?=[\w.]+: )", text)[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


# ---- sections -------------------------------------------------------------------------------------------------------


def rule(
    default: Any,
    of: Sequence[str] = (),
    low: float = -MOST,
    high: float = MOST,
    above: float = -inf,
    below: float = inf,
    count: int | None = None,
) -> Any:
    """A field whose value, or each of its `count` items, must be one of `of`, or lie in [low, high] and between
    `above` and `below`."""
    limits = {"of": tuple(of), "low": low, "high": high, "above": above, "below": below, "count": count}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=limits)
    return field(default=default, metadata=limits)


def mistakes(node: DictConfig | ListConfig, path: str, trusted: Sequence[str]) -> Iterator[str]:
    """One sentence for each mistake in a node and below it; `path` is its place, '' for the root."""
    if isinstance(node, DictConfig):
        if is_dataclass(OmegaConf.get_type(node)):
            yield from _check_fields(node, path)
        if "_target_" in node:
            yield from _check_target(node, path, trusted)
    keys = list(node) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        place = f"{path}[{key}]" if isinstance(node, ListConfig) else f"{path}.{key}".lstrip(".")
        if OmegaConf.is_missing(node, key):
            yield f"{place} has no value; give one with {place}=..."
            continue
        try:
            child = node[key]
        except InterpolationResolutionError as error:
            if "HydraConfig was not set" not in str(error):  # ${hydra:...} is known only once the job runs
                yield f"{place}: {flat(error)}"
            continue
        if isinstance(child, DictConfig | ListConfig):
            yield from mistakes(child, place, trusted)


def _check_fields(node: DictConfig, path: str) -> Iterator[str]:
    known = {f.name: f for f in fields(OmegaConf.get_type(node))}
    for key in node:
        place = f"{path}.{key}".lstrip(".")
        if key not in known:  # reached by +key=value only
            yield f"unknown key '{place}'{suggest(key, known)}"
        elif known[key].metadata and not OmegaConf.is_missing(node, key):
            or_null = " or null" if "None" in str(known[key].type) else ""
            with suppress(InterpolationResolutionError):  # reported by `mistakes`
                yield from list(_check_rule(node[key], place, or_null, **known[key].metadata))


def _check_rule(
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


# ---- targets --------------------------------------------------------------------------------------------------------


def locate(path: str, trusted: Sequence[str]) -> Any:
    """The object that a `_target_` names.

    The trusted packages keep out mistakes and the obvious attacks. They are no sandbox: read a stranger's config.

    Raises:
        ValueError: if it lies outside the trusted packages (also if it was only imported into one of them, as in
            `torch.os.system`), or if there is no such module or name
    """
    top, *rest = str(path).split(".")
    if top not in trusted:
        raise ValueError(
            f"{path} is in none of the trusted packages ({', '.join(trusted)}); if you trust it, set trusted=[{top}]"
        )
    found = _import(top)
    for depth, name in enumerate(rest, 1):
        parent = ".".join((top, *rest[: depth - 1]))
        if not hasattr(found, name):
            submodules = [m.name for m in pkgutil.iter_modules(getattr(found, "__path__", []))]
            if name not in submodules:
                options = {n for n in (*dir(found), *submodules) if not n.startswith("_")}
                close = nearest(name, options)
                raise ValueError(f"{parent} has no {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
            _import(f"{parent}.{name}")
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(f"{path} is a {type(found).__name__}, not a class or function")
    home = getattr(inspect.getmodule(found), "__name__", "builtins")
    if home.split(".")[0] not in trusted:
        raise ValueError(f"{path} comes from {home}, not one of the trusted packages")
    return found


def _import(module: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"importing {module} needs the package {error.name}, which is not installed") from error


def _check_target(node: DictConfig, path: str, trusted: Sequence[str]) -> Iterator[str]:
    prefix = f"{path}." if path else ""
    try:
        target = locate(node._target_, trusted)
        parameters = inspect.signature(target).parameters
    except ValueError as error:
        yield f"{prefix}_target_: {flat(error)}"
        return
    name = getattr(target, "__qualname__", node._target_)
    hints = _hints(target, parameters)
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = [str(key) for key in node if not str(key).startswith("_")]
    for key in given:
        if key not in named:
            if not open_ended:
                yield f"{prefix}{key}: {name} has no argument {key!r}{suggest(key, named)}"
            continue
        if OmegaConf.is_missing(node, key):
            continue
        try:
            value = node[key]
        except InterpolationResolutionError:
            continue  # reported by `mistakes`
        if not fits(value, hints[key]):
            near = suggest(value, _literals(hints[key])).split(" (")[0] if isinstance(value, str) else ""
            shown = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            yield f"{prefix}{key}: expected {describe(hints[key])}, got {shown!r}{near if 'did you' in near else ''}"
    if "_args_" not in node and not node.get("_partial_", False):
        missing = [n for n, p in named.items() if p.default is p.empty and n not in given]
        yield from (f"{prefix}{n}: {name} needs it and it is not given; add {prefix}{n}=..." for n in missing)


# ---- types ----------------------------------------------------------------------------------------------------------


def _hints(target: Any, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Annotations of the parameters; `Any` where one names something that exists for type checkers only."""
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    scope = getattr(function, "__globals__", {})

    def resolve(annotation: Any) -> Any:
        try:
            hints = types.SimpleNamespace(__annotations__={"x": annotation})
            return typing.get_type_hints(hints, scope, include_extras=True)["x"]
        except (NameError, TypeError, AttributeError, SyntaxError):
            return Any

    return {n: Any if p.annotation is p.empty else resolve(p.annotation) for n, p in parameters.items()}


_SCALARS = {int: int, float: (int, float), str: str, bool: bool, type(None): type(None)}
_LISTS = (list, tuple, set, frozenset, Sequence, Iterable, Collection)
_DICTS = (dict, Mapping)


def fits(value: Any, hint: Any) -> bool:
    """Whether a configured value can be what the annotation says; True for annotations we do not judge."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Annotated:
        limits = [limit for limit in args[1:] if isinstance(limit, Limits) and isinstance(value, int | float)]
        return fits(value, args[0]) and not any(limit.broken(value) for limit in limits)
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if isinstance(value, DictConfig) and "_target_" in value:
        return origin not in _SCALARS  # an object that will be built: its class is its own business
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


def describe(hint: Any) -> str:
    """An annotation in words: 'int', 'float or None', "one of 'flow', 'sit'", 'list of int'."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Annotated:
        return " ".join((describe(args[0]), *(str(limits) for limits in args[1:] if isinstance(limits, Limits))))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin is type(None):
        return "None"
    if origin is tuple and args and args[-1] is not Ellipsis:
        return f"list of {len(args)} ({', '.join(describe(arg) for arg in args)})"
    if origin in _LISTS:
        return "list" + (f" of {describe(args[0])}" if args else "")
    if origin in _DICTS:
        return "mapping" + (f" to {describe(args[1])}" if len(args) > 1 else "")
    return getattr(origin, "__name__", str(origin))


def _literals(hint: Any) -> list[str]:
    if typing.get_origin(hint) is Literal:
        return [str(arg) for arg in typing.get_args(hint)]
    return [name for arg in typing.get_args(hint) for name in _literals(arg)]
