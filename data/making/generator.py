"""The work behind `python -m data.generate`: the teacher samples each prompt once, in shards that a restart keeps.

Image number k is prompt k // images, with the noise that `edit.noise` gives number k of the seed: what a shard holds
does not depend on the process that writes it, or on interruptions. The teacher is given the text embeddings as they
are stored, so a student trains on what the teacher saw.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from data import manifest
from data.making.encoders import VAE
from data.making.frozen import DTYPES, PromptEncoders
from data.making.latent_folder import begin, check_place, finish, finished, images_of, readable, room, write_null
from data.making.pipelines import complete
from data.making.processes import in_processes, progress
from data.making.prompts import Prompt, read_prompts
from data.making.request import Request
from data.making.sample_writer import SampleWriter
from data.making.teacher import (
    check_text,
    default_shift,
    described_taps,
    description_of,
    solver_of,
    stored_times,
)
from edit.artifacts.checkpoint import skeleton
from edit.artifacts.location import find
from edit.measuring.devices import find_device
from edit.predictions import default_objective

# fields of a request on which its samples do not depend
PASSING = ("out", "batch", "processes", "device", "rank", "world")


def generate(request: Request, say: Callable[[str], None] = print) -> Path | None:
    """Generate what is still missing.

    Returns:
        The manifest; None if other ranks have yet to finish their shards.

    Raises:
        FileNotFoundError, ValueError: in one sentence, for what cannot be used
        RuntimeError: if a process died
    """
    request = complete(on_devices(request))
    specs = (request.text_encoder, request.tokenizer, request.pooled_encoder, request.pooled_tokenizer, request.vae)
    out = Path(request.out)
    check_place(out, [find(request.teacher, weights=False), *(spec for spec in specs if spec)], "out=")
    prompts = read_prompts(request.prompts)
    if is_made(out, stamp(request, prompts)):
        say(f"{out}: all {len(prompts) * request.images:,} images are there")
        return out / manifest.MANIFEST
    encoders = PromptEncoders(request, "cpu")
    refuse_long(request, encoders, prompts)
    settings = settings_of(request, encoders, prompts)
    begin(out, settings, "out=")
    write_null(out, encoders)
    count = len(prompts) * request.images
    total = math.ceil(count / request.shard_size)
    pending = [k for k in range(request.rank, total, request.world) if not finished(out, k)]
    images = sum(len(images_of(k, request.shard_size, count)) for k in pending)
    say(forecast(request, out, settings, images, count, len(pending), total))
    del encoders
    gc.collect()
    if pending:
        with progress(images) as advance:
            if request.processes == 1:
                write = SampleWriter(request, 0)
                for k in pending:
                    write(k, advance)
            else:
                in_processes(SampleWriter, request, request.processes, pending, advance)
    return finish(out, settings, {"num_classes": None, "classes": None}, total)


def on_devices(request: Request) -> Request:
    """The request with its device and processes as this machine has them.

    Raises:
        ValueError: if it has no such device
    """
    device = {"auto": "cuda" if torch.cuda.is_available() else "cpu", "gpu": "cuda"}.get(request.device, request.device)
    find_device(device)
    each = torch.cuda.device_count() if device == "cuda" else 1
    return replace(request, device=device, processes=request.processes or max(each, 1))


def is_made(out: Path, stamped: str) -> bool:
    """Whether the folder is complete and has this stamp."""
    try:
        made = manifest.verify(out)
    except (FileNotFoundError, ValueError):
        return False  # the manifest is written anew, from records and settings
    if made["sources"].get("stamp") != stamped:
        return False
    return all(manifest.check_shard(out, shard, full=False) is None for shard in made["shards"])


def stamp(request: Request, prompts: Sequence[Prompt]) -> str:
    """A hash of all that decides the shards: settings, prompts, and name, size and time of each file that is read.

    A stamp takes milliseconds; `settings_of` reads all weights. Equal stamps mean the same work. Of unequal ones only
    `settings_of` can tell. A model on the hub counts by its name.
    """
    settings = {name: value for name, value in asdict(request).items() if name not in PASSING}
    teacher = find(request.teacher)
    specs = (request.text_encoder, request.tokenizer, request.pooled_encoder, request.pooled_tokenizer, request.vae)
    folders = [teacher, teacher.parent / "scheduler", *(Path(spec) for spec in specs if spec)]
    files = [(file.name, file.stat()) for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
    facts = [(name, about.st_size, about.st_mtime_ns) for name, about in files]
    return hashlib.sha256(json.dumps([manifest.FORMAT, settings, prompts, facts]).encode()).hexdigest()


# ---- the settings -------------------------------------------------------------------------------------------------


def refuse_long(request: Request, encoders: PromptEncoders, prompts: Sequence[Prompt]) -> None:
    """Raises ValueError if prompts are longer than the encoder takes, and are not to be cut."""
    encoder = encoders.text or encoders.pooled
    if request.long == "cut" or encoder is None:
        return
    lengths = encoder.lengths([p.text for p in prompts], cut=False)
    if long := [(n, p) for n, p in zip(lengths, prompts, strict=True) if n > encoder.max_tokens]:
        raise ValueError(
            f"{len(long)} of {len(prompts)} prompts have more than {encoder.max_tokens} tokens (prompt {long[0][1].id} "
            f"has {long[0][0]}): shorten them, raise max_tokens if the encoder allows it, or set long=cut"
        )


def settings_of(request: Request, encoders: PromptEncoders, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The settings of the folder, as JSON: all that decides the shards, and `sources`, the paths, which may change.

    Raises:
        FileNotFoundError: if there is no teacher or no VAE
        ValueError: if the teacher does not fit prompts, encoders, VAE, size or solver
    """
    denoiser = skeleton(request.teacher)
    shape = denoiser.sample_shape
    if request.size is not None:
        shape = (*shape[:-2], request.size, request.size)
    if not denoiser.accepts(shape):
        raise ValueError(f"{request.teacher} makes no latents of {'x'.join(map(str, shape))}: choose another size")
    vae = None if request.vae is None else describe_vae(request.vae, request.teacher, shape[0])
    text = encoders.describe()
    check_text(request, denoiser, encoders, shape)
    shift = default_shift(request, denoiser, math.prod(shape[1:]) // 4) if request.shift is None else request.shift
    solver_of(request, shift).check(default_objective(denoiser))
    return {
        "format": manifest.FORMAT,
        "vae": vae,
        **text,
        "latent_shape": list(shape),
        "flips": False,
        "dtype": request.dtype,
        "precision": request.precision,
        "shard_size": request.shard_size,
        "generated": {
            **describe_sampling(request, denoiser.name, shift, prompts),
            **(described_taps(request, denoiser, encoders, shape, shift) if request.taps else {}),
        },
        "sources": describe_sources(request, prompts),
    }


def describe_vae(spec: str, teacher: str, channels: int) -> dict[str, Any]:
    """Raises ValueError if the VAE has other channels than the teacher's latents."""
    vae = VAE(spec)
    found = vae.moments(torch.zeros(1, 3, 64, 64)).shape[1] // 2
    if found != channels:
        raise ValueError(
            f"{teacher} makes latents of {channels} channels, the VAE {spec} has {found}: give the VAE that the "
            "teacher was trained with"
        )
    shift, scale = vae.shift_and_scale
    return {"name": vae.name, "sha256": vae.sha256, "shift": shift, "scale": scale}


def describe_sampling(request: Request, family: str, shift: float, prompts: Sequence[Prompt]) -> dict[str, Any]:
    texts = "\n".join(f"{p.id} {p.text}" for p in prompts)
    return {
        "teacher": manifest.teacher_hash(request.teacher),
        "family": family,
        "guidance": request.guidance,
        "steps": request.steps,
        "solver": request.solver,
        "shift": shift,
        "seed": request.seed,
        "images": request.images,
        **({"points": request.points, "times": stored_times(request, shift)} if request.points else {}),
        "prompts": {"count": len(prompts), "sha256": hashlib.sha256(texts.encode()).hexdigest()},
    }


def describe_sources(request: Request, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The paths in use, the stamp of the request, and the data set that the teacher was trained on."""
    places = {
        "teacher": request.teacher,
        "prompts": request.prompts,
        "vae": request.vae,
        "text": request.text_encoder,
        "pooled": request.pooled_encoder,
    }
    found = {name: os.path.abspath(spec) if spec and os.path.exists(spec) else spec for name, spec in places.items()}
    return {"stamp": stamp(request, prompts), "data": description_of(request.teacher).get("data") or None, **found}


def feature_bytes(made: dict[str, Any], latent: int, width: int) -> list[int]:
    """Bytes of a sample's predictions and of each tap's tokens, in elements of `width` bytes; empty without taps."""
    if not made.get("taps"):
        return []
    count = len(made["evaluations"])
    return [count * latent, *(count * made["branches"] * math.prod(made["tokens"]) * width for _ in made["taps"])]


def forecast(
    request: Request, out: Path, settings: dict[str, Any], images: int, count: int, pending: int, total: int
) -> str:
    """The amount of work, as a sentence. Raises ValueError if the disk has too little room."""
    if not pending:
        return f"{out}: all of this command's shards are there ({total} in all, {count:,} images)"
    width = DTYPES[request.dtype].itemsize
    members = [math.prod(settings["latent_shape"]) * width, 200]  # the last is the json
    members += [request.points * members[0]] if request.points else []
    members += feature_bytes(settings["generated"], members[0], width)
    if text := settings["text"]:
        members.append(text["max_tokens"] * text["width"] * width)  # an upper bound if padding is not stored
    if pooled := settings["pooled"]:
        members.append(pooled["width"] * width)
    # with headers of tar and npy, and padding
    needed = images * sum(512 + 128 + math.ceil((m + 1) / 512) * 512 for m in members)
    made = settings["generated"]
    latent = "x".join(map(str, settings["latent_shape"]))
    return (
        f"{images:,} of {count:,} images of {made['family']} -> latents {latent} {request.dtype}, {request.solver} "
        f"{request.steps} steps, guidance {request.guidance:g}, shift {made['shift']:.4g}: {pending} of {total} "
        f"shards, at most {readable(needed)} ({readable(room(out, needed, 'out='))} free)"
    )
