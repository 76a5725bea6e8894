"""The work behind `python -m data.precompute`: images are encoded once, in shards that a restart keeps."""

from __future__ import annotations

import gc
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from data import manifest
from data.damage import Damaged
from data.making.frozen import Encoders
from data.making.job import Job
from data.making.latent_folder import (
    begin,
    check_place,
    finish,
    finished,
    images_of,
    readable,
    room,
    write_null,
)
from data.making.latent_writer import open_images, write_shard
from data.making.processes import Writer, device_of, in_processes, progress
from data.sets.image_folder import Folder
from data.sets.image_shards import TarImages


def precompute(job: Job, say: Callable[[str], None] = print) -> Path | None:
    """Encode what is still missing.

    Returns:
        The manifest; None if other ranks have yet to finish their shards.

    Raises:
        FileNotFoundError, ValueError: in one sentence, for paths and models that cannot be used
        RuntimeError: if a process died
    """
    out = Path(job.out)
    check_place(out, [job.images], "--out")
    source = open_images(job)
    if isinstance(source, TarImages):
        check_place(out, source.tars.paths, "--out")
    encoders = Encoders(job, device_of(job, 0) if job.processes == 1 else "cpu")
    settings = settings_of(job, source, encoders)
    begin(out, settings)
    write_null(out, encoders)
    total = math.ceil(len(source) / job.shard_size)
    pending = [k for k in range(job.rank, total, job.world) if not finished(out, k)]
    say(forecast(job, out, source, encoders, settings, pending, total))
    sizes = [len(images_of(k, job.shard_size, len(source))) for k in pending]
    with progress(sum(sizes)) as advance:
        if job.processes == 1:
            for k in pending:
                write_shard(job, source, encoders, k, advance)
        else:
            del encoders
            gc.collect()
            in_processes(writer, job, job.processes, pending, advance)
    return finish(out, settings, {"num_classes": source.num_classes, "classes": source.classes}, total)


def writer(job: Job, process: int) -> Writer:
    """The function that writes shards in one of several processes."""
    if job.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.processes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the first process has given these warnings
        source = open_images(job)
    encoders = Encoders(job, device_of(job, process))
    return lambda shard, advance: write_shard(job, source, encoders, shard, advance)


def settings_of(job: Job, source: Folder | TarImages, encoders: Encoders) -> dict[str, Any]:
    """The settings of the folder, as JSON: all that decides the shards, and `sources`, the paths, which may change.

    Raises:
        ValueError: if the VAE or the vision encoder does not take images of this size, or of the buckets' sizes
    """
    sizes = job.bucket_sizes or []
    c2, y, x = encoders.vae.moments(torch.zeros(1, 3, job.size, job.size)).shape[1:]
    back = encoders.vae.decode(torch.zeros(1, c2 // 2, y, x)).shape[-1]
    if back != job.size:
        raise ValueError(f"size={job.size} comes back from the VAE as {back} px: choose --size {back}")
    shift, scale = encoders.vae.shift_and_scale
    factor = job.size // y  # pixels per latent
    if job.bucket_step is not None and (job.size % y or job.bucket_step % factor):
        raise ValueError(
            f"the VAE makes one latent of {factor} px: --bucket-step must be a multiple, got {job.bucket_step}"
        )
    buckets = [{"size": list(s), "latent_shape": [c2 // 2, s[0] // factor, s[1] // factor]} for s in sizes]
    sources = {"vae": job.vae, "text": job.text_encoder, "pooled": job.pooled_encoder}
    seen: dict[str, Any] = {}  # folders without features stay as they were
    if encoders.vision is not None:
        seen = {"features": encoders.told | {"grid": encoders.grid((job.size, job.size))}}
        sources["features"] = job.features
        buckets = [bucket | {"grid": encoders.grid(bucket["size"])} for bucket in buckets]
    names = "\n".join(source.names).encode(errors="surrogateescape")
    return {
        "format": manifest.FORMAT,
        "vae": {"name": encoders.vae.name, "sha256": encoders.vae.sha256, "shift": shift, "scale": scale},
        **encoders.describe(),
        **seen,
        "size": job.size,
        "latent_shape": [c2 // 2, y, x],
        **({"buckets": buckets} if buckets else {}),
        "flips": job.flips,
        "dtype": job.dtype,
        "precision": job.precision,
        "shard_size": job.shard_size,
        "images": {"count": len(source), "names": hashlib.sha256(names).hexdigest()},
        "sources": {
            name: os.path.abspath(spec) if spec and os.path.isdir(spec) else spec for name, spec in sources.items()
        },
    }


def forecast(
    job: Job,
    out: Path,
    source: Folder | TarImages,
    encoders: Encoders,
    settings: dict[str, Any],
    pending: Sequence[int],
    total: int,
) -> str:
    """The amount of work, as a sentence.

    Raises:
        ValueError: if the disk has too little room
    """
    images = sum(len(images_of(k, job.shard_size, len(source))) for k in pending)
    if not images:
        return f"{out}: all of this command's shards are there ({total} in all, {len(source):,} images)"
    width = encoders.stored.itemsize
    moments = 2 * math.prod(settings["latent_shape"]) * width
    views = 2 if job.flips else 1
    members, about = [moments] * views + [150], ""  # the last is the json
    if seen := settings.get("features"):
        members += [2 * math.prod(seen["grid"]) * seen["width"]] * views
        about = f", features {math.prod(seen['grid'])} x {seen['width']}"
    if encoders.text is not None:
        probe = range(0, len(source), max(1, len(source) // 32))
        lengths = encoders.text.lengths([c for i in probe if (c := _caption(source, i)) is not None] or [""])
        tokens = sum(lengths) / len(lengths)
        members.append(round(tokens * settings["text"]["width"] * width))
        about += f", captions of {tokens:.0f} tokens x {settings['text']['width']}"
    if settings["pooled"]:
        members.append(settings["pooled"]["width"] * width)
    each = sum(512 + 128 + math.ceil((m + 1) / 512) * 512 for m in members)  # tar header, npy header, padding
    free = room(out, images * each)
    latent = "x".join(map(str, settings["latent_shape"]))
    flips = " with flips" if job.flips else ""
    at = f"{job.size} px" if job.bucket_sizes is None else f"{len(job.bucket_sizes)} sizes like {job.size} px"
    return (
        f"{images:,} of {len(source):,} images at {at} -> latents {latent} {job.dtype}{flips}{about}: "
        f"{len(pending)} of {total} shards, about {readable(images * each)} ({readable(free)} free)"
    )


def _caption(source: Folder | TarImages, index: int) -> str | None:
    try:
        return source.load(index).caption
    except Damaged:
        return None  # reported when it is encoded
