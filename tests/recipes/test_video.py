"""Samples of three sizes, c t y x, through all that handles samples: training, evaluation, plans and losses."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import dino
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from small_runs import CONFIGS, losses
from torch import Tensor, nn
from views import passed

import edit
import edit.backbones
import eval as evaluation
from data.making.generator import generate
from data.making.request import Request
from data.sets.latents import Latents
from data.sets.moving_shapes import MovingShapes
from data.sets.toy_text import ToyText
from edit import noise
from edit.backbones.flux import FluxConfig
from edit.denoiser import Denoiser
from edit.distillation.attention import RelationKD, cosines
from edit.distillation.guidance import TeacherGuidance
from edit.few_step.discriminator import Heads
from edit.measuring.quality import Pretrained
from edit.sampling import lengths
from edit.solvers import tokens_in
from recipes import plan
from recipes.config.check import check
from recipes.config.errors import UserError
from recipes.config.schema import Evaluation
from recipes.config.sources import register
from recipes.report.yardstick import Yardstick, real_features
from recipes.training import run

BACKBONE = "{_target_: edit.backbones.toy_video.ToyVideoConfig}"
FAMILY = ("~backbone", f"+backbone={BACKBONE}")
WORLD = ("data=moving_shapes", "data.set.frames=4", "data.set.count=16", "data.set.held=8", "data.batch_size=4")
SHORT = (
    *("trainer.max_steps=4", "trainer.accelerator=cpu", "optimizer.warmup=0", "log_every=1", "checkpoint.every=2"),
    *("evaluate=null", "preview.every=0"),
)


@pytest.fixture(scope="module", autouse=True)
def known():
    """The toy is one of `edit.backbones`, which alone artifacts may name."""
    before, toys = list(edit.backbones.__path__), str(Path(__file__).parents[1] / "toys")
    edit.backbones.__path__.append(toys)
    yield
    edit.backbones.__path__[:] = before


def train(folder: Path, *words: str, data: Sequence[str] = WORLD) -> None:
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        cfg = compose("train", [*data, *FAMILY, f"runs={folder}", *SHORT, *words])
    if errors := check(cfg):
        raise UserError(errors[0])
    run(cfg)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A trained teacher of videos, `t`, with previews; and a vision model."""
    folder = tmp_path_factory.mktemp("video")
    train(folder, "name=t", "preview.every=2", "preview.count=3", "sampler.solver.steps=2")
    dino.write(folder / "dino")
    return folder


@pytest.fixture
def video() -> Denoiser:
    """Random weights; 2 x 4 x 4 tokens."""
    from edit.backbones.toy_video import ToyVideoConfig

    denoiser = ToyVideoConfig(frames=2).build()
    for p in denoiser.parameters():
        nn.init.normal_(p, std=0.2)
    return denoiser


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_previews_its_videos_as_rows_of_frames_and_its_artifact_loads(folder):
    with Image.open(folder / "t/samples/step_000004.png") as sheet:
        assert sheet.size == (3 * 4 * 64 + 2 * 2, 64 + 15)  # three of four frames, 32 pixels twice as large, captions
    loaded = edit.load(folder / "t").denoiser
    assert loaded.sample_shape == (12, 4, 8, 8) and loaded(*inputs(loaded)).sample.shape == (2, 12, 4, 8, 8)


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(folder):
    train(folder, "name=parts", "trainer.max_steps=2", "optimizer.schedule=constant")
    train(folder, "name=parts", "optimizer.schedule=constant")
    train(folder, "name=whole", "optimizer.schedule=constant")
    assert losses(folder, "parts") == losses(folder, "whole")


def test_an_evaluation_measures_frames_pairs_and_what_captions_say(folder, tmp_path):
    words = [f"artifact={folder / 't'}", f"reference={folder / 't'}", "n=8", "batch=4", "rounds=0", "device=cpu"]
    words += [f"out={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}", "guidance=1", "features=none"]
    assert evaluation.main(words) == 0
    (artifact,) = json.loads((tmp_path / "out/report.json").read_text())["artifacts"]
    (result,) = artifact["results"]
    assert {"nearest_train", "prompt_thing", "prompt_motion"} < set(result["quality"])
    assert result["compared"]["psnr"]["value"] == 100 and "8 images" in result["compared"]["psnr"]["over"]
    assert artifact["reference"]["prompts"]["real"] == 1
    with Image.open(tmp_path / "out" / artifact["reference"]["grid"]) as sheet:
        assert sheet.size[0] == 4 * (4 * 64 + 2) - 2  # four videos in a row


@pytest.mark.parametrize(
    "method",
    [
        "{_target_: edit.few_step.ladd.LADD, teacher_taps: [0, -1], hidden: 8}",
        "{_target_: edit.few_step.add.ADD, vision: {_target_: edit.few_step.vision.Vision, path: DINO, layers: [1],"
        " hidden: 8, crop: 6}}",
    ],
    ids=["tokens", "vision"],
)
def test_discriminators_of_tokens_and_of_decoded_frames_train_a_few_step_student(folder, method):
    words = (
        "edits=none",
        f"init={folder}/t",
        f"teacher.path={folder}/t",
        "sampler=grid",
        "sampler.solver.renoise=true",
    )
    method = f"matching={method.replace('DINO', str(folder / 'dino'))}"
    name = f"name={'few' if 'ladd' in method else 'seen'}"
    words = (*words, method, name, "label_drop=0.0", "optimizer.schedule=constant", "trainer.max_steps=2")
    train(folder, *words)
    assert all(float(v) for v in losses(folder, name.removeprefix("name=")))


def test_a_policy_and_relations_are_learned_from_a_teacher(folder):
    relation = "+terms.r={_target_: edit.distillation.attention.RelationKD, pairs: [[0, 1]]}"
    teacher = (f"teacher.path={folder}/t", "trainer.max_steps=1")
    train(folder, "name=relation", relation, *teacher)
    policy = "matching={_target_: edit.few_step.policy.PolicyImitation, substeps: 8}"
    train(folder, "name=policy", policy, "edits=policy", "sampler=policy", *teacher)
    assert all(float(losses(folder, name)[0]) for name in ("relation", "policy"))


def test_a_plan_counts_frames(capsys):
    def planned(*words: str) -> dict:
        assert plan.main([*WORLD, *FAMILY, *words, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    few, many = planned(), planned("frames=8", "+backbone.frames=8")
    assert few["sample"] == [12, 4, 8, 8] and many["sample"] == [12, 8, 8, 8]
    assert many["latent_per_image"] == 2 * few["latent_per_image"] and many["macs"] > 1.9 * few["macs"]
    assert plan.main([*WORLD, *FAMILY, "frames=8"]) == 2
    assert "takes samples of 12x4x8x8, got 12x8x8x8" in capsys.readouterr().err


def test_features_are_of_all_frames_and_distances_of_pairs_are_means_over_them(folder, tmp_path):
    data, none = MovingShapes(count=4, held=4, frames=4), Evaluation.of({"features": "none", "cache": str(tmp_path)})
    space = Yardstick.of(data, {}, none, torch.device("cpu"))
    eye = Pretrained(folder / "dino", torch.device("cpu"))
    real = real_features(data, data.heldout(), "heldout", eye, {}, none, tmp_path)
    x = torch.stack([data.heldout().sample(i, i)["x"] for i in range(4)])
    measured = replace(space, space=eye).measure(x, data.to_frames(x), torch.arange(4), data.to_frames(x.flip(2)))
    assert real.shape == (4 * 4, 16) and torch.equal(measured["features"], real)
    frames = measured["features"].unflatten(0, (4, 4))
    assert not torch.equal(frames[:, 0], frames[:, 1])
    assert all(measured[k].shape == (4,) for k in ("nearest", "psnr", "ssim", "perceptual", "prompt_motion"))


def test_videos_of_a_teacher_are_stored_with_their_paths_looked_at_and_trained_on(folder, tmp_path, capsys):
    words = ToyText().write(tmp_path / "text")
    (tmp_path / "prompts.txt").write_text("a red circle moving up\na white cross bouncing left")
    work = Request(
        teacher=str(folder / "t/artifact"),
        prompts=str(tmp_path / "prompts.txt"),
        out=str(tmp_path / "videos"),
        pooled_encoder=str(words["text_encoder"]),
        steps=2,
        points=1,
        size=8,
        dtype="float32",
        device="cpu",
    )
    data = Latents(str(generate(work, lambda told: None).parent), trajectories=True)
    sample = data.train().sample(1, 0)
    assert data.shape == sample["x"].shape == sample["z"].shape == (12, 4, 8, 8)
    assert sample["trajectory"].shape == (1, 12, 4, 8, 8) and (tmp_path / "videos/samples.png").exists()
    assert data.to_frames(sample["x"][None]).shape == (1, 4, 32, 32, 3)
    train(
        folder,
        "name=cached",
        data=("data=latents", f"data.set.path={tmp_path}/videos", "data.batch_size=2", "data.workers=0"),
    )
    assert torch.tensor([float(v) for v in losses(folder, "cached")]).isfinite().all()


# ---- the grid -------------------------------------------------------------------------------------------------------


def inputs(denoiser: Denoiser) -> Sequence:
    return torch.randn(2, *denoiser.sample_shape), torch.tensor([0.3, 0.8]), denoiser.example(2)


def test_an_output_tells_the_grid_of_its_tokens_whatever_edits_make_of_it(video, dit, batch):
    from edit.few_step.policy import MixtureHead

    assert video(*inputs(video)).grid == (2, 4, 4) and dit(*batch).grid == (1, 4, 4)
    taught = TeacherGuidance(2.0, 2.0)(video, *inputs(video), video.example(2), torch.full((2,), 2.0), taps=(0,))
    assert taught.grid == (2, 4, 4)
    out = edit.apply(video, {"policy": MixtureHead(components=2)})(*inputs(video))
    assert out.grid == (2, 4, 4) and out.trace["policy"].shape == (2, 2 * 12 + 2 + 1, 2, 8, 8)


def test_heads_and_relations_use_the_grid_that_the_model_tells(video):
    x, t, condition = inputs(video)
    out = video(x, t, condition, taps=(0, 1))
    heads = Heads.on(video, (0, 1), hidden=8)
    assert heads(out.trace, t, condition.pooled, out.grid).shape == (2, 2 * 32)
    mine, theirs = (cosines(out.trace[f"unit.{i}"], (2, 4, 4), 2) for i in (0, 1))
    assert mine.shape == (2, 8, 8)  # two frames of 2 x 2
    loss = RelationKD(((0, 1),), weight=1.0, size=2).losses(passed(out, t, 0.0, out))["relation_kd"]
    torch.testing.assert_close(loss, (mine - theirs.detach()).square().mean((1, 2)))


def test_stock_families_take_samples_of_the_rank_that_their_size_has(make_flux):
    image = make_flux()
    film = image.from_config({**image.config, "sample_size": [3, 8, 12]})
    assert film.sample_shape == (4, 3, 8, 12)
    assert film.accepts((4, 5, 8, 10)) and not film.accepts((4, 8, 10)) and not film.accepts((4, 5, 8, 9))
    film.settle((4, 7, 6, 2), FluxConfig())
    assert film.sample_shape == (4, 7, 6, 2) and film.base["sample_size"] == [7, 6, 2]
    image.settle((4, 7, 6, 2), FluxConfig())
    assert len(image.sample_shape) == 3 and not image.accepts((4, 7, 6, 2))


def test_the_tokens_that_move_a_samplers_times_are_those_of_all_frames():
    assert tokens_in((16, 5, 8, 12)) == 5 * tokens_in((16, 8, 12)) == 5 * 24


def test_lengths_of_guidance_are_those_of_patches_of_each_frame():
    x = torch.randn(2, 3, 4, 6, 8)
    found = lengths(x, 2)
    assert found.shape == (2, 1, 4, 6, 8)
    assert all(torch.equal(found[:, :, k], lengths(x[:, :, k], 2)) for k in range(4))


def test_noise_of_a_video_depends_on_seed_and_number_alone():
    shape, many = (3, 4, 5, 6), torch.arange(7)
    together = noise.gaussian(5, many, noise.NOISE, shape)
    assert torch.equal(together[4], noise.gaussian(5, torch.tensor([4]), noise.NOISE, shape)[0])
    assert not torch.equal(together[4], together[5]) and together.shape == (7, *shape)
    assert not torch.equal(together, noise.gaussian(6, many, noise.NOISE, shape))


def test_frames_are_decoded_each_by_itself_with_gradients():
    data = MovingShapes(count=2, held=1, frames=4)
    x = torch.stack([data.train().sample(i, 0)["x"] for i in range(2)]).requires_grad_(True)
    pixels: Tensor = data.decoder()(x)
    shown = data.to_frames(x.detach())
    assert pixels.shape == (2, 3, 4, 32, 32) and shown.shape == (2, 4, 32, 32, 3)
    assert torch.equal((127.5 * pixels.detach().permute(0, 2, 3, 4, 1) + 128).clamp(0, 255).to(torch.uint8), shown)
    pixels[1, :, 2].sum().backward()
    assert x.grad is not None and x.grad[1, :, 2].any() and not x.grad[0].any() and not x.grad[1, :, [0, 1, 3]].any()
