"""The words of a command, `key=value`, read into a dataclass of settings, and the command's help, made of its fields.

A key is a field. Its annotation gives the type and the limits (`edit.inputs.limits`), its default the value of a key
that is left out, the `Args:` of the class's docstring its help; where there are such, a field without help is no key.
"""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields
from functools import cache
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from edit.inputs.limits import check_numbers, hint_of

T = TypeVar("T")
KINDS = {int: "a whole number", float: "a number", bool: "true or false"}
TRUTH = {"true": True, "false": False}
NOTHING = ("null", "none")  # for a setting that may be None


def read(settings: type[T], words: Sequence[str], bare: str | None = None, **more: Any) -> T:
    """Settings from the words of a command line.

    Args:
        settings: dataclass
        words: of the command line, without options
        bare: the key that a word without a known key stands for
        more: fields that are no keys

    Raises:
        ValueError: as `parse`, and for a number beyond its limits
    """
    given = parse(settings, words, bare=bare)
    try:
        made = settings(**given, **more)
        check_numbers(made)
    except ValueError as error:  # on a command line the name of the class would say nothing
        raise ValueError(str(error).removeprefix(f"{settings.__name__}: ")) from error
    return made


def parse(settings: type, words: Sequence[str], bare: str | None = None) -> dict[str, Any]:
    """The values that words give, by key; numbers are not yet compared with their limits.

    A field of type `tuple[..., ...]` collects the values of a key that is repeated; no other key may be. One of type
    `list[...]` takes [a,b], and a for [a].

    Args:
        settings: dataclass
        words: of the command line, without options
        bare: the key that a word without a known key stands for

    Raises:
        ValueError: for a word that is no setting, an unknown, empty, repeated or missing key, a value of another type
    """
    known, given = keys(settings), dict[str, Any]()
    without = [f.name for f in fields(settings) if f.default is MISSING and f.default_factory is MISSING]
    needed = [name for name in without if name in known]
    for word in words:
        name, equals, text = word.partition("=")
        if bare is not None and not (equals and name in known):
            name, equals, text = bare, "=", word
        if not equals or not name:
            raise ValueError(f"{word!r} is no setting: write key=value, such as {known[0]}=...")
        if name not in known:
            near = difflib.get_close_matches(name.partition(".")[0], known, 1)
            raise ValueError(f"there is no key {name!r}: " + (f"did you mean {near[0]}?" if near else "see --help"))
        hint = hint_of(settings, name)
        repeated = get_origin(hint) is tuple
        if name in given and not repeated:
            raise ValueError(f"{name} is given twice: keep one of {name}={given[name]} and {word}")
        if not text and name not in needed:
            raise ValueError(f"{name} is empty: write {_wanted(settings, name)}, or leave it out")
        value = _value(name, text, get_args(hint)[0] if repeated else hint)
        given[name] = (*given.get(name, ()), value) if repeated else value
    if missing := next((name for name in needed if given.get(name) in (None, "")), None):
        raise ValueError(f"{missing} is missing: {_wanted(settings, missing)}")
    return given


def apart(words: Sequence[str], sections: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Words without those of the form `section.name=text`; and the texts of these, by section.name.

    Raises:
        ValueError: for one that is given twice
    """
    own, texts = list[str](), dict[str, str]()
    for word in words:
        name, equals, text = word.partition("=")
        section, _, rest = name.partition(".")
        if not equals or not rest or section not in sections:
            own.append(word)
        elif name in texts:
            raise ValueError(f"{name} is given twice: keep one of {name}={texts[name]} and {word}")
        else:
            texts[name] = text
    return own, texts


def keys(settings: type) -> list[str]:
    """The keys of a command, in the order of the fields."""
    names, told = [f.name for f in fields(settings)], helps(settings)
    return [name for name in names if name in told or not told]


@cache
def helps(settings: type) -> dict[str, str]:
    """The help of each field, from `Args:` in the docstring; empty where it has none."""
    _, _, described = inspect.cleandoc(settings.__doc__ or "").partition("\nArgs:\n")
    found: dict[str, str] = {}
    for line in described.partition("\n\n")[0].splitlines():
        if begin := re.match(r" {4}(\w+): (.+)", line):
            name, found[begin[1]] = begin[1], begin[2]
        else:
            found[name] += f" {line.strip()}"
    return found


def asks_help(words: Sequence[str]) -> bool:
    return bool({"-h", "--help"} & set(words))


def explained(settings: type) -> str:
    """The lines of a command's help that name its keys and their defaults."""
    lines, defaults = ["Keys and their defaults"], {f.name: f.default for f in fields(settings)}
    width = max(map(len, keys(settings))) + 4
    for name in keys(settings):
        default = defaults[name]
        usual = "" if default in (MISSING, "", ()) else f" ({'null' if default is None else default})"
        text = textwrap.wrap(helps(settings).get(name, "") + usual, 116 - width, break_on_hyphens=False) or [""]
        lines += [f"  {name + '=':<{width}}{text[0]}", *(" " * (width + 2) + line for line in text[1:])]
    return "\n".join(lines)


def listed(text: str) -> list[str]:
    """The parts of [a, b]; any other text is the only part."""
    if not (text.startswith("[") and text.endswith("]")):
        return [text]
    return [part.strip() for part in text[1:-1].split(",")] if text[1:-1].strip() else []


def _wanted(settings: type, name: str) -> str:
    return f"{name}=<{helps(settings).get(name, 'value')}>"


def _value(name: str, text: str, hint: Any) -> Any:
    """Raises ValueError if the text is nothing that the annotation takes."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _value(name, text, args[0])
    if origin in (Union, UnionType):
        return None if type(None) in args and text in NOTHING else _value(name, text, args[0])
    if origin is list:
        return [_value(name, part, args[0]) for part in listed(text)]
    try:
        return TRUTH[text.lower()] if hint is bool else hint(text)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{name}: expected {KINDS.get(hint, hint.__name__)}, got {text!r}") from error
