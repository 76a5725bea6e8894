"""A DiT as `diffusers.DiTTransformer2DModel`, and back: options, names and layouts of the weights.

Two facts about that class decide what converts exactly. It spaces the sinusoid's frequencies by 1/(half - 1) where the
official code uses 1/half: no change of weights can hide that, so only models built with `frequency_shift=1` convert to
it (the digits presets are). And it keeps a copy of the time and label embedders in every block: reading one back
demands that the copies agree.

Configurations are the fields of `DiTConfig` as plain values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_ROOT = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_EMBEDDERS = {  # one copy per block in diffusers
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}


def why_not_diffusers(config: Mapping[str, Any]) -> str | None:
    """The first option of this model that `DiTTransformer2DModel` cannot express, or None."""
    options = {
        "frequency_shift other than 1": config["frequency_shift"] != 1,
        "qk_norm": config["qk_norm"],
        "rope": config["rope"],
        "swiglu": config["swiglu"],
        "rms_norm": config["rms_norm"],
        "registers": config["registers"] > 0,
        "mlp_ratio other than 4": config["mlp_ratio"] != 4,
    }
    return next((name for name, present in options.items() if present), None)


def to_diffusers(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Configuration and weights of the equal `DiTTransformer2DModel`; feed it the times that `DiT.pack` makes.

    Weights of replaced layers (`Edit.replaces`) are absent from both sides.

    Raises:
        ValueError: if the model has an option that class lacks
    """
    if reason := why_not_diffusers(config):
        raise ValueError(f"DiTTransformer2DModel has no {reason}: build with frequency_shift=1 and no modern options")
    described = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": config["hidden_size"] // config["num_heads"],
        "in_channels": config["in_channels"],
        "out_channels": config["in_channels"] * (2 if config["learn_sigma"] else 1),
        "num_layers": config["depth"],
        "sample_size": config["input_size"],
        "patch_size": config["patch_size"],
        "num_embeds_ada_norm": config["num_classes"],
        "norm_eps": config["mlp_norm_eps"],
        **_STOCK_FIXED,
    }
    stock: dict[str, Tensor] = {}

    def give(ours: str, theirs: str, change: Callable[[Tensor], Tensor] = lambda v: v) -> None:
        for kind in ("weight", "bias"):  # the label table has no bias
            if (value := state.get(f"{ours}.{kind}")) is not None:
                stock[f"{theirs}.{kind}"] = change(value)

    for ours, theirs in _ROOT.items():
        give(ours, theirs)
    for i in range(config["depth"]):
        ours_at, theirs_at = f"blocks.{i}", f"transformer_blocks.{i}"
        for ours, theirs in _BLOCK.items():
            give(f"{ours_at}.{ours}", f"{theirs_at}.{theirs}")
        for j, name in enumerate("qkv"):
            give(f"{ours_at}.attn.qkv", f"{theirs_at}.attn1.to_{name}", lambda v, j=j: v.chunk(3)[j].contiguous())
        for ours, theirs in _EMBEDDERS.items():
            give(ours, f"{theirs_at}.{theirs}", Tensor.clone)
    return described, stock


def config_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the equal `DiTConfig`, with `time="ddpm"`, as published folders are.

    Raises:
        ValueError: if the `DiTTransformer2DModel` has options that a DiT lacks
    """
    given = {**_STOCK_DEFAULTS, **_STOCK_FIXED, **config}
    heads, head = given["num_attention_heads"], given["attention_head_dim"]
    channels = given["in_channels"]
    for option, expected in _STOCK_FIXED.items():
        if given[option] != expected:
            raise ValueError(f"this DiTTransformer2DModel has {option} {given[option]!r}, a DiT has {expected!r}")
    if given["out_channels"] not in (None, channels, 2 * channels):
        raise ValueError(
            f"this DiTTransformer2DModel has out_channels {given['out_channels']}, a DiT of {channels} channels has "
            f"{channels} or {2 * channels}"
        )
    return {
        "input_size": given["sample_size"],
        "in_channels": channels,
        "patch_size": given["patch_size"],
        "hidden_size": heads * head,
        "depth": given["num_layers"],
        "num_heads": heads,
        "num_classes": given["num_embeds_ada_norm"],
        "learn_sigma": given["out_channels"] == 2 * channels,
        "time": "ddpm",
        "frequency_shift": 1.0,
        "mlp_norm_eps": given["norm_eps"],
    }


def from_diffusers(depth: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `DiTTransformer2DModel` of so many blocks under the names of `DiTWeights`.

    Layers of which nothing is there are left out: whoever loads the weights knows which ones are to be there.

    Raises:
        ValueError: if keys of a layer are missing, or the embedders differ between blocks
    """
    ours_state: dict[str, Tensor] = {}

    def take(*layers: str, kinds: tuple[str, ...] = ("weight", "bias")) -> dict[str, Tensor]:
        keys = {kind: [f"{layer}.{kind}" for layer in layers] for kind in kinds}
        every = [key for of_kind in keys.values() for key in of_kind]
        if not any(key in state for key in every):
            return {}
        if lacking := next((key for key in every if key not in state), None):
            raise ValueError(f"not a DiTTransformer2DModel folder of this configuration: {lacking} is missing")
        return {k: state[v[0]] if len(v) == 1 else torch.cat([state[key] for key in v]) for k, v in keys.items()}

    def put(ours: str, values: Mapping[str, Tensor]) -> None:
        ours_state.update({f"{ours}.{kind}": value for kind, value in values.items()})

    for ours, theirs in _ROOT.items():
        put(ours, take(theirs))
    for i in range(depth):
        at = f"transformer_blocks.{i}"
        for ours, theirs in _BLOCK.items():
            put(f"blocks.{i}.{ours}", take(f"{at}.{theirs}"))
        put(f"blocks.{i}.attn.qkv", take(*(f"{at}.attn1.to_{name}" for name in "qkv")))
        for ours, theirs in _EMBEDDERS.items():
            kinds = ("weight",) if ours.startswith("y_embedder") else ("weight", "bias")
            first, mine = take(f"transformer_blocks.0.{theirs}", kinds=kinds), take(f"{at}.{theirs}", kinds=kinds)
            if any(not v.is_meta and not torch.equal(first[k], v) for k, v in mine.items()):
                raise ValueError(f"block {i} of this DiTTransformer2DModel has its own {theirs}: a DiT shares one")
            put(ours, first)
    return ours_state


_STOCK_FIXED = {  # options of that class that make a DiT; "gelu" or "layer_norm" would load and compute something else
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
_STOCK_DEFAULTS = {  # of diffusers.DiTTransformer2DModel, for folders that leave fields out
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
