"""Numbers and names of a run that are refused before it begins, and weights that end one."""

from math import inf, nan
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from small_runs import config, rows, train

import edit
from recipes.config.check import check
from recipes.config.errors import UserError
from recipes.config.words import as_typed
from recipes.steps.diffusion import Diffusion


@pytest.fixture(scope="module")
def right(tmp_path_factory) -> DictConfig:
    return config(tmp_path_factory.mktemp("runs"), "name=a")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        *(("optimizer.lr", v, "a number from 0 to 100") for v in (inf, nan, -1.0, 1e300)),
        *(("optimizer.betas", v, "at least 0 and below 1") for v in ([0.9, 1.0], [nan, 0.9], [-0.1, 0.9])),
        ("optimizer.betas", [0.9], "2 values, got 1"),
        *(("optimizer.eps", v, "more than 0 and below 1") for v in (0.0, nan, 1e300, -1e-8)),
        *(("optimizer.weight_decay", v, "a number from 0 to 100") for v in (inf, nan, -0.1)),
        ("optimizer.warmup", -1, "at least 0"),
        *(("ema.decay", v, "at least 0 and below 1") for v in (1.0, nan, -0.5)),
        *(("trainer.clip", v, "more than 0") for v in (0.0, nan, -1.0, inf)),
        *(("label_drop", v, "a number from 0 to 1") for v in (nan, -0.1, 1.5)),
        *((key, 0, "at least 1") for key in ("checkpoint.every", "checkpoint.keep", "log_every", "trainer.accumulate")),
        *(("trainer.max_steps", v, "at least 1") for v in (0, -1, 10**12)),
        ("preview.every", -1, "at least 0"),
        *(("trainer.devices", v, "a number from 1 to 1024 or auto") for v in (0, -1, 10**6, True, nan, None, "4")),
        ("trainer.precision", "fp16", "one of auto, 32-true, bf16-mixed"),
        *(("seed", v, "a number from 0 to 4294967295") for v in (-1, 2**32, 2**64)),
        *(("data.batch_size", v, "a number from 1 to 1000000") for v in (0, -4, 10**9)),
        ("data.workers", -1, "a number from 0 to 1024"),
        ("data.set", 5, "a section with _target_"),
        ("data.set", None, "a section with _target_"),
        ("sampler.solver.steps", 0, "int at least 1 and at most 10000"),
        ("sampler.solver.steps", 4.0, "int at least 1"),
        ("sampler.guidance", -1, "float at least 0"),
        ("sampler.guidance", nan, "float at least 0"),
        ("backbone.mlp_ratio", nan, "float"),
    ],
)
def test_a_number_that_no_run_can_have_is_refused_with_its_key(right, key, value, expected):
    cfg = right.copy()
    OmegaConf.update(cfg, key, value, force_add=True)
    (sentence,) = check(cfg)
    assert sentence.startswith(f"{key}: expected ") and expected in sentence


def test_the_data_group_takes_its_own_keys_and_types_alone(right):
    cfg = right.copy()
    OmegaConf.update(cfg, "data.batchsize", 5, force_add=True)
    assert check(cfg) == [
        "unknown key 'data.batchsize'; did you mean 'batch_size'? (accepted: batch_size, set, workers)"
    ]
    for value in (4.0, 4.5, None, True, "many"):
        with pytest.raises(Exception, match="batch_size"):
            OmegaConf.update(right.copy(), "data.batch_size", value)


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("name=1e3", "1e3"),
        ("name=007", "007"),
        ("name=true", "true"),
        ("name=1_000", "1_000"),
        ("name=nan", "nan"),
        ("name=2024-01-01", "2024-01-01"),
        ("name=sweep/1e3", "sweep/1e3"),
        ("name='1e3'", "1e3"),
    ],
)
def test_a_name_is_taken_as_typed(word, name, tmp_path):
    assert config(tmp_path, as_typed(word)).name == name
    assert as_typed("runs=5") == "runs='5'"


def test_what_is_no_text_is_left_to_hydra():
    words = ["trainer.max_steps=3", "name=null", "name=a,b", "name=${seed}", "name=[", "~name", "name", "+edits.a=1"]
    assert [as_typed(w) for w in words] == words


@pytest.mark.parametrize(
    "name", ["", "..", "a/../../b", "/a", "-a", "a/-b", "a\0b", "a\nb", " a", "n" * 300, 1e3, True, None]
)
def test_a_name_that_is_no_folder_is_refused_in_one_sentence(right, name):
    cfg = right.copy()
    cfg.name = name
    (sentence,) = check(cfg)
    assert sentence.startswith("name") and "expected" in sentence and "\n" not in sentence and len(sentence) < 250


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_that_is_past_its_last_step_is_refused_and_left_as_it_is(tmp_path):
    train(tmp_path, "name=a", "trainer.max_steps=4", "checkpoint.every=2")
    before = everything(tmp_path)
    with pytest.raises(UserError, match="is at step 4, and trainer.max_steps=3 ends before that: give at least 4"):
        train(tmp_path, "name=a", "trainer.max_steps=3", "checkpoint.every=2")
    assert everything(tmp_path) == before


def test_a_name_may_refer_to_a_number(tmp_path):
    train(tmp_path, "name=${seed}", "trainer.max_steps=1", "seed=7")
    assert edit.load(tmp_path / "7").run["name"] == "7"


def test_a_warmup_longer_than_the_run_is_said(tmp_path, capsys):
    train(tmp_path, "name=a", "trainer.max_steps=2", "optimizer.warmup=3")
    assert "warning: optimizer.warmup=3 is longer than the run of 2 steps" in capsys.readouterr().out
    train(tmp_path, "name=b", "trainer.max_steps=2", "optimizer.warmup=2")
    assert "warning" not in capsys.readouterr().out


def test_a_run_whose_weights_are_not_finite_ends_without_an_artifact_and_keeps_its_checkpoints(tmp_path, monkeypatch):

    def spoil(self, *args):
        if self.trainer.global_step == 3:
            with torch.no_grad():
                self.ema.model.blocks[1].attn.proj.weight[0, 0] = nan

    monkeypatch.setattr(Diffusion, "on_train_batch_end", spoil)
    with pytest.raises(UserError, match=r"no artifact was written: model.blocks.1.attn.proj.weight has weights that"):
        train(tmp_path, "name=a", "trainer.max_steps=3", "checkpoint.every=2")
    assert not (tmp_path / "a" / "artifact").exists() and len(rows(tmp_path, "a")) == 3
    checkpoints = sorted((tmp_path / "a" / "checkpoints").glob("*.ckpt"))
    assert [p.name for p in checkpoints] == ["step_00000002.ckpt", "step_00000003.ckpt"]
    monkeypatch.undo()
    checkpoints[-1].unlink()
    train(tmp_path, "name=a", "trainer.max_steps=3", "checkpoint.every=2")  # what the sentence says
    assert edit.load(tmp_path / "a")
