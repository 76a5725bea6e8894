"""An artifact as text and as a notebook shows it: five lines, its own numbers, pictures of its own folder, escaped."""

import json

import pytest
from PIL import Image

import edit
from edit.artifacts.measured import picture
from edit.caching.reuse import Reuse
from edit.pruning.depth import DepthPruning
from edit.sampling import Sampler
from edit.solvers import Euler

DATA = {"_target_": "data.sets.latents.Latents", "path": "latents/<b>", "flip": True, "vae": None}
RUN = {"name": "small", "step": 300, "seed": 4, "revision": "f98d8c8ed21b" + 28 * "0"}
PLAIN = {
    "guidance": 1.0,
    "n": 100,
    "quality": {"frechet": {"value": 0.53, "spread": 0.02}, "accuracy": {"value": 0.98, "spread": None}},
    "cost": {"macs_per_image": 73.1e6, "evaluations": 20, "forward": {"median": 0.1}},
    "grid": "grids/small_w1.png",
}


@pytest.fixture
def artifact(make_dit, tmp_path):
    denoiser = edit.apply(make_dit(depth=4), {"shallow": DepthPruning(ratio=0.5), "fast": Reuse(3)})
    folder = tmp_path / "runs/small/artifact"
    return edit.load(edit.save(denoiser, folder, sampler=Sampler(Euler(20), 1.5), data=DATA, run=RUN))


def report(artifact, *entries) -> None:
    (artifact.path.parent / "report.json").write_text(json.dumps({"artifacts": list(entries)}))


def draw(file, side: int) -> bytes:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side)).save(file)
    return file.read_bytes()


def test_an_artifact_is_told_in_five_lines(artifact):
    lines = repr(artifact).split("\n")
    assert len(lines) == 5 and all(len(line) <= 110 for line in lines[1:])
    name, backbone, edits, sampling, data = (line.split(maxsplit=1)[1] for line in lines)
    assert name == str(artifact.path.parent)
    count = sum(p.numel() for p in artifact.denoiser.parameters())
    assert backbone == f"dit, {count / 1e3:.3g} k parameters, 2 units"
    assert "Reuse(interval=3)" in edits and "shallow" in edits
    assert sampling.endswith("Sampler(Euler(steps=20), guidance=1.5)")
    assert data == "Latents(path=latents/<b>), step 300, seed 4, revision f98d8c8ed21b"


def test_a_published_model_is_told_too(make_dit, tmp_path):
    folder = edit.save(make_dit(), tmp_path / "plain")
    assert "edits     none\n" in repr(edit.load(folder)) and repr(edit.load(folder)).endswith("data      not told")


def test_a_notebook_shows_the_same_escaped_with_the_numbers_of_its_own_rows(artifact):
    other = {"name": "other", "path": "runs/other", "results": [{**PLAIN, "guidance": 9.0}]}
    variant = {"name": "v", "path": str(artifact.path), "variant": "v", "results": [{**PLAIN, "guidance": 8.0}]}
    own = {"name": "small", "path": str(artifact.path), "results": [PLAIN, {**PLAIN, "guidance": 1.5}]}
    report(artifact, own, other, variant)
    page = artifact._repr_html_()
    assert "latents/&lt;b&gt;" in page and "<b>" not in page
    assert page.count("<td") == 5 + 2 * 6 and ">1.5<" in page and ">9<" not in page and ">8<" not in page
    assert "0.53 ± 0.02" in page and ">73.1 M<" in page and ">20<" in page
    assert "<img" not in page  # nothing is sampled to show it


def test_the_picture_is_the_last_of_the_run_or_the_grid_of_its_report(artifact):
    run = artifact.path.parent
    report(artifact, {"name": "small", "path": str(artifact.path), "results": [PLAIN]})
    assert picture(artifact.path) is None
    draw(run / "grids/small_w1.png", 2)
    assert picture(artifact.path) == run / "grids/small_w1.png"
    draw(run / "samples/step_000009.png", 3)
    draw(run / "samples/step_000010.png", 4)
    assert picture(artifact.path) == run / "samples/step_000010.png"
    assert artifact._repr_html_().count("data:image/png;base64,") == 1


@pytest.mark.parametrize("grid", ["../../secret.png", "/etc/hostname", 3, None, "grids", "report.json"])
def test_a_report_shows_no_file_from_elsewhere(artifact, grid, tmp_path):
    draw(tmp_path / "runs/secret.png", 2)
    draw(tmp_path / "secret.png", 2)
    report(artifact, {"name": "small", "path": str(artifact.path), "results": [{**PLAIN, "grid": grid}]})
    assert picture(artifact.path) is None and "<img" not in artifact._repr_html_()


@pytest.mark.parametrize("text", ["no json", "[]", '{"artifacts": 3}', '{"artifacts": [{"results": [{"n": 1}]}]}'])
def test_a_report_that_nobody_can_read_leaves_the_card_without_numbers(artifact, text):
    (artifact.path.parent / "report.json").write_text(text)
    page = artifact._repr_html_()
    assert page.count("<table") == 1 and "Reuse(interval=3)" in page
