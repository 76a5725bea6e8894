"""A small encoder, trained without labels: the folder that it leaves, its loss, and that it is a run like others."""

import copy
import csv
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from small_runs import CONFIGS, config, train

from edit.alignment.encoder import Encoder
from recipes import encoder
from recipes.ahead import look_ahead, told
from recipes.config.chosen import procedure_of
from recipes.config.errors import UserError
from recipes.plan import main as plan
from recipes.report.run_record import read
from recipes.steps.encoder import features, new, nt_xent, probe, view

SHORT = ("experiment=dit_pixels/encoder", "recipe.depth=1", "recipe.width=16", "name=vit")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """With an encoder after three steps."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, *SHORT, "trainer.max_steps=3")
    return folder


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the folder -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_timm_and_the_framework_load_what_the_run_leaves_and_see_the_same(runs):
    place = runs / "vit" / "encoder"
    weights = str(place / "model.safetensors")  # named, as timm 1.0.22 takes those of a folder for a pickle
    model = timm.create_model(f"local-dir:{place}", checkpoint_path=weights).eval()
    x = torch.rand(3, 1, 8, 8, generator=generator()) * 2 - 1
    seen = Encoder(str(place)).load()(x)
    assert seen.grid == (8, 8) and seen.tokens.shape == (3, 64, 16)  # those of the model's tokens
    torch.testing.assert_close(seen.tokens, model.forward_features(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    # behind the final norm: mean 0 and deviation 1, as the norm has not learned much in three steps
    torch.testing.assert_close(seen.tokens.mean(-1), torch.zeros(3, 64), rtol=0, atol=0.05)
    assert Encoder(str(place), layers=(0,)).load()(x).maps[0].shape == (3, 2, 64, 64)
    assert {p.name for p in place.iterdir()} == {"config.json", "model.safetensors"}


def test_the_log_has_the_loss_and_what_a_probe_says(runs):
    with open(runs / "vit" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "3"] and float(rows[0]["loss"]) > 0
    scores = {k.partition("/")[2]: float(v) for k, v in rows[-1].items() if k.startswith("probe/")}
    assert set(scores) == {"pixels", "untrained", "encoder"} and 0.95 < scores["pixels"] < 0.98  # 347 of 360 digits
    assert all(0.1 < v <= 1 for v in scores.values())


def test_pictures_are_decoded_and_cut_into_the_models_tokens(tmp_path, capsys):
    small = ["recipe.depth=1", "recipe.width=16", "data.set.count=64", "data.set.held=16", "data.batch_size=8"]
    cfg = composed(tmp_path, "experiment=flux_tiny/encoder", *small, "trainer.max_steps=1", "name=vit")
    run(cfg)
    assert "probe" not in capsys.readouterr().out  # pictures with captions have no classes
    seen = Encoder(str(tmp_path / "vit" / "encoder")).load()(torch.zeros(1, 3, 32, 32))
    assert seen.grid == (4, 4)


def composed(folder, *words):
    """A checked configuration without the settings of a small run of digits."""
    from hydra import compose, initialize_config_dir

    from recipes.config.check import check
    from recipes.config.sources import register

    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        cfg = compose("train", [words[0], f"runs={folder}", *words[1:]])
    if errors := check(cfg):
        raise UserError(errors[0])
    return cfg


def run(cfg):
    from recipes.training import run as whole

    return whole(cfg)


# ---- a run like others ----------------------------------------------------------------------------------------------


def test_a_finished_encoder_is_not_trained_again_and_other_settings_are_refused(runs, capsys):
    file = runs / "vit/encoder/model.safetensors"
    written = file.stat().st_mtime_ns
    assert read(runs / "vit").state == "finished"
    capsys.readouterr()
    train(runs, *SHORT, "trainer.max_steps=3")
    said = capsys.readouterr().out
    assert "is complete (3 steps): a new run needs another name=" in said and "eval.py" not in said
    assert file.stat().st_mtime_ns == written
    with pytest.raises(UserError, match="holds a run with recipe.width=16, this command says 32"):
        train(runs, *SHORT, "recipe.width=32", "trainer.max_steps=3")
    with pytest.raises(UserError, match="holds an encoder of 3 steps, this command says trainer.max_steps=4"):
        train(runs, *SHORT, "trainer.max_steps=4")


def test_a_stopped_one_leaves_no_folder_and_begins_again_with_the_same_weights(runs, tmp_path, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    words = (*SHORT, "trainer.max_steps=3")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoder.steps, "save", crash)
        train(tmp_path, *words)
    assert not (tmp_path / "vit/encoder").exists() and read(tmp_path / "vit").state.startswith("stopped at step 3")
    (tmp_path / "vit/.encoder.tmp-1").mkdir()  # of a process that was killed while it wrote
    train(tmp_path, *words)
    first, again = (folder / "vit/encoder/model.safetensors" for folder in (runs, tmp_path))
    assert first.read_bytes() == again.read_bytes()
    assert not list((tmp_path / "vit").glob(".encoder*"))
    with open(tmp_path / "vit/metrics.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "3"]


def test_as_a_stage_it_is_named_before_and_complete_once_its_folder_is_there(runs, tmp_path):
    for folder, line in ((runs, "encoder: complete"), (tmp_path, f"encoder: a run in one piece into {tmp_path}/vit")):
        cfg = config(folder, "name=student")
        cfg.before = [{"encoder": [*SHORT]}]
        assert told(look_ahead(cfg, CONFIGS))[0] == line


def test_there_is_no_training_of_a_denoiser_to_plan(capsys):
    assert plan(["experiment=dit_pixels/encoder"]) == 2
    assert "TrainingEncoder trains no denoiser, so there is no training to plan" in capsys.readouterr().err


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A configuration that is right."""
    return composed(tmp_path_factory.mktemp("chosen"), "experiment=dit_pixels/encoder")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("matching", {"_target_": "edit.few_step.progressive.Progressive"}, "no denoiser: leave matching out"),
        ("terms", {"a": {"_target_": "edit.distillation.output.OutputKD"}}, "no denoiser: leave terms out"),
        ("edits", {"a": {"_target_": "edit.caching.reuse.Reuse"}}, "no denoiser: leave edits out"),
        ("teacher.path", "x", "learns from images alone: leave the teacher out"),
        ("teacher.placement", "tied", "learns from images alone: leave the teacher out"),
        ("trainer.strategy", "ddp", "is the work of one device"),
        ("trainer.accumulate", 2, "is the work of one device"),
        ("optimizer.kind", "adamw8bit", "trains with one group of AdamW"),
        ("data.batch_size", 1, "set data.batch_size to at least 2"),
        ("evaluate", {"n": 8}, "makes no denoiser that could be evaluated: set evaluate=null"),
    ],
)
def test_what_it_cannot_have_is_refused_in_one_sentence(chosen, key, value, sentence):
    cfg = copy.deepcopy(chosen)
    OmegaConf.update(cfg, key, value, merge=False)
    (said,) = procedure_of(cfg).check(cfg)
    assert sentence in said and "\n" not in said


def test_numbers_that_no_network_has_are_refused():
    for wrong, sentence in (({"width": 30}, "recipe.width=30 is no multiple of 4"), ({"heads": 3}, "recipe.heads=3")):
        with pytest.raises(ValueError, match=sentence):
            encoder.TrainingEncoder(**wrong)
    for wrong in ({"dropped": 1.0}, {"temperature": 0.0}, {"depth": 0}):
        with pytest.raises(ValueError, match=f"TrainingEncoder: {next(iter(wrong))} must be "):
            encoder.TrainingEncoder(**wrong)


def test_without_timm_it_says_how_to_get_it(chosen, monkeypatch):
    monkeypatch.setattr(encoder, "find_spec", lambda name: None)
    (said,) = procedure_of(chosen).check(chosen)
    assert said.endswith("a model of timm, which is not installed: pip install 'edit-dit[vision]'")


def test_data_that_are_no_images_are_refused(tmp_path):
    words = ("backbone=wan", "size=tiny", "data=moving_shapes", "recipe=encoder", "evaluate=null", "name=x")
    with pytest.raises(UserError, match="takes images of one size"):
        run(composed(tmp_path, *words, "data.set.count=8", "data.set.held=4", "trainer.max_steps=1"))


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="is the work of one process: start it without torchrun or srun"):
        train(tmp_path, *SHORT, "trainer.max_steps=1")


# ---- the step -------------------------------------------------------------------------------------------------------


def test_the_loss_is_simclrs_by_a_double_loop():
    z = torch.randn(6, 4, generator=generator())
    cos = F.cosine_similarity(z[:, None], z[None], dim=-1).double()
    total = 0.0
    for i in range(6):
        pair = (i + 3) % 6
        total -= math.log(math.exp(cos[i, pair] / 0.5) / sum(math.exp(cos[i, j] / 0.5) for j in range(6) if j != i))
    assert nt_xent(z, 0.5).item() == pytest.approx(total / 6, rel=1e-5)


def test_the_loss_is_least_where_views_agree_and_images_differ():
    alike = torch.eye(4).repeat(2, 1)
    assert nt_xent(alike, 0.1) < 1e-3 < nt_xent(alike.roll(1, 0)[torch.tensor([1, 2, 3, 0, 4, 5, 6, 7])], 0.1)
    assert nt_xent(torch.ones(8, 4), 0.1).item() == pytest.approx(math.log(7), rel=1e-5)  # all the same


def test_views_are_pure_functions_of_the_generator_and_move_the_picture_as_they_say(monkeypatch):
    x = torch.rand(5, 3, 8, 8, generator=generator()) * 2 - 1
    assert torch.equal(view(x, generator(1)), view(x, generator(1)))
    assert not torch.allclose(view(x, generator(1)), view(x, generator(2)))
    still = dict.fromkeys(("TURN", "ZOOM", "SHIFT", "BRIGHT", "GRAIN"), 0.0)
    for name, value in still.items():
        monkeypatch.setattr(encoder.steps, name, value)
    torch.testing.assert_close(view(x, generator()), x)  # nothing is changed
    monkeypatch.setattr(encoder.steps, "TURN", 20.0)
    flat = torch.full((2, 1, 8, 8), -1.0)
    torch.testing.assert_close(view(flat, generator()), flat)  # a border that goes on: no corners appear


@torch.no_grad()
def test_a_token_knows_its_place_and_its_pixel_before_training():
    told = encoder.steps.arguments([8, 8], 1, 16, 1, 2)
    model = new(told).eval()
    x = torch.zeros(2, 3, 8, 8)
    x[1, :, 3, 4] = 1.0
    tokens = model.forward_features(x)
    assert not torch.allclose(tokens[0, 0], tokens[0, 1], atol=0.1)
    moved = (tokens[1] - tokens[0]).norm(dim=-1)
    assert moved.argmax() == 3 * 8 + 4 and moved[3 * 8 + 4] > 0.3


def test_views_lack_patches_in_training_alone():
    told = encoder.steps.arguments([8, 8], 1, 16, 1, 2)
    model = new(told, 0.5)
    x = torch.zeros(2, 3, 8, 8)
    assert model.forward_features(x).shape[1] == 32 and features(model, x, torch.device("cpu")).shape == (2, 16)
    assert model.training and model.eval().forward_features(x).shape[1] == 64


def test_a_probe_of_what_tells_the_class_is_right_and_of_noise_it_guesses():
    labels = torch.arange(200) % 4
    clear = F.one_hot(labels, 4).float() + 0.1 * torch.randn(200, 4, generator=generator())
    noise = torch.randn(400, 4, generator=generator())
    assert probe(clear[:100], labels[:100], clear[100:], labels[100:]) == 1.0
    assert probe(noise[:200], labels, noise[200:], labels) < 0.4


# ---- how good it is -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_mean_token_tells_held_out_digits_much_better_than_an_untrained_networks(tmp_path):
    """The stage as the worlds have it, about a minute on one core; the 64 raw pixels tell more, 96.4 %."""
    run(composed(tmp_path, "experiment=dit_pixels/encoder"))
    with open(tmp_path / "dit_pixels_encoder/metrics.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["probe/encoder"]) > max(0.93, float(last["probe/untrained"]) + 0.05)
