import json

import pytest

from edit.catalogue import papers_of
from recipes.report.origin import POINTS, losses, methods, origin


def test_a_run_folder_tells_command_settings_revision_and_losses(tmp_path):
    (tmp_path / "config.yaml").write_text("optimizer: {lr: 0.1}\nname: a\n")
    (tmp_path / "env.json").write_text(json.dumps({"revision": "abc", "command": ["train.py", "name=a"]}))
    (tmp_path / "metrics.csv").write_text("step,train/loss,lr\n10,1.5,0.1\n20,0.5,0.1\n")
    assert origin(tmp_path) == {
        "command": ["train.py", "name=a"],
        "revision": "abc",
        "config": {"optimizer": {"lr": 0.1}, "name": "a"},
        "losses": {"step": [10, 20], "loss": [1.5, 0.5]},
    }


@pytest.mark.parametrize("damage", ["{", "- a list\n", "a: .nan\n", "\x00"])
def test_a_damaged_or_missing_configuration_is_no_run(tmp_path, damage):
    assert origin(tmp_path) is None
    (tmp_path / "config.yaml").write_text(damage)
    assert origin(tmp_path) is None


def test_what_else_is_damaged_is_missing(tmp_path):
    (tmp_path / "config.yaml").write_text("name: a\n")
    (tmp_path / "env.json").write_text('{"command": "train.py"')
    (tmp_path / "metrics.csv").write_text("step,train/loss\n10,nan\n20,torn\n30")
    assert origin(tmp_path) == {"command": None, "revision": None, "config": {"name": "a"}, "losses": None}


def test_curves_are_thinned_to_means_of_neighbours(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("step,train/loss\n" + "".join(f"{k},{k % 2}\n" for k in range(2 * POINTS)))
    found = losses(file)
    assert found is not None and len(found["step"]) == POINTS and set(found["loss"]) == {0.5}
    assert found["step"][:2] == [0.5, 2.5]


def test_papers_are_those_of_the_classes_that_settings_name():
    settings = {"terms": [{"_target_": "edit.distillation.output.OutputKD"}], "x": {"_target_": "edit.solvers.Heun"}}
    edits = {"fast": {"_target_": "edit.caching.reuse.Reuse"}, "gone": {"_target_": "edit.caching.gone.Gone"}}
    paths = list(methods(settings, edits, None))
    assert paths == [
        "edit.distillation.output.OutputKD",
        "edit.solvers.Heun",
        "edit.caching.reuse.Reuse",
        "edit.caching.gone.Gone",
    ]
    assert papers_of([*paths, "os.path", "x"]) == {"OutputKD": ["2412.01199", "2310.14189"], "Reuse": ["2407.01425"]}
    assert papers_of(["edit.solvers.DPMSolver", "edit.tuning.guidance.GuidanceInput"]) == {"DPMSolver": ["2211.01095"]}
