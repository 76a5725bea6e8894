"""What to type after a folder of latents is complete: a first training on it that works as it is printed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.names import legible, our_script, setting, typed


def next_step(out: str, made: Mapping[str, Any], generated_by: str | None = None, gpu: bool = False) -> str:
    """A sentence that begins with `next: `: the command line of a small model whose structure fits the samples.

    Args:
        out: the folder
        made: its manifest
        generated_by: the teacher that made the samples; None: they are encoded images
        gpu: whether this machine has one
    """
    shape = tuple(made["latent_shape"])
    told = ["data=latents", setting("data.set.path", out)]
    told += [] if generated_by is None else [setting("data.set.generated_by", generated_by)]
    if made["text"] is None and made["num_classes"] is None:
        return (
            f"next: no backbone trains on {legible(out)}, as it has neither classes nor texts: sort the images into a "
            "folder for each class, or put captions beside them and name a --text-encoder"
        )
    if made["num_classes"] is not None and made.get("buckets"):
        return (
            f"next: no backbone of classes trains on {legible(out)}, as it has several sizes: leave out --bucket-step, "
            "or put captions beside the images, without folders of classes, and name a --text-encoder"
        )
    backbone = _of_classes(shape, made["num_classes"]) if made["num_classes"] is not None else _of_text(shape, made)
    name = f"{Path(out).absolute().name}_{backbone[0].partition('=')[2]}"
    rest = [setting("name", name), "optimizer.lr=1e-4", *(["trainer=gpu"] if gpu else [])]
    return f"next: {typed('python', our_script('train.py'), *told, *backbone, *rest)}"


def _of_classes(shape: tuple[int, ...], classes: int) -> list[str]:
    """A SiT for square latents."""
    channels, side = shape[0], shape[-1]
    patch = next(p for p in (2, 1) if side % p == 0)
    keys = {"in_channels": channels, "input_size": side, "patch_size": patch, "num_classes": classes}
    return ["backbone=sit", "size=S/2", *_settings(keys)]


def _of_text(shape: tuple[int, ...], made: Mapping[str, Any]) -> list[str]:
    """The smallest model of a family that is told what the samples tell."""
    channels, width = shape[0], made["text"]["width"]
    if len(shape) == 4:
        sizes = "[" + ",".join(map(str, shape[1:])) + "]"
        keys = {"in_channels": channels, "text_dim": width, "sample_size": sizes, "rope_max_seq_len": 1024}
        return ["backbone=wan", "size=tiny", *_settings(keys)]
    keys = {"in_channels": 4 * channels, "joint_attention_dim": width}
    if (
        made["pooled"] is None or made["text"].get("padding", "none") == "none"
    ):  # FLUX attends to padding of a fixed length
        return ["backbone=qwen_image", "size=tiny", *_settings(keys)]
    return ["backbone=flux", "size=tiny", *_settings(keys | {"pooled_projection_dim": made["pooled"]["width"]})]


def _settings(keys: Mapping[str, Any]) -> list[str]:
    return [f"backbone.{key}={value}" for key, value in keys.items()]
