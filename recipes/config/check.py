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
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import field, fields, is_dataclass
from math import inf, isfinite
from typing import Annotated, Any, Literal, Union

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from edit.inputs.limits import Limits
from edit.inputs.trust import accepted, cut, is_kind, refuse_enormous, said
from edit.inputs.trust import hints as annotations

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
    text = re.sub(r"^\w+ raised while resolving interpolation: ", "", text)
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


def mistakes(node: DictConfig | ListConfig, path: str, trusted: Sequence[str], hint: Any = None) -> Iterator[str]:
    """One sentence for each mistake in a node and below it.

    Args:
        node: to look through
        path: its place, '' for the root
        trusted: packages that a `_target_` may name
        hint: what is built here has this annotation; None: nothing is
    """
    hints: Mapping[str, Any] = {}
    if isinstance(node, DictConfig):
        if is_dataclass(OmegaConf.get_type(node)):
            yield from _check_fields(node, path)
        if "_target_" in node:
            hints = yield from _check_target(node, path, trusted, hint)
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
            below = hints.get(str(key)) if "_target_" in node else _built_at(place, path) or hint
            if hint is None and below is not None:
                yield from _check_sizes(child, place)
            yield from mistakes(child, place, trusted, below)


def _check_sizes(node: DictConfig | ListConfig, path: str) -> Iterator[str]:
    try:
        refuse_enormous(OmegaConf.to_container(node, resolve=True), path)
    except OmegaConfBaseException:
        pass  # what a reference in it lacks is reported by `mistakes`
    except ValueError as error:
        yield flat(error)


# what is built from train.py's configuration, by its place; * is any name
BUILT = {
    "backbone": "edit.denoiser.Spec",
    "data.set": "data.split.Splits",
    "edits.*": "edit.denoiser.Edit",
    "objective": "edit.objectives.Objective",
    "data_weight": "edit.objectives.Ramp",
    "terms.*": "edit.objectives.Term",
    "matching": "edit.few_step.method.FewStepMethod",
    "sampler": "edit.sampling.Sampler",
}
# functions that stand where a value is expected, and compute it from nothing but their arguments
FUNCTIONS = ("edit.pruning.patterns.aligned",)
# Hydra's own words in a node, and the one thing that they may say: how nodes are built anyway
HYDRA = {"_partial_": False, "_recursive_": True, "_convert_": "all"}


def _built_at(place: str, parent: str) -> Any:
    """The kind of class that a place of train.py's configuration takes; None where nothing is built."""
    path = BUILT.get(place) or BUILT.get(f"{parent}.*")
    if path is None:
        return None
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


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


def locate(path: Any, trusted: Sequence[str]) -> Any:
    """The object that a `_target_` names.

    Raises:
        ValueError: if it lies outside the trusted packages (also if it was only imported into one of them, as in
            `torch.os.system`), or if there is no such module or name
    """
    if not isinstance(path, str):
        raise ValueError(f"expected an import path, got {cut(path)}")
    top, *rest = path.split(".")
    if top not in trusted:
        raise ValueError(
            f"{cut(path, quoted=False)} is in none of the trusted packages ({', '.join(trusted)}); if it is a class "
            f"for edit and you trust its package, set trusted=[{cut(top, quoted=False)}]"
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


def _check_target(
    node: DictConfig, path: str, trusted: Sequence[str], hint: Any
) -> Generator[str, None, Mapping[str, Any]]:
    """Mistakes of a node that is to be built; returns the annotations of its arguments."""
    prefix = f"{path}." if path else ""
    for key, value in OmegaConf.to_container(node).items():  # type: ignore[union-attr]
        if str(key).startswith("_") and key != "_target_" and (key not in HYDRA or value != HYDRA[key]):
            yield f"{prefix}{key}: arguments are given by their names and built at once; leave {key} out"
    try:
        target = locate(node._target_, trusted)
        _check_kind(target, node._target_, hint)
        parameters = inspect.signature(target).parameters
    except ValueError as error:
        yield f"{prefix}_target_: {flat(error)}"
        return {}
    name = getattr(target, "__qualname__", node._target_)
    hints = annotations(target, parameters)
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
    missing = [n for n, p in named.items() if p.default is p.empty and n not in given]
    yield from (f"{prefix}{n}: {name} needs it and it is not given; add {prefix}{n}=..." for n in missing)
    return hints


def _check_kind(target: Any, path: str, hint: Any) -> None:
    """Raises ValueError unless a `_target_` is a class that an annotation takes: see `edit.inputs.trust`."""
    if hint is None:
        raise ValueError(f"nothing is built here, so {path} is not called: leave it out")
    kinds = accepted(hint)
    if isinstance(target, type) and is_kind(target, kinds):
        return
    if path in FUNCTIONS and typing.get_type_hints(target)["return"] == hint:
        return
    what = f"{target.__module__}.{target.__qualname__}" if isinstance(target, type) else f"{path}, which is no class,"
    raise ValueError(f"{said(kinds)} was expected, got {what}{' and is not called' * (what[-1] == ',')}")


# ---- types ----------------------------------------------------------------------------------------------------------


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
