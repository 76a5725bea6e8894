"""Composed prompts: as many different ones as asked for, always the same, and varied from the first on."""

import hashlib
from collections import Counter

import pytest

from data.making.prompts import SLOTS, TOTAL, _sentence, _shuffled, read_prompts


def test_a_line_ends_where_the_file_says_so(tmp_path):
    """Other characters that Python takes for line ends may stand inside a prompt."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("a\u2028b\r\nc\x85d\n".encode())
    assert [p.text for p in read_prompts(str(path))] == ["a\u2028b", "c\x85d"]


def test_prompt_files_have_marks_encodings_and_suffixes_of_any_system(tmp_path):
    text = "\ufeffein Köter \r\n\r\tzwei\u2028Köter\r\ufeffdrei"
    for name, encoding in (("a.txt", "utf-8"), ("b.TXT", "utf-16-le"), ("c", "utf-32-be")):
        (tmp_path / name).write_bytes(text.encode(encoding))
        found = [(p.text, p.id) for p in read_prompts(str(tmp_path / name))]
        assert found == [("ein Köter", "1"), ("zwei\u2028Köter", "3"), ("drei", "4")]
    for name in ("d.jsonl", "d.JSONL"):
        (tmp_path / name).write_bytes(
            b'\xef\xbb\xbf{"prompt": " a\\ufeff cat", "id": null}\r\n{"prompt": "b", "id": 7}'
        )
        assert [(p.text, p.id) for p in read_prompts(str(tmp_path / name))] == [("a cat", "1"), ("b", "7")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "eins\nKöter".encode("latin-1"), "prompts=.*a.txt is no UTF-8 text: byte 6 is 0xf6"),
        ("a.txt", b"one\nt\0wo", "prompts=.*a.txt has a NUL at byte 5"),
        ("a.jsonl", b'{"prompt": "a\\u0000"}', r"a.jsonl, line 1: the prompt has U\+0000 at character 1"),
        ("a.jsonl", b'{"prompt": "a\\udc00"}', r"a.jsonl, line 1: the prompt has U\+DC00 at character 1"),
        ("a.jsonl", b'{"prompt": "\\ufeff"}', "a.jsonl, line 1: the prompt is empty"),
        ("a.jsonl", b'{"prompt": ' + b"[" * 100_000, 'a.jsonl, line 1: expected {"prompt": "..."}, got'),
        ("a.json", b'["one", "two"]', "a.json is a .json: give a .jsonl"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_place(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_prompts(str(tmp_path / name))


def test_they_are_different_and_numbered():
    prompts = read_prompts("composed:20000")
    assert len({p.text for p in prompts}) == 20_000 and TOTAL > 1e6
    assert [p.id for p in prompts[:3]] == ["1", "2", "3"]


@pytest.mark.parametrize("total", [1, 2, 5, 64, 1000])
def test_the_shuffle_reaches_everything_once(total):
    assert sorted(_shuffled(k, total) for k in range(total)) == list(range(total))


def test_sentences_of_different_numbers_differ():
    """No two choices of words read the same: every sentence tells which words it is of."""
    assert all(len(set(slot)) == len(slot) for slot in SLOTS)
    starts = [[word for word in slot if any(w != word and w.startswith(word + " ") for w in slot)] for slot in SLOTS]
    assert not any(starts)  # none begins another, so a sentence is read from left to right in one way
    assert _sentence(0) == " ".join(slot[0] for slot in SLOTS)
    assert _sentence(TOTAL - 1) == " ".join(slot[-1] for slot in SLOTS)


def test_fewer_prompts_are_the_first_of_more_on_every_machine():
    few, many = read_prompts("composed:50"), read_prompts("composed:500")
    assert few == many[:50]
    text = "\n".join(p.text for p in few)  # a change of words or shuffle changes what `composed:50` means: say so
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "0a6489a2e18aa763"


def test_the_first_of_them_are_varied():
    for slot in SLOTS:
        counts = Counter(word for p in read_prompts("composed:2000") for word in slot if f" {word} " in f" {p.text} ")
        # each word is drawn 2000 / len(slot) times in the mean, with the spread of a binomial: 6 of its deviations
        mean = 2000 / len(slot)
        assert len(counts) == len(slot) and all(abs(n - mean) < 6 * mean**0.5 for n in counts.values())


@pytest.mark.parametrize("count", ["0", "many", "-3", "", "1e4", f"{TOTAL + 1}"])
def test_a_count_that_is_none_is_refused(count):
    with pytest.raises(ValueError, match=rf"prompts=composed:{count}: expected composed:<count>, with a count of 1 to"):
        read_prompts(f"composed:{count}")
