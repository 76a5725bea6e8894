"""Tiny models of the families that are asked in the stock forward's own words, with those words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, WanTransformer3DModel
from torch import Tensor
from weights import randomise

from edit.backbones.dit_diffusers import DiTDiffusers
from edit.backbones.pixart import PixArt
from edit.backbones.stock import StockDenoiser
from edit.backbones.wan import Wan

TINY = {"in_channels": 3, "num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 8}
SIZE = (3, 8, 12)  # frames, rows, columns of Wan's latent: 3 x 4 x 6 tokens


@dataclass(frozen=True)
class Native:
    """A family, as `diffusers` has it and as we do.

    Args:
        family: ours
        kind: the stock class
        tiny: settings of the stock class
        words: of a model and further settings -> arguments of the stock forward, three samples
        block: class of the stock blocks
        kept: units that are left of three
        extras: what our family is told beside the stock model
    """

    family: type[StockDenoiser]
    kind: Any
    tiny: dict[str, Any]
    words: Callable[..., dict[str, Any]]
    block: str = "BasicTransformerBlock"
    kept: tuple[int, int] = (0, 2)
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def blocks(self) -> str:
        """The name of their list in the stock model."""
        return next(iter(self.family.lists))

    def stock(self, seed: int = 0, **options: Any) -> Any:
        torch.manual_seed(seed)
        model = self.kind(**{**self.tiny, **options})
        randomise(model, seed)
        return model.eval()

    def made(self, seed: int = 0, **options: Any) -> Any:
        """Ours, of a stock model."""
        return self.family.of(self.stock(seed, **options), **self.extras)


def of_dit(model: Any, size: int = 8) -> dict[str, Any]:
    """The last sample is of the null class."""
    x = torch.randn(3, model.config.in_channels, size, size, generator=torch.Generator().manual_seed(1))
    return {"hidden_states": x, "timestep": torch.tensor([0, 500, 999]), "class_labels": torch.tensor([0, 7, 10])}


def of_pixart(model: Any, size=(8, 8), masked=True) -> dict[str, Any]:
    """Seven text tokens, of which the last sample has one real."""
    g = torch.Generator().manual_seed(1)
    c = model.config
    told = None
    if model.use_additional_conditions:
        told = {"resolution": torch.tensor([[64.0, 96.0]] * 3), "aspect_ratio": torch.tensor([[64 / 96]] * 3)}
    mask = torch.tensor([[1] * 7, [1] * 2 + [0] * 5, [1] + [0] * 6])
    return {
        "hidden_states": torch.randn(3, c.in_channels, *size, generator=g),
        "encoder_hidden_states": torch.randn(3, 7, c.caption_channels or c.cross_attention_dim, generator=g),
        "timestep": torch.tensor([0, 500, 999]),
        "added_cond_kwargs": told,
        "encoder_attention_mask": mask if masked else None,
    }


def of_wan(model: Any, size=SIZE, length=7) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    c = model.config
    return {
        "hidden_states": torch.randn(3, c.in_channels, *size, generator=g),
        "timestep": torch.tensor([1.0, 500.0, 1000.0]),
        "encoder_hidden_states": torch.randn(3, length, c.text_dim, generator=g),
    }


SQUARE = {**TINY, "out_channels": 6, "sample_size": 8}
# in every block of the DiT other embedders, as the class allows; the readout used those of the first
DIT = Native(DiTDiffusers, DiTTransformer2DModel, {**SQUARE, "num_embeds_ada_norm": 10}, of_dit, kept=(1, 2))
PIXART = Native(
    PixArt, PixArtTransformer2DModel, {**SQUARE, "cross_attention_dim": 32, "caption_channels": 20}, of_pixart
)
WAN = Native(
    Wan,
    WanTransformer3DModel,
    {**TINY, "out_channels": 3, "ffn_dim": 64, "text_dim": 20, "freq_dim": 16, "rope_max_seq_len": 16},
    of_wan,
    block="WanTransformerBlock",
    extras={"sample_size": SIZE},
)


def ours(denoiser: Any, arguments: dict[str, Any]) -> Tensor:
    return denoiser.native(denoiser.run(denoiser.embed(**arguments)))


def close(a: Tensor, b: Tensor) -> None:
    """1e-6 of the largest element: some ten fp32 roundings, of which fused multiply-adds save a few."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * b.abs().max().item())
