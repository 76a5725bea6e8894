import pytest
from reports import small_report, whole_report

from recipes.report.plots import losses, plots


@pytest.fixture
def report(tmp_path) -> dict:
    return small_report(tmp_path)


def test_quality_is_drawn_against_each_cost_where_a_row_has_both(report):
    found = dict(plots(report))
    assert list(found) == [
        "Fréchet distance ↓ against MACs per image, G ↓",
        "Fréchet distance ↓ against ms per image ↓",
    ]
    assert all(png.startswith(b"\x89PNG") for png in found.values())
    for a in report["artifacts"][:2]:
        for result in a["results"]:
            result["compared"] = {"psnr": {"value": 20.0}}
    assert [text.split(" ↑ against ")[0] for text, _ in plots(report)][2:] == ["PSNR to reference, dB"] * 2
    for a in report["artifacts"][:2]:
        for result in a["results"]:
            result["quality"], result["compared"] = {}, None
    assert not list(plots(report))


def test_the_losses_of_runs_that_wrote_some_are_drawn(tmp_path, report):
    assert losses(report) is None
    png = losses(whole_report(tmp_path, 1))
    assert png is not None and png.startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["$x_2$", "_hidden", "a{b}^c"])
def test_a_name_that_matplotlib_would_read_is_drawn(tmp_path, name):
    report = whole_report(tmp_path, 1)
    report["artifacts"][0]["name"] = name
    report["artifacts"][1]["origin"] = report["artifacts"][0]["origin"]
    assert len(list(plots(report))) == 4 and losses(report)
