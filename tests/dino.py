"""A DINOv2 in its real format, small and random: 4 layers of 16 channels, 4 x 4 patches of 7 pixels."""

from pathlib import Path

import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def write(folder: Path) -> Path:
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=7, mlp_ratio=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dinov2Model(config)
        for p in model.parameters():  # far from the start, where layer scales and embeddings do next to nothing
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    size = {"height": 28, "width": 28}
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=size, image_mean=MEAN, image_std=STD).save_pretrained(
        folder
    )
    return folder
