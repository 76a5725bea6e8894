import json
import re

import pytest
from reports import small_report, whole_report

from recipes.report.columns import rows
from recipes.report.page import html, write_report
from recipes.report.terminal import show
from recipes.runtime.files import write


@pytest.fixture
def report(tmp_path) -> dict:
    return small_report(tmp_path)


def test_the_page_needs_no_other_file_and_shows_every_row_and_failure(report, tmp_path):
    page = html(report, tmp_path)
    sources = re.findall(r'(?:src|href)=["\']?(.{10})', page)
    assert len(sources) == 6 and set(sources) == {"data:image"}  # two plots, real images once, three rows
    assert "http" not in page and "<script" not in page
    assert "&lt;slow&gt; &amp; right w=1.5" in page and "<slow>" not in page
    assert "it holds no &lt;weights&gt;" in page
    assert page.count("'best'") == 2  # the smallest distance and the smallest cost; the rest is equal
    assert "<td class='best'>1.50<small>± 0.10</small></td>" in page and "<td class='best'>1.00</td>" in page


def test_a_page_of_many_variants_has_a_short_title(tmp_path):
    page = html(whole_report(tmp_path), tmp_path)
    assert "<h1>a run, a run + cache0, a run + cache1 and 8 more</h1>" in page


def test_quality_and_cost_are_tables_with_units_in_their_heads_and_many_columns_are_parted(tmp_path):
    page = html(whole_report(tmp_path, 1), tmp_path)
    tables = re.findall("<table class=figures>.*?</table>", page, re.DOTALL)
    assert len(tables) == 3 and all(t.count("a run + cache0 w=1<") == 1 for t in tables)
    assert "Fréchet" in tables[0] and "Fréchet" not in tables[2] and "ms per image" in tables[2]
    assert "PSNR" in tables[1]
    assert "peak memory <span class=unit>MiB ↓</span>" in tables[2] and "recall&nbsp;↑" in tables[0]


def test_the_commands_settings_and_papers_are_told_and_escaped(tmp_path):
    report = whole_report(tmp_path, 1)
    report["artifacts"][0]["origin"]["config"]["name"] = "<b>"
    page = html(report, tmp_path)
    assert "python eval.py &#x27;artifact=runs/a run&#x27; variant.cache0=reuse" in page
    assert "python train.py &#x27;name=a run&#x27;" in page and "revision 0123456789ab" in page
    assert 'Reuse <a href="https://arxiv.org/abs/2407.01425">arXiv 2407.01425</a>' in page
    assert "<td>optimizer.betas</td><td>0.9, 0.95</td>" in page and "<td>&lt;b&gt;</td>" in page
    assert page.count("settings of the run") == 1 and "origin.config" not in page  # not a second time among the details


def test_grids_too_broad_for_a_narrow_window_are_scrolled_there(tmp_path):
    page = html(whole_report(tmp_path, 1), tmp_path)
    assert '<img class=grid alt="grid of real images' in page and '<img class=broad alt="grid of a run w=1"' in page


def test_the_json_file_holds_the_report_and_never_nan(report, tmp_path):
    files = write_report(report, tmp_path)
    assert [f.name for f in files] == ["report.json", "report.html"]
    assert json.loads(files[0].read_text()) == report
    report["artifacts"][0]["results"][0]["quality"]["frechet"]["value"] = float("nan")
    with pytest.raises(ValueError):
        write_report(report, tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = write(tmp_path / "report.json", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError):
        write(file, "new")
    assert file.read_text() == "old"


def test_a_variant_is_shown_with_its_changes_and_how_many_times_as_fast_it_is(report, tmp_path, capsys):
    fast = report["artifacts"][1]
    fast |= {"variant": "fast", "of": "a", "changes": "reuse interval=5, <odd>"}
    speed = {"median": 1.75, "low": 1.5, "high": 2.0, "count": 10}
    fast["results"][0]["cost"]["speed"] = {"plain": speed}
    page = html(report, tmp_path)
    assert (
        "reuse interval=5, &lt;odd&gt;" in page
        and "times as fast as plain&nbsp;↑" in page
        and "1.75<small>± 0.25" in page
    )
    assert "timed in turns" in page and "as dense" not in page
    show(report)
    assert "reuse interval=5" in capsys.readouterr().out


def test_a_report_that_is_not_complete_says_so(report, tmp_path):
    assert "not complete" not in html(report, tmp_path)  # reports of older versions are
    page = html(report | {"complete": False, "rows": {"measured": 3, "planned": 8}}, tmp_path)
    assert "This report is not complete: 3 of 8 rows are measured." in page
    assert "not complete" not in html(report | {"complete": True, "rows": {"measured": 3, "planned": 8}}, tmp_path)


def test_an_artifact_that_failed_half_way_has_its_rows_and_the_reason(report, tmp_path):
    report["artifacts"][0]["error"] = "8 of 8 generated images are not finite"
    page = html(report, tmp_path)
    assert len(rows(report)) == 3 and "not finite" in page and "right w=1.5" in page
