"""Descriptions of artifacts: the content of `edits.json`, or its equivalent for a stock `diffusers` folder."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from edit.artifacts.location import find
from edit.denoiser import Denoiser
from edit.inputs import trust

FORMAT = 1


def edits_of(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The edits of an artifact, folded and live, each with its name, import path and fields."""
    description = read_description(find(path, weights=False))
    return [*description["folded"], *({"name": name, **node} for name, node in description["edits"].items())]


def read_description(path: Path) -> dict[str, Any]:
    """Content of edits.json, or its equivalent for a stock folder.

    Raises:
        FileNotFoundError: if it is missing where edits have left parameters
        ValueError: if it cannot be read, or is of another format
    """
    if not os.path.lexists(path / "edits.json"):
        if (path / "edits.safetensors").exists():
            raise FileNotFoundError(
                f"{path / 'edits.json'} is missing, which says what edits.safetensors belongs to: the artifact is not "
                "whole"
            )
        return _describe_stock(trust.read_json(path / "config.json"))
    description = trust.read_json(path / "edits.json")
    if description.get("format") != FORMAT:
        raise ValueError(f"{path} has artifact format {description.get('format')}, this version of edit reads {FORMAT}")
    if missing := [k for k in _PARTS if k not in description]:
        raise ValueError(f"{path / 'edits.json'} has no {missing[0]}: the artifact is not whole")
    _check_parts(description, path / "edits.json")
    return description


def _check_parts(description: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError where a part is not of the type that `save` writes."""
    for part, kinds in _PARTS.items():
        value = description[part]
        items = value.values() if part == "edits" and isinstance(value, dict) else value if part == "folded" else ()
        if not isinstance(value, kinds) or not all(isinstance(item, dict) for item in items):
            raise ValueError(f"{file} holds {trust.cut(value)} for {part}: it was not written by edit.save")
    if odd := [e for e in description["folded"] if not {"name", "_target_"} <= set(e)]:
        raise ValueError(f"{file} holds {trust.cut(odd[0])} for folded: an edit has a name and an import path")


_PARTS: dict[str, Any] = {
    "backbone": str,
    "base": dict | None,
    "edits": dict,
    "folded": list,
    "objective": dict | None,
    "sampler": dict | None,
    "data": dict,
    "run": dict,
}


def family_of(target: str) -> type[Denoiser]:
    if not target.startswith("edit.backbones."):
        raise ValueError(f"the artifact's backbone {trust.cut(target, False)} is not one of edit.backbones")
    try:
        return trust.named(target, ("edit",), (Denoiser,), "the artifact's backbone")
    except ValueError as error:
        raise ValueError(str(error).replace("the artifact's backbone asks for", "the artifact's backbone")) from error


_STOCK_CLASSES = {
    "DiTTransformer2DModel": "edit.backbones.dit.DiT",
    "FluxTransformer2DModel": "edit.backbones.flux.Flux",
    "PixArtTransformer2DModel": "edit.backbones.pixart.PixArt",
    "QwenImageTransformer2DModel": "edit.backbones.qwen_image.QwenImage",
    "SD3Transformer2DModel": "edit.backbones.sd3.SD3",
}


def _stock_name(config: Mapping[str, Any]) -> str:
    """The stock class of a folder without edits.json: a published `diffusers` model."""
    name = config.get("_class_name")
    if name == "Transformer2DModel":  # former name of PixArt and DiT, which their published folders have
        name = {"ada_norm_single": "PixArtTransformer2DModel", "ada_norm_zero": "DiTTransformer2DModel"}.get(
            str(config.get("norm_type")), name
        )
    if not isinstance(name, str) or name not in _STOCK_CLASSES:
        shown = trust.cut(name, quoted=False)
        raise ValueError(f"no backbone here reads a {shown}; known are {', '.join(_STOCK_CLASSES)}")
    return name


def _describe_stock(config: Mapping[str, Any]) -> dict[str, Any]:
    """A description for a folder without edits.json."""
    empty: dict[str, Any] = {"base": None, "edits": {}, "folded": [], "objective": None, "sampler": None}
    return {"format": FORMAT, "backbone": _STOCK_CLASSES[_stock_name(config)], **empty, "data": {}, "run": {}}


def stock_state(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of the weights that a published configuration goes with; called on the meta device."""
    import diffusers

    cls = getattr(diffusers, _stock_name(config))
    known = inspect.signature(cls.__init__).parameters  # published ones carry fields of older versions, too
    return cls(**{k: v for k, v in config.items() if k in known}).state_dict()
