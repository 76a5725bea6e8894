"""What there is, from Python: read off the code alone, without recipes."""

import pytest
from test_imports import python

import edit
from edit.catalogue import ROOT, Method, Methods, first_sentence


@pytest.fixture(scope="module")
def methods() -> Methods:
    return edit.methods()


def test_every_kind_is_there_with_summary_and_file(methods):
    names = [m.name for m in methods]
    assert len(names) == len(set(names)) > 50
    assert {"DiTConfig", "Reuse", "OutputKD", "LADD", "Heun"} <= set(names)
    for m in methods:
        assert m.summary and f"class {m.name}" in (ROOT / m.file).read_text()
        module, _, name = m.place.rpartition(".")
        assert getattr(__import__(module, fromlist=[name]), name).__module__ == module


def test_papers_are_those_of_the_docstrings(methods):
    papers = {m.name: m.papers for m in methods}
    assert papers["Reuse"] == ("2407.01425",) and papers["DPMSolver"] == ("2211.01095",) and papers["Euler"] == ()


def test_it_reads_as_lines_and_in_a_notebook_as_a_table_with_links(methods):
    lines = repr(methods).split("\n")
    assert len(lines) == len(methods) + 5 and lines[0] == "Backbones"
    (line,) = (line for line in lines if line.split()[:1] == ["Reuse"])
    assert line.split() == ["Reuse", "edit/caching/reuse.py", "2407.01425"]
    page = methods._repr_html_()
    assert page.count("<tr>") == len(methods) + 5 and "<a href='https://arxiv.org/abs/2407.01425'>" in page
    odd = Methods([Method("edits", "<b>", "a < b", (), "x.py")])
    assert "<b>&lt;b&gt;</b>" in odd._repr_html_() and "a &lt; b" in odd._repr_html_()


def test_it_needs_neither_recipes_nor_data():
    said = python("import edit, sys; n = len(edit.methods()); print(n > 50, {'recipes', 'data'} & set(sys.modules))")
    assert said == "True set()"


def test_a_sentence_ends_at_its_stop():
    assert first_sentence("Reflow (flow, arXiv 2209.03003, sec. 2): x. More.") == "Reflow: x"
    assert first_sentence("One\nline\n\nand more") == "One line"
