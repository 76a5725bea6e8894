"""From a search, or from a criterion, to a plain shallower model: `python -m recipes.prune`."""

import json

import pytest
import torch
from safetensors.torch import load_file
from weights import randomise

import edit
from edit.artifacts.weights import WEIGHTS
from edit.backbones.dit import DiTConfig
from edit.pruning.tinyfusion import TinyFusion
from edit.tuning.lora import LoRA
from recipes.prune import main

DATA = {"_target_": "data.sets.digits.Digits"}


def model(path, depth=4, seed=0):
    torch.manual_seed(seed)
    denoiser = DiTConfig(
        input_size=8, in_channels=1, patch_size=4, hidden_size=16, depth=depth, num_heads=2, num_classes=10, time="flow"
    ).build()
    randomise(denoiser, seed)
    edit.save(denoiser, path / "artifact", data=DATA)
    return denoiser


@pytest.fixture
def whole(tmp_path):
    """A model of four units and a search over it that keeps 1 and 2, whose LoRA has moved every weight."""
    denoiser = model(tmp_path / "whole")
    edit.apply(denoiser, {"lora": LoRA(2, 4, targets=("all-linear",)), "tinyfusion": TinyFusion()})
    with torch.no_grad():
        for name, p in denoiser.named_parameters():
            if ".lora_" in name:
                p.fill_(1.0)
        denoiser.edits["tinyfusion"].logits.copy_(torch.tensor([[0.0, 0.1], [0.1, 0.0]]))
    edit.save(denoiser, tmp_path / "search" / "artifact", data=DATA)
    return tmp_path


def prune(folder, **words) -> int:
    words = {"model": folder / "whole", "out": folder / "out", **words}
    return main([f"{k}={v}" for k, v in words.items()])


def test_extraction_keeps_the_original_tensors_bit_for_bit_and_nothing_of_the_search(whole):
    assert prune(whole, search=whole / "search") == 0
    before, after = (load_file(whole / run / "artifact" / WEIGHTS) for run in ("whole", "out"))
    renumbered = {"0": "1", "1": "2"}
    assert not any("lora" in k or "tinyfusion" in k for k in after)
    assert not (whole / "out" / "artifact" / "edits.safetensors").exists()
    for key, value in after.items():
        parts = key.split(".")
        if parts[0] == "blocks":
            parts[1] = renumbered[parts[1]]
        assert torch.equal(value, before[".".join(parts)])
    assert edit.load(whole / "out").denoiser.config["depth"] == 2


@torch.no_grad()
def test_the_pruned_model_is_the_whole_one_without_the_others(whole):
    prune(whole, search=whole / "search")
    dense, pruned = (edit.load(whole / run).denoiser for run in ("whole", "out"))
    dense.units = [dense.units[i] for i in (1, 2)]
    x, t, c = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.9]), edit.Condition(label=torch.tensor([1, 7]))
    assert torch.equal(dense(x, t, c).sample, pruned(x, t, c).sample)


def test_a_finished_pruning_is_not_done_again_and_another_one_is_refused(whole, capsys):
    assert prune(whole, by="uniform") == 0
    stamp = (whole / "out" / "pruning.json").stat().st_mtime_ns
    assert prune(whole, by="uniform") == 0
    assert "is complete" in capsys.readouterr().out
    assert (whole / "out" / "pruning.json").stat().st_mtime_ns == stamp
    assert prune(whole, by="uniform", pattern="2:4") == 1
    assert "pruned with pattern=1:2, this command says 2:4" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["random", "uniform", "influence", "sensitivity", "calibration"])
def test_every_criterion_keeps_one_of_each_pair_and_says_why(whole, by):
    assert prune(whole, by=by, samples=16, batch=8, out=whole / by) == 0
    record = json.loads((whole / by / "pruning.json").read_text())
    kept = record["kept"]
    assert len(kept) == 2 and kept[0] in (0, 1) and kept[1] in (2, 3)
    assert (whole / by / "pruning.png").read_bytes().startswith(b"\x89PNG")
    if by in ("influence", "sensitivity"):
        assert kept == [max(p, key=record["scores"].__getitem__) for p in ((0, 1), (2, 3))]
    if by == "calibration":
        assert len(record["losses"]) == 4


def test_calibration_takes_the_pattern_whose_loss_it_measured_least_or_largest(whole):
    found = {}
    for pick in ("min", "median", "max"):
        assert prune(whole, by="calibration", pick=pick, samples=16, batch=8, out=whole / pick) == 0
        record = json.loads((whole / pick / "pruning.json").read_text())
        ways = [[0, 2], [0, 3], [1, 2], [1, 3]]
        found[pick] = record["losses"][ways.index(record["kept"])]
    assert found["min"] == min(record["losses"]) and found["max"] == max(record["losses"])
    assert found["min"] < found["median"] < found["max"]


def test_a_pruned_model_is_pruned_again(whole):
    assert prune(whole, by="uniform") == 0
    assert prune(whole, model=whole / "out", by="uniform", out=whole / "quarter") == 0
    assert edit.load(whole / "quarter").denoiser.config["depth"] == 1


@pytest.mark.parametrize(
    "words, code, complaint",
    [
        ({"by": "luck"}, 2, "expected one of learned, random"),
        ({"by": "learned"}, 2, "give the run of a search exactly with by=learned"),
        ({"by": "random", "patern": "1:2"}, 2, "did you mean pattern?"),
        ({"by": "random", "pattern": "3:5"}, 1, "4 units make no groups of 5"),
        ({"by": "random", "model": "nowhere"}, 1, "no artifact at nowhere"),
        ({"search": "whole"}, 1, "its model has no gates"),
    ],
)
def test_mistakes_are_one_sentence(whole, capsys, monkeypatch, words, code, complaint):
    monkeypatch.chdir(whole)
    assert prune(whole, **words) == code
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1


def test_a_search_of_another_model_is_refused(whole, capsys):
    model(whole / "other", depth=6)
    assert prune(whole, model=whole / "other", search=whole / "search") == 1
    assert "does not fit this model" in capsys.readouterr().err


def test_a_search_over_other_weights_is_refused(whole, capsys):
    model(whole / "other", seed=1)
    assert prune(whole, model=whole / "other", search=whole / "search") == 1
    assert "was made with other weights than model=" in capsys.readouterr().err


def test_the_same_model_is_the_same_wherever_it_lies(whole, monkeypatch, capsys):
    assert prune(whole, by="uniform") == 0
    monkeypatch.chdir(whole)
    assert prune(whole, model="whole", out="out", by="uniform") == 0
    assert "is complete" in capsys.readouterr().out


def test_a_search_is_not_what_is_pruned(whole, capsys):
    assert prune(whole, model=whole / "search", by="influence") == 1
    assert "is a search: give the model that it started from" in capsys.readouterr().err


def test_help_names_every_key(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("pattern", "candidates", "calibration", "search"))
