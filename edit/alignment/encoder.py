"""Frozen image encoders, real ones: what a diffusion transformer's features and attention maps are aligned with.

A folder or hub id holds either a model of `timm` (config.json with "architecture", model.safetensors: as timm saves for
the hub) or a vision model of `transformers` (config.json with "model_type", safetensors, preprocessor_config.json).
Images are normalised as the model was trained. Specification: methods/repa.md, "Encoder input"; methods/haste.md.

Where `side` is None, the sizes are the published ones: patches of 14 see 14 pixels for every 16 of the image (DINOv2,
CLIP-L and I-JEPA: 224 of 256), bicubic without antialias; others see the image as it is (MAE, DINO, MoCo v3: 256), cut
down by interpolation to whole patches where they must. Position tables are resampled from their own size to the grid.

Inferred: pixels beyond [-1, 1], as decoders make them, are clamped first, for no image has them. Published pipelines
normalise before they resize, this one likewise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edit.alignment.looker import KINDS, Looker, OfTimm, OfTransformers
from edit.inputs.limits import Side, check_numbers
from edit.losses import Frozen
from edit.pretrained import described, flat, loaded, skeleton

ACCEPTED = (
    "a timm model (config.json with its architecture, and model.safetensors) or a transformers vision model "
    f"({', '.join(KINDS)}; safetensors, and preprocessor_config.json)"
)
# arguments of `timm.create_model` that fetch or read other weights
ELSEWHERE = {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


@dataclass(frozen=True)
class Encoder(Frozen):
    """A frozen image encoder.

    Args:
        path: folder, or hub id as owner/name or owner/name@revision
        side: pixels of the shorter side that it is given; None: the published rule of its patch size, see above
        layers: whose attention maps are wanted, counted from 0, negative ones from the end
    """

    path: str
    side: Side | None = None
    layers: tuple[int, ...] = ()

    def __post_init__(self):
        check_numbers(self)
        object.__setattr__(self, "layers", tuple(self.layers))

    def load(self) -> Looker:
        """The encoder with its weights, frozen, in fp32.

        Raises:
            FileNotFoundError: if it cannot be found
            ValueError: if it is of an unknown kind, lacks weights, or has no such layer
        """
        return self._made(found(self.path, weights=True), weights=True)

    def structure(self) -> Looker:
        """The same without weights, on the meta device; raises likewise."""
        with torch.device("meta"):
            return self._made(found(self.path, weights=False), weights=False)

    def identity(self) -> dict[str, Any]:
        """By what cached features know their encoder: its name, the SHA-256 of its files, its width and side.

        The files are weights and configurations: another mean of the images makes other features.
        """
        from edit.artifacts.checksums import of_file

        folder = found(self.path, weights=True)
        told = (folder / name for name in ("config.json", "preprocessor_config.json"))
        files = sorted([*folder.glob("*.safetensors"), *(file for file in told if file.exists())])
        sums = {file.name: of_file(file) for file in files}
        sha256 = hashlib.sha256(json.dumps(sums).encode()).hexdigest()
        return {"name": self.path, "sha256": sha256, "width": self.structure().width, "side": self.side}

    def _made(self, folder: Path, weights: bool) -> Looker:
        try:
            config = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"no encoder in {self.path}: expected {ACCEPTED}: {flat(error)}") from error
        if weights and not any(folder.glob("*.safetensors")):
            raise FileNotFoundError(f"no weights in safetensors in {self.path}: expected {ACCEPTED}")
        if isinstance(config, dict) and "architecture" in config:
            return OfTimm(self.path, self.layers, self.side, *timm_model(folder, config, weights))
        if not isinstance(config, dict) or config.get("model_type") not in KINDS:
            kind = config.get("model_type") if isinstance(config, dict) else None
            raise ValueError(f"{self.path} holds {kind or 'a model of unknown kind'}, expected {ACCEPTED}")
        return OfTransformers(self.path, self.layers, self.side, *transformers_model(folder, weights))


def found(path: str, weights: bool) -> Path:
    """The folder of an encoder; of a hub id its own, fetched unless it is there.

    Raises:
        FileNotFoundError: if there is none
    """
    if Path(path).is_dir():
        return Path(path)
    name, _, revision = path.partition("@")
    if name.startswith((".", "/")) or name.count("/") != 1:
        raise FileNotFoundError(f"no folder {path}: give the folder or hub id of {ACCEPTED}")
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "preprocessor_config.json", *(["*.safetensors", "*.index.json"] if weights else [])]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"neither a folder nor a model of the hub that can be had: {path}; give the folder or hub id of "
            f"{ACCEPTED}: {flat(error)}"
        ) from error


def timm_model(folder: Path, config: dict[str, Any], weights: bool) -> tuple[Any, dict[str, Any]]:
    """The model of a folder in timm's format, and how its images are prepared."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(f'{folder} holds a timm model, and timm is not here: pip install -e ".[vision]"') from error

    name, told = config["architecture"], dict(config.get("model_args") or {})
    if name not in timm.list_models():  # no "hf-hub:..." either: a stranger's folder sends nobody elsewhere
        raise ValueError(f"{folder}: timm has no architecture {name!r}: expected {ACCEPTED}")
    if forbidden := sorted(told.keys() & ELSEWHERE):
        raise ValueError(f"{folder}: model_args of its config.json name weights elsewhere ({forbidden[0]}): remove it")
    preparation = config.get("pretrained_cfg") or config
    arguments = {"pretrained_cfg": preparation, **told, "num_classes": 0}

    def made() -> Any:
        try:  # transformers resample their position tables
            return timm.create_model(name, **arguments | {"dynamic_img_size": True})
        except TypeError:
            return timm.create_model(name, **arguments)

    try:
        if weights:
            refuse_larger(made, folder / "model.safetensors")
        model = made()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{folder}: timm makes no {name} of it: {flat(error)}") from error
    if weights:
        from safetensors.torch import load_file

        state = load_file(folder / "model.safetensors") if (folder / "model.safetensors").exists() else {}
        convert = getattr(import_module(type(model).__module__), "checkpoint_filter_fn", None)  # of older formats
        try:
            missing = model.load_state_dict(convert(state, model) if convert else state, strict=False).missing_keys
        except RuntimeError as error:
            raise ValueError(f"{folder}: the weights are not those of its config.json: {flat(error)}") from error
        if missing:
            raise ValueError(f"{folder} lacks {len(missing)} weights of its {name}: {missing[0]}")
    return model, preparation


def refuse_larger(made: Callable[[], nn.Module], file: Path) -> None:
    """Raises ValueError if a model has more weights than its file has bytes, before memory is taken for them."""
    with torch.device("meta"):
        count = sum(p.numel() for p in made().parameters())
    if file.exists() and count > (size := file.stat().st_size):
        raise ValueError(f"{file} has {size} bytes, and its config.json describes {count} weights: get both anew")


def transformers_model(folder: Path, weights: bool) -> tuple[Any, dict[str, Any]]:
    """The vision model of a folder of `transformers`, and its preprocessor's configuration."""
    config, preparation = described(str(folder), KINDS, "a vision model")
    config = getattr(config, "vision_config", config)  # of CLIP and SigLIP the half that sees
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0
    model = loaded(str(folder), config, config.model_type, "pooler") if weights else skeleton(config)
    return model, preparation
