import multiprocessing as mp
import re

import pytest
from made_runs import made_run
from pages import faults, needs_chromium
from PIL import Image

from recipes.report import run_index
from recipes.report.run_index import at_failure, renew_pages, thumbnail, write_index, write_pages
from recipes.report.run_record import read


def names(page):
    """Of the rows, in order."""
    return re.findall(r"<tr><td>(?:<img[^>]*>)?(?:<a[^>]*>)?([^<]+)", page)


def test_runs_are_listed_newest_first_with_picture_state_figures_and_links(tmp_path):
    made_run(tmp_path, "old", when=1.0e9, artifact=False)
    made_run(tmp_path, "sweep/lr-1", when=1.2e9, frechet={1.0: 2.5, 1.5: 1.5}, pictures=1)
    made_run(tmp_path, "sweep/lr-2", {"edits": {"l": {"_target_": "edit.tuning.lora.LoRA"}}}, when=1.1e9)
    write_pages(tmp_path / "sweep/lr-1", tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert names(page) == ["sweep/lr-1", "sweep/lr-2", "old"]
    rows = page.split("<tr>")[2:]
    assert "href='sweep/lr-1/index.html'" in rows[0] and "<img" in rows[0] and ">1.50</td>" in rows[0]
    assert "href='sweep/lr-1/report.html'" in rows[0] and "2001-" not in rows[0] and "2008-01" in rows[0]
    assert ">LoRA</td>" in rows[1] and "stopped at step 20 of 20" in rows[2]
    assert "python -m recipes.sweep runs=" in page  # the sweep has no page yet


def test_the_last_losses_are_beside_each_other_where_they_were_measured(tmp_path):
    made_run(tmp_path, "plain")
    assert "held-out loss" not in write_index(tmp_path).read_text()
    made_run(tmp_path, "held", columns={"heldout/loss": (2.5, 2.125)})
    page = write_index(tmp_path).read_text()
    assert re.search(r"<th>training loss</th><th>held-out loss</th>", page)
    cells = {
        name: re.findall(r"<td class=number>([^<]*)", row)[1:3]
        for row in page.split("<tr>")[2:]
        for name in names("<tr>" + row)
    }
    assert cells == {"plain": ["1", "–"], "held": ["1", "2.125"]}


def test_a_new_report_renews_the_page_of_its_run_and_the_list_that_it_is_in(tmp_path, capsys):
    run = made_run(tmp_path / "runs", "sweep/a", {"runs": "runs"}, frechet={1.0: 2.5})
    renew_pages(run)
    assert "2.50" in (run / "index.html").read_text() and "sweep/a" in (tmp_path / "runs/index.html").read_text()
    copy = made_run(tmp_path / "elsewhere", "a", {"runs": "runs"}, frechet={1.0: 2.5})
    renew_pages(copy)
    assert (copy / "index.html").exists() and not (tmp_path / "elsewhere/index.html").exists()
    (tmp_path / "reports").mkdir()
    capsys.readouterr()
    renew_pages(tmp_path / "reports")
    assert not list((tmp_path / "reports").iterdir()) and not capsys.readouterr().out


def test_a_broken_folder_is_listed_as_such_and_hides_no_other(tmp_path):
    made_run(tmp_path, "whole")
    (made_run(tmp_path, "broken") / "config.yaml").write_text("a: [1\n")
    (tmp_path / "empty/artifact").mkdir(parents=True)
    page = write_index(tmp_path).read_text()
    assert set(names(page)) == {"whole", "broken", "empty"}
    assert re.search(r"<tr class=error><td>broken</td><td colspan=\d+>config.yaml is damaged", page)


def test_an_empty_folder_says_how_to_begin(tmp_path):
    assert "python train.py" in write_index(tmp_path).read_text()


def test_a_page_that_cannot_be_made_fails_no_run_and_says_why_in_one_line(tmp_path, capsys, monkeypatch):
    run = made_run(tmp_path, "a")

    def fail(*_):
        raise RuntimeError("no\nfont")

    monkeypatch.setattr(run_index, "write_page", fail)
    write_pages(run, tmp_path)
    assert capsys.readouterr().out == "page      not written: RuntimeError: no font\n"


def test_a_run_that_fails_has_its_pages_and_fails_as_before(tmp_path):
    from contextlib import ExitStack

    run = made_run(tmp_path, "a", artifact=False)
    with ExitStack() as held:
        held.push(at_failure(run, tmp_path))
    assert not (run / "index.html").exists()
    with pytest.raises(SystemExit, match="143"), ExitStack() as held:
        held.push(at_failure(run, tmp_path))
        raise SystemExit(143)
    assert "stopped at step 20 of 20" in (run / "index.html").read_text()


def _end(root, name, barrier):
    barrier.wait()
    write_pages(made_run(root, name), root)


def test_runs_that_end_at_once_are_all_in_the_list(tmp_path):
    context = mp.get_context("fork")
    barrier = context.Barrier(4)
    ends = [context.Process(target=_end, args=(tmp_path, f"run{i}", barrier)) for i in range(4)]
    for process in ends:
        process.start()
    for process in ends:
        process.join(60)
    assert set(names((tmp_path / "index.html").read_text())) == {f"run{i}" for i in range(4)}
    assert not list(tmp_path.glob("*.tmp-*"))


def test_the_small_copy_of_a_large_picture_is_kept_until_there_is_a_newer_one(tmp_path, monkeypatch):
    run = made_run(tmp_path, "a")
    (run / "samples").mkdir()
    Image.new("RGB", (2000, 1500), "red").save(run / "samples/step_000010.png")
    small = thumbnail(read(run).picture, run)
    assert (run / ".picture.png").read_bytes() == small
    monkeypatch.setattr(Image, "open", None)
    assert thumbnail(read(run).picture, run) == small
    monkeypatch.undo()
    Image.new("RGB", (2000, 1500), "blue").save(run / "samples/step_000020.png")
    assert thumbnail(read(run).picture, run) != small


@needs_chromium
@pytest.mark.parametrize("width, dark", [(400, False), (1400, True)])
def test_the_list_fits_windows_and_is_legible(tmp_path, width, dark):
    for i in range(3):
        made_run(tmp_path, f"sweep/a-rather-long_name-of.a.job-{i}", frechet={1.0: 2.5 + i}, pictures=1)
    (made_run(tmp_path, "broken") / "config.yaml").write_text("a: [1\n")
    assert faults(write_index(tmp_path), width, dark) == []
