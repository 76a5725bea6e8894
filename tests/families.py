"""Every family of units, tiny, with random weights in float64, where a comparison shows more than rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from weights import randomise

from edit.backbones.dit import DiTConfig
from edit.backbones.dit_diffusers import DiTDiffusersConfig
from edit.backbones.flux import FluxConfig
from edit.backbones.micro_dit import MicroDiTConfig
from edit.backbones.pixart import PixArtConfig
from edit.backbones.qwen_image import QwenImageConfig
from edit.backbones.sd3 import SD3Config
from edit.backbones.wan import WanConfig
from edit.denoiser import Denoiser
from edit.predictions import KINDS
from edit.solvers import Grid, Solver
from edit.stream import Condition, Stream
from edit.unit import Unit

HEADS = {"attention_head_dim": 16, "num_attention_heads": 4}
TEXT = {"joint_attention_dim": 24, "pooled_projection_dim": 20}
AXES: dict[str, Any] = {"axes_dims_rope": (4, 6, 6), "sample_size": (8, 8), "in_channels": 16}
DIT: dict[str, Any] = {"input_size": 8, "hidden_size": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
CONFIGS = {
    "dit": DiTConfig(**DIT),
    "dit swiglu": DiTConfig(**DIT, swiglu=True, qk_norm=True, rope=True, registers=2),
    "dit_diffusers geglu": DiTDiffusersConfig(
        num_layers=2, sample_size=8, num_embeds_ada_norm=10, activation_fn="geglu", **HEADS
    ),
    "flux": FluxConfig(num_layers=2, num_single_layers=2, **AXES, **HEADS, **TEXT),
    "sd3": SD3Config(in_channels=4, num_layers=3, sample_size=8, pos_embed_max_size=8, **HEADS, **TEXT),
    "micro_dit": MicroDiTConfig(input_size=8, width=64, depth=3, head=16, text_width=24, multiple=32),
    "pixart": PixArtConfig(num_layers=2, sample_size=8, cross_attention_dim=64, caption_channels=24, **HEADS),
    "qwen_image": QwenImageConfig(num_layers=3, joint_attention_dim=24, **AXES, **HEADS),
    "wan": WanConfig(4, num_layers=2, ffn_dim=128, text_dim=24, freq_dim=32, sample_size=(2, 8, 8), **HEADS),
}
# and what differs in what a model is told or predicts
BACKBONES = CONFIGS | {
    "sit": DiTConfig(**DIT, time="sit", learn_sigma=True),
    "dit ddpm": DiTConfig(**DIT, time="ddpm", learn_sigma=True),
    "dit edm": DiTConfig(**DIT, time="edm"),
    "flux untold": FluxConfig(num_layers=2, num_single_layers=2, guidance_embeds=False, **AXES, **HEADS, **TEXT),
}
# float64 sums in another order; stock RoPE is fp32, where the last bit of a float64 can turn a rounding
TOLERANCE = {name: 1e-7 if name in ("flux", "qwen_image") else 1e-12 for name in CONFIGS}


def family(name: str) -> Denoiser:
    """The same random weights every time."""
    torch.manual_seed(0)
    denoiser = CONFIGS[name].build()
    randomise(denoiser)
    return denoiser.double().eval()


def solver_at(denoiser: Denoiser, evaluations: int) -> Solver:
    """One that fits what the model predicts, of so many evaluations: the usual one; even steps of Euler where that
    takes none of this number, as Heun's no even one."""
    usual: Any = KINDS[denoiser.prediction].solver
    found = [replace(usual, steps=steps) for steps in (evaluations, (evaluations + 1) // 2)]
    even = Grid(tuple(i / evaluations for i in range(evaluations, 0, -1)))
    return next((solver for solver in found if solver.evaluations == evaluations), even)


def inputs(denoiser: Denoiser, count: int = 2) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """(x, t, condition) of some samples of different times."""
    g = torch.Generator().manual_seed(1)

    def drawn(shape) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    condition = denoiser.example(count, text=5).map(lambda v: drawn(v.shape) if v.is_floating_point() else v)
    return drawn((count, *denoiser.sample_shape)), torch.linspace(0.3, 0.7, count).double(), condition


def walk(denoiser: Denoiser) -> Iterator[tuple[Unit, Stream]]:
    """Each unit with a stream that reaches it, in float64 throughout."""
    stream = denoiser.embed(**denoiser.pack(*inputs(denoiser)))
    for unit in list(denoiser.units):
        assert isinstance(unit, Unit)
        parts = {name: getattr(stream, name) for name in ("image", "text", "cond", "time", "signal")}
        stream = replace(stream, **{k: None if v is None else v.double() for k, v in parts.items()})
        with torch.no_grad():
            after = unit(stream)
        yield unit, stream
        stream = after


def difference(a: Stream, b: Stream) -> float:
    """The largest between two streams' tokens, of image and text."""
    image = (a.image - b.image).abs().max().item()
    return image if a.text is None or b.text is None else max(image, (a.text - b.text).abs().max().item())
