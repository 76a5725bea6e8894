"""What is to be done before a run is known and said before it starts; words for a stage reach all that it concerns."""

import json
import os
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from small_runs import CONFIGS, config

from recipes import ahead
from recipes.ahead import Ahead, look_ahead, timed, told
from recipes.config.errors import UserError
from recipes.config.sources import register
from recipes.config.staged import Stage, gathered
from recipes.report.amounts import duration
from recipes.runtime.machine import device_name, pick_device

TINYFUSION = "experiment=dit_digits/tinyfusion"


def ahead_of(folder, *words):
    return look_ahead(config(folder, *gathered(words)), CONFIGS)


def finish(folder, name, step):
    """What a finished run leaves, as far as names of files tell."""
    (folder / name / "checkpoints").mkdir(parents=True)
    (folder / name / "checkpoints" / f"step_{step:08d}.ckpt").touch()
    (folder / name / "artifact").mkdir()


def test_every_stage_is_named_with_its_steps_and_folder_before_the_first_starts(tmp_path):
    lines = told(ahead_of(tmp_path, TINYFUSION, "before.teacher.trainer.max_steps=6"))
    assert lines[0].startswith(f"teacher: 6 steps of training into {tmp_path}/dit_digits_deep, how long is not known")
    assert lines[1].startswith(f"search: 1,200 steps of training into {tmp_path}/dit_digits_tinyfusion_search")
    assert lines[2] == f"prune: recipes.prune into {tmp_path}/dit_digits_tinyfusion_pruned"
    assert "before.teacher.trainer.max_steps=100" in lines[3] and len(lines) == 4


def test_complete_stages_are_one_word_and_no_work(tmp_path):
    finish(tmp_path, "dit_digits_deep", 1500)
    (tmp_path / "dit_digits_tinyfusion_pruned").mkdir()
    (tmp_path / "dit_digits_tinyfusion_pruned" / "pruning.json").touch()
    lines = told(ahead_of(tmp_path, TINYFUSION))
    assert lines[0] == "teacher, prune: complete"
    assert lines[1].startswith("search: ") and len(lines) == 3
    finish(tmp_path, "dit_digits_tinyfusion_search", 1200)
    assert told(ahead_of(tmp_path, TINYFUSION)) == ["teacher, search, prune: complete"]


def test_a_stage_that_was_stopped_goes_on_from_its_step(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "timed", lambda cfg: (3.6, Path("runs/like_it")))
    finish(tmp_path, "dit_digits_deep", 500)
    finish(tmp_path, "dit_digits_tinyfusion_search", 1200)
    (tmp_path / "dit_digits_tinyfusion_search/artifact").rmdir()
    (tmp_path / "dit_digits_tinyfusion_pruned").mkdir()  # and nothing in it
    teacher, search, prune, _ = told(ahead_of(tmp_path, TINYFUSION))
    known = f"about {duration(3600)} at the speed of runs/like_it"
    assert teacher == f"teacher: steps 500 to 1,500 into {tmp_path}/dit_digits_deep, {known}"
    assert search.startswith("search: 1,200 steps are trained, the artifact is to be written into ")
    assert prune == f"prune: recipes.prune into {tmp_path}/dit_digits_tinyfusion_pruned"


def module(name, out, *before):
    return Ahead(Stage(name, ("data.generate", f"out={out}")), f"before.{name}", Path(out), None, before)


def test_what_stages_need_themselves_comes_first_each_folder_once(tmp_path):
    deep = module("deep", tmp_path / "a")
    middle = module("middle", tmp_path / "b", deep)
    last = module("last", tmp_path / "c", middle, module("deep_again", tmp_path / "a"))
    assert [item.place for item in last.inside()] == ["before.deep", "before.middle", "before.deep_again"]
    names = [line.partition(":")[0] for line in told([last])]
    assert names == ["deep", "middle", "last", "words for one stage"]
    assert told([last])[-1] == "words for one stage: before.deep.<key>=..."


def test_words_for_a_stage_reach_the_same_run_where_a_later_stage_needs_it(tmp_path):
    """Else the search would train its model on, from 6 steps to 1500."""
    teacher, search, _ = ahead_of(tmp_path, TINYFUSION, "before.teacher.trainer.max_steps=6")
    (again,) = search.before
    assert search.stage.all[-1] == "before.teacher.trainer.max_steps=6"
    assert again.out == teacher.out and again.cfg.trainer.max_steps == 6
    other = ahead_of(tmp_path, TINYFUSION, "before.teacher.name=other", "before.search.before.teacher.seed=2")[1]
    assert other.before[0].cfg.seed == 2 and other.before[0].out == tmp_path / "dit_digits_deep"


def test_stages_of_stages_are_named_by_the_way_to_them(tmp_path):
    words = ("experiment=flux_dev/small_and_fast", "backbone.path=dev", "before.student.before.generate.size=8")
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        student, _ = look_ahead(compose("train", [f"runs={tmp_path}", *gathered(words)]), CONFIGS)
        assert compose("train").name == "digits"  # Hydra's state is the command's own again
    assert [item.place for item in student.inside()] == ["before.student.before.generate"]
    assert "size=8" in student.before[0].stage.all
    assert any(line.startswith("student.before.generate: data.generate into") for line in told([student]))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("before.teacher.trainer.max_stps=6",), "before.teacher: unknown key 'trainer.max_stps'"),
        (("before.teacher.experiment=dit_digits/depp",), "before.teacher: there is no experiment named"),
        (("before.search.before.techer.seed=6",), "before.search: before.techer: this run has no stage 'techer'"),
        (("before.teacher.seed=1,2",), "before.teacher: seed=1,2 gives several values"),
        (("before.teacher.label_drop=2",), "before.teacher: label_drop: expected a number from 0 to 1, got 2"),
        (("before.search.before.teacher.name=dit_digits_tinyfusion",), "before.search.before.teacher: this run fills"),
        (("before.teacher.name=dit_digits_tinyfusion",), "needs itself first"),
    ],
)
def test_a_word_that_a_stage_does_not_take_is_refused_before_anything_starts(tmp_path, words, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        ahead_of(tmp_path, TINYFUSION, *words)


def timed_run(cfg, name, speeds, device, when=None, **changes):
    """A folder of a run as `begin` writes it."""
    own, folder = OmegaConf.to_container(cfg, resolve=True), Path(cfg.runs) / name
    own["backbone"] |= changes
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(own)))
    (folder / "env.json").write_text(json.dumps({"device": device}))
    rows = "\n".join(f"{step},{speed}" for step, speed in enumerate(speeds))
    (folder / "metrics.csv").write_text(f"step,images_per_second\n{rows}\n")
    if when is not None:
        os.utime(folder / "metrics.csv", (when, when))


def test_the_time_is_that_of_the_newest_run_of_the_same_kind_on_this_device(tmp_path):
    device = device_name(pick_device("cpu"))
    cfg = config(tmp_path, "name=a", "trainer.accelerator=cpu", "data.batch_size=8", "trainer.accumulate=2")
    assert timed(cfg) is None
    timed_run(cfg, "other_model", [5.0], device, depth=7)
    timed_run(cfg, "other_device", [5.0], "a faster one")
    timed_run(cfg, "no_rows", [], device)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/metrics.csv").write_text("step\n")
    timed_run(cfg, "no_speed", [1.0], device)
    (tmp_path / "no_speed/metrics.csv").write_text("step\n1\n")
    assert timed(cfg) is None
    timed_run(cfg, "sweep/like_it", [8.0, 32.0, 32.0], device, when=2e9)  # slow at first
    timed_run(cfg, "older", [64.0], device, when=1e9)
    assert timed(cfg) == (0.5, tmp_path / "sweep/like_it")  # 16 images a step
    two = config(tmp_path, "name=b", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
    timed_run(two, "two", [32.0], device)
    assert timed(two) == (1.0, tmp_path / "two")  # 16 images on each of two
