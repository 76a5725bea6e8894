"""A family's sampler and its stock pipeline, both with default settings, paint the same from the same noise."""

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
import vaes
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
)
from diffusers import FlowMatchEulerDiscreteScheduler as Flow
from torch import Tensor
from weights import randomise

import edit
from edit import noise
from edit.backbones.dit_diffusers import DiTDiffusersConfig
from edit.backbones.flux import FluxConfig
from edit.backbones.pixart import PixArtConfig
from edit.backbones.qwen_image import QwenImageConfig
from edit.backbones.sd3 import SD3Config
from edit.backbones.stock import tokens_of
from edit.predictions import default_objective
from edit.sampling import Sampler, default_sampler
from edit.solvers import Euler, StockEuler, tokens_in
from edit.stream import Condition
from recipes.cost import from_file

GROUPS = Path(__file__).parents[2] / "configs"
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
TEXT = {"joint_attention_dim": 24, "pooled_projection_dim": 12}
SIZE = (8, 12)  # of the latent
# as the published folders have them
PUBLISHED = {
    "flux_dev": {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15},
    "flux_schnell": {"shift": 1.0, "base_shift": 0.5, "max_shift": 1.15},
    "sd3": {"shift": 3.0},
    "qwen_image": {
        **{"use_dynamic_shifting": True, "shift": 1.0, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02},
        **{"base_image_seq_len": 256, "max_image_seq_len": 8192, "time_shift_type": "exponential"},
    },
}


def words(width: int, pooled: int = 0, seed: int = 2) -> Condition:
    g = torch.Generator().manual_seed(seed)
    text = torch.randn(2, 5, width, generator=g)
    return Condition(text=text, pooled=torch.randn(2, pooled, generator=g) if pooled else None)


def make(config):
    """The denoiser with random weights, and a stock model that shares them."""
    torch.manual_seed(0)
    denoiser = config.build()
    randomise(denoiser)
    stock = getattr(diffusers, denoiser.stock)(
        **{k: v for k, v in denoiser.config.items() if k not in denoiser.extras}
    ).eval()
    stock.load_state_dict(denoiser.model.state_dict())
    return denoiser.eval(), stock


def flux(guided: bool, scheduler: dict):
    axes = {"axes_dims_rope": (4, 6, 6), "in_channels": 16, "sample_size": SIZE, "guidance_embeds": guided}
    denoiser, stock = make(FluxConfig(num_layers=1, num_single_layers=1, **axes, **HEADS, **TEXT))
    pipe = FluxPipeline(Flow(**scheduler), vaes.halved(4), None, None, None, None, stock)
    told = words(24, 12)

    def paint(x: Tensor, **options) -> Tensor:
        embeds = {"prompt_embeds": told.text, "pooled_prompt_embeds": told.pooled}
        return pipe(**embeds, latents=tokens_of(x), height=16, width=24, output_type="latent", **options).images

    return denoiser, pipe, told, None, lambda x, **o: unpacked(paint(x, **o))


def unpacked(tokens: Tensor) -> Tensor:
    return tokens.unflatten(1, (4, 6)).unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def sd3():
    shape = {"in_channels": 4, "sample_size": 8, "pos_embed_max_size": 12, "patch_size": 2}
    denoiser, stock = make(SD3Config(num_layers=2, **shape, **HEADS, **TEXT))
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = StableDiffusion3Pipeline(
        transformer=stock, scheduler=Flow(**PUBLISHED["sd3"]), vae=vaes.halved(4), **dict.fromkeys(parts)
    )
    told, negative = words(24, 12), words(24, 12, seed=3)

    def paint(x: Tensor, **options) -> Tensor:
        embeds = {"prompt_embeds": told.text, "pooled_prompt_embeds": told.pooled}
        embeds |= {"negative_prompt_embeds": negative.text, "negative_pooled_prompt_embeds": negative.pooled}
        return pipe(**embeds, latents=x, height=16, width=24, output_type="latent", **options).images

    return denoiser, pipe, told, negative, paint


def qwen_image():
    axes = {"axes_dims_rope": (4, 6, 6), "in_channels": 16, "sample_size": SIZE}
    denoiser, stock = make(QwenImageConfig(num_layers=2, joint_attention_dim=24, **axes, **HEADS))
    vae = diffusers.AutoencoderKLQwenImage(
        **{"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]},
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = QwenImagePipeline(Flow(**PUBLISHED["qwen_image"]), vae.eval(), None, None, stock)
    told, negative = words(24), words(24, seed=3)
    all_real = torch.ones(2, 5, dtype=torch.int64)

    def paint(x: Tensor, **options) -> Tensor:
        embeds = {"prompt_embeds": told.text, "prompt_embeds_mask": all_real}
        embeds |= {"negative_prompt_embeds": negative.text, "negative_prompt_embeds_mask": all_real}
        return pipe(**embeds, latents=tokens_of(x), height=16, width=24, output_type="latent", **options).images

    return denoiser, pipe, told, negative, lambda x, **o: unpacked(paint(x, **o))


def pixart(kind):
    shape = {"in_channels": 4, "out_channels": 8, "sample_size": 8}
    denoiser, stock = make(PixArtConfig(num_layers=2, cross_attention_dim=32, caption_channels=24, **shape, **HEADS))
    pipe = kind(None, None, vaes.halved(4), stock, DPMSolverMultistepScheduler())
    told, negative = words(24), words(24, seed=3)
    real = torch.ones(2, 5, dtype=torch.int64)

    def paint(x: Tensor, **options) -> Tensor:
        embeds = {"prompt_embeds": told.text, "prompt_attention_mask": real, "negative_prompt": None}
        embeds |= {"negative_prompt_embeds": negative.text, "negative_prompt_attention_mask": real}
        size = {"height": 16, "width": 24, "use_resolution_binning": False}
        return pipe(**embeds, **size, latents=x, output_type="latent", **options).images

    return denoiser, pipe, told, negative, paint


CASES = {
    "FLUX.1-dev": lambda: flux(True, PUBLISHED["flux_dev"]),
    "FLUX.1-schnell": lambda: flux(False, PUBLISHED["flux_schnell"]),
    "SD3": sd3,
    "Qwen-Image": qwen_image,
    "PixArt-alpha": lambda: pixart(PixArtAlphaPipeline),
    "PixArt-Sigma": lambda: pixart(PixArtSigmaPipeline),
}
STEPS = {"FLUX.1-schnell": {"num_inference_steps": 4}}  # its pipeline's default is dev's


def close(ours: Tensor, theirs: Tensor) -> None:
    """fp32 over up to 50 steps: diffusers rounds times to float32 and keeps time x 1000."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4 * theirs.abs().max().item())


def ours(denoiser, told, negative, sampler=None):
    x = noise.gaussian(5, torch.arange(2), noise.NOISE, (denoiser.sample_shape[0], *SIZE))
    sampler = sampler or default_sampler(denoiser)
    made = sampler(
        denoiser,
        default_objective(denoiser),
        told,
        torch.arange(2),
        seed=5,
        negative=negative,
        shape=tuple(x.shape[1:]),
    )
    return x, made


@pytest.mark.parametrize("name", CASES)
def test_with_default_settings_both_paint_the_same(name):
    denoiser, pipe, told, negative, paint = CASES[name]()
    pipe.set_progress_bar_config(disable=True)
    x, made = ours(denoiser, told, negative)
    theirs = paint(x, **STEPS.get(name, {}))
    assert (theirs - x).abs().max() > 0.1
    close(made, theirs)


def test_the_class_conditional_pipeline_too(monkeypatch):
    config = DiTDiffusersConfig(num_layers=2, in_channels=4, out_channels=8, sample_size=8, **HEADS)
    denoiser, stock = make(config)
    pipe = DiTPipeline(stock, vaes.halved(4), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    told = Condition(label=torch.tensor([3, 5]))
    x = noise.gaussian(5, torch.arange(2), noise.NOISE, (4, 8, 8))
    made = denoiser.sampler()(denoiser, default_objective(denoiser), told, torch.arange(2), seed=5)
    # the one pipeline that cannot be given its noise
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *a, **k: x)
    theirs = pipe([3, 5], output_type="np").images
    with torch.no_grad():
        decoded = pipe.vae.decode(made / pipe.vae.config.scaling_factor).sample
    close((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), torch.as_tensor(theirs))


@pytest.mark.parametrize("name", ["SD3", "FLUX.1-dev", "Qwen-Image"])
def test_even_steps_with_the_same_shift_paint_something_else(name):
    """The comparison can fail: what was told apart here were the steps alone."""
    denoiser, pipe, told, negative, paint = CASES[name]()
    pipe.set_progress_bar_config(disable=True)
    x, stock = ours(denoiser, told, negative)
    own = denoiser.sampler()
    wrong = replace(own, solver=Euler(own.solver.steps, own.solver.shift))
    difference = (ours(denoiser, told, negative, wrong)[1] - stock).abs().max()
    assert difference > 0.01 * stock.abs().max()


def test_guidance_that_keeps_lengths_is_not_plain_guidance():
    denoiser, _, told, negative, _ = qwen_image()
    plain = replace(denoiser.sampler(), norm_patch=None)
    _, stock = ours(denoiser, told, negative)
    assert (ours(denoiser, told, negative, plain)[1] - stock).abs().max() > 0.01 * stock.abs().max()


def test_four_steps_of_sd3_end_where_the_stock_scheduler_ends():
    ends = StockEuler(4, shift=3.0, even=False).times((16, 128, 128))
    assert ends == pytest.approx([1, 0.858, 0.602, 0.009, 0], abs=5e-4)
    scheduler = Flow(shift=3.0)
    scheduler.set_timesteps(4)
    assert ends == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize("side", [16, 64, 128, 256])
def test_a_dynamic_shift_grows_with_the_tokens_as_the_pipelines_rule_says(side):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler, shape = Flow(**PUBLISHED["flux_dev"]), (16, side, side)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=calculate_shift(tokens_in(shape)))
    mine = StockEuler(4, dynamic=(0.5, 1.15, 256, 4096)).times(shape)
    assert mine == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("file", "name"),
    [("flux", "FLUX.1-dev"), ("sd3", "SD3"), ("qwen_image", "Qwen-Image"), ("pixart", "PixArt-Sigma")],
)
def test_the_named_samplers_of_the_configuration_are_the_families(file, name):
    assert from_file(GROUPS, "sampler", file) == CASES[name]()[0].sampler()


def test_a_published_folder_is_sampled_on_the_steps_of_the_scheduler_beside_it(tmp_path):
    denoiser, stock = make(
        SD3Config(num_layers=1, in_channels=4, sample_size=8, pos_embed_max_size=12, **HEADS, **TEXT)
    )
    stock.save_pretrained(tmp_path / "pipe" / "transformer")
    assert edit.load(tmp_path / "pipe").sampler == denoiser.sampler()
    Flow(shift=6.0).save_pretrained(tmp_path / "pipe" / "scheduler")
    expected = Sampler(StockEuler(28, shift=6.0, even=False), guidance=7.0)
    assert edit.load(tmp_path / "pipe").sampler == expected
    Flow(shift=6.0, use_karras_sigmas=True).save_pretrained(tmp_path / "pipe" / "scheduler")
    assert edit.load(tmp_path / "pipe").sampler == denoiser.sampler(), "steps that we cannot take are not half taken"


@pytest.mark.parametrize("scheduler", PUBLISHED.values(), ids=PUBLISHED)
def test_the_settings_of_a_scheduler_come_back_as_a_scheduler_of_the_same_steps(scheduler, tmp_path):
    Flow(**scheduler).save_pretrained(tmp_path)
    config = Flow.load_config(tmp_path)
    for even in (True, False):
        solver = StockEuler.of(config, 5, even)
        again = StockEuler.of({**Flow(**solver.scheduler).config, "_class_name": Flow.__name__}, 5, even)
        assert again == solver


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"shift": 0.0}, "shift must be positive, got 0.0"),
        ({"shift": float("nan")}, "shift must be a finite number, got nan"),
        ({"dynamic": (0.5, 1.15, 256)}, "dynamic (is|must be)"),
        ({"dynamic": (0.5, 1.15, 4096, 256)}, "dynamic (is|must be)"),
        ({"terminal": 1.0}, "terminal lies between 0 and 1, got 1.0"),
    ],
)
def test_steps_that_cannot_be_are_refused(options, said):
    with pytest.raises(ValueError, match=f"StockEuler: {said}"):
        StockEuler(**options)
