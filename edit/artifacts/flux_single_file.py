"""FLUX.1 under the key names of its original release, as one file: what most tools besides `diffusers` read.

Both directions are exact: tensors are renamed, and rows are joined or split, never computed with. The original keeps
q, k, v (and the single blocks' MLP) in one matrix, and the last modulation as (shift, scale) where `diffusers` has
(scale, shift). Readers count blocks from the keys, so pruned depths need no configuration; a file without any double
or without any single block is refused by the converter of `diffusers`.

Source: key names and row orders of the FLUX.1 release (black-forest-labs/flux, model.py and layers.py).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from edit.backbones.flux import Flux
from edit.state_dicts import check_layout, first_names

AXES = "edit.axes_dims_rope"  # in the file's metadata: the one setting that no shape tells
PREFIX = "model.diffusion_model."  # before every key, where a file holds more than the transformer

# original module -> the stock modules whose rows it joins, in that order
_TOP = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
_LISTS = (("double_blocks", "transformer_blocks", _DOUBLE), ("single_blocks", "single_transformer_blocks", _SINGLE))
_SWAPPED = "final_layer.adaLN_modulation.1"


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From the state dict of `FluxTransformer2DModel` to the original one.

    Raises:
        ValueError: if it has keys that are not of this model
    """
    out, used = {}, set()
    for original, stock in _keys(_count(state, stock) for _, stock, _ in _LISTS):
        if stock[0] in state:
            parts = [state[k] for k in stock]
            whole = torch.cat(parts) if len(parts) > 1 else parts[0]
            out[original] = _swap_halves(whole) if original.startswith(_SWAPPED) else whole
            used.update(stock)
    if unknown := [k for k in state if k not in used]:
        raise ValueError(f"the state dict is not that of a FluxTransformer2DModel: {first_names(unknown)} are unknown")
    return out


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_original`.

    Raises:
        ValueError: if it has keys or tensors that the original FLUX.1 does not have
    """
    state = _weights(state, "img_in.weight")
    width = len(state["img_in.weight"])
    out, used = {}, set()
    for original, stock in _keys(_count(state, original) for original, _, _ in _LISTS):
        if original in state:
            whole = _swap_halves(state[original]) if original.startswith(_SWAPPED) else state[original]
            first = [width] * (len(stock) - 1)
            rows = [*first, len(whole) - sum(first)]
            if rows[-1] < 1:
                raise ValueError(f"{original} has {len(whole)} rows, too few for {len(stock)} layers of width {width}")
            out.update(zip(stock, whole.split(rows), strict=True))
            used.add(original)
    if unknown := [k for k in state if k not in used]:
        raise ValueError(f"this is not the original FLUX.1 layout: {first_names(unknown)} are unknown keys")
    return out


def original_config(state: Mapping[str, Tensor], axes: Sequence[int] | None = None) -> dict[str, Any]:
    """The stock configuration of a model in the original layout, read off its shapes.

    Args:
        state: tensors on any device, meta too
        axes: head channels that carry frame, row and column position; None: FLUX.1's own, for heads of 128

    Raises:
        ValueError: if the shapes do not tell, heads are not of 128 channels and `axes` is None, or axes do not fit
    """
    needed = ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "final_layer.linear.weight")
    state = _weights(state, *needed)
    width, channels = state["img_in.weight"].shape
    norm = next((k for k in state if k.endswith("norm.query_norm.scale")), None)
    if norm is None:
        raise ValueError("this is not the original FLUX.1 layout: no block has a norm.query_norm.scale")
    head = len(state[norm])
    if width % head:
        raise ValueError(f"the model's width {width} is no multiple of its heads' {head} channels")
    if axes is None and head != 128:
        raise ValueError(f"the file has heads of {head} channels and does not say how positions divide them: give axes")
    axes = [16, 56, 56] if axes is None else axes
    whole = isinstance(axes, Sequence) and all(type(a) is int and a > 0 and a % 2 == 0 for a in axes)
    if not whole or len(axes) != 3 or sum(axes) != head:
        raise ValueError(f"{AXES} must be three even numbers whose sum is the {head} channels of a head, got {axes!r}")
    outputs = len(state["final_layer.linear.weight"])
    return {
        "in_channels": channels,
        "out_channels": None if outputs == channels else outputs,
        "num_layers": _count(state, "double_blocks"),
        "num_single_layers": _count(state, "single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": state["txt_in.weight"].shape[1],
        "pooled_projection_dim": state["vector_in.in_layer.weight"].shape[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in state,
        "axes_dims_rope": list(axes),
    }


def read_original(path: str | os.PathLike) -> Flux:
    """A FLUX.1 denoiser from one safetensors file in the original layout.

    Raises:
        FileNotFoundError: if there is no file
        ValueError: if it is not such a file, or not a whole one
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}: give a .safetensors file in the original FLUX.1 layout")
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
        state = load_file(path)
    except Exception as error:  # safetensors raises its own untyped errors for damaged headers
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    try:
        axes = json.loads(metadata[AXES]) if AXES in metadata else None
        with torch.device("meta"):
            denoiser = Flux.from_config(original_config(state, axes))
        stock = from_original(state)
        check_layout(denoiser.model.state_dict(), stock, path.name)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    denoiser.model.load_state_dict(stock, assign=True)
    denoiser.reset_buffers()
    return denoiser.eval()  # type: ignore[return-value]


def _keys(counts: Iterable[int]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every original key with the stock keys it joins, for so many double and single blocks."""
    modules = dict(_TOP)
    for (original, stock, inside), count in zip(_LISTS, counts, strict=True):
        for i in range(count):
            modules |= {f"{original}.{i}.{k}": tuple(f"{stock}.{i}.{m}" for m in v) for k, v in inside.items()}
    for original, stock in modules.items():
        if original.endswith("_norm"):
            yield f"{original}.scale", tuple(f"{m}.weight" for m in stock)
        else:
            for tail in ("weight", "bias"):
                yield f"{original}.{tail}", tuple(f"{m}.{tail}" for m in stock)


def _count(state: Mapping[str, Tensor], name: str) -> int:
    """Length of a list of blocks.

    Raises:
        ValueError: if one in between is missing
    """
    numbers = {int(m[1]) for k in state if (m := re.match(rf"{name}\.(\d+)\.", k))}
    if gaps := [i for i in range(len(numbers)) if i not in numbers]:
        raise ValueError(f"{name}.{gaps[0]} is missing: there are others behind it")
    return len(numbers)


def _weights(state: Mapping[str, Tensor], *needed: str) -> dict[str, Tensor]:
    """The state without a prefix, once the needed matrices are there and all else could be a weight or a bias."""
    state = {k.removeprefix(PREFIX): v for k, v in state.items()}
    if missing := [k for k in needed if k not in state]:
        raise ValueError(f"this is not the original FLUX.1 layout: it has no {missing[0]}")
    for k, v in state.items():
        if v.dim() not in ((2,) if k in needed else (1, 2)) or not v.numel() or not v.is_floating_point():
            kind = str(v.dtype).removeprefix("torch.")
            raise ValueError(f"this is not the original FLUX.1 layout: {k} is {kind} of shape {tuple(v.shape)}")
    return state


def _swap_halves(rows: Tensor) -> Tensor:
    return rows.roll(len(rows) // 2, 0)
