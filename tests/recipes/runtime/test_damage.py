"""Whatever happens to a file of an artifact, a checkpoint or a run: what is loaded is what was saved, or one sentence
names the file."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from damage import BYTES, changed, cut, empty, flip, flips, folder, huge, renamed, swapped, zeros
from small_runs import config, losses, rows, train

import edit
from edit.artifacts.checksums import of_files
from edit.pruning.depth import DepthPruning
from edit.tuning.lora import LoRA
from recipes.config.errors import UserError
from recipes.runtime.callbacks import Checkpoints
from recipes.runtime.checkpoint_files import WHOLE, checkpoints, checksum_of, files_in, newest
from recipes.runtime.loggers import CSVLogger
from recipes.runtime.run_folder import read_config, refuse_other_run


def one_sentence(error: BaseException) -> bool:
    return "\n" not in str(error) and "Traceback" not in str(error)


# ---- artifacts -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, make_dit):
    """A sharded artifact with two live edits."""
    dit = make_dit(depth=2)
    edit.apply(dit, {"deep": DepthPruning(0.5), "lora": LoRA(rank=2)})
    return edit.save(dit, tmp_path_factory.mktemp("artifact") / "a", max_shard_size="60KB")


def same(found, wanted) -> bool:
    state = wanted.denoiser.state_dict()
    return (
        all(torch.equal(v, state[k]) for k, v in found.denoiser.state_dict().items())
        and found.denoiser.applied == wanted.denoiser.applied
        and (found.objective, found.sampler, found.data, found.run)
        == (wanted.objective, wanted.sampler, wanted.data, wanted.run)
    )


SHARD = "diffusion_pytorch_model-00002-of-00003.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
ARTIFACT = [(name, way) for name in ("config.json", "edits.json", INDEX, SHARD, "edits.safetensors") for way in BYTES]
ARTIFACT += [(name, way) for name in ("config.json", "edits.json", INDEX) for way in (changed, huge)]
ARTIFACT += [(name, swapped) for name in ("config.json", SHARD)]


@pytest.mark.parametrize(("name", "way"), ARTIFACT, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_damaged_artifact_is_never_loaded_and_its_file_is_named(tmp_path, artifact, name, way):
    wanted = edit.load(artifact)
    for seed in range(3):
        path = tmp_path / f"{seed}"
        shutil.copytree(artifact, path)
        way(path / name, random.Random(f"{name} {way.__name__} {seed}"))
        try:
            found = edit.load(path)
        except (ValueError, OSError) as error:
            assert one_sentence(error) and (name in str(error) or way is swapped), error
        else:
            assert same(found, wanted)


@pytest.mark.parametrize("name", ["config.json", "edits.json", INDEX])
@pytest.mark.parametrize("way", [changed, huge])
def test_wrong_values_in_an_artifact_without_checksums_end_in_its_weights_or_one_sentence(
    tmp_path, artifact, name, way
):
    """An older one, or one from somebody who knows how to leave them out: it may load, never as another model."""
    wanted = edit.load(artifact).denoiser
    for seed in range(8):
        path = tmp_path / f"{seed}"
        shutil.copytree(artifact, path)
        described = json.loads((path / "edits.json").read_text())
        del described["checksums"]
        (path / "edits.json").write_text(json.dumps(described))
        way(path / name, random.Random(f"{name} {way.__name__} {seed}"))
        try:
            found = edit.load(path).denoiser
        except (ValueError, OSError) as error:
            assert one_sentence(error), error
        else:
            assert all(torch.equal(v, wanted.state_dict()[k]) for k, v in found.state_dict().items())


def test_weights_that_were_put_beside_an_artifact_are_not_taken_for_its_own(tmp_path, dit, make_dit):
    """An index is read before the one file, and an edit's parameters wherever there are any."""
    path = edit.save(dit, tmp_path / "a")
    other = edit.save(make_dit(seed=5), tmp_path / "b", max_shard_size="60KB")
    for file in (INDEX, "edits.safetensors"):
        shutil.copytree(other, tmp_path / file)
        for weights in other.glob("*-of-*.safetensors"):
            shutil.copy(weights, tmp_path / file)
        for kept in path.iterdir():
            shutil.copy(kept, tmp_path / file)
        if file != INDEX:
            for added in (tmp_path / file).glob("*-of-*.safetensors"):
                added.unlink()
            (tmp_path / file / INDEX).unlink()
            shutil.copy(next(other.glob("*-of-*.safetensors")), tmp_path / file / file)
        with pytest.raises(ValueError, match=r"safetensors\S* is not what was saved there"):
            edit.load(tmp_path / file)


def test_an_artifact_whose_edits_are_lost_is_not_taken_for_a_stock_model(tmp_path, artifact):
    path = shutil.copytree(artifact, tmp_path / "a")
    (path / "edits.json").unlink()
    with pytest.raises(FileNotFoundError, match="edits.json is missing, which says what edits.safetensors belongs to"):
        edit.load(path)


@pytest.mark.parametrize(
    ("part", "value"),
    [("backbone", 3), ("base", []), ("edits", []), ("folded", {}), ("folded", [1]), ("sampler", "x"), ("data", None)],
    ids=str,
)
def test_a_part_of_another_kind_is_named_whoever_wrote_it(tmp_path, artifact, part, value):
    path = shutil.copytree(artifact, tmp_path / "a")
    described = {k: v for k, v in json.loads((path / "edits.json").read_text()).items() if k != "checksums"}
    (path / "edits.json").write_text(json.dumps({**described, part: value}))
    with pytest.raises(ValueError, match=rf"edits.json holds .* for {part}: it was not written by edit.save"):
        edit.load(path)


def test_sizes_that_no_model_has_are_refused_before_it_is_built(tmp_path, dit):
    path = edit.save(dit, tmp_path / "a")
    described = {k: v for k, v in json.loads((path / "edits.json").read_text()).items() if k != "checksums"}
    for key, value in (("depth", 5000), ("hidden_size", 10**400)):
        changed_ = {**described, "base": {**described["base"], key: value}}
        (path / "edits.json").write_text(json.dumps(changed_))
        with pytest.raises(
            ValueError, match=rf"edits.json: (base.{key} is .*, expected at most|samples of .* are more than)"
        ):
            edit.load(path)


def test_what_was_changed_on_purpose_is_accepted_by_a_command_or_for_once(tmp_path, artifact, capsys):
    from recipes.checksums import main

    path = tmp_path / "run" / "artifact"
    shutil.copytree(artifact, path)
    described = json.loads((path / "edits.json").read_text())
    (path / "edits.json").write_text(json.dumps({**described, "run": {"name": "by hand"}}))
    with pytest.raises(ValueError, match=rf"edits.json is not what .* `python -m recipes.checksums {path}`$"):
        edit.load(path)
    assert edit.load(path, verify=False).run == {"name": "by hand"}
    assert main([str(tmp_path / "run")]) == 0 and f"accepted  {path}" in capsys.readouterr().out
    assert edit.load(path).run == {"name": "by hand"}
    (path / "edits.json").unlink()
    (path / "edits.safetensors").unlink()
    assert main([str(path)]) == 2 and "has no edits.json" in capsys.readouterr().err


def test_an_artifact_written_again_as_it_is_laid_out_otherwise_is_the_same(tmp_path, artifact):
    path = shutil.copytree(artifact, tmp_path / "a")
    described = json.loads((path / "edits.json").read_text())
    (path / "edits.json").write_text(json.dumps(described, sort_keys=True))
    assert same(edit.load(path), edit.load(artifact))


def test_a_full_disk_leaves_the_earlier_artifact_and_names_it(tmp_path, dit):
    """A real limit on file size, for what safetensors writes itself."""
    import resource

    from ranks import run_ranks

    path = edit.save(dit, tmp_path / "a")
    before = {f.name: f.read_bytes() for f in path.iterdir()}

    def limited() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(OSError) as error:
            edit.save(dit, path)
        assert error.value.errno
        return str(error.value)

    (said,) = run_ranks(limited, 1)
    assert str(path) in said
    assert {f.name: f.read_bytes() for f in path.iterdir()} == before and [f.name for f in tmp_path.iterdir()] == ["a"]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two checkpoints, at steps 4 and 8."""
    folder = tmp_path_factory.mktemp("run")
    train(folder, "name=a", "trainer.max_steps=8")
    return folder


def content(path: Path) -> bytes:
    return path.read_bytes()


CHECKPOINT = [(which, way) for which in ("newest", "sum") for way in (*BYTES, swapped)]
CHECKPOINT += [("without a sum", way) for way in (*BYTES, swapped)]


@pytest.mark.parametrize(("which", "way"), CHECKPOINT, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_of_damaged_checkpoints_the_newest_whole_one_is_taken_and_the_damaged_are_named(
    tmp_path, run, capsys, which, way
):
    kept = {p.name: p.read_bytes() for p in checkpoints(run / "a" / "checkpoints")}
    tried = 1 if way is swapped else 3
    for seed in range(tried):
        folder_ = tmp_path / f"{seed}"
        shutil.copytree(run / "a" / "checkpoints", folder_)
        old, new = checkpoints(folder_)
        if which == "without a sum":
            checksum_of(new).unlink()
            checksum_of(old).unlink()
        way(checksum_of(new) if which == "sum" else new, random.Random(f"{which} {way.__name__} {seed}"))
        capsys.readouterr()
        try:
            found = newest(folder_)
        except UserError as error:
            assert way is swapped and one_sentence(error) and old.name in str(error) and new.name in str(error)
            continue
        said = capsys.readouterr().out
        if found == new:
            loaded = torch.load(new, weights_only=True)["state_dict"]
            true = torch.load(run / "a" / "checkpoints" / new.name, weights_only=True)["state_dict"]
            assert loaded.keys() == true.keys() and all(torch.equal(v, true[k]) for k, v in loaded.items())
        else:
            assert found == old and found.read_bytes() == kept[old.name]
            assert way in (renamed, folder) or (f"{new} is damaged (" in said and said.count("\n") == 1)


def test_if_no_checkpoint_is_whole_the_run_refuses_naming_all_and_trains_nothing(tmp_path, run):
    shutil.copytree(run / "a", tmp_path / "a")
    for number, path in enumerate(checkpoints(tmp_path / "a" / "checkpoints")):
        flips(path, random.Random(number))
    before = (tmp_path / "a" / "metrics.csv").read_bytes()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole \(step_00000008.ckpt: .*; step_00000004.ckpt: "):
        train(tmp_path, "name=a", "trainer.max_steps=12")
    assert (tmp_path / "a" / "metrics.csv").read_bytes() == before


def test_a_run_with_changed_bytes_in_its_last_checkpoint_ends_equal(tmp_path, run):
    train(tmp_path, "name=whole")
    shutil.copytree(run / "a", tmp_path / "a")
    flips(checkpoints(tmp_path / "a" / "checkpoints")[-1], random.Random(0))
    train(tmp_path, "name=a")
    assert losses(tmp_path, "a") == losses(tmp_path, "whole") and len(rows(tmp_path, "a")) == 12
    left = sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir())
    assert left == [f"step_{k:08d}.ckpt{end}" for k in (8, 12) for end in ("", ".sha256")]


def test_a_checksum_is_read_by_sha256sum_and_a_checkpoint_without_one_is_taken(tmp_path, run):
    import subprocess

    folder_ = shutil.copytree(run / "a" / "checkpoints", tmp_path / "c")
    new = checkpoints(folder_)[-1]
    subprocess.run(["sha256sum", "-c", "--strict", checksum_of(new).name], cwd=folder_, check=True)
    for given in ("", "no sum", "\0" * 64):  # killed in between; or the sum itself is torn
        checksum_of(new).write_text(given)
        assert newest(folder_) == new
    checksum_of(new).unlink()
    assert newest(folder_) == new


def test_a_checkpoint_under_the_name_of_another_step_is_not_taken(tmp_path, run, capsys):
    folder_ = shutil.copytree(run / "a" / "checkpoints", tmp_path / "c")
    old, new = checkpoints(folder_)
    shutil.copy(old, folder_ / "step_00000100.ckpt")
    (folder_ / "step_best.ckpt").write_text("not ours")
    assert newest(folder_) == new and "step_00000100.ckpt is damaged (it holds step 4)" in capsys.readouterr().out


@pytest.mark.parametrize("way", [flip, cut, zeros, renamed, empty], ids=lambda v: v.__name__)
def test_of_a_checkpoint_that_is_a_folder_every_file_counts(tmp_path, capsys, way):
    for step in (4, 8):
        path = tmp_path / f"step_{step:08d}.ckpt" / "checkpoint"
        path.mkdir(parents=True)
        for rank in range(2):
            (path / f"rank_{rank}.pt").write_bytes(random.Random(rank).randbytes(1000))
        (path.parent / WHOLE).write_text(json.dumps(of_files(path.parent, files_in(path.parent))) if step == 8 else "")
    assert newest(tmp_path).name == "step_00000008.ckpt"
    way(tmp_path / "step_00000008.ckpt" / "checkpoint" / "rank_1.pt", random.Random(0))
    assert newest(tmp_path).name == "step_00000004.ckpt"  # of an earlier version, its marker empty
    assert "rank_1.pt is not what was saved" in capsys.readouterr().out


def test_a_folder_gets_its_checksums_when_all_ranks_have_written_it(tmp_path):
    """As DeepSpeed saves, which runs on GPUs only."""

    def save(path: Path) -> None:
        (path / "checkpoint").mkdir(parents=True)
        (path / "checkpoint" / "rank_0.pt").write_bytes(b"weights")

    strategy = SimpleNamespace(checkpoint_io=None, reduce_boolean_decision=lambda decision, all: decision)
    trainer = SimpleNamespace(save_checkpoint=save, strategy=strategy, is_global_zero=True)
    for step in (4, 8):
        Checkpoints(tmp_path, 4, 1, None)._save(trainer, tmp_path / f"step_{step:08d}.ckpt")
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000008.ckpt"]
    assert newest(tmp_path) == tmp_path / "step_00000008.ckpt"
    (tmp_path / "step_00000008.ckpt" / "checkpoint" / "rank_0.pt").write_bytes(b"weighty")
    with pytest.raises(UserError, match="rank_0.pt is not what was saved"):
        newest(tmp_path)


# ---- what else a run's folder holds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", BYTES, ids=lambda v: v.__name__)
@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv"])
def test_a_damaged_file_of_a_run_is_named_or_does_not_matter(tmp_path, run, name, way):
    cfg = config(run, "name=a", "trainer.max_steps=8")
    for seed in range(3):
        out = tmp_path / f"{seed}"
        out.mkdir()
        shutil.copytree(run / "a" / "checkpoints", out / "checkpoints")
        for kept in ("config.yaml", "metrics.csv"):
            shutil.copy(run / "a" / kept, out / kept)
        way(out / name, random.Random(f"{name} {way.__name__} {seed}"))
        try:
            if name == "config.yaml":
                refuse_other_run(cfg, out)
            else:
                CSVLogger(out / name).resume(4)
        except (UserError, OSError) as error:
            assert one_sentence(error) and (str(out) in str(error))


def test_a_config_that_holds_nothing_is_damaged(tmp_path):
    for text in ("[1, 2]", "a: {b", "\0", "", "just text"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="config.yaml is damaged"):
            read_config(tmp_path / "config.yaml")


def test_of_metrics_a_torn_row_is_forgotten(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss\n1,0.5\n2,0.4\n1")  # of step 12, torn by a full disk
    CSVLogger(path).resume(12)
    assert path.read_text().split() == ["step,train/loss", "1,0.5", "2,0.4"]


def test_metrics_that_cannot_be_written_end_in_one_sentence_and_stay_whole(tmp_path):
    import resource

    from ranks import run_ranks

    log = CSVLogger(tmp_path / "metrics.csv")
    log.resume(0)
    log.log_metrics({"a": 1.0}, 1)
    before = (tmp_path / "metrics.csv").read_text()

    def limited() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), len(before)))
        with pytest.raises(UserError) as error:
            log.log_metrics({"a": 1.0}, 2)
        with pytest.raises(UserError):
            log.log_metrics({"a": 1.0, "b": 2.0}, 2)  # a new column: written anew
        return str(error.value)

    (said,) = run_ranks(limited, 1)
    assert "could not write" in said and "metrics.csv (file too large)" in said
    assert (tmp_path / "metrics.csv").read_text() == before and len(list(tmp_path.iterdir())) == 1
