"""Killed at any moment, the same command goes on bit-equal: data order, noise, average, optimiser, schedule."""

import fcntl
import os
import select
import signal
import sys
import termios
import threading
from contextlib import suppress

import pytest
import torch
from killed_runs import kill_at, slow_steps, start
from ranks import run_ranks
from small_runs import TWO_RANKS, kill_when, losses, rows, train, train_ranks

from recipes.config.errors import UserError
from recipes.runtime.checkpoint_files import checkpoints, newest

ONE = ("trainer.accumulate=2", "data.batch_size=100", "data.workers=1")  # 1437 digits: epochs end inside the run


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three real tar shards of 50 small pictures each."""
    import io

    import webdataset
    from PIL import Image

    folder = tmp_path_factory.mktemp("shards")
    for i in range(3):
        with webdataset.TarWriter(str(folder / f"train-{i:03d}.tar")) as tar:
            for k in range(50):
                picture = io.BytesIO()
                Image.effect_noise((8, 8), 64).convert("RGB").save(picture, "PNG")
                tar.write({"__key__": f"{i:03d}_{k:03d}", "png": picture.getvalue(), "cls": k % 10})
    return folder


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_on_webdataset_shards_goes_on_bit_equal_mid_epoch(tmp_path, shards, world):
    """150 pictures and 32 or more a step: checkpoint and kill both fall inside an epoch, with flips and two workers."""
    overrides = ["data=webdataset", f"data.set.shards={shards}", "data.set.size=8", "data.workers=2"]
    overrides += ["backbone.in_channels=3", "data.batch_size=32"]
    overrides += ["trainer=ddp", *TWO_RANKS] if world == 2 else []
    train_ranks(tmp_path, "name=whole", *overrides, world=world)
    kill_at(tmp_path, "killed", 6, *overrides, world=world)
    train_ranks(tmp_path, "name=killed", *overrides, world=world)
    assert losses(tmp_path, "killed") == losses(tmp_path, "whole")


@pytest.mark.parametrize(
    "overrides, world",
    [
        (ONE, 1),
        pytest.param(("trainer=ddp", *TWO_RANKS, "data.workers=1", "data.batch_size=100"), 2, marks=pytest.mark.slow),
        pytest.param(("trainer=fsdp2", *TWO_RANKS), 2, marks=pytest.mark.slow),
    ],
    ids=["one process, workers, accumulation", "ddp", "fsdp2"],
)
def test_a_killed_run_goes_on_bit_equal(tmp_path, overrides, world):
    train_ranks(tmp_path, "name=whole", *overrides, world=world)
    kill_at(tmp_path, "killed", 6, *overrides, world=world)  # after the checkpoint of step 4
    train_ranks(tmp_path, "name=killed", *overrides, world=world)
    assert losses(tmp_path, "killed") == losses(tmp_path, "whole")
    assert [r["step"] for r in rows(tmp_path, "killed")] == [str(i) for i in range(1, 13)]
    assert [r["lr"] for r in rows(tmp_path, "killed")] == [r["lr"] for r in rows(tmp_path, "whole")]
    one, two = (torch.load(newest(tmp_path / n / "checkpoints"), weights_only=True) for n in ("whole", "killed"))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for key, value in one["state_dict"].items():  # weights and their average
        assert torch.equal(value, two["state_dict"][key]), key


def test_a_kill_during_a_checkpoint_write_leaves_the_previous_one(tmp_path):
    def slow_disk():
        import time

        fsync = os.fsync
        os.fsync = lambda f: (time.sleep(5 if list(folder.glob("step_00000008*")) else 0), fsync(f))

    folder = tmp_path / "killed" / "checkpoints"
    train(tmp_path, "name=whole")
    (process,) = start(tmp_path, "name=killed", before=slow_disk)
    kill_when(lambda: list(folder.glob("step_00000008.ckpt.tmp-*")), process.pid)
    process.join()
    assert [p.name for p in checkpoints(folder)] == ["step_00000004.ckpt"]
    train(tmp_path, "name=killed")
    assert losses(tmp_path, "killed") == losses(tmp_path, "whole")
    assert not list(folder.glob("*.tmp-*"))


def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(tmp_path, capsys):
    train(tmp_path, "name=a")
    last = newest(tmp_path / "a" / "checkpoints")
    last.write_bytes(last.read_bytes()[:1000])
    assert newest(tmp_path / "a" / "checkpoints").name == "step_00000008.ckpt"
    assert last.name in capsys.readouterr().out


def test_sigterm_saves_the_step_and_the_same_command_finishes_equal(tmp_path):
    train(tmp_path, "name=whole")
    (process,) = start(tmp_path, "name=told", "checkpoint.every=1000", before=slow_steps)
    path = tmp_path / "told" / "metrics.csv"
    kill_when(lambda: path.exists() and path.read_text().count("\n") > 5)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 0
    assert 4 < len(rows(tmp_path, "told")) < 12
    train(tmp_path, "name=told", "checkpoint.every=1000")
    assert losses(tmp_path, "told") == losses(tmp_path, "whole")


@pytest.mark.slow
def test_a_closed_terminal_saves_the_step_and_the_same_command_finishes_equal(tmp_path):
    """A real one: the kernel hangs up, and whatever is printed afterwards fails."""
    train(tmp_path, "name=whole")
    ours, theirs = os.openpty()

    def at_a_terminal():
        os.close(ours)
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        for stream in (0, 1, 2):
            os.dup2(theirs, stream)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        slow_steps(print)

    (process,) = start(tmp_path, "name=told", "checkpoint.every=1000", before=at_a_terminal)
    os.close(theirs)
    reader = threading.Thread(target=lambda: _read_until_closed(ours), daemon=True)
    reader.start()
    path = tmp_path / "told" / "metrics.csv"
    kill_when(lambda: path.exists() and path.read_text().count("\n") > 5)
    os.close(ours)
    process.join()
    done = len(rows(tmp_path, "told"))
    assert 4 < done < 12 and newest(tmp_path / "told" / "checkpoints").name == f"step_{done:08d}.ckpt"
    train(tmp_path, "name=told", "checkpoint.every=1000")
    assert losses(tmp_path, "told") == losses(tmp_path, "whole")


def _read_until_closed(terminal: int) -> None:
    with suppress(OSError):
        while True:
            if select.select([terminal], [], [], 0.01)[0]:
                os.read(terminal, 1000)


@pytest.mark.slow
def test_under_nohup_a_hang_up_stops_nothing(tmp_path):
    def nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        slow_steps()

    (process,) = start(tmp_path, "name=a", before=nohup)
    path = tmp_path / "a" / "metrics.csv"
    kill_when(lambda: path.exists() and path.read_text().count("\n") > 2)
    os.kill(process.pid, signal.SIGHUP)
    process.join()
    assert len(rows(tmp_path, "a")) == 12 and (tmp_path / "a" / "artifact").is_dir()


def test_a_second_process_under_one_name_is_refused_and_the_first_is_not_disturbed(tmp_path):
    train(tmp_path, "name=whole")
    (process,) = start(tmp_path, "name=a", "data.workers=1", before=slow_steps)
    path = tmp_path / "a" / "metrics.csv"
    kill_when(lambda: path.exists() and path.read_text().count("\n") > 2)
    with pytest.raises(UserError, match=rf"a is being written by process {process.pid} on .*another name="):
        train(tmp_path, "name=a", "data.workers=1")
    process.join()
    assert losses(tmp_path, "a") == losses(tmp_path, "whole")


def test_a_finished_run_is_not_trained_again(tmp_path, capsys):
    train(tmp_path, "name=a")
    before = (tmp_path / "a" / "metrics.csv").read_text()
    train(tmp_path, "name=a")
    assert "is complete" in capsys.readouterr().out
    assert (tmp_path / "a" / "metrics.csv").read_text() == before


def test_a_run_killed_before_its_artifact_was_written_writes_it(tmp_path):
    import shutil

    train(tmp_path, "name=a")
    before = (tmp_path / "a" / "artifact" / "diffusion_pytorch_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "a" / "artifact")
    train(tmp_path, "name=a")
    assert (tmp_path / "a" / "artifact" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert len(rows(tmp_path, "a")) == 12


def test_another_configuration_is_refused_with_the_key_that_differs(tmp_path):
    train(tmp_path, "name=a")
    with pytest.raises(UserError, match=r"backbone.depth=2, this command says 3.*another name="):
        train(tmp_path, "name=a", "backbone.depth=3")
    assert len(checkpoints(tmp_path / "a" / "checkpoints")) == 2, "nothing is lost"


@pytest.mark.parametrize(
    "change",
    [
        "trainer.clip=0.5",
        *(pytest.param(c, marks=pytest.mark.slow) for c in ("trainer.accumulate=2", "data.batch_size=32")),
    ],
)
def test_what_decides_the_numbers_of_a_step_cannot_change(tmp_path, change):
    train(tmp_path, "name=a", "trainer.max_steps=4")
    with pytest.raises(UserError, match=rf"{change.split('=')[0]}.*another name="):
        train(tmp_path, "name=a", change)


def test_a_run_from_before_a_setting_existed_goes_on_if_its_default_is_meant(tmp_path, capsys):
    train(tmp_path, "name=a", "trainer.max_steps=4")
    path = tmp_path / "a" / "config.yaml"
    lines = path.read_text().splitlines(True)
    gone = ("end: 0.0", "std: 1.0")  # of a section without a class, and of one whose class tells it
    path.write_text("".join(line for line in lines if line.strip() not in gone))
    train(tmp_path, "name=a", "trainer.max_steps=4")
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a run with optimizer.end=0.0, this command says 0.5"):
        train(tmp_path, "name=a", "trainer.max_steps=4", "optimizer.end=0.5")
    with pytest.raises(UserError, match="holds a run with objective.time.std=1.0, this command says 2.0"):
        train(tmp_path, "name=a", "trainer.max_steps=4", "objective.time.std=2.0")


def test_without_checkpoints_a_finished_run_is_not_overwritten_by_another(tmp_path):
    import shutil

    train(tmp_path, "name=a", "trainer.max_steps=4")
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    with pytest.raises(UserError, match="backbone.depth=2, this command says 3"):
        train(tmp_path, "name=a", "trainer.max_steps=4", "backbone.depth=3")


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_one_at_the_same_batch(tmp_path):
    train(tmp_path, "name=one", "optimizer.schedule=constant")
    two = ("trainer=ddp", *TWO_RANKS, "data.batch_size=8", "optimizer.schedule=constant")
    train_ranks(tmp_path, "name=both", *(o.replace("steps=12", "steps=8") for o in two), world=2)
    train(tmp_path, "name=both", "optimizer.schedule=constant")
    pairs = zip(losses(tmp_path, "one"), losses(tmp_path, "both"), strict=True)
    assert max(abs(float(a) - float(b)) for a, b in pairs) < 2e-5  # the order of fp32 sums


def _limited(folder, size, overrides):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    with pytest.raises(UserError, match="could not write") as error:
        train(folder, *overrides)
    return str(error.value)


@pytest.mark.slow
def test_a_full_disk_ends_both_ranks(tmp_path):
    two = ("name=a", "trainer=ddp", *TWO_RANKS)
    train_ranks(tmp_path, *(o.replace("steps=12", "steps=4") for o in two), world=2)
    size = newest(tmp_path / "a" / "checkpoints").stat().st_size
    first, second = run_ranks(_limited, 2, args=(tmp_path, size, two))
    assert "free some space" in first or "check the disk" in first
    assert second.startswith("another rank could not write") or second == first


def test_a_full_disk_ends_in_one_sentence_and_keeps_earlier_checkpoints(tmp_path):
    """A real limit on file size stands for the full disk: the write of the checkpoint fails half-way."""
    import resource

    train(tmp_path, "name=a", "trainer.max_steps=5")
    size = newest(tmp_path / "a" / "checkpoints").stat().st_size

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        with pytest.raises(UserError, match="could not write .*step_00000008.ckpt.*earlier checkpoints are whole") as e:
            train(tmp_path, "name=a", "trainer.max_steps=12")
        assert "\n" not in str(e.value)

    run_ranks(limited, 1)
    assert [p.name for p in checkpoints(tmp_path / "a" / "checkpoints")] == ["step_00000004.ckpt", "step_00000005.ckpt"]
    assert not list((tmp_path / "a" / "checkpoints").glob("*.tmp-*"))


@pytest.mark.slow
def test_a_run_is_not_continued_with_another_teacher_under_the_same_path(tmp_path):
    train(tmp_path, "name=t", "trainer.max_steps=2")
    kd = ("name=s", f"teacher.path={tmp_path}/t", "+terms.kd._target_=edit.distillation.output.OutputKD")
    train(tmp_path, *kd, "trainer.max_steps=2")
    train(tmp_path, *kd, "trainer.max_steps=4")  # the same teacher
    train(tmp_path, "name=t", "trainer.max_steps=4")
    with pytest.raises(UserError, match="began with another teacher"):
        train(tmp_path, *kd, "trainer.max_steps=6")
    train(tmp_path, *kd, "trainer.max_steps=4")  # there is nothing left to do, and so nothing to refuse
