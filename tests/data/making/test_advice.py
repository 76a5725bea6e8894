"""The command that is printed after latents were made trains on them as it is printed."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from samples import SIZE

from data.making.advice import next_step
from data.precompute import main
from recipes.config.check import check
from recipes.config.sources import register
from recipes.training import run

ROOT = Path(__file__).parents[3]
SHORT = ["trainer.max_steps=1", "data.batch_size=2", "evaluate=null", "preview.every=0", "optimizer.warmup=0"]


def typed(said: str, *more: str):
    """The checked configuration of the printed command."""
    words = shlex.split(re.search(r"next: python (.*)", said)[1])
    assert (ROOT / words[0]).is_file()
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        cfg = compose("train", [*words[1:], *more])
    assert check(cfg) == []
    return cfg


@pytest.mark.parametrize(
    ("encoders", "backbone", "thin"),
    [
        ((), "sit", ("backbone.hidden_size=48", "backbone.depth=1")),
        (("t5",), "qwen_image", ("backbone.num_layers=1",)),
        (("t5", "clip"), "qwen_image", ("backbone.num_layers=1",)),
        (("t5", "clip", "zeros"), "flux", ("backbone.num_layers=1", "backbone.num_single_layers=1")),
    ],
)
def test_the_printed_command_trains(folder, vae, t5, clip, tmp_path, capsys, encoders, backbone, thin):
    out = tmp_path / "my latents"
    if encoders:  # captions alone: classes would be told instead
        for file in folder.glob("*/*"):
            file.rename(folder / file.name)
        for place in [p for p in folder.iterdir() if p.is_dir()]:
            place.rmdir()
    words = ["--images", str(folder), "--out", str(out), "--vae", str(vae), "--size", str(SIZE), "--device", "cpu"]
    words += ["--text-encoder", str(t5)] if "t5" in encoders else []
    words += ["--pooled-encoder", str(clip)] if "clip" in encoders else []
    words += ["--padding", "zeros", "--max-tokens", "8"] if "zeros" in encoders else []
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"backbone={backbone} " in said and f"_{backbone}' " in said
    cfg = typed(said, f"runs={tmp_path}/runs", *thin, *SHORT, "trainer=cpu", "data.workers=0")
    run(cfg)
    assert (tmp_path / "runs" / cfg.name / "artifact/config.json").exists() and cfg.name == f"my latents_{backbone}"


def test_what_no_backbone_trains_on_is_said_with_what_is_lacking(tmp_path):
    made = {"latent_shape": [4, 32, 32], "text": None, "pooled": None, "num_classes": None}
    assert "neither classes nor texts: sort the images into" in next_step("a", made)
    assert "several sizes: leave out --bucket-step" in next_step("a", made | {"num_classes": 2, "buckets": [{}]})


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"latent_shape": [4, 32, 32], "num_classes": 7}, "backbone=sit size=S/2 backbone.in_channels=4"),
        ({"latent_shape": [4, 33, 33], "num_classes": 7}, "backbone.input_size=33 backbone.patch_size=1"),
        ({"latent_shape": [16, 4, 6, 6], "text": {"width": 9}}, "backbone.text_dim=9 'backbone.sample_size=[4,6,6]'"),
    ],
)
def test_other_shapes_get_a_backbone_that_takes_them(made, words):
    told = {"text": None, "pooled": None, "num_classes": None} | made
    said = next_step("a", told, gpu=True)
    assert words in said and said.endswith("trainer=gpu")
    with torch.device("meta"):
        assert instantiate(typed(said).backbone, _convert_="all").build().accepts(tuple(made["latent_shape"]))
