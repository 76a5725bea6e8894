"""Frozen encoders that data sets are made with: a VAE and text encoders, from a local folder or the hub.

Only safetensors are read. An encoder's identity is a hash over its weights and configuration, not its path, so that
latents of different encoders are never mixed, or decoded by the wrong one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PADDINGS = ("none", "states", "zeros")
# by the class that made the checkpoint, else by the kind of model
TEXT_ENCODERS = {
    "CLIPTextModelWithProjection": "CLIPTextModelWithProjection",
    "clip_text_model": "CLIPTextModel",
    "clip": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
}


def locate(spec: str) -> tuple[str, dict[str, str]]:
    """The name and options of `from_pretrained`: a local folder, or a hub id with a subfolder, `owner/name:vae`.

    Raises:
        FileNotFoundError: if this is neither a folder nor a hub id
    """
    if os.path.isdir(spec):
        return spec, {}
    name, _, subfolder = spec.partition(":")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{spec} is no folder here and no hub id (owner/name or owner/name:subfolder)")
    return name, {"subfolder": subfolder} if subfolder else {}


def load_frozen(factory: Any, spec: str, **options: Any) -> nn.Module:
    """`factory.from_pretrained` in eval mode without gradients, refusing all but complete safetensors weights."""
    name, inside = locate(spec)
    try:
        model, report = factory.from_pretrained(
            name, **inside, **options, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{spec} gave no {factory.__name__}: {' '.join(str(error).split())}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{spec} lacks {len(missing)} weights of its {type(model).__name__}, such as {missing[0]}")
    return model.eval().requires_grad_(False)


def model_hash(model: nn.Module) -> str:
    """SHA-256 over configuration, names, shapes and values of a model as it was loaded."""
    config: Any = model.config
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    passing = ("transformers_version", "dtype", "torch_dtype")  # about the writer of the folder, not the model
    lasting = {k: v for k, v in config.items() if not k.startswith("_") and k not in passing}
    digest = hashlib.sha256(json.dumps(lasting, sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- images ---------------------------------------------------------------------------------------------------------


class VAE:
    """An image VAE of `diffusers`: pixels b 3 y x in [-1, 1] to latents and back.

    Raises:
        FileNotFoundError: if there is no VAE
        ValueError: if this is no image VAE with a latent distribution
    """

    def __init__(self, spec: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        import diffusers

        name, inside = locate(spec)
        try:
            kind = str(diffusers.AutoencoderKL.load_config(name, **inside).get("_class_name"))
        except OSError as error:
            raise FileNotFoundError(f"no VAE in {spec}: {' '.join(str(error).split())}") from error
        factory = getattr(diffusers, kind, None)
        if not hasattr(factory, "encode") or not hasattr(factory, "decode"):
            raise ValueError(f"{spec} holds no VAE of diffusers, but {kind}: expected such as AutoencoderKL")
        model = load_frozen(factory, spec, torch_dtype=torch.float32)
        self.name, self.sha256 = kind, model_hash(model)
        if dtype != torch.float32:
            model.to(dtype)  # after the hash, which is of the stored weights
        self.model, self.device, self.dtype = model.to(device), torch.device(device), dtype

    def to(self, device: str | torch.device) -> None:
        self.model, self.device = self.model.to(device), torch.device(device)

    @torch.no_grad()
    def moments(self, x: Tensor) -> Tensor:
        """Mean and standard deviation of the latent distribution: b 3 y x -> b 2c y x float32, unscaled.

        Raises:
            ValueError: if the model gives no distribution
        """
        encoded = self.model.encode(x.to(self.device, self.dtype))
        if not hasattr(encoded, "latent_dist"):
            raise ValueError(f"{self.name} encodes without a latent distribution; expected one, as AutoencoderKL has")
        return torch.cat((encoded.latent_dist.mean, encoded.latent_dist.std), dim=1).float()

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents b c y x -> pixels b 3 y x float32."""
        parts = [self.model.decode(part).sample.float() for part in z.to(self.device, self.dtype).split(8)]
        return torch.cat(parts)

    @property
    def shift_and_scale(self) -> tuple[list[float], list[float]]:
        """Per channel, or one for all: a model is trained on (z - shift) * scale, as the VAE's configuration says."""
        config: Any = self.model.config
        scale = config.get("scaling_factor") or 1.0
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            return list(config["latents_mean"]), [scale / s for s in config["latents_std"]]
        return [config.get("shift_factor") or 0.0], [scale]


# ---- text -----------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """One caption."""

    text: Tensor  # l c, states of the real tokens; with padding="states", of the padding too
    pooled: Tensor | None  # c, where the encoder pools


class TextEncoder:
    """A T5 or CLIP text encoder of `transformers` with its tokenizer.

    Args:
        spec: folder or hub id of the encoder
        tokenizer: the same for the tokenizer; None: it lies with the encoder
        max_tokens: longer captions are cut
        padding: "none": padding is masked while encoding and cut off; "states": captions are padded to max_tokens,
            nothing is masked, and the states of the padding are kept, as FLUX and SD3 are trained; "zeros": as "none",
            but readers of the states fill them up to max_tokens with zeros

    Raises:
        FileNotFoundError: if the encoder or the tokenizer is missing
        ValueError: if the model is no T5, UMT5 or CLIP, or padding is none of the three
    """

    def __init__(
        self,
        spec: str,
        tokenizer: str | None = None,
        max_tokens: int = 256,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        padding: str = "none",
    ):
        import transformers

        if padding not in PADDINGS:
            raise ValueError(f"padding is one of {', '.join(PADDINGS)}, got {padding!r}")
        self.padding = padding
        try:
            name, inside = locate(spec)
            config = transformers.AutoConfig.from_pretrained(name, **inside, trust_remote_code=False)
            name, inside = locate(tokenizer or spec)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, **inside, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"no text encoder in {spec} with a tokenizer in {tokenizer or spec}: {' '.join(str(error).split())}"
            ) from error
        kinds = [*(config.architectures or []), config.model_type]
        kind = next((TEXT_ENCODERS[k] for k in kinds if k in TEXT_ENCODERS), None)
        if kind is None:
            raise ValueError(f"{spec} holds a {config.model_type}, expected a T5, UMT5 or CLIP text encoder")
        model = load_frozen(getattr(transformers, kind), spec, dtype="auto")
        limits = (max_tokens, self.tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
        self.max_tokens = min(limit for limit in limits if limit)
        words = json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()
        self.description = {
            "name": kind,
            "sha256": model_hash(model),
            "vocabulary": hashlib.sha256(words).hexdigest(),
            "max_tokens": self.max_tokens,
        }
        if padding != "none":
            self.description["padding"] = padding
        self.model, self.device = model.to(device, dtype), torch.device(device)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Encoded]:
        """Encode captions; each result is independent of the others and has at least one token."""
        whole = self.padding == "states"
        tokens = self.tokenizer(
            list(captions),
            padding="max_length" if whole else "longest",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.device)
        if whole:
            tokens["attention_mask"] = torch.ones_like(tokens.input_ids)
        if not tokens.input_ids.shape[1]:  # an empty prompt, and a tokenizer that adds nothing to it
            tokens = self.tokenizer([""] * len(captions), padding="max_length", max_length=1, return_tensors="pt")
            tokens = tokens.to(self.device)
        out = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        pooled = out.get("text_embeds", out.get("pooler_output"))
        return [
            Encoded(
                out.last_hidden_state[i, mask.bool()] if mask.any() else out.last_hidden_state[i, :1],
                None if pooled is None else pooled[i],
            )
            for i, mask in enumerate(tokens.attention_mask)
        ]

    def lengths(self, captions: Sequence[str], cut: bool = True) -> list[int]:
        """Real tokens of each caption, after cutting or before."""
        limit = self.max_tokens if cut else None
        tokens = self.tokenizer(list(captions), truncation=cut, max_length=limit, verbose=False)
        return [len(ids) for ids in tokens.input_ids]
