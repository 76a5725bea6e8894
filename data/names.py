"""File names shown to people, typed into a shell, given to Hydra; and glob patterns, unless a file has that name."""

from __future__ import annotations

import os
import re
import shlex
from glob import escape, glob
from pathlib import Path

# control characters, and surrogates that stand for bytes that are no UTF-8 (PEP 383)
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def legible(text: str) -> str:
    """For messages and JSON: valid UTF-8 on one line, with \\xNN for every byte that is no text."""
    return UNPRINTABLE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    number = ord(found[0])
    number -= 0xDC00 if 0xDC80 <= number <= 0xDCFF else 0
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def typed(*words: str | os.PathLike) -> str:
    """A line for a shell; words with bytes that are no text in bash's $'...'."""
    return " ".join(_quoted(os.fspath(word)) for word in words)


def _quoted(word: str) -> str:
    if not UNPRINTABLE.search(word):
        return shlex.quote(word)
    return "$'" + legible(word.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def our_script(name: str) -> str:
    """train.py or eval.py as a shell in this folder finds it."""
    ours = Path(__file__).parents[1] / name
    return name if Path(name).is_file() or not ours.is_file() else str(ours)


def setting(key: str, value: str | os.PathLike) -> str:
    """`key=value` for train.py's command line, quoted where Hydra would not read this very text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    text = os.fspath(value)
    try:
        plain = "${" not in text and OverridesParser.create().parse_override(f"{key}={text}").value() == text
    except HydraException:
        plain = False
    if plain:
        return f"{key}={text}"
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # not an interpolation
    return f"{key}={in_quotes(text)}"


def in_quotes(text: str) -> str:
    """A text as Hydra reads it in single quotes."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def matching(pattern: str | os.PathLike) -> list[str]:
    """The path itself if it exists, else the matches of the glob pattern, sorted.

    Leading folders that exist are taken literally: `a [1]/*.tar` looks into the folder `a [1]`.
    """
    text = os.fspath(pattern)
    if os.path.lexists(text):
        return [text]
    there = next((parent for parent in Path(text).parents if parent.is_dir()), Path())
    if there == Path():
        return sorted(glob(text))
    return sorted(glob(os.path.join(escape(str(there)), os.path.relpath(text, there))))
