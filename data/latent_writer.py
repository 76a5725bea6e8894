"""Write images as shards of latents and text embeddings: the work behind `python -m data.precompute`.

Shard k holds images k * shard_size onwards in the source's order, encoded in fixed batches: what it contains does not
depend on who writes it, or on how often the work was interrupted.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import math
import os
import queue
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import manifest
from data.damage import Damaged, Tolerance
from data.encoders import VAE, Encoded, TextEncoder
from data.image_folder import Folder
from data.image_shards import TarImages
from data.pixels import Picture, centre_crop, to_tensor

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
    max_tokens: int = 256
    size: int = 256  # pixels
    flips: bool = True  # store the mirrored image's latents, too
    dtype: str = "float16"  # of what is stored: float16 or float32 (npy knows no bfloat16)
    precision: str = "float32"  # the encoders compute in
    batch: int = 32
    shard_size: int = 4096  # images per shard; an interruption loses at most one shard's work per process
    processes: int = 1
    workers: int = 4  # threads that decode images, per process
    device: str = "cpu"  # "cuda" spreads the processes over the GPUs
    on_error: str = "refuse"
    rank: int = 0  # of this command among `world` such commands
    world: int = 1

    def __post_init__(self):
        for name in ("max_tokens", "size", "batch", "shard_size", "processes", "workers", "world"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank is one of 0 to {self.world - 1} (world={self.world}), got {self.rank}")
        if self.dtype not in ("float16", "float32"):
            raise ValueError(f"dtype is float16 or float32, got {self.dtype!r}")
        if self.precision not in DTYPES:
            raise ValueError(f"precision is one of {', '.join(DTYPES)}, got {self.precision!r}")

    def device_of(self, process: int) -> str:
        if self.device != "cuda":
            return self.device
        first = int(os.environ.get("LOCAL_RANK", "0")) * self.processes
        return f"cuda:{(first + process) % torch.cuda.device_count()}"


def precompute(job: Job, say: Callable[[str], None] = print) -> Path | None:
    """Encode what is still missing.

    Returns:
        The manifest; None if other ranks have yet to finish their shards.

    Raises:
        FileNotFoundError, ValueError: in one sentence, for what cannot be used
        RuntimeError: if a process died
    """
    out = Path(job.out)
    source = open_images(job)
    encoders = Encoders(job, job.device_of(0) if job.processes == 1 else "cpu")
    settings = describe(job, source, encoders)
    begin(out, settings)
    write_null(out, encoders)
    total = math.ceil(len(source) / job.shard_size)
    pending = [k for k in range(job.rank, total, job.world) if not finished(out, k)]
    say(forecast(job, out, source, encoders, settings, pending, total))
    sizes = [len(span(job, source, k)) for k in pending]
    with Progress(sum(sizes)) as advance:
        if job.processes == 1:
            for k in pending:
                write_shard(job, source, encoders, k, advance)
        else:
            del encoders
            gc.collect()
            in_processes(job, pending, advance)
    return finish(out, settings, source, total)


# ---- parts ----------------------------------------------------------------------------------------------------------


def open_images(job: Job) -> Folder | TarImages:
    """Shards if it names or holds .tar files, else a folder of images."""
    holds_tars = os.path.isdir(job.images) and any(n.endswith(".tar") for n in os.listdir(job.images))
    if holds_tars or not os.path.isdir(job.images) and (job.images.endswith(".tar") or "*" in job.images):
        return TarImages(job.images, Tolerance(job.on_error))
    return Folder(job.images)


class Encoders:
    """All frozen models of a job on one device."""

    def __init__(self, job: Job, device: str):
        dtype = DTYPES[job.precision]
        self.stored = DTYPES[job.dtype]
        self.flips = job.flips
        self.vae = VAE(job.vae, device, dtype)
        self.text = self.pooled = None
        if job.text_encoder:
            self.text = TextEncoder(job.text_encoder, job.tokenizer, job.max_tokens, device, dtype)
        if job.pooled_encoder:
            self.pooled = TextEncoder(job.pooled_encoder, job.pooled_tokenizer, job.max_tokens, device, dtype)

    @property
    def needs_captions(self) -> bool:
        return self.text is not None or self.pooled is not None

    def encode(self, x: Tensor, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Pixels b 3 y x in [-1, 1] and their captions -> members of each sample, in the stored type."""
        columns = {"moments": self._fit(self.vae.moments(x))}
        if self.flips:
            columns["moments_flip"] = self._fit(self.vae.moments(x.flip(-1)))
        rows = [{name: column[i] for name, column in columns.items()} for i in range(len(x))]
        for row, words in zip(rows, self.words(captions) if self.needs_captions else [{}] * len(x), strict=True):
            row |= words
        return rows

    def words(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """`text` l c and `pooled` c of each caption, as far as there are encoders for them."""
        rows: list[dict[str, Tensor]] = [{} for _ in captions]
        if self.text is not None:
            for row, encoded in zip(rows, self.text.encode(captions), strict=True):
                row["text"] = self._fit(encoded.text)
                if encoded.pooled is not None:
                    row["pooled"] = self._fit(encoded.pooled)
        if self.pooled is not None:
            for row, encoded in zip(rows, self.pooled.encode(captions), strict=True):
                row["pooled"] = self._fit(_pooled(encoded, self.pooled.description["name"]))
        return rows

    def _fit(self, x: Tensor) -> Tensor:
        stored = x.to("cpu", self.stored)
        if not stored.isfinite().all():
            raise ValueError(f"an encoder's output does not fit {str(self.stored)[6:]}: use --dtype float32")
        return stored


def _pooled(encoded: Encoded, name: str) -> Tensor:
    if encoded.pooled is None:
        raise ValueError(f"the pooled encoder is a {name}, which does not pool: expected a CLIP text encoder")
    return encoded.pooled


def describe(job: Job, source: Folder | TarImages, encoders: Encoders) -> dict[str, Any]:
    """Everything that decides what is written, as JSON; `sources` says where the encoders were, and may change.

    Raises:
        ValueError: if the VAE does not take images of this size
    """
    c2, y, x = encoders.vae.moments(torch.zeros(1, 3, job.size, job.size)).shape[1:]
    back = encoders.vae.decode(torch.zeros(1, c2 // 2, y, x)).shape[-1]
    if back != job.size:
        raise ValueError(f"size={job.size} comes back from the VAE as {back} px: choose --size {back}")
    shift, scale = encoders.vae.shift_and_scale
    null = encoders.words([""])[0] if encoders.needs_captions else {}
    text = encoders.text.description | {"width": null["text"].shape[-1]} if encoders.text else None
    pooler = encoders.pooled or encoders.text
    pooled = pooler.description | {"width": len(null["pooled"])} if pooler and "pooled" in null else None
    names = "\n".join(source.names)
    return {
        "format": manifest.FORMAT,
        "vae": {"name": encoders.vae.name, "sha256": encoders.vae.sha256, "shift": shift, "scale": scale},
        "text": text,
        "pooled": pooled,
        "size": job.size,
        "latent_shape": [c2 // 2, y, x],
        "flips": job.flips,
        "dtype": job.dtype,
        "precision": job.precision,
        "shard_size": job.shard_size,
        "images": {"count": len(source), "names": hashlib.sha256(names.encode()).hexdigest()},
        "sources": {
            name: os.path.abspath(spec) if spec and os.path.isdir(spec) else spec
            for name, spec in (("vae", job.vae), ("text", job.text_encoder), ("pooled", job.pooled_encoder))
        },
    }


def begin(out: Path, settings: dict[str, Any]) -> None:
    """Put the settings into the folder, or compare them with those it was begun with.

    Raises:
        ValueError: naming the first setting that differs, or if the folder holds shards of unknown origin
    """
    path = out / manifest.SETTINGS
    if path.exists():
        before, now = _flat(manifest.read(path)), _flat(settings)
        for key in {**before, **now}:
            if before.get(key) != now.get(key) and not key.startswith("sources."):
                raise ValueError(
                    f"{out} was begun with {key}={before.get(key)}, this command has {now.get(key)}: "
                    f"choose another --out, or restore the setting"
                )
        return
    if out.is_dir() and any(out.glob("*.tar")):
        raise ValueError(f"{out} holds .tar files but no {manifest.SETTINGS}: choose another --out")
    (out / "records").mkdir(parents=True, exist_ok=True)
    manifest.write(path, settings)


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict):
        return {k: v for name, child in node.items() for k, v in _flat(child, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): node}


def write_null(out: Path, encoders: Encoders) -> None:
    """The empty prompt, once."""
    path = out / manifest.NULL
    if not encoders.needs_captions or path.exists():
        return
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    save_file({k: v.contiguous() for k, v in encoders.words([""])[0].items()}, temporary)
    os.replace(temporary, path)


def span(job: Job, source: Folder | TarImages, shard: int) -> range:
    """Indices of a shard's images."""
    return range(shard * job.shard_size, min((shard + 1) * job.shard_size, len(source)))


def shard_name(shard: int) -> str:
    return f"shard-{shard:06d}.tar"


def record_path(out: Path, shard: int) -> Path:
    return out / "records" / f"{shard:06d}.json"


def finished(out: Path, shard: int) -> bool:
    path = record_path(out, shard)
    if not path.exists():
        return False
    record = manifest.read(path)
    return record["count"] == 0 or manifest.check_shard(out, record, full=False) is None


def forecast(
    job: Job,
    out: Path,
    source: Folder | TarImages,
    encoders: Encoders,
    settings: dict[str, Any],
    pending: Sequence[int],
    total: int,
) -> str:
    """How much is to be written.

    Raises:
        ValueError: if the disk has no room for it
    """
    images = sum(len(span(job, source, k)) for k in pending)
    if not images:
        return f"{out}: all of this command's shards are there ({total} in all, {len(source):,} images)"
    width = encoders.stored.itemsize
    moments = 2 * math.prod(settings["latent_shape"]) * width
    members = [moments] * (2 if job.flips else 1) + [150]  # the last is the json
    about = ""
    if encoders.text is not None:
        probe = range(0, len(source), max(1, len(source) // 32))
        lengths = encoders.text.lengths([c for i in probe if (c := _caption(source, i)) is not None] or [""])
        tokens = sum(lengths) / len(lengths)
        members.append(round(tokens * settings["text"]["width"] * width))
        about = f", captions of {tokens:.0f} tokens x {settings['text']['width']}"
    if settings["pooled"]:
        members.append(settings["pooled"]["width"] * width)
    each = sum(512 + 128 + math.ceil((m + 1) / 512) * 512 for m in members)  # tar header, npy header, padding
    free = shutil.disk_usage(out).free
    if images * each > free:
        raise ValueError(f"{out} needs about {_bytes(images * each)}, {_bytes(free)} are free: choose another --out")
    latent = "x".join(map(str, settings["latent_shape"]))
    flips = " with flips" if job.flips else ""
    return (
        f"{images:,} of {len(source):,} images at {job.size} px -> latents {latent} {job.dtype}{flips}{about}: "
        f"{len(pending)} of {total} shards, about {_bytes(images * each)} ({_bytes(free)} free)"
    )


def _caption(source: Folder | TarImages, index: int) -> str | None:
    try:
        return source.load(index).caption
    except Damaged:
        return None  # told when its turn comes


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def write_shard(
    job: Job, source: Folder | TarImages, encoders: Encoders, shard: int, advance: Callable[[int], None]
) -> None:
    """Encode one shard under a temporary name, then rename it, then write its record."""
    from webdataset import TarWriter

    out, tolerance = Path(job.out), Tolerance(job.on_error)
    path, count = out / shard_name(shard), 0
    for left in out.glob(f".{path.name}.tmp-*"):  # by a process that was killed
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with open(temporary, "wb") as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:  # a fixed time: the same bytes whenever it is written
            for size, batch in decoded(job, source, span(job, source, shard), encoders.needs_captions, tolerance):
                for key, members in encoded(encoders, batch):
                    tar.write({"__key__": f"{key:09d}", **members})
                    count += 1
                advance(size)
        file.flush()
        os.fsync(file.fileno())
    record = {"name": path.name, "count": count, "skipped": sorted(tolerance.skipped)}
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

    def load(index: int) -> Loaded | Damaged:
        try:
            picture = source.load(index)
            if captions and picture.caption is None:
                return Damaged(f"{picture.name} has no caption")
            return index, picture, to_tensor(centre_crop(picture.image, job.size))
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


def encoded(encoders: Encoders, batch: list[Loaded]) -> Iterator[tuple[int, dict[str, bytes]]]:
    """The members of each sample, as they are stored."""
    if not batch:
        return
    pictures = [picture for _, picture, _ in batch]
    arrays = encoders.encode(torch.stack([x for _, _, x in batch]), [p.caption or "" for p in pictures])
    for (index, picture, _), row in zip(batch, arrays, strict=True):
        members = {f"{name}.npy": _npy(array) for name, array in row.items()}
        facts = {"label": picture.label, "caption": picture.caption, "name": picture.name}
        members["json"] = json.dumps({k: v for k, v in facts.items() if v is not None}).encode()
        yield index, members


def _npy(array: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, array.numpy(), allow_pickle=False)
    return file.getvalue()


def finish(out: Path, settings: dict[str, Any], source: Folder | TarImages, total: int) -> Path | None:
    """Write the manifest once all shards of all ranks are there. Several ranks may do so at once: it is the same."""
    if not all(finished(out, k) for k in range(total)):
        return None
    records = [manifest.read(record_path(out, k)) for k in range(total)]
    null = out / manifest.NULL
    path = out / manifest.MANIFEST
    manifest.write(
        path,
        settings
        | {
            "identity": manifest.identity(settings),
            "num_classes": source.num_classes,
            "classes": source.classes,
            "count": sum(r["count"] for r in records),
            "skipped": [name for r in records for name in r["skipped"]],
            "null": {"sha256": manifest.digest(null)} if null.exists() else None,
            "shards": [{k: r[k] for k in ("name", "count", "size", "sha256")} for r in records if r["count"]],
        },
    )
    return path


# ---- several processes ----------------------------------------------------------------------------------------------


def in_processes(job: Job, pending: Sequence[int], advance: Callable[[int], None]) -> None:
    """Spread the shards over `job.processes` processes.

    Raises:
        RuntimeError: with what the process said, if one failed; or that it died
    """
    context = torch.multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    news = context.Queue()
    arguments = [(job, i, list(pending[i :: job.processes]), news) for i in range(job.processes)]
    processes = [context.Process(target=_process, args=a, daemon=True) for a in arguments if a[2]]
    for p in processes:
        p.start()
    try:
        while any(p.is_alive() for p in processes) or not news.empty():
            try:
                said = news.get(timeout=0.5)
            except queue.Empty:
                said = 0
            if isinstance(said, str):
                raise RuntimeError(said)
            advance(said)
            if died := next((p for p in processes if p.exitcode), None):
                raise RuntimeError(
                    f"a process ended with code {died.exitcode} (out of memory?): the same command goes on from the "
                    f"finished shards; try fewer --processes or a smaller --batch"
                )
    finally:
        for p in processes:
            p.terminate()
            p.join()


def _process(job: Job, number: int, shards: list[int], news: Any) -> None:
    try:
        if job.device == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.processes))
        source, encoders = open_images(job), Encoders(job, job.device_of(number))
        for k in shards:
            write_shard(job, source, encoders, k, news.put)
    except KeyboardInterrupt:
        pass  # the first process says so
    except (ValueError, OSError, RuntimeError) as error:
        news.put(str(error))


class Progress:
    """A live bar with images/s and the time left; called with how many images were done."""

    def __init__(self, total: int):
        from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        speed = TaskProgressColumn(show_speed=True)
        self.bar = Bar(TextColumn("images"), BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn())
        self.task = self.bar.add_task("images", total=total)

    def __enter__(self) -> Callable[[int], None]:
        self.bar.start()
        return lambda count: self.bar.advance(self.task, count)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
