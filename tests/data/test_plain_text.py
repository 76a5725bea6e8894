"""Text of files: encodings, line ends, and values that are no labels."""

import codecs
import json
import math

import pytest

from data.damage import Damaged
from data.plain_text import class_digits, class_number, read_json, read_text, words

WORDS = "ein Köter 🐕"
ENCODED = {
    "UTF-8": WORDS.encode(),
    "UTF-8 with a mark": codecs.BOM_UTF8 + WORDS.encode(),
    "two marks": codecs.BOM_UTF8 * 2 + WORDS.encode(),
    "UTF-16": codecs.BOM_UTF16_LE + WORDS.encode("utf-16-le"),
    "UTF-16, big end first": codecs.BOM_UTF16_BE + WORDS.encode("utf-16-be"),
    "UTF-32": codecs.BOM_UTF32_LE + WORDS.encode("utf-32-le"),
    "UTF-32, big end first": codecs.BOM_UTF32_BE + WORDS.encode("utf-32-be"),
}


@pytest.mark.parametrize("content", ENCODED.values(), ids=ENCODED)
def test_a_byte_order_mark_tells_the_encoding_and_is_no_text(content):
    assert read_text(content, "a.txt") == WORDS


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("zwei Köter".encode("latin-1"), "a.txt is no UTF-8 text: byte 6 is 0xf6 "),
        (codecs.BOM_UTF8 + b"ab\xff", "a.txt is no UTF-8 text: byte 5 is 0xff "),
        (codecs.BOM_UTF16_LE + b"a\0\0\xd8b\0", "a.txt is no UTF-16-LE text: byte 4 is 0x00 "),
        (codecs.BOM_UTF16_LE + b"a\0b", "a.txt is no UTF-16-LE text: byte 4 is 0x62 "),
        (b"ab\0c", "a.txt has a NUL at byte 2: "),
        ("ö\0".encode(), "a.txt has a NUL at byte 2: "),
        ("cat".encode("utf-16-le"), "a.txt has a NUL at byte 1: .*UTF-16 without its mark"),
        (codecs.BOM_UTF16_BE + b"\0a\0\0", "a.txt has a NUL at byte 4: "),
    ],
)
def test_what_is_no_text_is_refused_with_its_first_byte(content, said):
    with pytest.raises(Damaged, match=f"^{said}"):
        read_text(content, "a.txt")


def test_lines_end_as_on_any_system_and_nowhere_else():
    assert read_text(b"a\r\nb\rc\nd\n\r\ne", "") == "a\nb\nc\nd\n\ne"
    kept = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\th"
    assert read_text(kept.encode(), "") == kept


def test_strings_of_json_are_captions_without_marks_and_space_around_them():
    assert words("\ufeff a cat\r\n", "a") == "a cat"
    for value, said in (
        (3, "^a is 3, expected words"),
        (None, "^a is None, expected words"),
        (["cat"], r"^a is \['cat'\], expected words"),
        ("cat \ud83d", r"^a has U\+D83D at character 4"),
        ("c\0t", r"^a has U\+0000 at character 1"),
    ):
        with pytest.raises(Damaged, match=said):
            words(value, "a")


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"[" * 100_000, b'{"label": ' + b"9" * 5000 + b"}"])
def test_json_that_cannot_be_read_is_damage(content):
    with pytest.raises(Damaged, match=r"^a\.json holds no JSON that can be read \("):
        read_json(content, "a.json")


def test_json_may_begin_with_a_mark():
    assert read_json(codecs.BOM_UTF8 + b'{"a": 1}', "") == {"a": 1}
    assert read_json('{"a": 1}'.encode("utf-16"), "") == {"a": 1}


@pytest.mark.parametrize("text", ["3", "3.0", "3e0", "0.3e1"])
def test_a_whole_number_is_a_label(text):
    number = class_number(json.loads(text), "a")
    assert number == 3 and type(number) is int


NO_LABELS = [2.7, True, False, "3", -1, -1.0, math.nan, math.inf, -math.inf, 2**63, 1e19, 10**4000, None, [3], {}]


@pytest.mark.parametrize("value", NO_LABELS, ids=lambda v: f"{v!r:.20}")
def test_what_would_have_to_be_rounded_or_guessed_is_no_label(value):
    with pytest.raises(Damaged, match="^a.json holds the label .*, expected a class number") as error:
        class_number(value, "a.json")
    assert len(str(error.value)) < 160
    if not isinstance(value, int) or abs(value) < 10**30:
        assert repr(value) in str(error.value)


@pytest.mark.parametrize("content", [b"3", b" 3\r\n", b"003", b"+3", codecs.BOM_UTF8 + b"3\n", "3".encode("utf-16")])
def test_digits_are_a_label(content):
    assert class_digits(content, "a.cls") == 3


@pytest.mark.parametrize(
    "text",
    ["", "3.0", "2.7", "-1", "cat", "1_000", "0x3", "3 4", "3\n4", "\u0663", "nan", "1e2", str(2**63), "9" * 5000],
)
def test_other_text_is_no_label(text):
    with pytest.raises(Damaged, match="^a.cls holds the label .*, expected a class number"):
        class_digits(text.encode(), "a.cls")


def test_the_largest_label_is_that_of_int64():
    assert class_digits(str(2**63 - 1).encode(), "") == class_number(2**63 - 1, "") == 2**63 - 1
