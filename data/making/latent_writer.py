"""Write one shard of the latents and text embeddings of images.

Shard k holds images k * shard_size onwards in the source's order, encoded in fixed batches: its content does not depend
on the process that writes it, or on interruptions.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from data.damage import Damaged, Tolerance
from data.making import buckets
from data.making.frozen import Encoders
from data.making.job import Job
from data.making.latent_folder import images_of, npy, store
from data.names import legible
from data.pixels import EXTENSIONS, Picture, centre_crop, to_tensor
from data.sets.image_folder import Folder
from data.sets.image_shards import TarImages

Loaded = tuple[int, Picture, Tensor]  # index in the source, picture, 3 y x pixels


def open_images(job: Job) -> Folder | TarImages:
    """The images of a job: tar shards if the path names or holds .tar files, else a folder.

    Raises:
        FileNotFoundError, ValueError: in one sentence, for a path that cannot be used, or a folder of both
    """
    given = Path(job.images)
    if given.is_dir():
        if not any(p.suffix == ".tar" and not p.is_dir() for p in given.iterdir()):
            return Folder(job.images)
        if picture := next((p for p in given.glob("*") if p.suffix.lower()[1:] in EXTENSIONS), None):
            raise ValueError(
                f"{given} holds .tar files and images, such as {legible(picture.name)}: give a folder of one of them"
            )
    elif not job.images.endswith(".tar") and (os.path.lexists(given) or not any(c in job.images for c in "*?[{")):
        raise FileNotFoundError(f"{given} is no folder of images, no .tar file and no pattern: correct the path")
    return TarImages(job.images, Tolerance(job.on_error))


def write_shard(
    job: Job, source: Folder | TarImages, encoders: Encoders, shard: int, advance: Callable[[float], None]
) -> None:
    """Encode one shard."""
    tolerance, counts = Tolerance(job.on_error), Counter[str]()

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        batches = decoded(
            job, source, images_of(shard, job.shard_size, len(source)), encoders.needs_captions, tolerance
        )
        for read, batch in alike(batches, job.batch) if job.bucket_sizes else batches:
            for index, members in encoded(encoders, batch):
                key = f"{index:09d}"
                if job.bucket_sizes:
                    bucket = "x".join(map(str, batch[0][2].shape[1:]))
                    counts[bucket] += 1
                    key = f"{bucket}-{key}"
                yield key, members
            advance(read)

    def facts() -> dict[str, Any]:
        skipped = tolerance.skipped
        if shard == 0 and isinstance(source, TarImages):  # skipped when the source was opened: recorded once, here
            skipped = skipped | source.tars.tolerance.skipped
        return {"skipped": sorted(skipped), **({"buckets": dict(sorted(counts.items()))} if job.bucket_sizes else {})}

    store(Path(job.out), shard, samples(), facts)


def decoded(
    job: Job, source: Folder | TarImages, indices: range, captions: bool, tolerance: Tolerance
) -> Iterator[tuple[int, list[Loaded]]]:
    """Batches of images: the number read, and the undamaged ones. The next batch decodes while one is encoded.

    Raises:
        Damaged: if an image is damaged or lacks its caption, and damage is to be refused
    """

    sizes = job.bucket_sizes

    def crop(image: Image) -> Image:
        if sizes is None:
            return centre_crop(image, job.size)
        return buckets.cover_crop(image, buckets.nearest(sizes, *image.size))

    def load(index: int) -> Loaded | Damaged:
        try:
            picture = source.load(index)
            if captions:
                picture.words()
            return index, picture, to_tensor(crop(picture.image))
        except Damaged as error:
            return error

    with ThreadPoolExecutor(job.workers) as pool:
        parts = [indices[i : i + job.batch] for i in range(0, len(indices), job.batch)]
        coming = [pool.submit(load, i) for i in parts[0]]
        for following in [*parts[1:], range(0)]:
            here, coming = coming, [pool.submit(load, i) for i in following]
            whole = []
            for future in here:
                loaded = future.result()
                if isinstance(loaded, Damaged):
                    tolerance.excuse(loaded)
                else:
                    whole.append(loaded)
            yield len(here), whole


def alike(batches: Iterator[tuple[int, list[Loaded]]], size: int) -> Iterator[tuple[int, list[Loaded]]]:
    """The same images in batches of one bucket each: full batches as soon as possible, the rest at the end."""
    waiting: dict[tuple[int, ...], list[Loaded]] = {}
    for read, batch in batches:
        for loaded in batch:
            shape = tuple(loaded[2].shape)
            waiting.setdefault(shape, []).append(loaded)
            if len(waiting[shape]) == size:
                yield 0, waiting.pop(shape)
        yield read, []
    for _, rest in sorted(waiting.items()):
        yield 0, rest


def encoded(encoders: Encoders, batch: list[Loaded]) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Number and members of each sample, as they are stored."""
    if not batch:
        return
    pictures = [picture for _, picture, _ in batch]
    arrays = encoders.encode(torch.stack([x for _, _, x in batch]), [p.caption or "" for p in pictures])
    for (index, picture, _), row in zip(batch, arrays, strict=True):
        members = {f"{name}.npy": npy(array) for name, array in row.items()}
        facts = {"label": picture.label, "caption": picture.caption, "name": picture.name}
        members["json"] = json.dumps({k: v for k, v in facts.items() if v is not None}).encode()
        yield index, members
