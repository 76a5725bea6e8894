"""Tiny stock pipelines of the families, around stock transformers, and the same pictures by our sampler."""

from dataclasses import replace
from functools import cache
from typing import Any

import diffusers
import torch
from caches import family, told
from torch import Tensor

from edit import noise
from edit.backbones.stock import tokens_of
from edit.denoiser import Denoiser
from edit.predictions import default_objective
from edit.stream import Condition

STEPS = 8


def images() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()


def qwen_images() -> Any:
    sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
    return diffusers.AutoencoderKLQwenImage(**sizes, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()


def films() -> Any:
    sizes = {"base_dim": 3, "z_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1}
    down = {"temperal_downsample": [False, True, True]}
    return diffusers.AutoencoderKLWan(**sizes, **down, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()


def stock(name: str) -> Any:
    """A stock transformer with the weights of `family`."""
    net: Any = family(name)
    made = net.stock_class()(**{k: v for k, v in net.model.config.items() if not k.startswith("_")})
    made.load_state_dict(net.model.state_dict())
    return made.eval()


def pipeline(name: str, kind: Any = diffusers.FluxPipeline) -> Any:
    """`kind` is the class of FLUX's."""
    texts = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    euler, model = diffusers.FlowMatchEulerDiscreteScheduler, stock(name)
    one = {k: v for k, v in texts.items() if not k[-1].isdigit()}
    if name == "flux":
        two = {k: v for k, v in texts.items() if not k.endswith("3")}
        made = kind(euler(use_dynamic_shifting=True, shift=3.0), images(), **two, transformer=model)
    elif name == "sd3":
        made = diffusers.StableDiffusion3Pipeline(model, euler(shift=3.0), images(), **texts)
    elif name == "qwen_image":
        shift = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
        scheduler = euler(use_dynamic_shifting=True, **shift)
        made = diffusers.QwenImagePipeline(scheduler, qwen_images(), **one, transformer=model)
    elif name == "wan":
        made = diffusers.WanPipeline(**one, vae=films(), scheduler=euler(shift=3.0), transformer=model)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler()
        made = diffusers.PixArtSigmaPipeline(**one, vae=images(), transformer=model, scheduler=scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def conditions(name: str) -> tuple[Condition, Condition]:
    """What is wanted, and what is not."""
    wanted = told(family(name))
    return wanted, wanted.map(lambda v: v if v.dtype in (torch.bool, torch.int64) else 0.5 * v.flip(0))


@cache
def words(name: str) -> dict[str, Any]:
    """Arguments of a pipeline for two samples."""
    net: Any = family(name)
    (wanted, other), x = conditions(name), noise.gaussian(5, torch.arange(2), noise.NOISE, net.sample_shape)
    found: dict[str, Any] = {"prompt_embeds": wanted.text, "num_inference_steps": STEPS, "output_type": "latent"}
    found |= {"height": 16, "width": 16, "latents": x}
    if name == "flux":
        return found | {"pooled_prompt_embeds": wanted.pooled, "latents": tokens_of(x)}
    found |= {"negative_prompt_embeds": other.text, "guidance_scale": 3.0}
    if name == "sd3":
        found |= {"pooled_prompt_embeds": wanted.pooled, "negative_pooled_prompt_embeds": other.pooled}
    mask = torch.ones(2, 5, dtype=torch.int64)
    if name == "qwen_image":
        del found["guidance_scale"]
        found |= {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask, "latents": tokens_of(x)}
        found |= {"true_cfg_scale": 3.0}
    if name == "pixart":
        found |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "negative_prompt": None}
        found |= {"use_resolution_binning": False}
    if name == "wan":
        found |= {"num_frames": 5, "height": 64, "width": 64}
    return found


@torch.no_grad()
def painted(pipe: Any, name: str, **options: Any) -> Tensor:
    return pipe(**{**words(name), **options}, return_dict=False)[0]


@cache
def plain(name: str) -> tuple[Tensor, tuple[float, ...]]:
    """The picture without a cache, and the times of its evaluations."""
    pipe = pipeline(name)
    return painted(pipe, name), tuple(t / 1000 for t in pipe.scheduler.timesteps.tolist())


def sampled(net: Denoiser, name: str) -> Tensor:
    """The same by our sampler: the family's, which takes the steps of the pipeline."""
    ours = net.sampler()
    assert ours is not None
    ours = replace(ours, solver=replace(ours.solver, steps=STEPS), guidance=1.0 if name == "flux" else 3.0)
    wanted, other = conditions(name)
    found = ours(net, default_objective(net), wanted, torch.arange(2), seed=5, negative=other)
    return tokens_of(found) if name in ("flux", "qwen_image") else found


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value of `b`."""
    return float((a - b).abs().max() / b.abs().max())


def evaluated(pipe: Any, name: str) -> tuple[Tensor, list[int]]:
    """A picture, and the evaluations at which the second block computed its attention, counted over all calls."""
    calls, computed = [0], []
    blocks = getattr(pipe.transformer, "transformer_blocks", None) or pipe.transformer.blocks
    attention = getattr(blocks[1], "attn", None) or blocks[1].attn1
    hooks = [
        pipe.transformer.register_forward_hook(lambda m, a, out: calls.append(0)),
        attention.to_q.register_forward_pre_hook(lambda m, a: computed.append(len(calls) - 1)),
    ]
    try:
        return painted(pipe, name), computed
    finally:
        for hook in hooks:
            hook.remove()
