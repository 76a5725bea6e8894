import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import edit
from edit.artifacts import weights
from edit.edm import EDMHeun
from edit.objectives import DDPM, EDM, FlowMatching, LogitNormal
from edit.pruning.depth import DepthPruning
from edit.sampling import Sampler
from edit.solvers import DDIMSolver, Euler, Heun
from edit.tuning.lora import LoRA

MODEL = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def artifact(tmp_path, dit) -> Path:
    return edit.save(dit, tmp_path / "artifact")


def contents(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(path.iterdir())}


def rewrite(path: Path, **changes) -> None:
    """As somebody would who knows what checksums are: without them."""
    content = json.loads(path.read_text())
    content.pop("checksums", None)
    content.update(changes)
    path.write_text(json.dumps(content))


def one_sentence(error: BaseException) -> bool:
    return "\n" not in str(error) and str(error)[-1] != "."


# ---- round trip ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_artifact_holds_all_that_sampling_and_judging_need(tmp_path, dit, batch):
    objective = FlowMatching(time=LogitNormal(0.1, 0.9), cosine=1.0)
    sampler = Sampler(Heun(7), guidance=1.5, interval=(0.1, 0.9))
    data, run = {"_target_": "data.sets.digits.Digits", "size": 8}, {"name": "x", "step": 12}
    edit.apply(dit, {"lora": LoRA(rank=2)})
    path = edit.save(dit, tmp_path / "run" / "artifact", objective, sampler, data, run)
    assert path == tmp_path / "run" / "artifact"
    for given in (path, str(path), tmp_path / "run"):  # a run folder means the artifact inside it
        got = edit.load(given)
        assert (got.path, got.objective, got.sampler, got.data, got.run) == (path, objective, sampler, data, run)
    assert not got.denoiser.training and all(p.requires_grad for p in got.denoiser.parameters())
    assert torch.equal(got.denoiser(*batch).sample, dit(*batch).sample)


def test_without_an_objective_the_backbones_convention_decides(tmp_path, make_dit):
    flow = FlowMatching(), Euler(50)
    usual = {"flow": flow, "sit": flow, "ddpm": (DDPM(), DDIMSolver(50)), "edm": (EDM(), EDMHeun(30))}
    for time, (objective, solver) in usual.items():
        path = edit.save(make_dit(time=time), tmp_path / time)
        assert edit.load(path).objective == objective and edit.load(path).sampler == Sampler(solver)


def test_an_artifact_is_json_and_safetensors_and_nothing_else(tmp_path, dit):
    edit.apply(dit, {"deep": DepthPruning(0.34), "lora": LoRA(rank=2)})
    path = edit.save(dit, tmp_path / "a")
    assert sorted(f.name for f in path.iterdir()) == ["config.json", MODEL, "edits.json", "edits.safetensors"]
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def test_given_weights_are_written_instead_of_the_live_ones(tmp_path, dit):
    ema = {k: v + 1 if v.is_floating_point() else v for k, v in dit.state_dict().items()}
    loaded = edit.load(edit.save(dit, tmp_path / "a", state=ema)).denoiser
    for name, p in loaded.named_parameters():
        assert torch.equal(p, ema[name])


@torch.no_grad()
def test_weights_can_be_written_in_bfloat16_and_run(tmp_path, make_dit, batch):
    for name, options in (
        ("plain", {}),
        ("stock", {"frequency_shift": 1.0}),
        ("modern", {"rope": True, "registers": 1}),
    ):
        dit = make_dit(**options)
        path = edit.save(dit, tmp_path / name, dtype=torch.bfloat16)
        assert {v.dtype for v in load_file(path / MODEL).values()} == {torch.bfloat16}
        assert (path / MODEL).stat().st_size < 0.6 * (edit.save(dit, tmp_path / "full") / MODEL).stat().st_size
        out = edit.load(path).denoiser(*batch).sample.float()
        exact = dit(*batch).sample
        assert (out - exact).norm() < 0.03 * exact.norm()  # 8 bits of mantissa


@pytest.mark.parametrize("options", [{}, {"frequency_shift": 1.0}], ids=["own names", "stock names"])
@torch.no_grad()
def test_sharded_weights_come_back_whole(tmp_path, make_dit, batch, options):
    dit = make_dit(**options)
    path = edit.save(dit, tmp_path / "a", max_shard_size="60KB")
    index = json.loads((path / f"{MODEL}.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and not (path / MODEL).exists()
    assert torch.equal(edit.load(path).denoiser(*batch).sample, dit(*batch).sample)


def test_saving_does_not_touch_the_denoiser(tmp_path, dit):
    before = {k: v.clone() for k, v in dit.state_dict().items()}
    dit.train()
    edit.save(dit, tmp_path / "a", dtype=torch.bfloat16)
    assert dit.training and all(torch.equal(v, before[k]) for k, v in dit.state_dict().items())


# ---- atomic writing --------------------------------------------------------------------------------------------------


def test_a_new_artifact_replaces_the_old_one_whole(tmp_path, dit, make_dit):
    path = edit.save(dit, tmp_path / "a", max_shard_size="60KB")
    new = make_dit(seed=5)
    edit.save(new, path)
    assert sorted(f.name for f in path.iterdir()) == ["config.json", MODEL, "edits.json"]  # no shard of before
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    assert all(torch.equal(v, new.state_dict()[k]) for k, v in edit.load(path).denoiser.state_dict().items())


def test_an_exception_during_a_save_leaves_the_old_artifact_whole(artifact, make_dit):
    before = contents(artifact)
    with pytest.raises(TypeError, match="not JSON serializable"):  # raised after the weights were written
        edit.save(make_dit(seed=5), artifact, run={"callback": object()})
    assert contents(artifact) == before
    assert [f.name for f in artifact.parent.iterdir()] == ["artifact"]  # a full disk is not made fuller


def test_a_kill_during_a_save_leaves_the_old_artifact_whole_and_the_next_save_works(artifact, make_dit, batch):
    class Deadly(dict):
        def items(self):  # met while the description is written, after the weights
            os._exit(137)

    before, new = contents(artifact), make_dit(seed=5)
    child = multiprocessing.get_context("fork").Process(
        target=edit.save, args=(new, artifact), kwargs={"run": {"x": Deadly(y=1)}}
    )
    child.start()
    child.join(30)
    assert child.exitcode == 137
    assert contents(artifact) == before
    edit.save(new, artifact)
    with torch.no_grad():
        assert torch.equal(edit.load(artifact).denoiser(*batch).sample, new(*batch).sample)


# ---- refusals: one sentence that names what is wrong -----------------------------------------------------------------


def test_missing_weights_are_named(artifact):
    (artifact / MODEL).unlink()
    with pytest.raises(FileNotFoundError, match=f"{MODEL} is missing: the artifact is not whole"):
        edit.load(artifact)


@pytest.mark.parametrize("keep", [0, 5, 300, -1], ids=["empty", "no header", "half a header", "last byte missing"])
def test_truncated_weights_are_refused(artifact, keep):
    whole = (artifact / MODEL).read_bytes()
    (artifact / MODEL).write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=f"{MODEL} is not what was saved there"):
        edit.load(artifact)
    with pytest.raises(ValueError, match=f"{MODEL} is not a whole safetensors file"):
        edit.load(artifact, verify=False)


def test_a_header_that_promises_more_than_the_file_holds_allocates_nothing(artifact):
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**9, 10**3], "data_offsets": [0, 4 * 10**12]}}).encode()
    (artifact / MODEL).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        edit.load(artifact, verify=False)


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda s: s.pop("blocks.1.attn.qkv.weight"), "1 keys are missing, such as blocks.1.attn.qkv.weight"),
        (lambda s: s.update(alien=torch.zeros(2)), "it has 1 unknown keys, such as alien"),
        (
            lambda s: s.update({"blocks.0.mlp.fc1.bias": torch.zeros(64)}),
            r"blocks.0.mlp.fc1.bias has shape \(64,\), expected \(128,\)",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_weights_of_another_model_are_refused_before_any_is_read(artifact, monkeypatch, damage, complaint):
    state = load_file(artifact / MODEL)
    damage(state)
    save_file(state, artifact / MODEL)
    monkeypatch.setattr(weights, "load_file", lambda f: pytest.fail("weights were read before they were checked"))
    with pytest.raises(ValueError, match=f"{MODEL} does not fit this model: {complaint}") as error:
        edit.load(artifact, verify=False)
    assert one_sentence(error.value)


def test_parameters_of_edits_are_checked_too(tmp_path, dit):
    edit.apply(dit, {"lora": LoRA(rank=2)})
    path = edit.save(dit, tmp_path / "a")
    own = load_file(path / "edits.safetensors")
    name, value = next(iter(own.items()))
    save_file({**own, name: torch.cat((value, value))}, path / "edits.safetensors")
    with pytest.raises(ValueError, match="edits.safetensors does not fit this model: .*lora_A.*has shape"):
        edit.load(path, verify=False)
    (path / "edits.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="edits.safetensors is missing: the artifact is not whole"):
        edit.load(path)
    with pytest.raises(ValueError, match="edits.safetensors does not fit this model: 12 keys are missing"):
        edit.load(path, verify=False)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"format": 2}, "has artifact format 2, this version of edit reads 1"),
        ({"format": None}, "has artifact format None"),
        ({"backbone": "os.system"}, "backbone os.system is not one of edit.backbones"),
        ({"backbone": "edit.backbones_evil.X"}, "is not one of edit.backbones"),
        (
            {"backbone": "edit.backbones.dit.DiTConfig"},
            "edit.backbones.dit.DiTConfig, where an edit.denoiser.Denoiser was expected",
        ),
        (
            {"backbone": "edit.backbones.flux9.Flux"},
            "edit.backbones.flux9.Flux, which this version of edit does not have",
        ),
        ({"edits": {"x": {"_target_": "os.system", "command": "true"}}}, "asks for os.system, outside of `edit`"),
        ({"objective": {"_target_": "torch.load", "f": "x"}}, "asks for torch.load, outside of `edit`"),
        ({"sampler": {"_target_": "builtins.exec"}}, "asks for builtins.exec, outside of `edit`"),
        ({"base": {"wings": 2}}, "base.*'wings'"),
    ],
    ids=lambda v: next(iter(v.values())) if isinstance(v, dict) else "",
)
def test_a_description_from_elsewhere_cannot_reach_outside(artifact, changes, complaint):
    rewrite(artifact / "edits.json", **changes)
    with pytest.raises(ValueError, match=complaint) as error:
        edit.load(artifact)
    assert one_sentence(error.value)


@pytest.mark.parametrize("missing", ["backbone", "base", "edits", "folded", "objective", "sampler", "data", "run"])
def test_a_description_with_a_part_missing_is_refused_naming_it(artifact, missing):
    content = json.loads((artifact / "edits.json").read_text())
    del content[missing]
    (artifact / "edits.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"edits.json has no {missing}"):
        edit.load(artifact)


@pytest.mark.parametrize("name", ["config.json", "edits.json"])
def test_a_description_that_is_not_json_is_refused(artifact, name):
    (artifact / name).write_text('{"half": ')
    with pytest.raises(ValueError, match=f"{name} is not JSON"):
        edit.load(artifact, verify=False)
    (artifact / name).write_text("[1]")
    with pytest.raises(ValueError, match=f"{name} holds list, expected an object"):
        edit.load(artifact, verify=False)


@pytest.mark.parametrize("elsewhere", ["../other.safetensors", "/tmp/other.safetensors", "sub/other.safetensors"])
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path, dit, elsewhere):
    path = edit.save(dit, tmp_path / "a", max_shard_size="60KB")
    index = path / f"{MODEL}.index.json"
    weights = json.loads(index.read_text())["weight_map"]
    shutil.copy(path / next(iter(weights.values())), tmp_path / "other.safetensors")
    rewrite(index, weight_map={**weights, next(iter(weights)): elsewhere})
    with pytest.raises(ValueError, match=f"points outside its folder: {elsewhere}"):
        edit.load(path, verify=False)


def test_a_missing_shard_is_named(tmp_path, dit):
    path = edit.save(dit, tmp_path / "a", max_shard_size="60KB")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} is missing: the artifact is not whole"):
        edit.load(path)


def test_a_stock_folder_of_an_unknown_family_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="no backbone here reads a UNet2DModel; known are DiTTransformer2DModel"):
        edit.load(tmp_path)


def test_a_kill_between_the_two_renames_of_a_save_loses_nothing(dit, batch, tmp_path, monkeypatch):
    edit.save(dit, tmp_path / "a")
    rename, renames = os.replace, []

    def killed(source, target):
        renames.append(target)
        if len(renames) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        edit.save(dit, tmp_path / "a")
    monkeypatch.undo()
    assert torch.equal(edit.load(tmp_path / "a").denoiser(*batch).sample, dit(*batch).sample)
    edit.save(dit, tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize(("norm", "family"), [("ada_norm_single", "pixart"), ("ada_norm_zero", "dit")])
def test_published_folders_say_the_old_name_of_their_class_and_fields_of_older_versions(tmp_path, norm, family):
    from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

    small = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "in_channels": 4}
    if family == "pixart":
        small |= {"cross_attention_dim": 16, "caption_channels": 12, "out_channels": 8}
    cls = PixArtTransformer2DModel if family == "pixart" else DiTTransformer2DModel
    cls(**small, norm_type=norm).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    old = {**json.loads(file.read_text()), "_class_name": "Transformer2DModel", "only_cross_attention": False}
    file.write_text(json.dumps(old))
    assert edit.load(tmp_path).denoiser.name == family
