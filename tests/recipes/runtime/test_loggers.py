"""metrics.csv survives everything; W&B never prompts, never hangs, never ends a run, and keeps one id per run."""

import csv
import json
import os
import socket
import struct
import time

import numpy as np
import pytest
from lightning.pytorch.utilities import rank_zero_only
from small_runs import rows, train

from recipes.config.schema import LoggerConfig, WandbConfig
from recipes.runtime import loggers as module
from recipes.runtime.loggers import (
    CSVLogger,
    close,
    log_artifact,
    log_image,
    log_summary,
    make_loggers,
    reachable,
    run_id,
)

ONLINE, OFFLINE = (LoggerConfig(["wandb"], WandbConfig(mode)) for mode in ("online", "offline"))
KEY = "0123456789" * 4


@pytest.fixture
def no_wandb(monkeypatch, tmp_path):
    """No key, no proxy and no run that an earlier test left open; the client reads the environment again."""
    import wandb

    wandb.teardown()
    for name in [n for n in os.environ if n.startswith("WANDB_") or n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    yield
    wandb.teardown()


def said(capsys):
    """What was printed, without rich's line breaks."""
    return " ".join(capsys.readouterr().out.split())


def offline_run(out):
    """The folder of the one offline run, and what it will send, whose strings are not compressed."""
    import wandb

    wandb.teardown()  # as at the end of the process: the service may write a finished run a moment later
    (folder,) = (out / "wandb").glob("offline-run-*")
    (sent,) = folder.glob("*.wandb")
    return folder, sent.read_bytes()


def read(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_rows_are_written_at_once_and_new_columns_keep_old_rows(tmp_path):
    logger = CSVLogger(tmp_path / "metrics.csv")
    logger.resume(0)
    logger.log_metrics({"train/loss": 1.5}, 1)
    logger.log_metrics({"train/loss": 1.25, "lr": 0.5}, 2)
    assert read(tmp_path / "metrics.csv") == [
        {"step": "1", "train/loss": "1.5", "lr": ""},
        {"step": "2", "train/loss": "1.25", "lr": "0.5"},
    ]


def test_resuming_forgets_later_rows_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss\n1,1.0\n2,0.9\n3,0.8\n4,0.")
    CSVLogger(path).resume(2)
    assert [r["step"] for r in read(path)] == ["1", "2"]


def test_wandb_offline_keeps_one_id_over_restarts(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(tmp_path, "name=a", "logger=wandb", "logger.wandb.mode=offline", "trainer.max_steps=4")
    train(tmp_path, "name=a", "logger=wandb", "logger.wandb.mode=offline", "trainer.max_steps=8")
    # wandb numbers a second run that opens within one second, after the id: only the file is named by the id alone.
    runs = [p.name for p in (tmp_path / "a" / "wandb").glob("offline-run-*/*.wandb")]
    assert runs == [f"run-{run_id(tmp_path / 'a')}.wandb"] * 2
    assert len(rows(tmp_path, "a")) == 8


def test_wandb_online_without_a_key_goes_offline_at_once(tmp_path, no_wandb, capsys):
    started = time.monotonic()
    loggers = make_loggers(ONLINE, tmp_path / "a", "a", {})
    assert len(loggers) == 2 and loggers[1].experiment.offline
    assert time.monotonic() - started < 10  # the client alone would wait at a prompt, or minutes for a network
    assert "no API key" in said(capsys)
    close(loggers)


def test_wandb_online_without_a_network_logs_offline_at_once(tmp_path, no_wandb, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    loggers = make_loggers(ONLINE, tmp_path / "a", "a", {})
    loggers[1].log_metrics({"train/loss": 1.0}, 1)
    close(loggers)
    assert time.monotonic() - started < 20  # the client alone would try for 90 s
    assert "no network" in said(capsys)
    assert b"train/loss" in offline_run(tmp_path / "a")[1]


def test_wandb_mode_of_the_environment_makes_a_run_offline_without_trying(tmp_path, no_wandb, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    loggers = make_loggers(ONLINE, tmp_path, "a", {})
    assert loggers[1].experiment.offline and not said(capsys)
    close(loggers)


def test_a_server_that_never_answers_ends_in_an_offline_run_of_the_same_id(tmp_path, no_wandb, monkeypatch, capsys):
    monkeypatch.setattr(module, "OPEN", 2)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        started = time.monotonic()
        loggers = make_loggers(ONLINE, tmp_path / "a", "a", {})
        loggers[1].log_metrics({"train/loss": 1.0}, 1)
        close(loggers)
    assert time.monotonic() - started < 30  # not UPLOAD seconds: the run that failed to open has nothing to send
    assert "cannot open the run" in said(capsys)
    folder, sent = offline_run(tmp_path / "a")
    assert folder.name.endswith(run_id(tmp_path / "a")) and b"train/loss" in sent


def test_a_proxy_is_what_must_be_reachable(monkeypatch):
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        here = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        assert reachable(here)
        monkeypatch.setenv("https_proxy", here)
        assert reachable("https://host.invalid")
    assert not reachable("https://host.invalid")


def test_an_offline_run_holds_name_config_pictures_artifact_and_summary(tmp_path, no_wandb):
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "weights.bin").write_bytes(b"1234")
    loggers = make_loggers(OFFLINE, tmp_path / "run", "sweep/seed-0", {"backbone": {"hidden_size": 4321}})
    log_image(loggers, "samples", np.full((4, 4, 3), 255, np.uint8), 3)
    log_artifact(loggers, tmp_path / "artifact")
    log_summary(loggers, {"fid w=1": 12.5})
    close(loggers)
    folder, sent = offline_run(tmp_path / "run")
    assert len(list((folder / "files" / "media" / "images").glob("samples_*.png"))) == 1
    for part in (b"sweep/seed-0", b"hidden_size", b"4321", b"weights.bin", b"fid w=1", b"12.5"):
        assert part in sent, part


def test_what_wandb_refuses_is_said_and_not_raised(tmp_path, no_wandb, capsys):
    loggers = make_loggers(OFFLINE, tmp_path / "run", "run", {})
    log_artifact(loggers, tmp_path / "missing")
    assert "is not uploaded" in said(capsys)
    close(loggers)
    log_summary(loggers, {"fid": 1.0})  # the run is closed
    assert "are not sent" in said(capsys)


def test_other_ranks_write_nothing_and_make_no_id(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    loggers = make_loggers(OFFLINE, tmp_path, "run", {})
    loggers[1].log_metrics({"train/loss": 1.0}, 1)
    loggers[1].log_hyperparams({"seed": 1})
    log_artifact(loggers, tmp_path)
    log_summary(loggers, {"fid": 1.0})
    close(loggers)
    assert not list(tmp_path.iterdir())


def test_wandb_disabled_and_csv_open_nothing_else(tmp_path):
    assert len(make_loggers(LoggerConfig(["wandb"], WandbConfig("disabled")), tmp_path, "a", {})) == 1
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_numbers_and_pictures(tmp_path):
    train(tmp_path, "name=a", "logger=tensorboard", "preview.every=12", "preview.count=10", "sampler.solver.steps=1")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("train/loss")) == 12 and len(events.Images("samples")) == 1


def test_float_pictures_are_refused(tmp_path):
    with pytest.raises(TypeError, match="uint8"):
        log_image([], "samples", np.zeros((4, 4, 3), np.float32), 0)


def history(file):
    """The rows of a .wandb file: records in blocks of 32 KiB, each part with checksum, length and kind in front."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                found.append({"number": record.history.step.num, **row})
    return found


@pytest.mark.slow
def test_an_offline_run_that_is_resumed_continues_its_steps_without_a_warning(tmp_path, no_wandb, capfd):
    import wandb

    words = ("name=a", "logger=wandb", "logger.wandb.mode=offline", "preview.every=3", "preview.count=4")
    for steps in (4, 8):
        train(tmp_path, *words, f"trainer.max_steps={steps}")
        wandb.teardown()
    files = sorted((tmp_path / "a/wandb").glob("offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime_ns)
    one, two = ([row["number"] for row in history(file)] for file in files)
    assert (one, two) == ([1, 2, 3, 4], [5, 6, 7, 8])
    for row in (row for file in files for row in history(file)):
        assert row["trainer/global_step"] == row["number"] and "train/loss" in row
        assert ("samples" in str(row)) == (row["number"] in (3, 4, 6, 8))
    out, err = capfd.readouterr()
    assert "wandb: " not in out + err
