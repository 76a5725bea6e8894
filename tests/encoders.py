"""Image encoders in their real formats, small and random: timm's, and of `transformers` each kind that is accepted."""

from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from timm.models import save_for_hf
from transformers import BitImageProcessorPil

MEAN, STD = [0.45, 0.5, 0.55], [0.2, 0.25, 0.3]
LAYERS, HEADS, WIDTH = 3, 2, 16
TINY = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 32}
# kind: class of the model, more of its configuration, tokens before the patches
KINDS = {
    "dinov2": ("Dinov2", {"mlp_ratio": 2}, 1),
    "dinov2_with_registers": ("Dinov2WithRegisters", {"mlp_ratio": 2, "num_register_tokens": 3}, 4),
    "dinov3_vit": ("DINOv3ViT", {"num_register_tokens": 2}, 3),
    "vit": ("ViT", {}, 1),
    "vit_mae": ("ViTMAE", {}, 1),
    "ijepa": ("IJepa", {}, 0),
    "clip_vision_model": ("CLIPVision", {}, 1),
    "siglip_vision_model": ("SiglipVision", {}, 0),
}


def randomised(model: Any, std: float = 0.3) -> Any:
    """Far from the start, where layer scales and embeddings do next to nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=std)
    return model.eval()


def of_timm(folder: Path, size: int = 32, patch: int = 8, width: int = WIDTH, registers: int = 2, **more) -> Any:
    """A ViT as timm saves it for the hub; returns the model, which still has its head."""
    arguments = {"img_size": size, "patch_size": patch, "embed_dim": width, "depth": LAYERS, "num_heads": HEADS}
    arguments |= {"reg_tokens": registers, **more}
    model = randomised(timm.create_model("vit_tiny_patch16_224", num_classes=5, **arguments))
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": MEAN, "std": STD}
    save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return model


def of_transformers(folder: Path, kind: str, size: int = 32, patch: int = 8, **more) -> Any:
    """A vision model with its preprocessor; returns the model."""
    name, options, _ = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(
        **{**TINY, "image_size": size, "patch_size": patch, **options, **more}
    )
    model = randomised(getattr(transformers, f"{name}Model")(config))
    model.save_pretrained(folder)
    crop = {"height": size, "width": size}
    BitImageProcessorPil(size={"shortest_edge": size}, crop_size=crop, image_mean=MEAN, image_std=STD).save_pretrained(
        folder
    )
    return model
