"""The frozen models of a command on one device: embeddings of prompts, latents and features of pixels, as stored."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data import manifest
from data.making.encoders import VAE, Encoded, TextEncoder
from data.making.job import Job
from data.making.request import Request
from edit.alignment.encoder import Encoder

DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


class PromptEncoders:
    """The frozen text encoders of a command on one device."""

    def __init__(self, job: Job | Request, device: str):
        dtype = DTYPES[job.precision]
        self.stored = DTYPES[job.dtype]
        self.text = self.pooled = None
        if job.text_encoder:
            self.text = TextEncoder(job.text_encoder, job.tokenizer, job.max_tokens, device, dtype, job.padding)
        if job.pooled_encoder:  # pools at one token; padding behind it has no effect
            self.pooled = TextEncoder(job.pooled_encoder, job.pooled_tokenizer, job.max_tokens, device, dtype)

    @property
    def needs_captions(self) -> bool:
        return self.text is not None or self.pooled is not None

    def describe(self) -> dict[str, Any]:
        """`text` and `pooled` of a manifest: encoder and width of each; None where there is none."""
        null = self.embed([""])[0] if self.needs_captions else {}
        text = self.text.description | {"width": null["text"].shape[-1]} if self.text else None
        pooler = self.pooled or self.text
        pooled = pooler.description | {"width": len(null["pooled"])} if pooler and "pooled" in null else None
        return {"text": text, "pooled": pooled}

    def embed(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """`text` l c and `pooled` c of each caption, as far as there are encoders."""
        rows: list[dict[str, Tensor]] = [{} for _ in captions]
        if self.text is not None:
            for row, encoded in zip(rows, self.text.encode(captions), strict=True):
                row["text"] = self.fit(encoded.text)
                if encoded.pooled is not None:
                    row["pooled"] = self.fit(encoded.pooled)
        if self.pooled is not None:
            for row, encoded in zip(rows, self.pooled.encode(captions), strict=True):
                row["pooled"] = self.fit(_pooled(encoded, self.pooled.description["name"]))
        return rows

    def fit(self, x: Tensor) -> Tensor:
        """Convert to the stored type. Raises ValueError for values beyond its range."""
        stored = x.to("cpu", self.stored)
        if not stored.isfinite().all():
            raise ValueError(f"values do not fit {str(self.stored)[6:]}: set dtype to float32")
        return stored


class Encoders(PromptEncoders):
    """The text encoders, the VAE and the vision encoder of a command on one device.

    Raises:
        FileNotFoundError, ValueError: in one sentence, for a model that is not there, or does not take the images
    """

    def __init__(self, job: Job, device: str):
        super().__init__(job, device)
        self.flips = job.flips
        self.vae = VAE(job.vae, device, DTYPES[job.precision])
        self.device = device
        self.vision, self.casting = None, partial(_casting, device, DTYPES[job.precision])
        if job.features:
            self.vision = Encoder(job.features, job.features_side).load().to(device)
            self.told = manifest.encoder_facts(job.features, job.features_side)

    def encode(self, x: Tensor, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Pixels b 3 y x in [-1, 1] and their captions -> members of each sample, in the stored type."""
        columns = {"moments": self.fit(self.vae.moments(x))}
        if self.flips:
            columns["moments_flip"] = self.fit(self.vae.moments(x.flip(-1)))
        if self.vision is not None:
            columns["features"] = self.look(x)
            if self.flips:
                columns["features_flip"] = self.look(x.flip(-1))
        rows = [{name: column[i] for name, column in columns.items()} for i in range(len(x))]
        for row, words in zip(rows, self.embed(captions) if self.needs_captions else [{}] * len(x), strict=True):
            row |= words
        return rows

    @torch.no_grad()
    def look(self, x: Tensor) -> Tensor:
        """Pixels b 3 y x in [-1, 1] -> patch tokens b n d float16. Raises ValueError for values beyond its range."""
        assert self.vision is not None
        with self.casting():
            tokens = self.vision(x.to(self.device)).tokens.to("cpu", torch.float16)
        if not tokens.isfinite().all():
            raise ValueError(f"features of {self.told['name']} do not fit float16: choose another encoder")
        return tokens

    def grid(self, size: Sequence[int]) -> list[int]:
        """Rows and columns of the patch tokens of an image of `size`, rows and columns of pixels.

        Raises:
            ValueError: if it is smaller than a patch
        """
        assert self.vision is not None
        with torch.no_grad():
            return list(self.vision(torch.zeros(1, 3, *size, device=self.device)).grid)


def _casting(device: str, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def _pooled(encoded: Encoded, name: str) -> Tensor:
    if encoded.pooled is None:
        raise ValueError(f"the pooled encoder is a {name}, which does not pool: expected a CLIP text encoder")
    return encoded.pooled
