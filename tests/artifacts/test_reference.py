"""Artifacts that refer to the weights of another folder."""

import json
import shutil

import pytest
import torch

import edit
from data.manifest import teacher_hash
from edit.artifacts import checksums
from edit.artifacts.checkpoint import skeleton
from edit.artifacts.fingerprint import fingerprint
from edit.artifacts.variant import same_weights, twin, variant
from edit.caching.reuse import Reuse
from edit.sampling import Sampler
from edit.solvers import Euler
from edit.tuning.lora import LoRA

SMALL = 40_000  # bytes: no weights


@pytest.fixture
def runs(make_dit, tmp_path):
    """Runs `whole` and `fast`, which refers to the weights of `whole`."""
    whole = edit.load(edit.save(make_dit(), tmp_path / "whole/artifact", sampler=Sampler(Euler(4))))
    refer(whole, tmp_path / "fast/artifact")
    return tmp_path


def refer(artifact, path, edits=None):
    new = variant(artifact, edits or {"reuse": Reuse(3)})
    return edit.save(new.denoiser, path, new.objective, new.sampler, refers=artifact.home)


def change(folder, **parts):
    """Another description, with checksums that fit."""
    description = json.loads((folder / "edits.json").read_text()) | parts
    del description["checksums"]
    (folder / "edits.json").write_text(json.dumps(checksums.signed(description, folder)))


def test_it_is_loaded_with_the_weights_of_the_other(runs, batch):
    fast, whole = edit.load(runs / "fast"), edit.load(runs / "whole")
    assert sum(f.stat().st_size for f in (runs / "fast/artifact").iterdir()) < SMALL
    assert list(fast.denoiser.applied) == ["reuse"] and fast.home == (runs / "whole/artifact").resolve()
    torch.testing.assert_close(fast.denoiser(*batch).sample, whole.denoiser(*batch).sample, rtol=0, atol=0)
    assert list(skeleton(runs / "fast").applied) == ["reuse"]
    shutil.move(runs, moved := runs.parent / f"{runs.name}_moved")  # the two together
    assert edit.load(moved / "fast").home == moved / "whole/artifact"


def test_it_may_be_reached_by_a_link(runs):
    (runs / "deep/er").mkdir(parents=True)
    (runs / "deep/er/link").symlink_to(runs / "fast/artifact")
    assert list(edit.load(runs / "deep/er/link").denoiser.applied) == ["reuse"]


def test_artifacts_of_the_same_files_are_loaded_once(runs, make_dit):
    shutil.copytree(runs / "whole", runs / "copy")
    whole = edit.load(runs / "whole")
    edit.save(edit.apply(twin(whole.denoiser, copy=True), {"lora": LoRA(rank=2)}), runs / "tuned")
    edit.save(make_dit(seed=1), runs / "other")
    for name in ("fast", "copy"):
        assert same_weights(edit.load(runs / name, beside=[whole]).denoiser, whole.denoiser)
        assert not same_weights(edit.load(runs / name).denoiser, whole.denoiser)
    inside = {p.data_ptr() for p in edit.load(runs / "tuned", beside=[whole]).denoiser.parameters()}
    assert {p.data_ptr() for p in whole.denoiser.parameters()} < inside  # its LoRA alone was read
    other = edit.load(runs / "other", beside=[whole]).denoiser
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in whole.denoiser.parameters()}
    assert not same_weights(edit.load(runs / "fast", verify=False, beside=[whole]).denoiser, whole.denoiser)


def test_a_stock_folder_is_referred_to_as_well(make_flux, tmp_path):
    edit.save(make_flux(), tmp_path / "stock")
    (tmp_path / "stock/edits.json").unlink()
    stock = edit.load(tmp_path / "stock")
    refer(stock, tmp_path / "fast")
    assert same_weights(edit.load(tmp_path / "fast", beside=[stock]).denoiser, stock.denoiser)


def test_what_is_gone_or_has_changed_is_told(runs, make_dit):
    edit.save(make_dit(seed=1), runs / "whole/artifact")
    with pytest.raises(ValueError, match="fast/artifact refers to .*whole/artifact/diffusion_.*, which is not what it"):
        edit.load(runs / "fast")
    checksums.accept(runs / "fast")
    assert same_weights(edit.load(runs / "fast", beside=[w := edit.load(runs / "whole")]).denoiser, w.denoiser)
    edit.save(make_dit(depth=2), runs / "whole/artifact")
    with pytest.raises(ValueError, match="does not fit this model"):
        edit.load(runs / "fast", verify=False)
    shutil.rmtree(runs / "whole")
    with pytest.raises(
        FileNotFoundError, match="fast/artifact refers to the weights in .*, where there is no artifact"
    ):
        edit.load(runs / "fast", verify=False)


def test_a_reference_leads_to_weights_only(runs):
    fast, elsewhere = runs / "fast/artifact", runs / "elsewhere"
    good = json.loads((fast / "edits.json").read_text())["refers"]
    refer(edit.load(runs / "whole"), runs / "second/artifact")
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("{}")
    for refers, sentence in {
        "../../whole": "refers: expected the path and files of other weights",
        json.dumps(good | {"path": str(runs / "whole/artifact")}): "expected a path relative to",
        json.dumps(good | {"path": ""}): "expected a path relative to",
        json.dumps(good | {"path": "../../second/artifact"}): "which has no weights itself",
        json.dumps(good | {"path": "../../elsewhere"}): "which holds no weights in safetensors",
        json.dumps(good | {"path": "../../nowhere"}): "there is no artifact any more",
        json.dumps(good | {"files": {"../secret": "0"}}): "'../secret': expected names of files with weights",
        json.dumps(good | {"files": {"notes.txt": "0"}}): "'notes.txt': expected names of files with weights",
        json.dumps(good | {"files": {"config.json": 3}}): "expected names of files with weights, and checksums",
        json.dumps(good | {"files": {}}): "which is not what it was then",
    }.items():
        change(fast, refers=refers if refers.startswith("..") else json.loads(refers))
        with pytest.raises((ValueError, OSError)) as caught:
            edit.load(fast)
        assert sentence in str(caught.value), refers
    change(fast, refers=good)
    edit.load(fast)


def test_a_model_from_the_hub_does_not_refer_to_this_machine(runs, monkeypatch):
    monkeypatch.chdir(runs)
    found = runs / "fast/artifact"
    monkeypatch.setattr("edit.artifacts.checkpoint.find", lambda path, weights=True: found)
    for read in (edit.load, skeleton):
        with pytest.raises(ValueError, match="someone/model comes from the hub and refers to a folder of this machine"):
            read("someone/model")


def test_weights_of_another_shape_are_not_referred_to(runs, make_dit):
    with pytest.raises(ValueError, match="does not fit this model"):
        edit.save(make_dit(depth=2), runs / "half", refers=runs / "whole/artifact")
    assert not (runs / "half").exists()


def test_its_identity_is_its_own_and_that_of_its_weights(runs, make_dit):
    before = fingerprint(runs / "fast"), teacher_hash(runs / "fast")
    assert fingerprint(runs / "whole") != before[0]
    edit.save(make_dit(seed=1), runs / "whole/artifact")
    assert fingerprint(runs / "fast") != before[0] and teacher_hash(runs / "fast") != before[1]
