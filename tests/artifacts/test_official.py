"""Official .pt checkpoints: tensors alone, whole or refused."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from edit.artifacts.official import load_official
from edit.backbones.dit import DiTConfig


class Payload:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_pickled_objects_are_not_executed(tmp_path, dit, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": Payload()}, "evil.pt")
    Path("plain.pt").write_bytes(pickle.dumps({"ema": Payload()}))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as a checkpoint of tensors alone"):
            load_official(dit, name)
    assert not Path("pwned").exists()


def test_an_official_file_that_is_missing_or_half_there_is_refused(tmp_path, dit):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*gone.pt: give the official .pt file"):
        load_official(dit, tmp_path / "gone.pt")
    torch.save(dit.model.state_dict(), tmp_path / "half.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "half.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="half.pt cannot be read as a checkpoint of tensors alone"):
        load_official(dit, tmp_path / "half.pt")


def test_an_official_file_fills_a_model_that_was_made_on_the_meta_device(tmp_path, dit):
    torch.save({"ema": dit.model.state_dict()}, tmp_path / "ema.pt")
    with torch.device("meta"):
        empty = DiTConfig(**dit.config).build()
    load_official(empty, tmp_path / "ema.pt")
    assert all(torch.equal(v, dit.state_dict()[k]) for k, v in empty.state_dict().items())
