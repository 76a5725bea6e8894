"""The words of a command line before Hydra reads them: settings `key=value`, and Hydra's options."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from data.names import legible
from recipes.config.errors import UserError, refuse
from recipes.config.schema import Root
from recipes.config.staged import gathered
from recipes.config.values import spell

KEY = re.compile(r"(\+{1,2}|~)?[\w./@:$-]+(=|$)")  # how a setting begins


def parse_options(words: list[str]) -> tuple[Any, list[str]]:
    """Hydra's namespace of options and settings, those for stages gathered, and the words that are options.

    Raises:
        UserError: for words that are neither settings nor options of this program
    """
    if odd := next((word for word in words if any("\ud800" <= c <= "\udfff" for c in word)), None):
        raise UserError(f"{legible(odd)} is no text in UTF-8, which Hydra cannot read: rename the file that it names")
    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    args, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        raise UserError(
            f"there is no option {unknown[0]}; settings are written key=value, for example trainer.max_steps=200"
        )
    if args.experimental_rerun is not None:
        raise UserError("--experimental-rerun reads a pickle, which may run anything: give the command again instead")
    if args.config_dir is not None and not Path(args.config_dir).is_dir():
        raise UserError(f"--config-dir={args.config_dir}: there is no such folder")
    flags = [word for word in words if word not in args.overrides]
    args.overrides = gathered(args.overrides)
    return args, flags


def as_typed(word: str) -> str:
    """A setting as the user meant it: text that Hydra would read as a number or a truth value is quoted (name=1e3).

    Raises:
        UserError: for a number in place of true or false, or text in place of a number; OmegaConf would convert both
    """
    key, equals, value = word.partition("=")
    kind = KINDS.get(key.lstrip("+"))
    if not equals or kind is None or not KEY.match(word):
        return word
    try:
        read = OverridesParser.create().parse_override(word).value()
    except HydraException:  # explained when the configuration is composed
        return word
    number = isinstance(read, int | float)
    if kind is str:
        return f"{key}='{value}'" if number else word
    if kind is bool and number and not isinstance(read, bool):
        raise UserError(f"{key.lstrip('+')}: expected true or false, got {value}")
    if kind in (int, float) and value[:1] in ("'", '"'):
        raise UserError(f"{key.lstrip('+')}: expected {spell(kind)}, got the text {value}")
    return word


def _kinds(section: Any, prefix: str = "") -> Iterator[tuple[str, type]]:
    """The dotted keys of a schema that hold a single value, and the types of these values."""
    for key, hint in typing.get_type_hints(section).items():
        if is_dataclass(hint):
            yield from _kinds(hint, f"{prefix}{key}.")
        for kind in (str, bool, int, float):
            if hint in (kind, kind | None):
                yield f"{prefix}{key}", kind


KINDS = {"name": str, **dict(_kinds(Root))}
