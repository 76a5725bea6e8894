import json
import re

import pytest
import torch

from recipes.report.page import COLUMNS, best, html, image_grid, notes, plot, rows, save_grid, show, shown, write_report
from recipes.runtime.files import write

FRECHET, MACS = (next(c for c in COLUMNS if c.title == t) for t in ("Fréchet distance", "MACs per image, G"))


def measure(value: float) -> dict:
    return {"value": value, "spread": 0.1, "over": "20 resamplings"}


def entry(name: str, distances: dict[float, float], macs: int, real: str = "abc") -> dict:
    """One artifact as `recipes.report.evaluate.evaluate` describes it."""
    time = {"median": 0.02, "low": 0.01, "high": 0.03, "count": 10}
    return {
        "name": name,
        "data": {"_target_": "data.sets.digits.Digits"},
        "extractor": {"name": "judge", "hash": "0123", "width": 64, "rule": "no resizing"},
        "reference": {
            "split": "held-out",
            "n": 360,
            "hash": real,
            "floor": 0.3,
            "nearest": 2.1,
            "judge": {"hash": "0123", "accuracy": 0.99, "n": 360},
            "grid": "grids/real.png",
        },
        "results": [
            {
                "guidance": w,
                "quality": {"frechet": measure(distance), "accuracy": measure(0.98)},
                "compared": None,
                "cost": {"macs_per_image": macs, "generation": time, "parameters": 1_280_000},
                "grid": "grids/a.png",
            }
            for w, distance in distances.items()
        ],
    }


@pytest.fixture
def report(tmp_path) -> dict:
    for name in ("a", "real"):
        save_grid(torch.zeros(4, 1, 8, 8, 3, dtype=torch.uint8), tmp_path / f"grids/{name}.png", 2)
    return {
        "format": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "environment": {"device": "cpu", "edit": "0.1.0"},
        "settings": {"n": 100, "seed": [0], "batch": 50},
        "artifacts": [
            entry("<slow> & right", {1.0: 1.5, 1.5: 2.5}, 4_000_000_000),
            entry("fast", {1.0: 3.5}, 1_000_000_000),
            {"name": "broken", "path": "runs/broken", "error": "it holds no <weights>"},
        ],
    }


def test_a_grid_enlarges_tiny_images_without_smoothing():
    images = torch.randint(0, 256, (5, 1, 8, 8, 3), dtype=torch.uint8)
    grid = image_grid(images, columns=3)
    assert grid.size == (3 * 40 + 2 * 2, 2 * 40 + 2)  # 5 pixels per pixel, gaps of 2
    assert grid.getpixel((42 + 5 * 3 + 2, 5 * 6 + 1)) == tuple(images[1, 0, 6, 3].tolist())
    assert grid.getpixel((2 * 42 + 7, 42 + 7)) == (255, 255, 255)  # the missing sixth
    assert image_grid(images.repeat_interleave(8, 2).repeat_interleave(8, 3), columns=5).size == (5 * 64 + 4 * 2, 64)


def test_a_grid_shows_a_few_frames_of_a_video_from_first_to_last():
    frames = torch.arange(2 * 10, dtype=torch.uint8).view(2, 10, 1, 1, 1).expand(-1, -1, 40, 40, 3)
    grid = image_grid(frames, columns=8)
    assert grid.size == (2 * 160 + 2, 40)  # four frames each
    assert [grid.getpixel((40 * k + 20, 20))[0] for k in range(4)] == [0, 3, 6, 9]
    assert grid.getpixel((160, 20)) == (255, 255, 255) and grid.getpixel((162, 20)) == (10, 10, 10)


@pytest.mark.parametrize("images", [torch.zeros(2, 1, 8, 8, 3), torch.zeros(0, 1, 8, 8, 3, dtype=torch.uint8)])
def test_a_grid_refuses_what_is_no_image(images):
    with pytest.raises(ValueError, match="uint8 frames b f y x 3"):
        image_grid(images)


def test_the_best_value_is_the_smallest_distance_and_the_smallest_cost(report):
    table = rows(report)
    assert [row["label"] for row in table] == ["<slow> & right w=1", "<slow> & right w=1.5", "fast w=1"]
    assert best(FRECHET, table) == 1.5 and best(MACS, table) == 1
    assert best(FRECHET, table[:1]) is None  # nothing to compare with


def test_qualities_measured_against_different_images_are_not_ranked(report, capsys):
    report["artifacts"][1] = entry("fast", {1.0: 3.5}, 1_000_000_000, real="another")
    assert best(FRECHET, rows(report)) is None and best(MACS, rows(report)) == 1
    show(report)
    assert "cannot be compared" in capsys.readouterr().out


def test_the_page_needs_no_other_file_and_shows_every_row_and_failure(report, tmp_path):
    page = html(report, tmp_path)
    sources = re.findall(r'(?:src|href)=["\']?(.{10})', page)
    assert len(sources) == 5 and set(sources) == {"data:image"}  # plot, real images once, three rows
    assert "http" not in page and "<script" not in page
    assert "&lt;slow&gt; &amp; right w=1.5" in page and "<slow>" not in page
    assert "it holds no &lt;weights&gt;" in page
    assert page.count("class=best") == 2  # the smallest distance and the smallest cost; the rest is equal
    assert "<td class=best>1.50 ± 0.10</td>" in page and "<td class=best>1</td>" in page


def test_the_terminal_shows_every_row_and_failure(report, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")  # one row of the report at a time
    show(report)
    out = capsys.readouterr().out
    for text in ("<slow> & right w=1.5", "fast w=1", "1.50 ± 0.10", "3.50 ± 0.10", "broken: it holds no <weights>"):
        assert text in out


def test_there_is_a_plot_where_a_row_has_quality_and_cost(report):
    picture = plot(report)
    assert picture is not None and picture.startswith(b"\x89PNG")
    for a in report["artifacts"][:2]:
        for result in a["results"]:
            result["quality"] = {}
    assert plot(report) is None


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


def test_macs_of_which_some_were_not_counted_are_shown_as_a_lower_bound_and_are_never_the_best(report):
    fast = report["artifacts"][1]["results"][0]
    table = rows(report)
    assert best(MACS, table) == 1.0
    fast["cost"]["uncounted"] = ["aten.mv.default"]
    table = rows(report)
    assert best(MACS, table) is None and shown(MACS)(table[2]) == "≥ 1" and shown(MACS)(table[0]) == "4"
    assert any("aten.mv.default has no FLOP formula" in note for note in notes(report))


def test_a_variant_is_shown_with_its_changes_and_how_many_times_as_fast_it_is(report, tmp_path, capsys):
    fast = report["artifacts"][1]
    fast |= {"variant": "fast", "of": "a", "changes": "reuse interval=5, <odd>"}
    speed = {"median": 1.75, "low": 1.5, "high": 2.0, "count": 10}
    fast["results"][0]["cost"]["speed"] = {"plain": speed}
    page = html(report, tmp_path)
    assert "reuse interval=5, &lt;odd&gt;" in page and "times as fast as plain ↑" in page and "1.75 ± 0.25" in page
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
