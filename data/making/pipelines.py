"""The text encoders, tokenizers and VAE of the `diffusers` pipeline that a published teacher is part of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from data import manifest
from data.making.encoders import TEXT_ENCODERS
from data.making.request import Request
from edit.artifacts.location import find, is_hub_id


def complete(request: Request) -> Request:
    """The request with the encoders and the VAE of the teacher's pipeline, as far as it names none itself.

    FLUX has a CLIP that pools and a T5, PixArt a T5 alone. SD3 joins two CLIPs and a T5, Qwen-Image has a language
    model: neither is encoded here.

    Raises:
        FileNotFoundError: if there is no teacher
        ValueError: if no encoder is named, and the pipeline has none, or some that are not supported
    """
    base, parts = pipeline_of(request.teacher)
    encoders = {name: kind for name, kind in parts.items() if name.startswith("text_encoder")}
    roles = ["pooled" if kind.startswith("CLIP") else "text" for kind in encoders.values()]
    clear = len(set(roles)) == len(roles) and set(encoders.values()) <= set(TEXT_ENCODERS.values())
    if request.text_encoder is None and request.pooled_encoder is None and not (encoders and clear):
        if encoders:
            raise ValueError(
                f"{request.teacher} is told its prompts by {', '.join(encoders.values())}, and data.generate encodes "
                "with one T5 and one CLIP at most: take a teacher that needs no more, such as FLUX or PixArt"
            )
        raise ValueError(
            f"no text encoder: {request.teacher} is in no pipeline that has one, so give those that it was "
            "trained with, as text_encoder=<folder> pooled_encoder=<folder>"
        )
    found = {"vae": f"{base}vae"} if parts.get("vae") == "AutoencoderKL" else {}
    for name, role in zip(encoders, roles, strict=True) if clear else ():
        named = "text_encoder" if role == "text" else "pooled_encoder"
        if getattr(request, named) is None:
            tokenizer = "tokenizer" if role == "text" else "pooled_tokenizer"
            found |= {named: f"{base}{name}", tokenizer: base + name.replace("text_encoder", "tokenizer")}
    return replace(request, **{name: spec for name, spec in found.items() if getattr(request, name) is None})


def pipeline_of(teacher: str) -> tuple[str, dict[str, str]]:
    """The prefix of a part's path, and the class of each part by its name; empty without a pipeline.

    Raises:
        FileNotFoundError: if there is no teacher
    """
    folder = find(teacher, weights=False).parent
    if is_hub_id(teacher):
        from diffusers import DiffusionPipeline

        try:
            index: Any = DiffusionPipeline.load_config(teacher)
        except OSError:  # a transformer by itself
            index = {}
        base = f"{teacher}:"
    else:
        file = folder / "model_index.json"
        index, base = manifest.read(file) if file.is_file() else {}, f"{folder}/"
    pairs = {name: part[1] for name, part in index.items() if isinstance(part, list | tuple) and len(part) == 2}
    return base, {name: kind for name, kind in pairs.items() if isinstance(kind, str)}
