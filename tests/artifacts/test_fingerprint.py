"""Fingerprints: what changes one, and what does not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import edit
from edit.artifacts.fingerprint import fingerprint
from edit.tuning.lora import LoRA

MODEL = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def artifact(tmp_path, dit) -> Path:
    return edit.save(dit, tmp_path / "artifact")


def test_a_fingerprint_changes_with_weights_edits_and_configuration_and_with_nothing_else(tmp_path, make_dit):
    dit = make_dit()
    first = fingerprint(edit.save(dit, tmp_path / "run" / "artifact"))
    assert first == fingerprint(tmp_path / "run")  # a run means the artifact inside
    assert first == fingerprint(edit.save(dit, tmp_path / "b", max_shard_size="60KB", run={"name": "other", "step": 9}))
    seen = {first}
    with torch.no_grad():
        dit.units[-1].mlp.fc2.bias[0] += 1e-3  # one number
    seen.add(fingerprint(edit.save(dit, tmp_path / "run" / "artifact")))  # trained further under the same path
    seen.add(fingerprint(edit.save(dit, tmp_path / "c", dtype=torch.bfloat16)))
    edit.apply(dit, {"lora": LoRA(rank=2)})
    seen.add(fingerprint(edit.save(dit, tmp_path / "d")))
    with torch.no_grad():
        dit.get_parameter("model.blocks.0.attn.qkv.lora_B.default.weight")[0, 0] = 1
    seen.add(fingerprint(edit.save(dit, tmp_path / "e")))
    assert len(seen) == 5 and all(len(f) == 64 for f in seen)


def test_a_fingerprint_of_a_stock_folder_needs_no_description_of_ours(tmp_path):
    folder = stock_folder(tmp_path / "pipeline" / "transformer")
    assert fingerprint(folder) == fingerprint(tmp_path / "pipeline")
    before = fingerprint(folder)
    file = folder / MODEL
    save_file({k: v + 1 for k, v in load_file(file).items()}, file)
    assert fingerprint(folder) != before


def test_what_is_not_whole_has_no_fingerprint(tmp_path, artifact):
    (artifact / MODEL).write_bytes((artifact / MODEL).read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        fingerprint(artifact)
    (artifact / MODEL).unlink()
    with pytest.raises(FileNotFoundError, match="the artifact is not whole"):
        fingerprint(artifact)


def stock_folder(path: Path) -> Path:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "in_channels": 4}
    DiTTransformer2DModel(**sizes, out_channels=8).save_pretrained(path)
    return path
