"""Tiny VAEs of stock pipelines."""

from diffusers import AutoencoderKL


def flat() -> AutoencoderKL:
    """A latent has as many rows as its image; scaled and shifted as those of FLUX and SD3."""
    return AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.4,
        shift_factor=0.1,
    ).eval()


def halved(channels: int) -> AutoencoderKL:
    """A latent of 8 rows is an image of 16."""
    return AutoencoderKL(
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
