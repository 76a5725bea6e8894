"""What `python -m data.precompute` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from data.making import buckets
from edit.inputs.limits import Count, Limits, Side, check_numbers

PRECISIONS = ("float16", "float32", "bfloat16")


@dataclass(frozen=True)
class Job:
    """What to encode with what, and how. The fields are the command's options."""

    images: str  # folder of images, or shards: a .tar, a pattern, a folder of .tar files
    out: str
    vae: str  # folder or hub id
    text_encoder: str | None = None  # its token states become `text`
    tokenizer: str | None = None  # None: with the text encoder
    pooled_encoder: str | None = None  # its pooled output becomes `pooled`; None: the text encoder's, if it pools
    pooled_tokenizer: str | None = None
    features: str | None = None  # vision encoder whose patch tokens are stored: folder or hub id
    features_side: Side | None = None  # pixels of the shorter side that it is given; None: see `Encoder`
    max_tokens: Count = 256
    padding: str = "none"  # of the text encoder's input: none, states or zeros, see TextEncoder
    size: Side = 256  # pixels; with buckets the side of the square whose area they all have, about
    bucket_step: Side | None = None  # None: all images are cropped to squares; else sizes are multiples of it
    # of the longer to the shorter side of a bucket, at most
    bucket_ratio: Annotated[float, Limits(1, buckets.LONGEST)] = 2.0
    flips: bool = True  # store the mirrored image's latents, too
    dtype: str = "float16"  # of what is stored: float16 or float32 (npy knows no bfloat16)
    precision: str = "float32"  # the encoders compute in
    batch: Count = 32
    shard_size: Count = 4096  # images per shard; an interruption loses at most one shard's work per process
    processes: Annotated[int, Limits(1, 1024)] = 1
    workers: Annotated[int, Limits(1, 1024)] = 4  # threads that decode images, per process
    device: str = "cpu"  # "cuda" spreads the processes over the GPUs
    on_error: str = "refuse"
    rank: int = 0  # of this command among `world` such commands
    world: Count = 1

    def __post_init__(self):
        check_numbers(self)
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank is one of 0 to {self.world - 1} (world={self.world}), got {self.rank}")
        if self.dtype not in ("float16", "float32"):
            raise ValueError(f"dtype is float16 or float32, got {self.dtype!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        for name in ("images", "out", "vae"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give a folder")
        if self.features == "":
            raise ValueError("features is empty: give a folder or hub id, or leave it out")
        if self.features_side is not None and self.features is None:
            raise ValueError("features_side is of a vision encoder, and there is none: give features, too")
        if self.bucket_step is not None:
            buckets.sizes(self.size, self.bucket_step, self.bucket_ratio)

    @property
    def bucket_sizes(self) -> list[buckets.Size] | None:
        """Sizes in pixels; None: one square for all."""
        if self.bucket_step is None:
            return None
        return buckets.sizes(self.size, self.bucket_step, self.bucket_ratio)
