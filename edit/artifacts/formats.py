"""Formats of an export: a stock transformer folder, one file in the original FLUX.1 layout.

Each function writes weights and returns the code that loads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from edit.artifacts.checkpoint import Artifact, save
from edit.artifacts.flux_single_file import AXES, to_original
from edit.artifacts.steps import steps_of
from edit.artifacts.usage import Usage, calling, dtype_name, imports, scheduling
from edit.artifacts.weights import check_weights
from edit.backbones.flux import Flux
from edit.denoiser import Denoiser


def write_model(artifact: Artifact, folder: Path, dtype: torch.dtype | None, max_shard_size: str) -> Usage:
    """A folder of the stock transformer class, and `edits.json` for `edit.load`.

    Raises:
        ValueError: if stock `diffusers` has no class for the model
    """
    a, denoiser = artifact, artifact.denoiser
    config, steps = stock_config(denoiser), steps_of(a)
    save(denoiser, folder, a.objective, a.sampler, a.data, a.run, dtype=dtype, max_shard_size=max_shard_size)
    name = config["_class_name"]

    def usage(export: str, base: str | None) -> str:
        lines = ["import torch", f"from diffusers import {', '.join(['DiffusionPipeline', name, *imports(steps)])}", ""]
        lines += [f'transformer = {name}.from_pretrained("{export}", torch_dtype={dtype_name(denoiser, dtype)})']
        around = base or "<the pipeline it was made from>"
        lines += [f'pipe = DiffusionPipeline.from_pretrained("{around}", transformer=transformer)']
        return "\n".join([*lines, *scheduling(steps), *calling(a, steps)])

    return usage


def write_single_file(denoiser: Denoiser, file: Path, dtype: torch.dtype | None) -> Usage:
    """One file in the original FLUX.1 layout.

    Raises:
        ValueError: if the model is not a FLUX.1
    """
    if not isinstance(denoiser, Flux):
        raise ValueError(f"format=single_file is the original layout of FLUX.1, this is {denoiser.name}: leave it out")
    metadata = {"format": "pt", AXES: json.dumps(denoiser.axes)}
    save_file(cast(to_original(denoiser.model.state_dict()), dtype), file, metadata)

    def usage(export: str, base: str | None) -> str:
        lines = ["# place it where your tool keeps diffusion models, for instance ComfyUI/models/diffusion_models", ""]
        lines += ["import torch", "from diffusers import FluxTransformer2DModel", ""]
        around = f', config="{base}", subfolder="transformer"' if base else ""
        of = dtype_name(denoiser, dtype)
        lines += [f'transformer = FluxTransformer2DModel.from_single_file("{file.name}"{around}, torch_dtype={of})']
        return "\n".join(lines)

    return usage


def stock_config(denoiser: Denoiser) -> dict[str, Any]:
    """Content of the exported `config.json`.

    Raises:
        ValueError: if stock `diffusers` has no class for the model, with the reason
    """
    import diffusers

    with torch.device("meta"):
        state = {k: v.to("meta") for k, v in denoiser.model.state_dict().items()}
    config = denoiser.to_stock(denoiser.config, state)[0]
    if not hasattr(diffusers, config["_class_name"]):
        reason = config.get("_not_diffusers_because", f"it has no {config['_class_name']}")
        raise ValueError(f"stock diffusers cannot express this {denoiser.name}: {reason}")
    return config


def cast(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Raises ValueError for weights that are not finite, or that the type cannot hold."""
    check_weights(state, dtype)
    return {k: v.detach().to(dtype if v.is_floating_point() else None).contiguous() for k, v in state.items()}
