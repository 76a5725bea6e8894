"""The PixArt family computes what `diffusers.PixArtTransformer2DModel` computes, and stands in for it everywhere."""

from pathlib import Path

import pytest
import torch
import vaes
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
)
from natives import PIXART, close, ours
from torch import Tensor

import edit
from edit.backbones.attached import attached
from edit.backbones.pixart import PixArt, PixArtConfig
from edit.denoiser import Denoiser
from edit.objectives import DDPM
from edit.pruning.depth import DepthPruning
from edit.stream import Condition
from recipes.config.composed import read

CONFIGS = Path(__file__).parents[2] / "configs"
TINY, stock, native = PIXART.tiny, PIXART.stock, PIXART.words


OPTIONS = {
    "plain": {},
    "without a text mask": {"masked": False},
    "told the image size": {"use_additional_conditions": True, "num_attention_heads": 3, "cross_attention_dim": 24},
    "text as it is": {"caption_channels": None, "cross_attention_dim": 20},
    "no learned variance": {"out_channels": None},
    "no attention bias": {"attention_bias": False},
    "another activation": {"activation_fn": "geglu"},
    "affine norms": {"norm_elementwise_affine": True, "norm_eps": 1e-4},
    "large patches": {"patch_size": 4},
    "one patch": {"patch_size": 8},
    "stretched positions": {"interpolation_scale": 2},
    "not square": {"size": (8, 12)},
    "larger": {"size": (16, 16)},
    "upcast attention": {"upcast_attention": True},
}


def double(a: dict) -> dict:
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in a.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_and_all_gradients_are_those_of_the_stock_model(options):
    options = dict(options)
    how = {k: options.pop(k) for k in ("size", "masked") if k in options}
    model = stock(**options)
    pixart = PixArt.from_config(model.config).eval()
    pixart.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items()})
    with torch.no_grad():
        a = native(model, **how)
        close(ours(pixart, a), model(**a).sample)
    # gradients in fp64, where equations that are equal differ by nothing else that could be seen
    results = []
    for net, call in ((model.double(), lambda a: model(**a).sample), (pixart.double(), lambda a: ours(pixart, a))):
        arguments = double(native(model, **how))
        inputs = [arguments[k].requires_grad_() for k in ("hidden_states", "encoder_hidden_states")]
        call(arguments).square().mean().backward()
        named = {n.removeprefix("model."): p.grad for n, p in net.named_parameters()}
        results.append({"x": inputs[0].grad, "text": inputs[1].grad, **named})
    theirs, mine = results
    assert list(theirs) == list(mine)
    largest = max(g.abs().max() for g in theirs.values())
    for name, g in theirs.items():
        # A key's bias, which softmax cannot see, and with one patch all of queries and keys have a gradient of zero
        # and show roundings: exact zeros on a CPU with AVX-512, up to 9e-18 with AVX2, where the largest gradient is
        # 0.3. They are measured on the largest gradient.
        unseen = model.config.patch_size == 8 and ("attn1.to_q" in name or "attn1.to_k" in name)
        scale = largest if unseen or name.endswith("to_k.bias") else g.abs().max()
        assert (mine[name] - g).abs().max() <= 1e-12 * scale, name


@torch.no_grad()
def test_a_caption_without_a_real_token_is_defined_as_in_the_stock_model():
    model = stock().double()
    a = double(native(model))
    a["encoder_attention_mask"][2] = 0  # in fp32 the bias of -10000 leaves three digits of the scores
    torch.testing.assert_close(ours(PixArt.of(model), a), model(**a).sample, rtol=0, atol=1e-9)


@torch.no_grad()
def test_forward_packs_times_masks_and_image_sizes_as_the_stock_model_wants_them():
    model = stock(use_additional_conditions=True, num_attention_heads=3, cross_attention_dim=24)
    a = native(model, size=(8, 12))
    pixart = PixArt.of(model)
    mask = a["encoder_attention_mask"].bool()
    condition = Condition(text=a["encoder_hidden_states"], text_mask=mask)
    out = pixart(a["hidden_states"], torch.tensor([0.001, 0.501, 1.0]), condition)
    theirs = model(**a).sample  # 8 x 12 latent pixels of 8 image pixels each are 64 x 96
    close(out.sample, theirs[:, :3])
    close(out.variance, theirs[:, 3:])


PUBLISHED = {"alpha_512": 610_856_096, "alpha_1024": 611_349_152, "sigma_512": 610_856_096, "sigma_1024": 610_856_096}


def configured(name: str) -> PixArtConfig:
    values = read(CONFIGS, "backbone", f"pixart_{name}")
    assert values.pop("_target_") == "edit.backbones.pixart.PixArtConfig"
    return PixArtConfig(**values)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_real_models_are_made_without_memory_and_have_their_published_size(name):
    with torch.device("meta"):
        pixart = configured(name).build()
    assert all(v.is_meta for v in (*pixart.parameters(), *pixart.buffers()))
    assert sum(p.numel() for p in pixart.parameters()) == PUBLISHED[name]
    assert pixart.prediction == "noise" and len(pixart.units) == 28


def test_a_fresh_model_predicts_zero_and_learns():
    pixart = configured("tiny").build()
    assert pixart.sample_shape == (12, 8, 8) and 1e5 < sum(p.numel() for p in pixart.parameters()) < 1e6
    x, t = torch.randn(2, 12, 8, 8), torch.tensor([0.3, 0.9])
    out = pixart(x, t, Condition(text=torch.randn(2, 5, 64)))
    assert out.sample.shape == out.variance.shape == x.shape and not out.sample.any() and not out.variance.any()
    DDPM().losses(out, x, torch.randn_like(x), x, t)["noise"].mean().backward()
    assert pixart.model.proj_out.weight.grad.any()


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"cross_attention_dim": None}, "cross_attention_dim is None"),
        ({"attention_type": "gated"}, "attention_type must be default, got gated"),
        ({"out_channels": 5}, "in_channels 3, or twice that for a learned variance, got 5"),
    ],
)
def test_models_of_other_kinds_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        PixArt.from_config({**TINY, **options})


def test_conditions_that_do_not_fit_are_refused():
    pixart = PixArt.of(stock())
    x, t, text = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 5, 20)
    with pytest.raises(ValueError, match="needs condition.text"):
        pixart(x, t, Condition())
    with pytest.raises(ValueError, match="width 20, got 24"):
        pixart(x, t, Condition(text=torch.randn(2, 5, 24)))
    with pytest.raises(ValueError, match="not distilled for guidance"):
        pixart(x, t, Condition(text=text, guidance=torch.ones(2)))
    with pytest.raises(ValueError, match="takes samples of 3x8x8, got 3x7x8"):
        pixart(x[:, :, :7], t, Condition(text=text))
    a = native(pixart.model)
    for change, words in (
        ({"attention_mask": torch.ones(3, 16)}, "never masked"),
        ({"cross_attention_kwargs": {"gligen": 1}}, "got gligen"),
        ({"encoder_attention_mask": torch.zeros(3, 1, 7)}, r"mask b l, got shape \(3, 1, 7\)"),
        ({"encoder_hidden_states": None}, "needs encoder_hidden_states"),
    ):
        with pytest.raises(ValueError, match=words):
            pixart.embed(**{**a, **change})
    told = PixArt.of(stock(use_additional_conditions=True, num_attention_heads=3, cross_attention_dim=24))
    with pytest.raises(ValueError, match="resolution and aspect_ratio"):
        told.embed(**{**a, "added_cond_kwargs": None})


# ---- inside the stock pipelines -------------------------------------------------------------------------------------


def pipeline(kind, scheduler, **options):
    torch.manual_seed(0)
    pipe = kind(
        tokenizer=None, text_encoder=None, vae=vaes.halved(3), transformer=stock(**options), scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe, guidance_scale=3.0) -> Tensor:
    g = torch.Generator().manual_seed(2)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    return pipe(
        prompt_embeds=torch.randn(1, 5, 20, generator=g),
        prompt_attention_mask=mask,
        negative_prompt=None,
        negative_prompt_embeds=torch.randn(1, 5, 20, generator=g),
        negative_prompt_attention_mask=mask.flip(1),
        guidance_scale=guidance_scale,
        num_inference_steps=3,
        height=16,
        width=32,
        use_resolution_binning=False,
        generator=g,
        output_type="pt",
    ).images


PIPELINES = {
    "sigma, DPM solver": (PixArtSigmaPipeline, DPMSolverMultistepScheduler, {}),
    "sigma, DDIM": (PixArtSigmaPipeline, DDIMScheduler, {}),
    "alpha at 1024, told the image size": (
        PixArtAlphaPipeline,
        DPMSolverMultistepScheduler,
        {"sample_size": 128, "num_attention_heads": 3, "cross_attention_dim": 24},
    ),
}


@pytest.mark.parametrize("kind, scheduler, options", PIPELINES.values(), ids=PIPELINES)
def test_the_stock_pipeline_paints_the_same_with_us_and_another_picture_with_an_edit(kind, scheduler, options):
    pipe = pipeline(kind, scheduler(), **options)
    model, before = pipe.transformer, paint(pipe)
    pixart = PixArt.of(model)
    with attached(pipe, pixart):
        # three steps with guidance 3 multiply the roundings of one evaluation
        torch.testing.assert_close(paint(pipe), before, rtol=0, atol=1e-4)
    edit.apply(pixart, {"depth": DepthPruning(ratio=1 / 3)})
    with attached(pipe, pixart):
        assert (paint(pipe) - before).abs().max() > 1e-2
    assert pipe.transformer is model and torch.equal(paint(pipe), before)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, DDIMScheduler])
def test_units_are_told_the_pipelines_steps_and_each_generation_has_its_own_memory(scheduler):
    pipe = pipeline(PixArtSigmaPipeline, scheduler())
    pixart = PixArt.of(pipe.transformer)
    own, steps = pixart.units[0], []
    pixart.units[0] = lambda stream: steps.append(stream.step) or own(stream)
    with attached(pipe, pixart):
        paint(pipe), paint(pipe)
    assert [s.index for s in steps] == [0, 1, 2, 0, 1, 2] and {s.count for s in steps} == {3}
    expected = [(t + 1) / 1000 for t in pipe.scheduler.timesteps.tolist()]
    assert [s.sigma for s in steps] == pytest.approx(2 * expected)
    assert steps[0].memory is steps[2].memory and steps[0].memory is not steps[3].memory


def test_a_pipeline_of_another_family_is_refused(dit: Denoiser):
    pipe = pipeline(PixArtSigmaPipeline, DDIMScheduler())
    pipe.transformer = dit.model
    with pytest.raises(ValueError, match="has a DiTWeights, a pixart stands in for PixArtTransformer2DModel"):
        with attached(pipe, PixArt.of(stock())):
            pass
