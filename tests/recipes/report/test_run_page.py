import re
import shlex
from html import unescape

import pytest
from made_runs import made_run
from pages import faults, needs_chromium
from PIL import Image

from recipes.report.run_page import commands, html, scaled, sentence, write_page
from recipes.report.run_record import read

COMMAND = ("train.py", "experiment=dit_digits/depth", "edits={a: 1}", "name=a")


@pytest.fixture
def run(tmp_path):
    return made_run(
        tmp_path / "runs",
        "a",
        {"init": "runs/digits", "edits": {"lora": {"_target_": "edit.tuning.lora.LoRA"}}},
        losses=[3.0 / (i + 1) for i in range(40)],
        frechet={1.0: 2.5, 1.5: 1.5},
        command=COMMAND,
        pictures=8,
        columns={"heldout/loss": [2.0 / (i + 1) for i in range(40)]},
    )


def test_the_picture_comes_first_then_what_was_trained_the_figures_the_curves_and_how_to_go_on(run):
    page = html(read(run))
    order = [
        "finished",
        "samples at step 20",
        "DiT of 1.23 M parameters, trained for 20 steps of 16 images (320 in all)",
    ]
    order += ["Fréchet distance ↓", "<td>1.5</td><td>1.50</td>", "href='report.html'", 'alt="loss over the steps']
    order += ["Samples over time", "How to go on", "Reproduce", "Export", "<summary>configuration", "env.json"]
    places = [page.index(text) for text in order]
    assert places == sorted(places)
    assert "<script" not in page and "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", page)


def test_the_loss_on_held_out_data_is_explained_where_there_is_one(run, tmp_path):
    page = html(read(run))
    assert "training loss 3 at step 0" in page and "; held-out loss 2 at step 0" in page
    assert "loss of the averaged weights" in page
    assert "averaged weights" not in html(read(made_run(tmp_path, "b")))


def test_first_some_between_and_last_grids_are_shown(run):
    shown = [int(s) for s in re.findall(r"<figcaption>step (\d+)<", html(read(run)))]
    steps = [step for step, _ in read(run).samples]
    assert len(shown) == 5 and (shown[0], shown[-1]) == (steps[0], steps[-1]) and set(shown) <= set(steps)


def test_the_sentence_tells_start_method_device_and_time(run):
    from recipes.report.curves import read_curves

    said = sentence(read(run), read_curves(run / "metrics.csv"))
    assert said == (
        "DiT of 1.23 M parameters, trained for 20 steps of 16 images (320 in all) on Digits, starting from "
        "runs/digits, objective FlowMatching, with LoRA, learning rate 0.001, on cpu (test), in 10.0 seconds of "
        "training."
    )


def test_commands_say_what_was_typed_and_are_read_by_the_commands_that_they_name(run):
    from edit.artifacts.export import ExportSettings
    from edit.inputs import words
    from recipes.config.schema import Evaluation
    from recipes.page import Paging
    from recipes.report.request import OWN, parse

    lines = [shlex.split(line) for _, line in commands(read(run), [read(run)])]
    assert lines[0] == ["python", *COMMAND]
    assert {tuple(line[1:3])[: 2 if line[1] == "-m" else 1] for line in lines[1:]} == {
        ("eval.py",),
        ("-m", "recipes.export"),
        ("-c",),
        ("-m", "recipes.page"),
    }
    for line in lines[1:]:
        if line[1] == "eval.py":
            given = parse(line[2:])
            Evaluation.of({k: v for k, v in given.items() if k not in OWN})
        elif line[1] == "-m":
            words.read({"recipes.export": ExportSettings, "recipes.page": Paging}[line[2]], line[3:])
        else:
            compile(line[2], "command", "exec")


def test_what_cannot_be_exported_is_offered_no_export(run, tmp_path):
    routed = made_run(tmp_path, "r", {"edits": {"dydit": {"_target_": "edit.routing.dydit.DyDiT"}}})
    foreign = made_run(tmp_path, "f", {"edits": {"mine": {"_target_": "mine.Edit"}}})
    told = [any("export" in what.lower() for what, _ in commands(read(f), ())) for f in (run, routed, foreign)]
    assert told == [True, False, False]


def test_a_run_is_compared_with_its_start_else_with_the_newest_on_the_same_data(run, tmp_path):
    old, new = (made_run(tmp_path / "runs", name, when=when) for name, when in (("old", 1e9), ("new", 2e9)))
    other = made_run(tmp_path / "runs", "shapes", {"data.set._target_": "data.sets.shapes.Shapes"}, when=3e9)
    beside = [read(f) for f in (old, new, other, run)]
    assert f"artifact={new} " in dict(commands(read(run), beside))["Compare"]
    started = made_run(tmp_path / "runs", "b", {"init": str(old)})
    assert f"artifact={old} " in dict(commands(read(started), beside))["Compare"]
    assert "Compare" not in dict(commands(read(run), [read(other)]))


def test_a_run_that_was_stopped_says_where_and_how_it_goes_on(tmp_path):
    page = html(read(made_run(tmp_path, "a", artifact=False, command=COMMAND)))
    assert "This run is not finished: stopped at step 20 of 20" in page and "Go on from the last checkpoint" in page
    assert "recipes.export" not in page and "There is no picture of this run" in page


def test_runs_of_other_kinds_show_what_they_have(tmp_path):
    import json

    run = made_run(tmp_path, "a", {"recipe": {"_target_": "recipes.calibrate.Calibrating"}}, pictures=1)
    Image.new("RGB", (30, 20)).save(run / "samples/routing_dydit_000010.png")
    Image.new("RGB", (30, 20)).save(run / "samples/routing_dydit_000020.png")
    (run / "artifact/edits.json").write_text(json.dumps({"run": {"name": "a"}}))
    page = html(read(run))
    assert "made without training steps" in page and page.count("decisions of dydit</figcaption>") == 1
    pruned = tmp_path / "pruned"
    (pruned / "artifact").mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(pruned / "pruning.png")
    record = {"model": "runs/deep", "kept": [0, 2], "settings": {"by": "sensitivity"}}
    (pruned / "pruning.json").write_text(json.dumps(record))
    page = html(read(pruned))
    assert "pruned from runs/deep by sensitivity: 2 units stay" in page and "how the units were chosen" in page
    assert "finished" in page


def test_text_of_a_run_is_text_in_its_page(tmp_path):
    run = made_run(tmp_path, "<i>a", {"init": "<script>x", "backbone._target_": "x.<b>"}, command=["train.py", "<u>"])
    page = html(read(run))
    assert not any(f"<{tag}>" in page for tag in ("i", "script", "b", "u"))
    assert "&lt;script&gt;x" in unescape(page).replace("<", "&lt;").replace(">", "&gt;")


def test_a_large_picture_is_scaled_and_a_damaged_one_left_out(tmp_path, run):
    import io

    Image.new("RGB", (4000, 1000)).save(tmp_path / "large.png")
    assert Image.open(io.BytesIO(scaled(tmp_path / "large.png"))).size == (1600, 400)
    small = read(run).samples[0][1]
    assert scaled(small) == small.read_bytes()
    small.write_bytes(small.read_bytes()[:40])
    assert scaled(small) is None and "step 20" in html(read(run))


@needs_chromium
@pytest.mark.parametrize("width, dark", [(400, True), (1400, False)])
def test_the_page_fits_windows_and_is_legible(run, width, dark):
    assert faults(write_page(read(run)), width, dark) == []
