"""Dense2MoE from the command: a ranking and three stages, each a run that begins with the one before."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from small_runs import CONFIGS, rows, train
from weights import randomise

import edit
from edit.backbones.dit import DiTConfig
from edit.moe.dense2moe import Dense2MoE, take
from edit.moe.mixture_of_blocks import MixtureOfBlocks
from edit.moe.taylor import TaylorRanking
from edit.sampling import Sampler
from edit.solvers import Euler
from edit.stream import Condition
from recipes.config.check import check
from recipes.config.errors import UserError
from recipes.config.sources import register
from recipes.config.staged import gathered, stages_of

SHORT = ("before=[]", "backbone.depth=4", "data.batch_size=8", "checkpoint.every=2", "optimizer.warmup=0")


def words(folder, stage, name, *more):
    keys = (*SHORT, f"world.path={folder}/model", "trainer.max_steps=3")
    return (f"experiment=dit_digits/{stage}", f"name={name}", *keys, *more)


def ranked(folder, name="it_ranking"):
    return ("experiment=dit_digits/dense2moe_ranking", f"name={name}", "before=[]", "backbone.depth=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a model of random weights, its ranking and the three stages."""
    folder = tmp_path_factory.mktemp("dense2moe")
    model = DiTConfig(8, 1, 4, 32, 4, 2, num_classes=10, learn_sigma=False, time="flow", frequency_shift=1).build()
    randomise(model, 0)
    edit.save(model, folder / "model", sampler=Sampler(Euler(4)))
    train(folder, *ranked(folder), f"world.path={folder}/model", "data.batch_size=8", "recipe.batches=2")
    train(folder, *words(folder, "dense2moe_shared", "it_shared", f"edits.dense2moe.start={folder}/it_ranking"))
    train(folder, *words(folder, "dense2moe_experts", "it_experts", f"edits.dense2moe.start={folder}/it_shared"))
    train(folder, *words(folder, "dense2moe", "it"))
    return folder


@pytest.fixture(scope="module")
def states(folder):
    found = {
        name: edit.load(folder / name).denoiser for name in ("model", "it_ranking", "it_shared", "it_experts", "it")
    }
    return {name: (denoiser, denoiser.state_dict()) for name, denoiser in found.items()}


def changed(states, before: str, after: str) -> set[str]:
    one, other = states[before][1], states[after][1]
    return {k for k in one if not torch.equal(one[k], other[k])}


@pytest.mark.slow
def test_each_run_leaves_the_artifact_of_its_stage(states):
    kinds = {name: [type(e) for e in denoiser.applied.values()] for name, (denoiser, _) in states.items()}
    assert kinds["it_ranking"] == [TaylorRanking] and kinds["it_shared"] == kinds["it_experts"] == [Dense2MoE]
    assert kinds["it"] == [Dense2MoE, MixtureOfBlocks]
    stages = [states[name][0].applied["dense2moe"].stage for name in ("it_shared", "it_experts", "it")]
    assert stages == ["shared", "experts", "blocks"]
    assert states["it"][0].applied["mixture_of_blocks"].blocks == ((1, 2, 1),)


@pytest.mark.slow
def test_the_shared_expert_has_the_channels_of_largest_importance(states):
    """Routed experts are not trained in stage A, so they tell which channels they have."""
    whole, scores = states["model"][1], states["it_ranking"][1]
    for i in range(4):
        order = scores[f"edits.taylor_ranking.{i}"].argsort(descending=True, stable=True)
        rows_ = whole[f"model.blocks.{i}.mlp.fc1.weight"]
        rest, into = rows_[order[32:]], states["it_shared"][1][f"edits.dense2moe.{i}.experts.into"]
        assert torch.equal(into[0, 0], rest[0]) and torch.equal(into[11, 0], rest[11])  # dealt one by one
        assert torch.equal(into[0, 1], rest[23]) and torch.equal(into[11, 1], rest[12])  # and back


@pytest.mark.slow
def test_each_stage_changes_what_it_trains_and_nothing_else(states):
    b, c = changed(states, "it_shared", "it_experts"), changed(states, "it_experts", "it")
    assert all(".experts." in k or ".router." in k for k in b) and any(".router." in k for k in b)
    assert c and all(
        k.startswith(("model.blocks.1.", "model.blocks.2.", "edits.dense2moe.1", "edits.dense2moe.2")) for k in c
    )
    trained_in_a = {k for k in states["model"][1] if k in states["it_shared"][1]} & changed_in_a(states)
    assert trained_in_a and all(k.startswith("model.blocks.") for k in trained_in_a)


def changed_in_a(states) -> set[str]:
    whole, after = states["model"][1], states["it_shared"][1]
    return {k for k in whole if k in after and not torch.equal(whole[k], after[k])}


@pytest.mark.slow
@torch.no_grad()
def test_after_stage_b_without_routed_experts_it_is_stage_as_model_bit_for_bit(folder):
    a, b = (edit.load(folder / name).denoiser for name in ("it_shared", "it_experts"))
    take(b, 0)
    x, t, label = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.5, 0.9]), Condition(label=torch.arange(3))
    assert torch.equal(a(x, t, label).sample, b(x, t, label).sample)


@pytest.mark.slow
def test_losses_and_what_is_watched_are_logged(folder):
    shared, experts, last = (rows(folder, name)[-1] for name in ("it_shared", "it_experts", "it"))
    wanted = {"train/output/output_kd", "train/features/balanced_features", "train/features/raw/0"}
    assert all(wanted <= row.keys() for row in (shared, experts, last))
    assert "train/dense2moe/balance" not in shared and float(experts["train/dense2moe/balance"]) >= 0.01 - 1e-6
    assert 1 <= float(experts["train/dense2moe/unevenness"]) <= 12
    assert {"train/groups/balanced_features", "train/mixture_of_blocks/entropy"} <= last.keys()
    assert "train/features/raw/1" not in last and "train/groups/raw/2" in last
    assert all(float(row["train/loss"]) > 0 for row in (shared, experts, last))


@pytest.mark.slow
def test_a_stage_that_is_started_from_the_wrong_one_is_refused_in_one_sentence(folder):
    said = "dense2moe .Dense2MoE.: stage=experts begins with the artifact of stage=shared, and start=.*it_ranking has"
    with pytest.raises((UserError, ValueError), match=said):
        train(folder, *words(folder, "dense2moe_experts", "bad", f"edits.dense2moe.start={folder}/it_ranking"))


@pytest.mark.parametrize("world", ["dit_digits", "flux_tiny", "sd3_tiny", "pixart_tiny", "qwen_image_tiny"])
def test_one_command_names_all_stages_and_passes_the_check(world):
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        cfg = compose(
            "train", gathered([f"experiment={world}/dense2moe", "name=mine", "before.shared.trainer.max_steps=2"])
        )
    assert check(cfg) == []
    stages = {stage.name: stage.all for stage in stages_of(cfg)}
    assert list(stages) == ["teacher", "ranking", "shared", "experts"]
    assert "name=mine_shared" in stages["shared"] and "trainer.max_steps=2" in stages["shared"]
    assert "edits.dense2moe.start=runs/mine_shared" in stages["experts"] and "before=[]" in stages["experts"]
    assert cfg.edits.dense2moe.start == "runs/mine_experts"


@pytest.mark.parametrize("name", ["ranking", "shared", None, "s", "m", "xs"])
def test_configurations_of_flux_dev_pass_the_check(name):
    register()
    experiment = "experiment=flux_dev/dense2moe" + (f"_{name}" if name else "")
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        assert check(compose("train", [experiment, "backbone.path=dev"])) == []
