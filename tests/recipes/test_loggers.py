"""metrics.csv survives everything; W&B never prompts, never hangs, and keeps one id per run."""

import csv
import time

import numpy as np
import pytest
from runs import rows, train

from recipes.config import LoggerConfig, WandbConfig
from recipes.loggers import CSVLogger, log_image, make_loggers, run_id


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
    runs = [p.name for p in (tmp_path / "a" / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and all(r.endswith(run_id(tmp_path / "a")) for r in runs)
    assert len(rows(tmp_path, "a")) == 8


def test_wandb_online_without_a_key_goes_offline_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    started = time.monotonic()
    loggers = make_loggers(LoggerConfig(["wandb"], WandbConfig("online")), tmp_path / "a", {})
    assert len(loggers) == 2 and loggers[1]._offline
    assert time.monotonic() - started < 10  # the client alone would wait at a prompt, or minutes for a network
    assert "no API key" in capsys.readouterr().out


def test_wandb_disabled_and_csv_open_nothing_else(tmp_path):
    assert len(make_loggers(LoggerConfig(["wandb"], WandbConfig("disabled")), tmp_path, {})) == 1
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
