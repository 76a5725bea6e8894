"""The folder of latents that a command fills, in any number of attempts: begin, store shard after shard, finish.

data/manifest.py describes its files.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data import manifest
from data.making.frozen import PromptEncoders
from data.names import legible


def check_place(out: Path, sources: Sequence[str | os.PathLike], option: str) -> None:
    """Check that a folder can be written, and is not inside one of the sources.

    Args:
        out: the folder
        sources: files and folders that are read; missing ones are ignored
        option: of the command line that names the folder

    Raises:
        ValueError: if the folder is a file, below a file, a source or inside a source
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
    """Write the settings into a new folder, or compare them with the settings of a begun one.

    Args:
        out: the folder
        settings: all that decides the shards
        option: of the command line that names the folder

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


def write_null(out: Path, encoders: PromptEncoders) -> None:
    """Store the embedded empty prompt, once."""
    path = out / manifest.NULL
    if not encoders.needs_captions or path.exists():
        return
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    save_file({k: v.contiguous() for k, v in encoders.embed([""])[0].items()}, temporary)
    os.replace(temporary, path)


def finished(out: Path, shard: int) -> bool:
    path = record_path(out, shard)
    if not path.exists():
        return False
    record = manifest.read_record(path)
    return record["count"] == 0 or manifest.check_shard(out, record, full=False) is None


def images_of(shard: int, size: int, count: int) -> range:
    """Numbers of the images in a shard: `size` in each, but for the last of all `count`."""
    return range(shard * size, min((shard + 1) * size, count))


def shard_name(shard: int) -> str:
    return f"shard-{shard:06d}.tar"


def record_path(out: Path, shard: int) -> Path:
    return out / "records" / f"{shard:06d}.json"


def store(
    out: Path, shard: int, samples: Iterator[tuple[str, dict[str, bytes]]], facts: Callable[[], dict[str, Any]]
) -> None:
    """Write keys and members under a temporary name, then rename it, then write its record.

    Args:
        out: the folder
        shard: its number
        samples: in order
        facts: further entries of the record, called after the last sample
    """
    from webdataset import TarWriter

    path, count = out / shard_name(shard), 0
    for left in out.glob(f".{path.name}.tmp-*"):  # of a process that was killed
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


def npy(array: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, array.numpy(), allow_pickle=False)
    return file.getvalue()


def room(out: Path, needed: int, option: str = "--out") -> int:
    """Free bytes on the folder's disk.

    Raises:
        ValueError: if they are fewer than needed
    """
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(f"{out} needs about {readable(needed)}, {readable(free)} are free: choose another {option}")
    return free


def readable(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def finish(out: Path, settings: dict[str, Any], facts: dict[str, Any], total: int) -> Path | None:
    """Write the manifest once all shards of all ranks are there. Several ranks may write it at once, all the same.

    Args:
        out: the folder
        settings: with which it was begun
        facts: further entries, such as classes
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
