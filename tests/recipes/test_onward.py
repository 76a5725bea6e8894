"""The commands that a finished run prints work as they are printed."""

import json
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from small_runs import CONFIGS, config, train

import eval as evaluation
from recipes.config.sources import register
from recipes.export import main as export
from recipes.onward import onward
from recipes.runtime.run_folder import read_config

WHOLE = ("backbone.hidden_size=128", "backbone.num_heads=4", "backbone.depth=4")  # as the default run has it


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The default run, short; and a run of half its units that started from it."""
    folder = tmp_path_factory.mktemp("runs")
    one = ["trainer.max_steps=1", *WHOLE]
    train(folder, "name=whole", *one)
    train(folder, "name=half", *one, "edits=depth", f"init={folder}/whole")
    return folder


def words(folder: Path, name: str) -> list[list[str]]:
    out = folder / name
    return [shlex.split(command) for command in onward(read_config(out / "config.yaml"), out)]


def test_the_report_comes_first_and_is_not_named_again_when_it_is_there(runs):
    assert words(runs, "whole")[0] == ["python", "eval.py", f"artifact={runs}/whole"]
    (runs / "whole/report.json").write_text("{}")
    try:
        told = words(runs, "whole")
    finally:
        (runs / "whole/report.json").unlink()
    assert [w[1] for w in told] == ["eval.py", "train.py", "-m"] and "out=reports/whole_reuse" in told[0]


def test_the_comparison_and_the_export_work_as_printed(runs, tmp_path, monkeypatch):
    (runs / "whole/report.json").write_text("{}")
    compare, student, exported = words(runs, "whole")
    (runs / "whole/report.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert evaluation.main([*compare[2:], "features=none", "guidance=1", "n=8", "rounds=0"]) == 0
    rows = json.loads(Path("reports/whole_reuse/report.json").read_text())["artifacts"]
    assert [row.get("error") for row in rows] == [None, None]
    assert exported[2] == "recipes.export" and export(exported[3:]) == 0
    assert (tmp_path / "exported/whole/config.json").is_file()


def test_the_student_of_the_default_run_is_a_run_that_the_check_accepts(runs):
    student = words(runs, "whole")[2][2:]
    assert student == ["experiment=dit_digits/depth", f"init={runs}/whole", f"runs={runs}"]
    cfg = config(runs, *student[:2], *WHOLE)
    assert cfg.name == "dit_digits_depth" and list(cfg.edits) == ["depth"] and not cfg.before
    train(runs, *student[:2], *WHOLE, "trainer.max_steps=1")


def test_a_run_made_from_another_is_compared_with_it(runs):
    told = words(runs, "half")
    assert told[1] == ["python", "eval.py", f"artifact={runs}/half", f"reference={runs}/whole", "out=reports/half"]
    assert not any("experiment=" in word for command in told for word in command)  # it has half of the units already


def test_a_model_with_live_edits_or_of_no_world_gets_no_command_that_would_fail(runs):
    train(runs, "name=lora", "edits=lora", f"init={runs}/whole", "trainer.max_steps=1", *WHOLE)
    assert [w[1] for w in words(runs, "lora")] == ["eval.py", "eval.py"]
    train(runs, "name=thin", "trainer.max_steps=1", "+backbone.qk_norm=true")  # not of the default world, not of stock
    told = words(runs, "thin")
    assert [w[1] for w in told] == ["eval.py", "eval.py"] and "variant.fast=reuse" in told[1]


def test_the_whole_model_of_a_world_is_the_teacher_of_its_student(tmp_path):
    def composed(*overrides: str) -> DictConfig:
        register()
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            cfg = compose("train", ["experiment=flux_tiny/teacher", f"runs={tmp_path}", *overrides])
        OmegaConf.resolve(cfg)
        return cfg

    out = tmp_path / "flux_tiny_teacher"
    (out / "artifact").mkdir(parents=True)
    for name in ("edits.json", "config.json"):
        (out / "artifact" / name).write_text("{}")
    student = ["python", "train.py", "experiment=flux_tiny/distill", "before=[]", f"runs={tmp_path}"]
    assert [shlex.split(c) for c in onward(composed(), out)][1:] == [student]
    changed = composed("name=changed", "backbone.num_layers=2")  # of no world
    assert len(onward(changed, out)) == 1
