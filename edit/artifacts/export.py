"""From an artifact to what others load: a `diffusers` folder or pipeline, an original FLUX.1 file, a LoRA.

Live edits are folded into the weights; one that cannot be is named, and nothing is written. In a pipeline the scheduler
takes the times that the artifact is sampled at. The folder appears whole or not at all, with a model card that
says where the weights come from. Nothing is sent anywhere without `push=`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import edit
from edit import edits as editing
from edit.artifacts.card import Card, Licence, Origin, base_of, common, licence_files, origin, origins
from edit.artifacts.checkpoint import Artifact, load
from edit.artifacts.flux_single_file import read_original
from edit.artifacts.formats import write_model, write_single_file
from edit.artifacts.lora import write_lora
from edit.artifacts.pipeline import pipeline_index, write_pipeline
from edit.artifacts.usage import Usage
from edit.artifacts.whole import replacing
from edit.predictions import default_objective
from edit.sampling import default_sampler

FORMAT = 1
MARK = "export.json"  # tells a former export, which may be replaced, from any other folder
LAYOUTS = ("diffusers", "single_file", "lora")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class ExportSettings:
    """Settings of an export.

    Args:
        artifact: artifact, run or `diffusers` folder, hub id, or an original FLUX.1 .safetensors file
        out: folder to write; it must not exist, be empty or hold a former export
        format: "diffusers", "single_file" (the original FLUX.1 layout) or "lora"
        dtype: of the weights, "bf16", "fp16" or "fp32"; None keeps them
        max_shard_size: of one weight file in a `diffusers` folder, such as 5GB or 500MB
        pipeline: folder of a stock pipeline whose other components are taken over
        teacher: folder or hub id of the model that this one was made from; None: the run's own record
        license: of the weights; None: that of the teacher, where it is known
        push: hub id to upload to, into a private repository if it is new
        trusted: further packages, with commas between, whose edits may be imported
    """

    artifact: str
    out: str
    format: str = "diffusers"
    dtype: str | None = None
    max_shard_size: str = "5GB"
    pipeline: str | None = None
    teacher: str | None = None
    license: str | None = None
    push: str | None = None
    trusted: str = ""

    def __post_init__(self):
        if self.format not in LAYOUTS:
            raise ValueError(f"format is one of {', '.join(LAYOUTS)}, got {self.format}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype is one of {', '.join(DTYPES)}, got {self.dtype}; leave it out to keep the weights")
        if not re.fullmatch(r"[1-9]\d*[KMGT]B", self.max_shard_size):
            raise ValueError(f"max_shard_size is a size such as 5GB or 500MB, got {self.max_shard_size}")
        if self.pipeline and self.format != "diffusers":
            raise ValueError(f"pipeline= makes a diffusers folder: leave it out, or leave out format={self.format}")
        if self.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push):
            raise ValueError(f"push is a repository on the hub, owner/name, got {self.push}")


def export(settings: ExportSettings, say: Callable[[str], None] = lambda stage: None) -> Path:
    """Write the export; with `push`, upload it too.

    Args:
        settings: what to write
        say: called with one line before each stage

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if the artifact or something of the pipeline is missing
        FileExistsError: if `out` holds something else than a former export
        ValueError: if an edit cannot be folded, or the model cannot be expressed in the format
        ConnectionError: if the upload failed; the folder is there
    """
    s, out = settings, Path(os.path.abspath(settings.out))
    refuse_foreign(out)
    index = pipeline_index(Path(s.pipeline)) if s.pipeline else {}
    say(f"reading {s.artifact}")
    artifact = read_model(s.artifact, tuple(filter(None, s.trusted.split(","))))
    found = origins(artifact.path, s.teacher)
    around = origin(s.pipeline) if s.pipeline else None
    all_parts = [*found, around] if found and around else found  # weights from nowhere we know of stay unknown
    licence = Licence.of(s.license) if s.license else common(all_parts)
    name = s.push or out.name
    bases = found  # the base of an adapter is the model it was trained on, not that model's teacher
    if s.format == "lora" and (start := origin(s.teacher) if s.teacher else base_of(artifact.path)):
        bases = [start]
    with replacing(out) as folder:
        say(f"writing {out}")
        usage = _write(s, artifact, index, folder, bases[0] if bases else None)
        base = next((o.hub for o in bases if o.hub), None)
        for file in licence_files([*found, around] if around else found):
            shutil.copyfile(file, folder / file.name)
        relation = "adapter" if s.format == "lora" else "finetune"
        tags = ("edit", "diffusion-transformer", *(("lora",) if s.format == "lora" else ()))
        card = Card(out.name, artifact, usage(name, base), relation, bases, found, around, licence, tags)
        (folder / "README.md").write_text(str(card), encoding="utf-8")
        mark = {"format": FORMAT, "layout": s.format, "edit": edit.__version__}
        (folder / MARK).write_text(json.dumps(mark, indent=2) + "\n")
        for file in folder.rglob("*.safetensors"):  # written for the owner alone; a link is not ours to change
            if file.stat().st_nlink == 1:
                shutil.copymode(folder / MARK, file)
    if licence.id == "unknown":
        say("the licence is unknown, the model card says so: give it with license=..., or the teacher with teacher=...")
    if s.push:
        say(f"uploading to {s.push}")
        upload(out, s.push)
    return out


def _write(s: ExportSettings, artifact: Artifact, index: Mapping[str, Any], folder: Path, base: Origin | None) -> Usage:
    """Weights in the chosen format; `base` is the model that a LoRA was trained on."""
    dtype = DTYPES[s.dtype] if s.dtype else None
    if s.format == "lora":
        return write_lora(artifact, folder, dtype, base)
    fold_all(artifact)
    if s.format == "single_file":
        name = Path(os.path.abspath(s.out)).name
        return write_single_file(artifact.denoiser, folder / f"{name}.safetensors", dtype)
    if not s.pipeline:
        return write_model(artifact, folder, dtype, s.max_shard_size)
    usage = write_pipeline(artifact, Path(s.pipeline), index, folder, dtype)
    write_model(artifact, folder / "transformer", dtype, s.max_shard_size)
    return usage


# ---- the model -------------------------------------------------------------------------------------------------------


def read_model(path: str, trusted: tuple[str, ...] = ()) -> Artifact:
    """An artifact; an original FLUX.1 file, too."""
    if not path.endswith(".safetensors"):
        return load(path, trusted=trusted)
    denoiser = read_original(path)
    return Artifact(Path(path), denoiser, default_objective(denoiser), default_sampler(denoiser))


def fold_all(artifact: Artifact) -> None:
    """Make all live edits part of the weights.

    Raises:
        ValueError: naming the edit that cannot be
    """
    denoiser = artifact.denoiser
    for name in reversed(list(denoiser.applied)):
        try:
            editing.fold(denoiser, name)
        except ValueError as error:
            raise ValueError(f"{artifact.path} cannot be exported, its edit {name!r} stays live: {error}") from error


# ---- the folder ------------------------------------------------------------------------------------------------------


def refuse_foreign(out: Path) -> None:
    """Raises FileExistsError if there is something at `out` that no export has written."""
    if out.is_dir() and (not any(out.iterdir()) or (out / MARK).is_file()):
        return
    if out.exists():
        raise FileExistsError(f"{out} is there and is not a former export: give another out=, or remove it")


def upload(folder: Path, repository: str) -> None:
    """Send an export to the hub, without a prompt. `edits.json` stays: it may name folders of this machine.

    Raises:
        ConnectionError: for every failure, in one sentence
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=["edits.json", "*/edits.json"])
    except Exception as error:  # networks, servers and two HTTP libraries raise anything
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ConnectionError(
            f"{folder} is written but was not uploaded to {repository} ({type(error).__name__}: {reason}): log in with "
            "`hf auth login` or set HF_TOKEN, then give the same command again"
        ) from error
