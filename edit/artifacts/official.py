"""Official DiT and SiT checkpoints (`DiT-XL-2-256x256.pt`, `SiT-XL-2-256.pt`): the only pickles that are read."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edit.backbones.dit import DiT, DiTConfig, DiTWeights
from edit.denoiser import Denoiser
from edit.state_dicts import check_layout


def load_official(denoiser: Denoiser, path: str | os.PathLike) -> None:
    """Fill a `DiT` from an official DiT or SiT `.pt` file (`DiT-XL-2-256x256.pt`, `SiT-XL-2-256.pt`), EMA first.

    Raises:
        FileNotFoundError: if there is no file
        ValueError: if it is not such a checkpoint, or not of this model (keys are named)
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give the official .pt file, or an artifact folder")
    if not isinstance(denoiser, DiT):
        raise ValueError(f"{path.name}: official .pt checkpoints are read into the dit backbone, not {denoiser.name}")
    try:
        with torch.serialization.safe_globals([Namespace]):  # training checkpoints carry their parsed arguments
            mapped = str(path).isprintable()  # torch maps no file whose name is no UTF-8
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors alone: {error.__class__.__name__}"
        ) from error
    state = from_official(checkpoint, denoiser.spec)
    if denoiser.model.pos_embed.is_meta:
        denoiser.model.to_empty(device="cpu")
    denoiser.model.load_state_dict(state)


def from_official(checkpoint: Mapping[str, Any], config: DiTConfig) -> dict[str, Tensor]:
    """State dict of `DiTWeights` from a loaded official checkpoint.

    Args:
        checkpoint: a bare state dict, or a training checkpoint; of that the "ema" entry is taken, else "model"
        config: the model to fill; `time` must be "ddpm" for DiT weights and "sit" for SiT weights

    Raises:
        ValueError: if keys or shapes differ, naming the first few; or if the position table is not the expected one
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"the official checkpoint holds a {type(checkpoint).__name__}, expected a state dict")
    state = next((checkpoint[k] for k in ("ema", "model") if isinstance(checkpoint.get(k), Mapping)), checkpoint)
    state = {k.removeprefix("module."): v for k, v in state.items()}
    with torch.device("meta"):
        wanted = DiTWeights(config).state_dict()
    check_layout(wanted, state, "the official checkpoint")
    if not torch.allclose(state["pos_embed"][0].float(), config.tables()["pos_embed"][0], atol=1e-4):
        raise ValueError("the checkpoint's pos_embed is not the 2-D sin-cos table of this model: another input_size?")
    return state
