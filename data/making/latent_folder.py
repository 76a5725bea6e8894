"""Fill a folder with latents: the work behind `python -m data.precompute`, on one process or many, in any number of
attempts. What the folder holds is described in data/manifest.py.
"""

from __future__ import annotations

import gc
import hashlib
import math
import os
import queue
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from data import manifest
from data.damage import Damaged
from data.making.latent_writer import Encoders, Job, Words, device_of, open_images, record_path, span, write_shard
from data.names import legible
from data.sets.image_folder import Folder
from data.sets.image_shards import TarImages


def precompute(job: Job, say: Callable[[str], None] = print) -> Path | None:
    """Encode what is still missing.

    Returns:
        The manifest; None if other ranks have yet to finish their shards.

    Raises:
        FileNotFoundError, ValueError: in one sentence, for what cannot be used
        RuntimeError: if a process died
    """
    out = Path(job.out)
    check_place(out, [job.images], "--out")
    source = open_images(job)
    if isinstance(source, TarImages):
        check_place(out, source.tars.paths, "--out")
    encoders = Encoders(job, device_of(job, 0) if job.processes == 1 else "cpu")
    settings = describe(job, source, encoders)
    begin(out, settings)
    write_null(out, encoders)
    total = math.ceil(len(source) / job.shard_size)
    pending = [k for k in range(job.rank, total, job.world) if not finished(out, k)]
    say(forecast(job, out, source, encoders, settings, pending, total))
    sizes = [len(span(job, source, k)) for k in pending]
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
    """What writes shards in one of several processes."""
    if job.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.processes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the first process has told what there is to tell
        source = open_images(job)
    encoders = Encoders(job, device_of(job, process))
    return lambda shard, advance: write_shard(job, source, encoders, shard, advance)


# ---- the folder ------------------------------------------------------------------------------------------------------


def describe(job: Job, source: Folder | TarImages, encoders: Encoders) -> dict[str, Any]:
    """Everything that decides what is written, as JSON; `sources` says where the encoders were, and may change.

    Raises:
        ValueError: if the VAE does not take images of this size, or of the buckets' sizes
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
    names = "\n".join(source.names).encode(errors="surrogateescape")
    return {
        "format": manifest.FORMAT,
        "vae": {"name": encoders.vae.name, "sha256": encoders.vae.sha256, "shift": shift, "scale": scale},
        **encoders.describe(),
        "size": job.size,
        "latent_shape": [c2 // 2, y, x],
        **({"buckets": buckets} if buckets else {}),
        "flips": job.flips,
        "dtype": job.dtype,
        "precision": job.precision,
        "shard_size": job.shard_size,
        "images": {"count": len(source), "names": hashlib.sha256(names).hexdigest()},
        "sources": {
            name: os.path.abspath(spec) if spec and os.path.isdir(spec) else spec
            for name, spec in (("vae", job.vae), ("text", job.text_encoder), ("pooled", job.pooled_encoder))
        },
    }


def check_place(out: Path, sources: Sequence[str | os.PathLike], option: str) -> None:
    """Whether a folder can be written, and what is written is not read again as one of the sources.

    Args:
        out: the folder
        sources: files and folders that are read; what is not there is none
        option: that names the folder on the command line

    Raises:
        ValueError: if it is a file, lies below one, or is a source or inside of one
    """
    place = Path(os.path.realpath(out))
    here = next(p for p in (place, *place.parents) if os.path.lexists(p))
    if not here.is_dir():
        raise ValueError(legible(f"{out} cannot be written: {here} is no folder; correct {option}"))
    for source in sources:
        real = Path(os.path.realpath(source))
        folder = real if real.is_dir() else real.parent
        if os.path.exists(source) and (place == folder or real.is_dir() and real in place.parents):
            raise ValueError(legible(f"{out} is where {source} is read from: choose another {option}, outside of it"))


def begin(out: Path, settings: dict[str, Any], option: str = "--out") -> None:
    """Put the settings into the folder, or compare them with those it was begun with.

    Args:
        out: the folder
        settings: everything that decides what is written
        option: that names the folder on the command line

    Raises:
        ValueError: naming the first setting that differs, or if the folder holds shards of unknown origin
    """
    path = out / manifest.SETTINGS
    if path.exists():
        before, now = _flat(manifest.read(path)), _flat(settings)
        for key in {**before, **now}:
            if before.get(key) != now.get(key) and not key.startswith("sources."):
                raise ValueError(
                    f"{legible(str(out))} was begun with {key}={before.get(key)}, this command has {now.get(key)}: "
                    f"choose another {option}, or restore the setting"
                )
        return
    if out.is_dir() and any(out.glob("*.tar")):
        raise ValueError(f"{out} holds .tar files but no {manifest.SETTINGS}: choose another {option}")
    (out / "records").mkdir(parents=True, exist_ok=True)
    manifest.write(path, settings)


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict):
        return {k: v for name, child in node.items() for k, v in _flat(child, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): node}


def write_null(out: Path, encoders: Words) -> None:
    """The empty prompt, once."""
    path = out / manifest.NULL
    if not encoders.needs_captions or path.exists():
        return
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    save_file({k: v.contiguous() for k, v in encoders.words([""])[0].items()}, temporary)
    os.replace(temporary, path)


def finished(out: Path, shard: int) -> bool:
    path = record_path(out, shard)
    if not path.exists():
        return False
    record = manifest.read_record(path)
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
    free = room(out, images * each)
    latent = "x".join(map(str, settings["latent_shape"]))
    flips = " with flips" if job.flips else ""
    at = f"{job.size} px" if job.bucket_sizes is None else f"{len(job.bucket_sizes)} sizes like {job.size} px"
    return (
        f"{images:,} of {len(source):,} images at {at} -> latents {latent} {job.dtype}{flips}{about}: "
        f"{len(pending)} of {total} shards, about {readable(images * each)} ({readable(free)} free)"
    )


def room(out: Path, needed: int, option: str = "--out") -> int:
    """Bytes that are free where the folder is.

    Raises:
        ValueError: if they are fewer than needed
    """
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(f"{out} needs about {readable(needed)}, {readable(free)} are free: choose another {option}")
    return free


def _caption(source: Folder | TarImages, index: int) -> str | None:
    try:
        return source.load(index).caption
    except Damaged:
        return None  # told when its turn comes


def readable(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def finish(out: Path, settings: dict[str, Any], facts: dict[str, Any], total: int) -> Path | None:
    """Write the manifest once all shards of all ranks are there. Several ranks may do so at once: it is the same.

    Args:
        out: the folder
        settings: with which it was begun
        facts: what else its users need to know
        total: shards
    """
    if not all(finished(out, k) for k in range(total)):
        return None
    records = [manifest.read_record(record_path(out, k)) for k in range(total)]
    null = out / manifest.NULL
    path = out / manifest.MANIFEST
    if buckets := settings.get("buckets"):
        names = ["x".join(map(str, b["size"])) for b in buckets]
        counts = [sum(r["buckets"].get(name, 0) for r in records) for name in names]
        facts = facts | {"buckets": [b | {"count": n} for b, n in zip(buckets, counts, strict=True)]}
    told = (
        settings
        | {"identity": manifest.identity(settings)}
        | facts
        | {
            "count": sum(r["count"] for r in records),
            "skipped": [name for r in records for name in r["skipped"]],
            "null": {"sha256": manifest.digest(null)} if null.exists() else None,
            "shards": [{k: r[k] for k in ("name", "count", "size", "sha256")} for r in records if r["count"]],
        }
    )
    manifest.write(path, told | {"checksum": manifest.checksum(told)})
    return path


# ---- several processes ----------------------------------------------------------------------------------------------


Writer = Callable[[int, Callable[[float], None]], None]  # (shard, advance)


def in_processes(
    prepare: Callable[[Any, int], Writer],
    job: Any,
    count: int,
    pending: Sequence[int],
    advance: Callable[[float], None],
) -> None:
    """Spread the shards over processes.

    Args:
        prepare: a function of a module, called in each process as (job, process), makes what writes a shard
        job: what to do
        count: of processes
        pending: shards
        advance: called with how many images were done

    Raises:
        RuntimeError: with what the process said, if one failed; or that it died
    """
    context = torch.multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    news = context.Queue()
    arguments = [(prepare, job, i, list(pending[i::count]), news) for i in range(count)]
    processes = [context.Process(target=_process, args=a, daemon=True) for a in arguments if a[3]]
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


def _process(prepare: Callable[[Any, int], Writer], job: Any, number: int, shards: list[int], news: Any) -> None:
    try:
        write = prepare(job, number)
        for k in shards:
            write(k, news.put)
    except KeyboardInterrupt:
        pass  # the first process says so
    except (ValueError, OSError, RuntimeError) as error:
        news.put(str(error))


class Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.1f} images/s")


@contextmanager
def progress(total: int) -> Iterator[Callable[[float], None]]:
    """A live bar with images/s and the time left; called with how many images were done."""
    with Progress("images", BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn(), "left") as bar:
        task = bar.add_task("images", total=total)
        yield lambda count: bar.advance(task, count)
