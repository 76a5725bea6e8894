"""A small stock DiT of `diffusers`."""

import torch

STOCK = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}


def stock_model(**options):
    """A stock DiTTransformer2DModel with random weights and, as published folders have, shared embedders."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(**{**STOCK, **options}).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model
