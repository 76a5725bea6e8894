"""The catalogue says what the code says."""

import re
from pathlib import Path

import pytest

from recipes import list as catalogue
from recipes.list import CONFIGS, ROOT, TITLES, WRITTEN, Entry, entries, first_sentence, main, page


@pytest.fixture(scope="module")
def rows() -> list[Entry]:
    return entries()


def test_the_written_catalogue_is_that_of_the_code(rows):
    assert WRITTEN.read_text() == page(rows), "python -m recipes.list --write"


def test_nothing_is_missing_and_everything_named_exists(rows):
    assert {row.kind for row in rows} == set(TITLES)
    names = [row.name for row in rows]
    assert len(names) == len(set(names)) > 50 and {"DiTConfig", "TinyFusion", "OutputKD", "LADD", "Euler"} <= set(names)
    for row in rows:
        assert row.summary and row.change and len(row.change.split()) < 10
        assert f"class {row.name}" in (ROOT / row.file).read_text()
        assert all((CONFIGS / f"{name}.yaml").is_file() for name in row.configs)
        assert all((ROOT / f"benchmarks/claims/{name}.yaml").is_file() for name in row.claims)
        assert row.result or not row.claims
    links = re.findall(r"\]\((?!https)([^)]+)\)", WRITTEN.read_text())
    assert links and all((WRITTEN.parent / link).exists() for link in links)


def test_a_class_of_which_nothing_is_told_is_named_with_what_to_write(monkeypatch):
    told = catalogue.sayings()
    monkeypatch.setattr(catalogue, "sayings", lambda: {k: v for k, v in told.items() if k != "LADD"})
    with pytest.raises(ValueError, match="differ in LADD: say under about.rows"):
        entries()
    monkeypatch.setattr(catalogue, "sayings", lambda: {**told, "Nothing": {}})
    with pytest.raises(ValueError, match="differ in Nothing: there is no such class"):
        entries()


def test_a_sentence_ends_at_its_stop():
    assert first_sentence("Reflow (flow, arXiv 2209.03003, sec. 2): x. More.") == "Reflow: x"
    assert first_sentence("One\nline\n\nand more") == "One line"


def test_every_claim_is_some_rows(rows):
    claims = {file.stem for file in Path(ROOT / "benchmarks/claims").glob("*.yaml")}
    assert claims == {claim for row in rows for claim in row.claims}


def test_it_is_printed(capsys):
    assert main([]) == 0
    assert all(title in capsys.readouterr().out for title in ["Loss terms"])
