"""Text from files: captions, prompts, class numbers.

UTF-8, or UTF-16 and UTF-32 with a byte-order mark. Nothing is guessed or replaced, for a replaced letter is another
prompt: an unreadable byte is refused with its position.
"""

from __future__ import annotations

import codecs
import json
import re
import reprlib
from typing import Any

from data.damage import Damaged

BOM = "\ufeff"
# the longer ones first: UTF-32's begins with UTF-16's
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
LAST_LABEL = 2**63 - 1  # labels are int64


def read_text(content: bytes, name: str) -> str:
    """A file's text, without byte-order marks, each line ended by a line feed.

    CR LF and CR become line feeds. Other separators, such as U+2028, stay part of the text.

    Args:
        content: of the file
        name: for messages

    Raises:
        Damaged: naming the first byte that is invalid in the encoding, or NUL
    """
    mark, codec = next(((m, c) for m, c in MARKS if content.startswith(m)), (b"", "utf-8"))
    try:
        text = content[len(mark) :].decode(codec)
    except UnicodeDecodeError as error:
        place = len(mark) + error.start
        raise Damaged(
            f"{name} is no {codec.upper()} text: byte {place} is 0x{content[place]:02x} ({error.reason}); "
            f"convert it to UTF-8"
        ) from error
    if "\0" in text:
        place = len(mark) + len(text[: text.index("\0")].encode(codec))
        raise Damaged(f"{name} has a NUL at byte {place}: it is no text, or UTF-16 without its mark; save it as UTF-8")
    return re.sub("\r\n?", "\n", text.replace(BOM, ""))


def read_json(content: bytes, name: str) -> Any:
    """Raises Damaged for content that is no JSON, is nested too deep, or has a number that is too long."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} holds no JSON that can be read ({error})") from error


def words(value: object, name: str) -> str:
    """A string of a JSON file as a caption or prompt.

    Raises:
        Damaged: if it is no string, or has characters that are none
    """
    if not isinstance(value, str):
        raise Damaged(f"{name} is {shown(value)}, expected words")
    if wrong := re.search("[\0\ud800-\udfff]", value):
        raise Damaged(f"{name} has U+{ord(wrong[0]):04X} at character {wrong.start()}, which is none: remove it")
    return value.replace(BOM, "").strip()


def class_number(value: object, name: str) -> int:
    """A label of a JSON file, 3 or 3.0; nothing is rounded or guessed.

    Raises:
        Damaged: for anything else, such as 2.7, true, "3", a negative number, or one beyond int64
    """
    number = value
    if isinstance(value, float) and value.is_integer():
        number = int(value)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= LAST_LABEL:
        raise Damaged(f"{name} holds the label {shown(value)}, expected a class number, 0, 1, 2, ...")
    return number


def class_digits(content: bytes, name: str) -> int:
    """A label of a text file: digits alone, with space around them. Raises Damaged for anything else."""
    text = read_text(content, name).strip()
    if not re.fullmatch("[+]?[0-9]{1,19}", text):
        raise Damaged(f"{name} holds the label {shown(text)}, expected a class number, 0, 1, 2, ...")
    return class_number(int(text), name)


def shown(value: object) -> str:
    """A value for messages, cut if it is long or deep."""
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = 60
    return short.repr(value)
