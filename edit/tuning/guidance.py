"""The guidance input of a FLUX: fixed at one scale and folded into a bias, or added, to be taught.

Both edits are structural: the artifact is a plain model of its family. The fold is ours.
Specification: methods/distillation.md D2 and D3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edit.denoiser import Denoiser, Edit
from edit.inputs.limits import NotNegative, check_numbers


def embedders(who: str, model: Any) -> Any:
    """The embedder of time, guidance and pooled text. Raises ValueError if another edit has replaced it."""
    if not hasattr(model.time_text_embed, "timestep_embedder") or not hasattr(
        model.time_text_embed.timestep_embedder, "linear_2"
    ):
        raise ValueError(f"{who}: another edit has replaced the embedder of the time: apply {who} before it")
    return model.time_text_embed


@dataclass
class FixedGuidance(Edit):
    """A guidance-distilled FLUX with one fixed scale and no guidance input: exact.

    The guidance embedder's output at that scale is added to the bias of the timestep MLP's last layer, and the embedder
    is dropped. What is left is a model without guidance input, as FLUX.1-schnell is.

    Args:
        guidance: the scale, 3.5 by default in FLUX.1-dev
    """

    guidance: NotNegative = 3.5

    def __post_init__(self):
        check_numbers(self)

    @torch.no_grad()
    def apply(self, denoiser: Denoiser) -> None:
        from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings

        config = denoiser.config
        if not config.get("guidance_embeds"):
            raise ValueError(f"FixedGuidance: this {denoiser.name} has no guidance input: there is nothing to fold")
        model = denoiser.model
        old, bias = embedders("FixedGuidance", model), model.time_text_embed.timestep_embedder.linear_2.bias
        told = torch.tensor([self.guidance], dtype=bias.dtype, device=bias.device)
        bias += old.guidance_embedder(old.time_proj(told * 1000).to(bias.dtype))[0]
        with torch.device("meta"):  # stock calls a module without guidance with other arguments
            new = CombinedTimestepTextProjEmbeddings(len(bias), config["pooled_projection_dim"])
        for name in ("time_proj", "timestep_embedder", "text_embedder"):
            setattr(new, name, getattr(old, name))
        model.time_text_embed = new
        model.register_to_config(guidance_embeds=False)

    def fold(self, denoiser: Denoiser) -> None:
        """Nothing to do: the bias has it already."""


@dataclass
class GuidanceInput(Edit):
    """The inverse: a FLUX that gets a guidance input, to be taught by a teacher asked at many scales (D3.2).

    The new embedder's last layer is zero, so nothing changes at first.
    """

    def apply(self, denoiser: Denoiser) -> None:
        from diffusers.models.embeddings import CombinedTimestepGuidanceTextProjEmbeddings

        config = denoiser.config
        if config.get("guidance_embeds", True):  # families without the option have no such input
            raise ValueError(f"GuidanceInput: this {denoiser.name} cannot be given a guidance input, or has one")
        model = denoiser.model
        old, weight = embedders("GuidanceInput", model), model.time_text_embed.timestep_embedder.linear_2.weight
        with weight.device:  # type: ignore
            new = CombinedTimestepGuidanceTextProjEmbeddings(len(weight), config["pooled_projection_dim"])
        new.guidance_embedder.to(weight.dtype)
        nn.init.zeros_(new.guidance_embedder.linear_2.weight)
        nn.init.zeros_(new.guidance_embedder.linear_2.bias)
        for name in ("time_proj", "timestep_embedder", "text_embedder"):
            setattr(new, name, getattr(old, name))
        model.time_text_embed = new
        model.register_to_config(guidance_embeds=True)

    def owns(self, name: str) -> bool:
        return ".guidance_embedder." in name

    def fold(self, denoiser: Denoiser) -> None:
        """Nothing to do: the model has its input."""
