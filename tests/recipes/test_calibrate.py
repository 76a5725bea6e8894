"""Edits without training: the artifact and report of a run that no optimiser made."""

import json
from pathlib import Path

import pytest
import torch
from small_runs import config, train

import edit
from recipes.config.errors import UserError
from recipes.training import run

CALIBRATE = ("recipe=calibrate", "recipe.batches=3", "recipe.samples=5", "sampler.solver.steps=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a trained model."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "name=digits", "trainer.max_steps=2")
    return folder


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "toys"))
    return {name: f"+edits.{name.lower()}={{_target_: toy_scale.{name}}}" for name in ("Scale", "Watcher", "Broken")}


def words(folder, name, *more):
    return (*CALIBRATE, f"init={folder}/digits", f"name={name}", *more)


def test_edits_with_nothing_to_calibrate_are_written_as_they_are(folder, capsys):
    train(folder, *words(folder, "fast", "edits=reuse"))
    said = capsys.readouterr().out
    assert "calibrated nothing to do for reuse" in said and f"artifact  {folder}/fast/artifact" in said
    assert "warmup" not in said  # of an optimiser that there is not
    before, after = (edit.load(folder / name).denoiser for name in ("digits", "fast"))
    assert list(after.applied) == ["reuse"]
    assert all(torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items())
    told = json.loads((folder / "fast/artifact/edits.json").read_text())["run"]
    assert told["recipe"] == {"_target_": "recipes.calibrate.Calibrating", "batches": 3, "samples": 5}
    assert told["calibrated"] == [] and told["name"] == "fast" and "torch" in json.dumps(told)
    assert (folder / "fast/config.yaml").exists() and not (folder / "fast/checkpoints").exists()


def test_a_calibrated_scale_is_in_the_artifact_and_a_finished_run_is_not_run_again(folder, toys, capsys):
    chosen = words(folder, "scaled", toys["Scale"], toys["Watcher"], "trusted=[toy_scale]")
    train(folder, *chosen)
    own = edit.load(folder / "scaled", trusted=("toy_scale",)).denoiser.edits
    assert own["scale"].count == 3 and own["watcher"].count == 2 and own["scale"].scale != 1
    assert "calibrated scale, watcher" in capsys.readouterr().out
    written = (folder / "scaled/artifact/edits.json").stat().st_mtime_ns
    train(folder, *chosen)
    assert "is complete: a new run needs another name=" in capsys.readouterr().out
    assert (folder / "scaled/artifact/edits.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="holds a run with recipe.batches=3, this command says 4"):
        train(folder, *(w.replace("batches=3", "batches=4") for w in chosen))
    train(folder, *(w.replace("=scaled", "=again") for w in chosen))
    again = edit.load(folder / "again", trusted=("toy_scale",)).denoiser.edits
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in own.state_dict().items())


def test_a_crash_loses_the_calibration_under_way_and_nothing_else(folder, toys, monkeypatch):
    import toy_scale

    chosen = words(folder, "crashed", toys["Scale"], "trusted=[toy_scale]")

    def crash(self, denoiser, batches, own):
        next(iter(batches))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toy_scale.Scale, "calibrate", crash)
        train(folder, *chosen)
    assert not (folder / "crashed/artifact").exists()
    train(folder, *chosen)
    assert edit.load(folder / "crashed", trusted=("toy_scale",)).denoiser.edits["scale"].count == 3


def test_values_that_are_not_finite_are_refused_with_a_cure_for_calibration(folder, toys):
    with pytest.raises(UserError, match="no artifact was written: .*broken.*not finite.*recipe.batches"):
        train(folder, *words(folder, "broken", toys["Broken"], "trusted=[toy_scale]"))
    assert not (folder / "broken/artifact").exists()


def test_the_report_is_written_as_after_training(folder):
    cfg = config(folder, *words(folder, "told", "edits=reuse"))
    cfg.evaluate = {"n": 8, "rounds": 0, "guidance": [1.0], "features": "none", "batch": 8}
    assert run(cfg)["artifacts"] and (folder / "told/report.json").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("init=null", "starts from a trained model: give its run or artifact folder"),
        ("edits=none", "applies edits to a trained model, and there are none"),
        ("trainer=ddp", "is the work of one device, got trainer.strategy=ddp"),
        ("teacher.path=x", "compares with no teacher"),
        ("+terms.a={_target_: edit.distillation.output.OutputKD}", "has no losses: leave out terms.a"),
        (
            "matching={_target_: edit.few_step.progressive.Progressive}",
            "matching is a way to train: leave one of",
        ),
        ("recipe.batches=0", "recipe.batches: expected int at least 1"),
    ],
)
def test_what_calibration_cannot_have_is_refused_in_one_sentence(folder, change, sentence):
    key = change.split("=")[0]
    chosen = [w for w in words(folder, "refused", "edits=reuse") if w.split("=")[0] != key]
    with pytest.raises(UserError, match=sentence) as refused:
        config(folder, *chosen, change)
    assert "\n" not in str(refused.value)


def test_several_processes_are_refused(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="is the work of one process: start it without torchrun or srun"):
        train(folder, *words(folder, "two", "edits=reuse"))
