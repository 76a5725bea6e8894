"""The page of a report in a browser."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pages import faults, needs_chromium
from reports import small_report, whole_report

from recipes.report.page import write_report
from recipes.report.routing_map import Map, draw, numbers


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """All kinds of columns and pictures, eleven artifacts at two guidance weights, not complete, one failed."""
    folder = tmp_path_factory.mktemp("report")
    report = whole_report(folder) | {"complete": False, "rows": {"measured": 22, "planned": 24}}
    maps = {"open": {"cond": Map({0: 1.0, 1: 0.5}, torch.rand(2, 4, 6))}}
    draw(maps, {"a cat": [0], "a dog": [1]}, lambda k: np.zeros((8, 8, 3), np.uint8)).save(folder / "grids/map.png")
    result = report["artifacts"][1]["results"][0]
    result |= {"routing": {"it": numbers(maps)}, "routing_maps": {"it": "grids/map.png"}}
    report["artifacts"].append({"name": "broken", "path": "runs/broken", "error": "it holds no <weights> " * 20})
    return write_report(report, folder)[1]


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_report_fits_and_can_be_read(page, width, dark):
    assert faults(page, width, dark) == []


@needs_chromium
def test_the_tables_of_a_report_fit_into_a_common_window_without_scrolling(page, tmp_path):
    text = page.read_text().replace(".wide { overflow-x: auto;", ".wide {")
    assert text != page.read_text()
    (tmp_path / "page.html").write_text(text)
    assert faults(tmp_path / "page.html", 1400, dark=False) == []


@needs_chromium
def test_a_small_report_fits_and_can_be_read(tmp_path):
    assert faults(write_report(small_report(tmp_path), tmp_path)[1], 400, dark=True) == []
