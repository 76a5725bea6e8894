"""Export of a LoRA: its factors as `diffusers` and `peft` name them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from edit.artifacts.card import Origin
from edit.artifacts.checkpoint import Artifact
from edit.artifacts.description import edits_of
from edit.artifacts.formats import cast, stock_config
from edit.artifacts.steps import steps_of
from edit.artifacts.usage import Usage, calling, imports, scheduling
from edit.artifacts.weights import split_state
from edit.edits import describe
from edit.tuning.lora import ADAPTER, LoRA

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # the names that `diffusers` looks for
LORA_METADATA = "lora_adapter_metadata"


def write_lora(artifact: Artifact, folder: Path, dtype: torch.dtype | None, base: Origin | None) -> Usage:
    """The factors of a LoRA as `diffusers` and `peft` name them.

    alpha / rank is multiplied into B and alpha = rank written down: readers that do not know the metadata take just
    that for granted, so that all agree.

    Args:
        artifact: with the LoRA live
        folder: to write into
        dtype: of the factors
        base: the model that the LoRA was trained on, which may have edits of its own

    Raises:
        ValueError: if the artifact's only edit beyond those of its base is not a LoRA, or its layers are not those of
            stock `diffusers`
    """
    from peft.tuners.lora import LoraLayer

    denoiser, lora = artifact.denoiser, _only_lora(artifact, base)
    own = split_state(denoiser, denoiser.state_dict())[1]
    state = {}
    for key, value in own.items():
        layer, _, factor = key.removeprefix("model.").partition(".lora_")  # factor: "A.default.weight"
        module = denoiser.model.get_submodule(layer)
        assert isinstance(module, LoraLayer)
        scaled = value if factor.startswith("A") else value * module.scaling[ADAPTER]
        state[f"transformer.{layer}.lora_{factor.replace(f'.{ADAPTER}', '')}"] = scaled
    layers = sorted({k.removeprefix("transformer.").partition(".lora_")[0] for k in state})
    settings = {"r": lora.rank, "lora_alpha": lora.rank, "bias": "none", "target_modules": layers}
    settings |= {"rank_pattern": {}, "alpha_pattern": {}}  # which diffusers 0.39 looks for
    packed = json.dumps({f"transformer.{k}": v for k, v in settings.items()})
    save_file(cast(state, dtype), folder / LORA_WEIGHTS, {"format": "pt", LORA_METADATA: packed})

    stock, steps = stock_config(denoiser)["_class_name"], steps_of(artifact)

    def usage(export: str, hub: str | None) -> str:
        names, own, around = "DiffusionPipeline", [], f'"{hub or "<the pipeline it was trained on>"}"'
        if base and base.ours:
            names, around = f"{names}, {stock}", '"<the pipeline around it>", transformer=transformer'
            own = [f'transformer = {stock}.from_pretrained("<export of {base.name}>", torch_dtype=torch.bfloat16)']
        lines = ["import torch", f"from diffusers import {', '.join([names, *imports(steps)])}", "", *own]
        lines += [f"pipe = DiffusionPipeline.from_pretrained({around}, torch_dtype=torch.bfloat16)"]
        lines += [f'pipe.load_lora_weights("{export}", weight_name="{LORA_WEIGHTS}")']
        return "\n".join([*lines, *scheduling(steps), *calling(artifact, steps)])

    return usage


def _only_lora(artifact: Artifact, base: Origin | None) -> LoRA:
    """The only live edit beyond those of the base; raises ValueError as `write_lora` does."""
    denoiser = artifact.denoiser
    lora = next((e for e in denoiser.applied.values() if isinstance(e, LoRA)), None)
    inherited = edits_of(base.path) if base and base.ours else []
    live = {name: e for name, e in denoiser.applied.items() if {"name": name, **describe(e)} not in inherited}
    if changed := [e for e in denoiser.folded if e not in inherited]:
        raise ValueError(
            f"format=lora: {changed[0]['name']} has changed the weights that this LoRA stands on, which nobody else "
            "has: leave format=lora out to export the whole model"
        )
    if lora is None or len(live) > 1:
        there = ", ".join(f"{name} ({type(e).__name__})" for name, e in live.items()) or "none"
        raise ValueError(
            f"format=lora takes an artifact with a LoRA as its only live edit, this one has {there}: leave format=lora "
            "out to export the whole model"
        )
    if denoiser.stock is None:
        raise ValueError(f"stock diffusers has other layers than our {denoiser.name}: leave format=lora out to fold it")
    return lora
