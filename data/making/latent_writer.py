"""Write one shard of latents and text embeddings.

Shard k holds images k * shard_size onwards in the source's order, encoded in fixed batches: what it contains does not
depend on who writes it, or on how often the work was interrupted.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from data import manifest
from data import order as buckets
from data.damage import Damaged, Tolerance
from data.generate import number_of
from data.making.encoders import VAE, Encoded, TextEncoder
from data.names import legible
from data.pixels import EXTENSIONS, Picture, centre_crop, to_tensor
from data.sets.image_folder import Folder
from data.sets.image_shards import TarImages
from edit.inputs.limits import Count, Limits, Side, check_numbers

if TYPE_CHECKING:
    from data.generate import Order

DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


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
        if self.precision not in DTYPES:
            raise ValueError(f"precision is one of {', '.join(DTYPES)}, got {self.precision!r}")
        for name in ("images", "out", "vae"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give a folder")
        if self.bucket_step is not None:
            buckets.sizes(self.size, self.bucket_step, self.bucket_ratio)

    @property
    def bucket_sizes(self) -> list[buckets.Size] | None:
        """Sizes in pixels; None: one square for all."""
        if self.bucket_step is None:
            return None
        return buckets.sizes(self.size, self.bucket_step, self.bucket_ratio)


def device_of(job: Job | Order, process: int) -> str:
    """The device of one of a command's processes: "cuda" spreads them over the GPUs."""
    if job.device != "cuda":
        return job.device
    first = number_of("LOCAL_RANK", 0) * job.processes
    return f"cuda:{(first + process) % torch.cuda.device_count()}"


def open_images(job: Job) -> Folder | TarImages:
    """Shards if it names or holds .tar files, else a folder of images.

    Raises:
        FileNotFoundError, ValueError: in one sentence, for what cannot be used, and for a folder of both
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


class Words:
    """The frozen text encoders of a job on one device."""

    def __init__(self, job: Job | Order, device: str):
        dtype = DTYPES[job.precision]
        self.stored = DTYPES[job.dtype]
        self.text = self.pooled = None
        if job.text_encoder:
            self.text = TextEncoder(job.text_encoder, job.tokenizer, job.max_tokens, device, dtype, job.padding)
        if job.pooled_encoder:  # pools at one token, which padding behind it does not change
            self.pooled = TextEncoder(job.pooled_encoder, job.pooled_tokenizer, job.max_tokens, device, dtype)

    @property
    def needs_captions(self) -> bool:
        return self.text is not None or self.pooled is not None

    def describe(self) -> dict[str, Any]:
        """`text` and `pooled` of a manifest: who made them, and how wide they are; None where there are none."""
        null = self.words([""])[0] if self.needs_captions else {}
        text = self.text.description | {"width": null["text"].shape[-1]} if self.text else None
        pooler = self.pooled or self.text
        pooled = pooler.description | {"width": len(null["pooled"])} if pooler and "pooled" in null else None
        return {"text": text, "pooled": pooled}

    def words(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """`text` l c and `pooled` c of each caption, as far as there are encoders for them."""
        rows: list[dict[str, Tensor]] = [{} for _ in captions]
        if self.text is not None:
            for row, encoded in zip(rows, self.text.encode(captions), strict=True):
                row["text"] = self.fit(encoded.text)
                if encoded.pooled is not None:
                    row["pooled"] = self.fit(encoded.pooled)
        if self.pooled is not None:
            for row, encoded in zip(rows, self.pooled.encode(captions), strict=True):
                row["pooled"] = self.fit(_pooled(encoded, self.pooled.description["name"]))
        return rows

    def fit(self, x: Tensor) -> Tensor:
        """In the stored type. Raises ValueError if that cannot hold it."""
        stored = x.to("cpu", self.stored)
        if not stored.isfinite().all():
            raise ValueError(f"values do not fit {str(self.stored)[6:]}: set dtype to float32")
        return stored


class Encoders(Words):
    """All frozen models of a job on one device."""

    def __init__(self, job: Job, device: str):
        super().__init__(job, device)
        self.flips = job.flips
        self.vae = VAE(job.vae, device, DTYPES[job.precision])

    def encode(self, x: Tensor, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Pixels b 3 y x in [-1, 1] and their captions -> members of each sample, in the stored type."""
        columns = {"moments": self.fit(self.vae.moments(x))}
        if self.flips:
            columns["moments_flip"] = self.fit(self.vae.moments(x.flip(-1)))
        rows = [{name: column[i] for name, column in columns.items()} for i in range(len(x))]
        for row, words in zip(rows, self.words(captions) if self.needs_captions else [{}] * len(x), strict=True):
            row |= words
        return rows


def _pooled(encoded: Encoded, name: str) -> Tensor:
    if encoded.pooled is None:
        raise ValueError(f"the pooled encoder is a {name}, which does not pool: expected a CLIP text encoder")
    return encoded.pooled


def span(job: Job, source: Folder | TarImages, shard: int) -> range:
    """Indices of a shard's images."""
    return range(shard * job.shard_size, min((shard + 1) * job.shard_size, len(source)))


def shard_name(shard: int) -> str:
    return f"shard-{shard:06d}.tar"


def record_path(out: Path, shard: int) -> Path:
    return out / "records" / f"{shard:06d}.json"


def write_shard(
    job: Job, source: Folder | TarImages, encoders: Encoders, shard: int, advance: Callable[[float], None]
) -> None:
    """Encode one shard."""
    tolerance, counts = Tolerance(job.on_error), Counter[str]()

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        batches = decoded(job, source, span(job, source, shard), encoders.needs_captions, tolerance)
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
        if shard == 0 and isinstance(source, TarImages):  # left out when the source was opened: told once, here
            skipped = skipped | source.tars.tolerance.skipped
        return {"skipped": sorted(skipped), **({"buckets": dict(sorted(counts.items()))} if job.bucket_sizes else {})}

    store(Path(job.out), shard, samples(), facts)


def store(
    out: Path, shard: int, samples: Iterator[tuple[str, dict[str, bytes]]], facts: Callable[[], dict[str, Any]]
) -> None:
    """Write keys and members under a temporary name, then rename it, then write its record.

    Args:
        out: the folder
        shard: its number
        samples: in order
        facts: what else the record tells, asked when all samples are written
    """
    from webdataset import TarWriter

    path, count = out / shard_name(shard), 0
    for left in out.glob(f".{path.name}.tmp-*"):  # by a process that was killed
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with open(temporary, "wb") as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:  # a fixed time: the same bytes whenever it is written
            for key, members in samples:
                tar.write({"__key__": key, **members})
                count += 1
        file.flush()
        os.fsync(file.fileno())
    record = {"name": path.name, "count": count, **facts()}
    if count:
        record |= {"size": temporary.stat().st_size, "sha256": manifest.digest(temporary)}
        os.replace(temporary, path)
    else:
        temporary.unlink()
    manifest.write(record_path(out, shard), record)


Loaded = tuple[int, Picture, Tensor]  # index in the source, picture, 3 y x pixels


def decoded(
    job: Job, source: Folder | TarImages, indices: range, captions: bool, tolerance: Tolerance
) -> Iterator[tuple[int, list[Loaded]]]:
    """Batches of images, the next one decoding while the last is encoded: how many were read, and those that are whole.

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
    """The same images in batches of one bucket each: full ones as soon as there are enough, the rest at the end."""
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
    """The members of each sample, as they are stored."""
    if not batch:
        return
    pictures = [picture for _, picture, _ in batch]
    arrays = encoders.encode(torch.stack([x for _, _, x in batch]), [p.caption or "" for p in pictures])
    for (index, picture, _), row in zip(batch, arrays, strict=True):
        members = {f"{name}.npy": npy(array) for name, array in row.items()}
        facts = {"label": picture.label, "caption": picture.caption, "name": picture.name}
        members["json"] = json.dumps({k: v for k, v in facts.items() if v is not None}).encode()
        yield index, members


def npy(array: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, array.numpy(), allow_pickle=False)
    return file.getvalue()
