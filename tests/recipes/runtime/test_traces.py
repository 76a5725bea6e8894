"""A launch that fails before it has trained leaves no folder; what was there before, and what was trained, stays."""

from pathlib import Path

import pytest
from small_runs import CONFIGS, config

from benchmarks.forked import python
from recipes.runtime.files import LOCK, is_locked, locked
from recipes.runtime.traces import Before

ROOT = Path(__file__).parents[3]
SHORT = ("evaluate=null", "preview.every=0", "trainer.max_steps=2", "backbone.depth=1", "optimizer.warmup=0")

SLOW = pytest.mark.slow  # the folder goes in the same way whatever was refused


def launch(folder: Path, *words: str):

    assert config(folder / "unused") is not None and CONFIGS.is_dir()
    return python("train.py", f"runs={folder}/runs", *SHORT, *words, cwd=ROOT)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("init=nowhere",), "nowhere"),
        pytest.param(("teacher.path=nowhere",), "nowhere", marks=SLOW),
        pytest.param(("data=webdataset", "data.set.shards=nowhere"), "nowhere", marks=SLOW),
        pytest.param(("data=latents", "data.set.path=nowhere"), "nowhere", marks=SLOW),
        pytest.param(("trainer.memory=0.0000001",), "trainer.memory=0", marks=SLOW),
        pytest.param(("backbone.input_size=16",), "backbone.input_size=8", marks=SLOW),
        (("trainer=gpu",), "no GPU"),
        pytest.param(("data=image_folder", f"data.set.path={ROOT}/configs"), "image", marks=SLOW),
        (("before=[[recipes.prune,model=nowhere,by=random,'pattern=1:2',out=runs/never]]",), "nowhere"),
        pytest.param(("sampler=ddpm",), "integrates a noise", marks=SLOW),
        (("+terms.o={_target_: edit.distillation.output.OutputKD}",), "teacher.path="),
    ],
)
def test_a_launch_that_fails_leaves_nothing(tmp_path, words, said):
    done = launch(tmp_path, "name=deep/in", *words)
    assert done.returncode not in (0, -9) and said in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_was_there_stays_as_it_was(tmp_path):
    (tmp_path / "runs/mine").mkdir(parents=True)
    assert launch(tmp_path, "name=mine", "init=nowhere").returncode == 1
    assert list((tmp_path / "runs/mine").iterdir()) == []
    (tmp_path / "runs/mine/notes.txt").write_text("mine")
    assert launch(tmp_path, "name=mine", "init=nowhere").returncode == 1
    assert [f.name for f in (tmp_path / "runs/mine").iterdir()] == ["notes.txt"]


def test_what_was_trained_stays_without_a_lock(tmp_path):
    assert launch(tmp_path, "name=good").returncode == 0
    kept = sorted(f.name for f in (tmp_path / "runs/good").iterdir())
    assert {"config.yaml", "checkpoints", "artifact"} <= set(kept) and LOCK not in kept
    assert launch(tmp_path, "name=good", "seed=5").returncode == 2
    assert kept == sorted(f.name for f in (tmp_path / "runs/good").iterdir())


def test_of_a_sweep_only_the_jobs_that_failed_go(tmp_path):
    done = launch(tmp_path, "-m", "name=sweep", "init=null,nowhere")
    assert done.returncode == 1
    assert sorted(f.name for f in (tmp_path / "runs/sweep").iterdir()) == ["init-null", "multirun.yaml"]
    assert launch(tmp_path, "-m", "name=lost", "init=there,nowhere").returncode == 1
    assert not (tmp_path / "runs/lost").exists()


def fill(folder: Path, *names: str) -> None:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("step,loss\n1,2.0\n" if name.endswith("metrics.csv") else "")


@pytest.mark.parametrize(
    ("names", "goes"),
    [
        (("config.yaml", "env.json", ".lock", "wandb/offline-run/run.wandb", "tensorboard/events"), True),
        (("config.yaml", "metrics.csv"), False),  # with a row
        (("checkpoints/step_00000001.ckpt",), False),
        (("notes.txt",), False),
        (("a/config.yaml",), False),
    ],
)
def test_only_what_a_launch_writes_before_its_first_result_is_removed(tmp_path, names, goes):
    before = Before(tmp_path / "runs/new")
    with pytest.raises(RuntimeError), before.watched(tmp_path / "runs/new"):
        fill(tmp_path / "runs/new", *names)
        raise RuntimeError
    assert (tmp_path / "runs").exists() != goes


def test_a_folder_in_which_another_process_writes_is_left_to_it(tmp_path):
    before = Before(tmp_path / "new")
    with before.watched(tmp_path / "new"):
        holding = locked(tmp_path / "new")
        holding.__enter__()
    assert (tmp_path / "new" / LOCK).exists() and is_locked(tmp_path / "new")
    holding.__exit__(None, None, None)
    assert not is_locked(tmp_path / "new") and not (tmp_path / "new" / LOCK).exists()


def test_other_ranks_and_places_that_only_a_job_knows_remove_nothing(tmp_path, monkeypatch):
    for place, rank in ((None, "0"), (tmp_path / "new", "1")):
        monkeypatch.setenv("RANK", rank)
        with Before(place).watched(tmp_path / "new"):
            (tmp_path / "new").mkdir(exist_ok=True)
        assert (tmp_path / "new").exists()
