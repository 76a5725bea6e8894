"""Exports for tests: a tiny FLUX, the command, and the stock classes that read the result."""

import json
from pathlib import Path

import torch
from omegaconf import OmegaConf
from weights import randomise

import edit
from edit.backbones.flux import Flux, FluxConfig
from edit.sampling import Sampler
from edit.solvers import Euler
from recipes.export import main as command

ABSENT = {"text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}  # of the tiny pipeline


def make_flux(seed: int = 0, **options) -> Flux:
    tiny = {"in_channels": 16, "num_layers": 3, "num_single_layers": 3, "attention_head_dim": 16}
    tiny |= {"num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 20}
    denoiser = FluxConfig(**{**tiny, "axes_dims_rope": (4, 6, 6), "sample_size": (8, 8), **options}).build()
    randomise(denoiser, seed)
    return denoiser.eval()  # type: ignore[return-value]


@torch.no_grad()
def stock_output(model, flux: Flux, asked) -> torch.Tensor:
    """What a stock transformer predicts for the same question, as latents."""
    native = flux.pack(*asked)
    grid = native.pop("grid")
    tokens = model(**native, return_dict=False)[0]
    x = tokens.view(2, *grid[1:], 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(2, 4, 8, 8)


def run(*words: str) -> int:
    return command([str(w) for w in words])


def load_stock(folder: Path):
    import diffusers

    name = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder)


def randomise_lora(denoiser) -> None:
    with torch.no_grad():
        for name, p in denoiser.named_parameters():
            if ".lora_" in name:
                p.normal_(std=0.2)


def error_of(capsys) -> str:
    """The one sentence on stderr."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


def make_run(flux: Flux, folder: Path, **config) -> Path:
    """A run folder as train.py leaves it."""
    sampler = Sampler(Euler(4))
    run_of = {"name": folder.name, "step": 1200, "images": 38400}
    edit.save(flux, folder / "artifact", sampler=sampler, data={"_target_": "data.sets.shapes.Shapes"}, run=run_of)
    settings = {"name": folder.name, "seed": 0, "trainer": {"max_steps": 1200}, "init": None, **config}
    OmegaConf.save(OmegaConf.create(settings), folder / "config.yaml")
    return folder
