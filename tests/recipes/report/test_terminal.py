import re

import pytest
from reports import small_report, whole_report

from recipes.report.terminal import show


@pytest.fixture
def report(tmp_path) -> dict:
    return small_report(tmp_path)


def printed(report: dict, capsys, monkeypatch, width: int) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    show(report)
    return capsys.readouterr().out


def test_every_row_and_failure_is_shown_and_the_best_has_a_star(report, capsys, monkeypatch):
    out = printed(report, capsys, monkeypatch, 60)
    for text in ("<slow> & right w=1.5", "fast w=1", "1.50 ± 0.10*", "3.50 ± 0.10 ", "broken: it holds no <weights>"):
        assert text in out


@pytest.mark.parametrize("width", [80, 160])
def test_each_row_is_one_line_of_each_table_and_no_line_is_longer_than_the_terminal(
    tmp_path, capsys, monkeypatch, width
):
    out = printed(whole_report(tmp_path), capsys, monkeypatch, width)
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    counts = {k: len([line for line in lines if line.strip().startswith(f"a run + cache{k} w=1.5 ")]) for k in (0, 9)}
    assert counts == ({0: 8, 9: 8} if width == 80 else {0: 3, 9: 3})
    assert all("…" not in line for line in lines)


def test_every_number_of_a_narrow_terminal_is_in_a_wide_one(tmp_path, capsys, monkeypatch):
    narrow, wide = (
        sorted(
            re.findall(
                r"[\d.,]+", printed(whole_report(tmp_path, 2), capsys, monkeypatch, width).split("a run + cache0:")[0]
            )
        )
        for width in (80, 240)
    )
    labels = narrow.count("1.5") - wide.count("1.5")
    assert labels > 0 and set(narrow) == set(wide)


def test_what_variants_change_is_told_once(tmp_path, capsys, monkeypatch):
    out = printed(whole_report(tmp_path), capsys, monkeypatch, 80)
    assert out.count("reuse interval=5") == 10 and "a run + cache3: reuse interval=5" in out
