"""A stock pipeline's calls are the evaluations of one generation, wherever it begins and however it guides."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
import vaes
from einops import rearrange
from torch import Tensor
from weights import randomise

import edit
from edit.backbones.attached import _Calls, _Generation, attached
from edit.backbones.dit_diffusers import DiTDiffusersConfig
from edit.backbones.flux import FluxConfig
from edit.backbones.sd3 import SD3, SD3Config
from edit.backbones.stock import StockDenoiser
from edit.backbones.wan import WanConfig
from edit.caching.reuse import Reuse
from edit.denoiser import Denoiser, Edit
from edit.stream import Step, Stream

HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
TEXT: dict[str, Any] = {"joint_attention_dim": 24, "pooled_projection_dim": 20}
NO_TEXT = {f"{kind}{n}": None for kind in ("text_encoder", "tokenizer") for n in ("", "_2")}


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
    return diffusers.FluxImg2ImgPipeline(scheduler=scheduler, vae=vaes.flat(), transformer=denoiser.model, **NO_TEXT)


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
    return kind(scheduler=scheduler, vae=vaes.flat(), transformer=denoiser.model, **NO_TEXT, **more)


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


def placed(place: dict[str, Any]) -> list[Step]:
    """The steps of both branches at a place that the pipeline tells in its cache context, as Wan's does."""
    denoiser, steps = sd3(), []
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe, own = Pipeline(denoiser.model, scheduler), denoiser.units[0]
    denoiser.units[0] = lambda stream: steps.append(stream.step) or own(stream)
    scheduler.set_timesteps(3)
    told = {"encoder_hidden_states": torch.ones(1, 5, 24), "pooled_projections": torch.ones(1, 20)}
    with attached(pipe, denoiser), torch.no_grad():
        for name in ("cond", "uncond"):
            with pipe.transformer.cache_context(name, **place):
                pipe.transformer(torch.ones(1, 4, 8, 8), timestep=scheduler.timesteps[:1], **told)
    return steps


def test_a_pipeline_that_tells_its_cache_context_where_it_is_is_believed():
    """The scheduler, of which no step was asked, would tell index 0."""
    steps = placed({"step_index": 1, "sigma": 0.25, "num_inference_steps": 2})
    assert counted(steps) == [(1, 2, "cond"), (1, 2, "uncond")] and steps[0].sigma == 0.25
    assert steps[0].memory is steps[1].memory
    assert counted(placed({"step_index": 1}))[0] == (1, 3, "cond")
    nothing = placed({"step_index": None, "sigma": None, "num_inference_steps": None})
    assert counted(nothing)[0] == (0, 3, "cond") and nothing[0].sigma == 1


def test_a_pipeline_that_counts_more_than_its_scheduler_lists_is_refused():
    with pytest.raises(ValueError, match="is at evaluation 2 of 9, and its scheduler lists 3"):
        placed({"step_index": 2, "sigma": 0.25, "num_inference_steps": 9})


@pytest.mark.parametrize("strength, begin", [(1.0, 0), (0.5, 2)])
def test_the_grid_of_times_is_that_of_all_evaluations_and_ends_in_0(monkeypatch, strength, begin):
    grids, reach = [], _Generation.reach

    def reached(self, *args):
        reach(self, *args)
        grids.append(self.times)

    monkeypatch.setattr(_Generation, "reach", reached)
    denoiser = flux()
    pipe = flux_pipeline(denoiser)
    steps = stepped(denoiser, pipe, lambda p: flux_from_image(p, strength=strength))
    assert len(set(grids)) == 1 and grids[0] == pytest.approx(pipe.scheduler.sigmas[begin:].tolist())
    assert len(grids[0]) == steps[0].count + 1 and grids[0][-1] == 0
    assert [s.sigma for s in steps] == list(grids[0][:-1])


# ---- what a pipeline sends -------------------------------------------------------------------------------------------


class Strips(SD3):
    """A family whose stock model would read columns of pixels as tokens: it alone knows how."""

    name = "strips"

    def embed(self, hidden_states: Tensor, **native: Any) -> Stream:
        return super().embed(hidden_states=rearrange(hidden_states, "b x (c y) -> b c y x", y=8), **native)

    def packed(self, sample: Tensor) -> Tensor:
        return rearrange(sample, "b c y x -> b x (c y)")


@torch.no_grad()
def test_a_family_packs_as_its_own_stock_model():
    plain = sd3()
    strips = Strips.of(plain.model)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(2)
    x, told = torch.randn(1, 4, 8, 8), {"encoder_hidden_states": torch.ones(1, 5, 24)}
    told |= {"pooled_projections": torch.ones(1, 20), "timestep": scheduler.timesteps[:1]}
    found = []
    for denoiser, sent in ((plain, x), (strips, strips.packed(x))):
        pipe = Pipeline(denoiser.model, scheduler)
        with attached(pipe, denoiser):
            found.append(pipe.transformer(sent, **told).sample)
    assert found[1].shape == (1, 8, 32) and torch.equal(strips.packed(found[0]), found[1])


# ---- two transformers ------------------------------------------------------------------------------------------------


def wan(seed: int) -> StockDenoiser:
    """Width 32, one unit."""
    denoiser = WanConfig(3, 1, text_dim=20, ffn_dim=40, freq_dim=16, rope_max_seq_len=32, **HEADS).build()
    randomise(denoiser, seed)
    return denoiser.eval()


def wan_pipeline(first: Any, second: Any, boundary: float | None = 0.8) -> diffusers.WanPipeline:
    """The times of the first two of five evaluations are above the boundary."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.WanPipeline(None, None, vae.eval(), scheduler, first, second, boundary)  # type: ignore[arg-type]


def film(pipe: Any) -> Tensor:
    text = {k: torch.ones(1, 5, 20) * v for k, v in (("prompt_embeds", 1.0), ("negative_prompt_embeds", -1.0))}
    size = {"num_frames": 1, "height": 16, "width": 16}
    generator = torch.Generator().manual_seed(2)
    words = {"guidance_scale": 3.0, "num_inference_steps": 5, "generator": generator, "output_type": "latent"}
    pipe.set_progress_bar_config(disable=True)
    return pipe(**text, **size, **words).frames


def stock_of(denoiser: StockDenoiser) -> Any:
    """A stock model with the weights of a denoiser."""
    model = denoiser.stock_class().from_config(denoiser.model.config)
    model.load_state_dict(denoiser.model.state_dict())
    return model.eval()


def noted(denoiser: StockDenoiser) -> list[Step]:
    """Filled with the steps that the first unit is told."""
    unit, steps = denoiser.units[0], []
    denoiser.units[0] = lambda stream: steps.append(stream.step) or unit(stream)
    return steps


BRANCHES = ("cond", "uncond")
HIGH = [(i, 5, branch) for i in range(2) for branch in BRANCHES]
LOW = [(i, 5, branch) for i in (2, 3, 4) for branch in BRANCHES]


def test_two_experts_film_the_same_as_the_stock_ones():
    high, low = wan(0), wan(1)
    experts = stock_of(high), stock_of(low)
    pipe = wan_pipeline(*experts)
    wanted = film(pipe)
    with attached(pipe, high, second=low):
        torch.testing.assert_close(film(pipe), wanted, rtol=0, atol=1e-4)
    assert (pipe.transformer, pipe.transformer_2) == experts and torch.equal(film(pipe), wanted)
    with attached(pipe, low, second=high):
        assert (film(pipe) - wanted).abs().max() > 1e-2


def test_the_index_runs_over_both_experts_and_each_remembers_its_own():
    high, low = wan(0), wan(1)
    pipe = wan_pipeline(stock_of(high), stock_of(low))
    of_high, of_low = noted(high), noted(low)
    with attached(pipe, high, second=low):
        film(pipe)
        film(pipe)
    assert counted(of_high) == 2 * HIGH and counted(of_low) == 2 * LOW
    times = [s.sigma for s in (*of_high[:4:2], *of_low[:6:2])]
    assert times == pytest.approx(pipe.scheduler.sigmas[:5].tolist())
    memories = [of_high[:4], of_low[:6], of_high[4:], of_low[6:]]
    assert all(len({id(s.memory) for s in steps}) == 1 for steps in memories)
    assert len({id(steps[0].memory) for steps in memories}) == 4


def test_one_expert_alone_is_counted_in_the_whole_generation(monkeypatch):
    """Also where the pipeline does not tell where it is, as Wan's from an image."""
    for silent in (False, True):
        high, low = wan(0), wan(1)
        pipe = wan_pipeline(stock_of(high), stock_of(low))
        steps = noted(low)
        if silent:
            context = _Calls.cache_context
            monkeypatch.setattr(_Calls, "cache_context", lambda self, name, c=context, **_: c(self, name))
        with attached(pipe, None, second=low):
            film(pipe)
        assert counted(steps) == LOW


def test_an_edit_in_one_expert_repeats_what_that_one_computed():
    high, low = wan(0), edit.apply(wan(1), {"reuse": Reuse(interval=2)})
    pipe = wan_pipeline(stock_of(high), stock_of(low))
    plain = film(pipe)
    with attached(pipe, high, second=low):
        assert (film(pipe) - plain).abs().max() > 1e-3  # of the evaluations 2 to 4, 3 repeats 2
    low.applied["reuse"].interval = 1
    with attached(pipe, high, second=low):
        torch.testing.assert_close(film(pipe), plain, rtol=0, atol=1e-4)


def test_experts_that_do_not_fit_are_refused_and_the_pipeline_stays_as_it_is():
    high, low = wan(0), wan(1)
    pipe = wan_pipeline(first := stock_of(high), None, None)
    for args, sentence in (
        ((high, low), "a WanPipeline has no transformer_2 here for this wan to stand in for: leave it out"),
        ((sd3(), None), "the pipeline has a WanTransformer3DModel, a sd3 stands in for SD3Transformer2DModel"),
    ):
        with pytest.raises(ValueError, match=sentence), attached(pipe, args[0], second=args[1]):
            pass
        assert pipe.transformer is first
    pipe = wan_pipeline(first, stock_of(low))
    with pytest.raises(ValueError, match="one denoiser cannot stand for both"), attached(pipe, high, second=high):
        pass


# ---- guidance --------------------------------------------------------------------------------------------------------


def dit_from_label(pipe: Any, **options) -> Any:
    generator = torch.Generator().manual_seed(2)
    return pipe([3, 5], num_inference_steps=2, generator=generator, output_type="pt", **options)


def dit_pipeline(denoiser: StockDenoiser) -> Any:
    return diffusers.DiTPipeline(denoiser.model, vaes.flat(), diffusers.DDIMScheduler())


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


def test_a_cache_context_of_both_branches_is_joint_where_the_batch_holds_both():
    """As Mochi's and LTX's pipelines name it, with guidance and without."""
    denoiser, scheduler = sd3(), diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(2)
    pipe, steps = Pipeline(denoiser.model, scheduler), noted(denoiser)
    told = {"encoder_hidden_states": torch.randn(2, 5, 24), "pooled_projections": torch.ones(2, 20)}
    for x in (torch.ones(2, 4, 8, 8), torch.randn(2, 4, 8, 8)):
        with attached(pipe, denoiser), torch.no_grad(), pipe.transformer.cache_context("cond_uncond"):
            pipe.transformer(x, timestep=scheduler.timesteps[:1].expand(2), **told)
    assert [s.branch for s in steps] == ["joint", "cond"]


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
