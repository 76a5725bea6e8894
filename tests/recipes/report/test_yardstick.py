"""Measuring text-to-image data: prompts, their level of chance, and captions in the report."""

from pathlib import Path

import pytest
import torch

from data.sets.shapes import Shapes
from data.split import CheckedSet
from recipes.config.schema import Evaluation
from recipes.report.grids import save_grid
from recipes.report.notes import notes
from recipes.report.page import html
from recipes.report.yardstick import GRID, Yardstick, prompts

SHAPES = {"_target_": "data.sets.shapes.Shapes"}


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    return Shapes(count=90, held=90)


@pytest.fixture(scope="module")
def space(shapes, tmp_path_factory) -> Yardstick:
    chosen = Evaluation.of({"features": "none", "cache": str(tmp_path_factory.mktemp("cache"))})
    return Yardstick.of(shapes, SHAPES, chosen, torch.device("cpu"))


def held_out(shapes: Shapes, numbers: torch.Tensor) -> torch.Tensor:
    split = shapes.heldout()
    return torch.stack([split.sample(int(k) % len(split), int(k))["x"] for k in numbers])


def test_real_images_follow_their_prompts_round_and_round(shapes, space):
    numbers = torch.arange(120)  # more than there are held-out images
    x = held_out(shapes, numbers)
    quality = space.quality([space.measure(x, shapes.to_frames(x), numbers, None)])
    assert quality["prompt_accuracy"]["value"] > 0.97
    parts = {"count", "colour", "kind", "size", "place", "relation"}
    assert {f"prompt_{p}" for p in parts} < set(quality) and "accuracy" not in quality
    assert all(quality[f"prompt_{p}"]["value"] > 0.97 for p in parts)


def test_images_of_other_prompts_follow_by_chance(shapes, space):
    numbers = torch.arange(90)
    x = held_out(shapes, numbers.flip(0))
    quality = space.quality([space.measure(x, shapes.to_frames(x), numbers, None)] * 2)
    assert quality["prompt_accuracy"]["value"] < 0.1 and "2 seeds" in quality["prompt_accuracy"]["over"]


def test_the_reference_states_chance_and_the_real_images_own_accuracy(shapes, space):
    told = space.description["prompts"]
    assert told == prompts(shapes)  # the same every time
    # of 90 images a third share 12 captions; measured 2 %, and 1.3 % over the full set
    assert told["real"] > 0.97 and told["chance"] < 0.1
    assert told["shown"] == shapes.heldout().captions[:GRID] and told["count"] == len(set(shapes.heldout().captions))


def test_the_real_grid_shows_what_the_generated_one_is_to_show(shapes, space):
    assert torch.equal(space.some_real, shapes.to_frames(held_out(shapes, torch.arange(GRID))))


def test_a_checked_data_set_is_known_by_what_it_offers(shapes):
    from data.sets.digits import Digits

    assert isinstance(shapes, CheckedSet) and not isinstance(Digits(), CheckedSet)


def test_the_page_prints_the_captions_once_and_the_notes_the_chance(shapes, space, tmp_path):
    save_grid(space.some_real, tmp_path / "real.png", 8)
    numbers = torch.arange(12)
    x = held_out(shapes, numbers)
    result = {
        "guidance": 1.0,
        "quality": space.quality([space.measure(x, shapes.to_frames(x), numbers, None)]),
        "compared": None,
        "cost": {},
        "grid": "real.png",
    }
    entry = {
        "data": SHAPES,
        "extractor": None,
        "reference": space.description | {"grid": "real.png"},
        "results": [result],
    }
    report = {
        "created": "2026-01-01T00:00:00+00:00",
        "environment": {"device": "cpu", "edit": "0.1.0"},
        "settings": {"n": 12, "seed": [0], "batch": 12},
        "artifacts": [{"name": name, **entry} for name in ("a", "b")],
    }
    page = html(report, Path(tmp_path))
    assert page.count("<ol class=captions>") == 1 and page.count("<li>") == GRID
    assert f"<li>{shapes.heldout().captions[0]}</li>" in page and "prompt accuracy" in page and "relation as" in page
    assert any("(chance)" in note for note in notes(report))
