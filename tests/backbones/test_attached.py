"""A stock pipeline's calls are the evaluations of one generation, wherever it begins and however it guides."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from weights import randomise

import edit
from edit.backbones.dit_diffusers import DiTDiffusersConfig
from edit.backbones.flux import FluxConfig
from edit.backbones.sd3 import SD3Config
from edit.backbones.stock import StockDenoiser, attached
from edit.denoiser import Denoiser, Edit
from edit.stream import Step

HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
TEXT: dict[str, Any] = {"joint_attention_dim": 24, "pooled_projection_dim": 20}
NO_TEXT = {f"{kind}{n}": None for kind in ("text_encoder", "tokenizer") for n in ("", "_2")}


def vae() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.4,
        shift_factor=0.1,
    ).eval()


def made(config: Any) -> StockDenoiser:
    denoiser = config.build()
    randomise(denoiser)
    return denoiser.eval()


def flux() -> StockDenoiser:
    return made(FluxConfig(16, 1, 1, axes_dims_rope=(4, 6, 6), sample_size=(8, 8), **HEADS, **TEXT))


def sd3() -> StockDenoiser:
    return made(SD3Config(in_channels=4, num_layers=1, sample_size=8, pos_embed_max_size=8, **HEADS, **TEXT))


def prompts(samples: int, negative: bool) -> dict[str, Tensor]:
    found = {"prompt_embeds": torch.ones(samples, 5, 24), "pooled_prompt_embeds": torch.ones(samples, 20)}
    return found | ({f"negative_{k}": torch.zeros_like(v) for k, v in found.items()} if negative else {})


def stepped(denoiser: StockDenoiser, pipeline: Any, paint: Callable[[Any], Any]) -> list[Step]:
    """The steps of which the first unit is told."""
    unit, steps = denoiser.units[0], []
    denoiser.units[0] = lambda stream: steps.append(stream.step) or unit(stream)
    pipeline.set_progress_bar_config(disable=True)
    try:
        with attached(pipeline, denoiser), torch.no_grad():
            paint(pipeline)
    finally:
        denoiser.units[0] = unit
    for step in steps:
        assert step.times[step.index] == step.sigma and len(step.times) == step.count + 1 and step.times[-1] == 0
    return steps


def counted(steps: list[Step]) -> list[tuple[int, int, str]]:
    return [(s.index, s.count, s.branch) for s in steps]


def flux_from_image(pipe: Any, samples: int = 1, **options) -> Any:
    words = {"height": 16, "width": 16, "num_inference_steps": 4, "strength": 0.5, "output_type": "latent"}
    told = prompts(samples, "true_cfg_scale" in options)
    return pipe(image=torch.ones(1, 3, 16, 16), **told, **{**words, **options})


def flux_pipeline(denoiser: StockDenoiser) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.FluxImg2ImgPipeline(scheduler=scheduler, vae=vae(), transformer=denoiser.model, **NO_TEXT)


def sd3_from_image(pipe: Any, **options) -> Any:
    told = prompts(1, True)
    words = {"num_inference_steps": 4, "strength": 0.5, "guidance_scale": 1.0, "output_type": "latent"}
    return pipe(image=torch.ones(1, 3, 8, 8), **told, **{**words, **options})


def sd3_from_text(pipe: Any, **options) -> Any:
    words = {"height": 8, "width": 8, "num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
    return pipe(**{**prompts(1, True), **words, **options})


def sd3_pipeline(denoiser: StockDenoiser, kind: Any = None, scheduler: Any = None) -> Any:
    scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    kind = kind or diffusers.StableDiffusion3Img2ImgPipeline
    more = {"text_encoder_3": None, "tokenizer_3": None}
    return kind(scheduler=scheduler, vae=vae(), transformer=denoiser.model, **NO_TEXT, **more)


# ---- where a generation begins ---------------------------------------------------------------------------------------

FROM_IMAGE = {"flux": (flux, flux_pipeline, flux_from_image), "sd3": (sd3, sd3_pipeline, sd3_from_image)}


@pytest.mark.parametrize("make, pipeline, paint", FROM_IMAGE.values(), ids=FROM_IMAGE)
def test_image_to_image_counts_from_its_first_evaluation(make, pipeline, paint):
    denoiser = make()
    pipe = pipeline(denoiser)
    steps = stepped(denoiser, pipe, paint)
    assert counted(steps) == [(0, 2, "cond"), (1, 2, "cond")]
    assert [s.sigma for s in steps] == pytest.approx(pipe.scheduler.sigmas[2:4].tolist()) and steps[0].sigma < 1


@pytest.mark.parametrize("strengths", [(0.5, 1.0), (1.0, 0.5), (0.5, 0.5)])
def test_each_generation_has_its_own_memory_and_count(strengths):
    denoiser = flux()
    steps = stepped(
        denoiser, flux_pipeline(denoiser), lambda pipe: [flux_from_image(pipe, strength=s) for s in strengths]
    )
    made = [round(4 * s) for s in strengths]
    assert counted(steps) == [(i, count, "cond") for count in made for i in range(count)]
    first, second = steps[: made[0]], steps[made[0] :]
    assert len({id(s.memory) for s in first}) == len({id(s.memory) for s in second}) == 1
    assert first[0].memory is not second[0].memory


def test_a_generation_that_is_broken_off_leaves_nothing_to_the_next():
    """Which begins where the first one would have gone on."""
    denoiser = flux()

    def stop(pipe, i, t, kept):
        raise KeyboardInterrupt

    def paint(pipe):
        with pytest.raises(KeyboardInterrupt):
            flux_from_image(pipe, strength=1.0, callback_on_step_end=stop)
        flux_from_image(pipe, strength=0.75)

    steps = stepped(denoiser, flux_pipeline(denoiser), paint)
    assert counted(steps) == [(0, 4, "cond")] + [(i, 3, "cond") for i in range(3)]
    assert steps[0].memory is not steps[1].memory


def test_both_evaluations_of_a_second_order_step_are_counted():
    denoiser, scheduler = sd3(), diffusers.FlowMatchHeunDiscreteScheduler()
    pipe = sd3_pipeline(denoiser, diffusers.StableDiffusion3Pipeline, scheduler)
    steps = stepped(denoiser, pipe, sd3_from_text)
    assert counted(steps) == [(i, 5, "cond") for i in range(5)]  # the last step has one
    times = [s.sigma for s in steps]
    assert times == pytest.approx(scheduler.sigmas[:-1].tolist()) and times[1] == times[2] > times[3] == times[4]
    pipe = sd3_pipeline(denoiser, scheduler=scheduler)
    again = stepped(denoiser, pipe, sd3_from_image)  # steps 2 and 3 of four: three of seven evaluations
    assert counted(again) == [(i, 3, "cond") for i in range(3)] and again[1].sigma == again[2].sigma < again[0].sigma


@pytest.mark.parametrize(
    "scheduler", [diffusers.DDIMScheduler(), diffusers.HeunDiscreteScheduler()], ids=["DDIM", "Heun"]
)
@torch.no_grad()
def test_schedulers_of_noise_are_counted_from_where_they_begin(scheduler):
    """As an image-to-image pipeline drives them; diffusers has none of this family."""
    denoiser = made(DiTDiffusersConfig(num_layers=1, sample_size=8, num_embeds_ada_norm=10, **HEADS))
    unit, steps = denoiser.units[0], []
    denoiser.units[0] = lambda stream: steps.append(stream.step) or unit(stream)
    pipe, x = Pipeline(denoiser.model, scheduler), torch.ones(1, 4, 8, 8)
    with attached(pipe, denoiser):
        scheduler.set_timesteps(4)
        begin = 2 * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        for t in scheduler.timesteps[begin:]:
            out = pipe.transformer(x, timestep=t[None], class_labels=torch.tensor([1])).sample
            x = scheduler.step(out[:, :4], t, x).prev_sample
    times = (scheduler.timesteps[begin:] + 1) / 1000
    assert counted(steps) == [(i, len(times), "cond") for i in range(len(times))]
    assert [s.sigma for s in steps] == pytest.approx(times.tolist())


class Pipeline:
    """What `attached` reads of a pipeline."""

    def __init__(self, transformer: Any, scheduler: Any):
        self.transformer, self.scheduler = transformer, scheduler


def test_a_pipeline_may_tell_its_cache_context_where_it_is():
    """As Wan's does; places are those of the scheduler all the same."""
    denoiser, steps = sd3(), []
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe, own = Pipeline(denoiser.model, scheduler), denoiser.units[0]
    denoiser.units[0] = lambda stream: steps.append(stream.step) or own(stream)
    scheduler.set_timesteps(3)
    told = {"encoder_hidden_states": torch.ones(1, 5, 24), "pooled_projections": torch.ones(1, 20)}
    with attached(pipe, denoiser), torch.no_grad():
        for name in ("cond", "uncond"):
            with pipe.transformer.cache_context(name, step_index=2, sigma=0.25, num_inference_steps=9):
                pipe.transformer(torch.ones(1, 4, 8, 8), timestep=scheduler.timesteps[:1], **told)
    assert counted(steps) == [(0, 3, "cond"), (0, 3, "uncond")] and steps[0].sigma == 1


# ---- guidance --------------------------------------------------------------------------------------------------------


def dit_from_label(pipe: Any, **options) -> Any:
    generator = torch.Generator().manual_seed(2)
    return pipe([3, 5], num_inference_steps=2, generator=generator, output_type="pt", **options)


def dit_pipeline(denoiser: StockDenoiser) -> Any:
    return diffusers.DiTPipeline(denoiser.model, vae(), diffusers.DDIMScheduler())


def dit() -> StockDenoiser:
    return made(DiTDiffusersConfig(num_layers=1, sample_size=8, num_embeds_ada_norm=1000, **HEADS))


def test_a_batch_of_both_branches_is_joint():
    denoiser = sd3()
    pipe = sd3_pipeline(denoiser)
    assert counted(stepped(denoiser, pipe, lambda p: sd3_from_image(p, guidance_scale=3.0)))[0] == (0, 2, "joint")
    assert counted(stepped(denoiser, pipe, sd3_from_image))[0] == (0, 2, "cond")
    told = prompts(2, True) | {"latents": torch.ones(2, 4, 8, 8)}
    pipe = sd3_pipeline(denoiser, diffusers.StableDiffusion3Pipeline)
    steps = stepped(denoiser, pipe, lambda p: sd3_from_text(p, **told))  # one noise, two prompts, and no guidance
    assert counted(steps)[0] == (0, 3, "cond")
    # DiT's pipeline does not say whether it guides: the halves of its batch do
    denoiser = dit()
    pipe = dit_pipeline(denoiser)
    assert counted(stepped(denoiser, pipe, lambda p: dit_from_label(p, guidance_scale=3.0)))[0] == (0, 2, "joint")
    assert counted(stepped(denoiser, pipe, lambda p: dit_from_label(p, guidance_scale=1.0)))[0] == (0, 2, "cond")


@pytest.mark.parametrize("samples", [1, 2])
def test_a_second_call_of_a_step_is_the_unconditional_one(samples):
    """FLUX's image-to-image pipeline calls twice and names neither, also where all samples have one noise."""
    denoiser = flux()
    latents = torch.ones(samples, 64, 16)

    def paint(pipe):
        flux_from_image(pipe, samples, true_cfg_scale=2.0, latents=latents)

    steps = stepped(denoiser, flux_pipeline(denoiser), paint)
    first = "joint" if samples == 2 else "cond"
    assert counted(steps) == [(i, 2, branch) for i in range(2) for branch in (first, "uncond")]
    assert all(s.memory is steps[0].memory for s in steps)


@dataclass
class Apart(Edit):
    separate = True

    def apply(self, denoiser: Denoiser) -> None:
        """Changes nothing."""


def test_an_edit_that_treats_branches_differently_is_refused_in_a_joint_batch():
    denoiser = edit.apply(sd3(), {"apart": Apart()})
    pipe = sd3_pipeline(denoiser)
    with pytest.raises(ValueError, match="'apart' treats guidance branches differently, and a StableDiffusion3Img2"):
        stepped(denoiser, pipe, lambda p: sd3_from_image(p, guidance_scale=3.0))
    assert len(stepped(denoiser, pipe, sd3_from_image)) == 2
