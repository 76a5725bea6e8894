"""What `python -m data.generate` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from edit.inputs.limits import Count, Limits, NotNegative, Positive, Seed, Side, Steps, check_numbers
from edit.inputs.words import helps

CHOICES = {
    "solver": ("euler", "heun", "dpm", "ddim", "ddpm"),
    "padding": ("none", "states", "zeros"),
    "long": ("refuse", "cut"),
    "dtype": ("float16", "float32"),
    "precision": ("float32", "bfloat16", "float16"),
}


@dataclass(frozen=True)
class Request:
    """What to generate with what, and how.

    Args:
        teacher: artifact, run or diffusers folder, or hub id, of a text-conditioned model
        prompts: text file with one prompt per line, or .jsonl with a 'prompt' and perhaps an 'id' in each line; or
            composed:<count>, that many different prompts made of words, for a first try
        out: folder to write; one begun with another teacher or other settings is refused
        text_encoder: T5 or CLIP of transformers, folder or hub id, for token states. Encoders, tokenizers and VAE that
            are not named are those of the teacher's pipeline, if that is of FLUX or PixArt
        tokenizer: its tokenizer, if it lies elsewhere
        pooled_encoder: CLIP for the pooled embedding, if the text encoder has none
        pooled_tokenizer: its tokenizer, if it lies elsewhere
        max_tokens: of the text encoder; the pooled encoder always cuts at its own length
        padding: states: prompts are padded to max_tokens and the states of the padding kept, as FLUX and SD3 are
            trained; zeros: filled up with zeros; none: real tokens only, for teachers that mask
        long: refuse or cut prompts of more tokens
        vae: the teacher's VAE, folder or hub id: for pictures, and as the identity of the latents
        guidance: scale; an input of a guidance-distilled teacher, else applied with the empty prompt
        steps: of the solver
        solver: euler, heun or dpm; for teachers that predict noise dpm, ddim or ddpm
        shift: of the times towards noise; null: that of the artifact, else of its pipeline's scheduler, else that of
            the sampler its family is published with, else 1
        seed: of the noise; image k of the file has noise number k of this seed
        images: per prompt
        points: states of each solve to store beside its latent, evenly between noise and sample: for students that
            learn from the teacher's paths; with euler or heun, whose steps must be a multiple of points + 1
        taps: unit of the teacher whose tokens are stored at every evaluation, with its predictions, for rollouts;
            repeat the key for several units; negative ones count from the end
        size: rows and columns of a latent; null: the teacher's default
        dtype: of the stored arrays: float16 or float32
        precision: of the models: float32, bfloat16 or float16
        batch: images at once
        shard_size: images per shard; an interruption loses at most one shard's work per process
        processes: spread over the GPUs; 0: one for each GPU of this machine
        device: cpu, cuda or gpu, cuda:1, ...; auto: cuda if there is one
    """

    teacher: str
    prompts: str
    out: str
    text_encoder: str | None = None
    tokenizer: str | None = None
    pooled_encoder: str | None = None
    pooled_tokenizer: str | None = None
    max_tokens: Count = 512
    padding: str = "states"
    long: str = "refuse"
    vae: str | None = None
    guidance: NotNegative = 3.5
    steps: Steps = 28
    solver: str = "euler"
    shift: Positive | None = None
    seed: Seed = 0
    images: Count = 1
    points: Annotated[int, Limits(0, 10_000)] = 0
    taps: tuple[int, ...] = ()
    size: Side | None = None
    dtype: str = "float16"
    precision: str = "float32"
    batch: Count = 8
    shard_size: Count = 256
    processes: Annotated[int, Limits(0, 1024)] = 1
    device: str = "auto"
    rank: int = 0  # of this command among `world` such commands
    world: Count = 1

    def __post_init__(self):
        check_numbers(self)
        for name in ("teacher", "prompts", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give {helps(Request)[name]}")
        if self.steps % (self.points + 1):
            raise ValueError(
                f"points={self.points} does not divide steps={self.steps} evenly: steps must be a multiple of "
                "points + 1, and 0 stores none"
            )
        if self.points and self.solver not in ("euler", "heun"):
            raise ValueError(f"points={self.points} needs solver euler or heun, got {self.solver}: set points=0")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank is one of 0 to {self.world - 1} (world={self.world}), got {self.rank}")
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} is one of {', '.join(accepted)}, got {getattr(self, name)!r}")
