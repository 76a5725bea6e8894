"""The text encoders that a finished folder was made with, for prompts that are not in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.making.frozen import PromptEncoders
from data.making.request import Request


def encoders_of(folder: Path, described: Mapping[str, Any]) -> PromptEncoders:
    """The encoders at the places that the manifest names.

    Args:
        folder: made by data.precompute or data.generate
        described: its manifest

    Raises:
        FileNotFoundError: if they are not there
        ValueError: if the manifest names none, or others lie there
    """
    sources, text = described["sources"], described["text"] or {}
    if not (sources.get("text") or sources.get("pooled")):
        raise ValueError(f"the manifest of {folder} does not name text encoders: give n= for samples of its captions")
    request = Request(
        teacher=str(folder),
        prompts=str(folder),
        out=str(folder),
        text_encoder=sources.get("text"),
        tokenizer=_tokenizer(sources.get("text")),
        pooled_encoder=sources.get("pooled"),
        pooled_tokenizer=_tokenizer(sources.get("pooled")),
        max_tokens=text.get("max_tokens", 512),
        padding=text.get("padding", "none"),
        dtype=described["dtype"],
        precision=described.get("precision", "float32"),
    )
    found = PromptEncoders(request, "cpu")
    if found.describe() != {"text": described["text"], "pooled": described["pooled"]}:
        raise ValueError(
            f"the text encoders at {sources.get('text') or sources.get('pooled')} are not those that made {folder}: "
            "put those back, or give n= for samples of its captions"
        )
    return found


def _tokenizer(encoder: str | None) -> str | None:
    """Where an encoder's tokenizer lies in a pipeline: text_encoder_2 has tokenizer_2; None: with the encoder."""
    if encoder is None:
        return None
    place, name = os.path.split(encoder)
    beside = os.path.join(place, name.replace("text_encoder", "tokenizer"))
    published = ":" in name and not os.path.isdir(encoder)
    return beside if beside != encoder and (published or os.path.isdir(beside)) else None
