"""Artifacts: what a run leaves, a folder that stock `diffusers` reads where it can express the model.

    config.json, diffusion_pytorch_model.safetensors    the model under its stock names
    edits.json                                          backbone, live and folded edits, objective, sampler, data, run,
                                                        checksums of all files
    edits.safetensors                                   parameters that edits added, if any

`load` compares all files with their checksums, builds the model on the meta device from the base configuration, applies
the edits again, compares names and shapes with the file headers, and only then reads weights. Nothing pickled is ever
read except official `.pt` checkpoints, and those with `weights_only`.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from edit import edits as editing
from edit.artifacts import checksums
from edit.denoiser import Denoiser, check_layout
from edit.inputs import trust
from edit.objectives import DDPM, FlowMatching, Objective
from edit.sampling import Sampler, default_sampler
from edit.solvers import StockEuler

FORMAT = 1
WEIGHTS = "diffusion_pytorch_model.safetensors"
MODEL_PREFIX = "model."  # of parameters that edits put inside the model, in edits.safetensors
HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"  # owner/name
SAMPLED = 4096  # bytes of each tensor that a fingerprint reads


@dataclass
class Artifact:
    """A loaded artifact: the denoiser in eval mode, and what is needed to sample from it and judge it."""

    path: Path
    denoiser: Denoiser
    objective: Objective
    sampler: Sampler
    data: dict[str, Any] = field(default_factory=dict)  # the data set's configuration node, `_target_` included
    run: dict[str, Any] = field(default_factory=dict)  # name, step, seed, revision, versions, metrics


# ---- writing -------------------------------------------------------------------------------------------------------


def save(
    denoiser: Denoiser,
    path: str | os.PathLike,
    objective: Objective | None = None,
    sampler: Sampler | None = None,
    data: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write an artifact; an existing one at `path` is replaced only when the new one is whole.

    Args:
        denoiser: gives structure and edits; its weights too, unless `state` is given
        path: folder to write
        objective: what the model predicts; None: by the backbone's convention
        sampler: the default way to generate
        data: configuration of the data set
        run: provenance and metrics, JSON
        state: full `denoiser.state_dict()` to write instead of the live weights (gathered from shards)
        dtype: to cast floating-point weights to; None keeps them
        max_shard_size: of one weight file

    Returns:
        The folder.

    Raises:
        Unwritable: if weights are not finite, or `dtype` cannot hold them
    """
    from huggingface_hub import save_torch_state_dict

    path = Path(path)
    state = denoiser.state_dict() if state is None else state
    check_weights(state, dtype)
    stock, own = split_state(denoiser, state)
    config, stock = denoiser.to_stock(denoiser.config, stock)
    description = {
        "format": FORMAT,
        "backbone": f"{denoiser.family.__module__}.{denoiser.family.__qualname__}",
        "base": denoiser.base,
        "edits": {name: editing.describe(e) for name, e in denoiser.applied.items()},
        "folded": denoiser.folded,
        "objective": editing.describe(objective or default_objective(denoiser)),
        "sampler": editing.describe(sampler or default_sampler(denoiser, objective)),
        "data": dict(data or {}),
        "run": dict(run or {}),
    }
    temporary, old = path.with_name(f"{path.name}.tmp-{os.getpid()}"), _replaced(path)
    for left in path.parent.glob(f"{escape(path.name)}.tmp-*"):  # of a save that was killed
        shutil.rmtree(left)
    temporary.mkdir(parents=True)
    try:
        save_torch_state_dict(
            {k: _plain(v, dtype) for k, v in stock.items()},
            temporary,
            filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        if own:
            save_file({k: _plain(v, dtype) for k, v in own.items()}, temporary / "edits.safetensors")
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        description = checksums.signed(description, temporary)
        (temporary / "edits.json").write_text(json.dumps(description, indent=2) + "\n")
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk is not left fuller
        if isinstance(error, SafetensorError) and (code := re.search(r"os error (\d+)", str(error))):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)
    return path


class Unwritable(ValueError):
    """Weights that are not finite, or that the type they are to be written in cannot hold."""


def check_weights(state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Refuse weights that are not finite, or that a narrower type cannot hold.

    Args:
        state: by name
        dtype: that they are to be cast to; None keeps theirs

    Raises:
        Unwritable: naming the first such tensor
    """
    for name, v in state.items():
        if not v.is_floating_point() or not v.numel():
            continue
        largest = v.detach().abs().max() if v.dtype.itemsize > 1 else v.detach().float().abs().max()
        if not largest.isfinite():
            count = int((~v.isfinite()).sum()) if v.dtype.itemsize > 1 else "some"
            raise Unwritable(f"{name} has weights that are not finite, {count} of {v.numel()}")
        if dtype is not None and not largest.to(dtype).isfinite():
            kind, end = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
            raise Unwritable(
                f"{name} has a weight of {largest.item():.4g} in size, and {kind} ends at {end:.4g}, so that inf "
                "would be written: use bf16 or fp32"
            )


def default_objective(denoiser: Denoiser) -> Objective:
    return DDPM() if denoiser.prediction == "noise" else FlowMatching()


def _plain(v: Tensor, dtype: torch.dtype | None) -> Tensor:
    v = v.detach().to("cpu", dtype if v.is_floating_point() else None).contiguous()
    part = v.untyped_storage().nbytes() > v.numel() * v.element_size()  # q, k, v split from one matrix
    return v.clone() if part else v


def stock_key(denoiser: Denoiser, key: str) -> str | None:
    """The stock name of a key of `denoiser.model.state_dict()`, or None where an edit put it there."""
    for e in reversed(denoiser.applied.values()):
        if (key := e.stock_key(key)) is None:  # type: ignore[assignment]
            return None
    return key


def split_state(denoiser: Denoiser, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A denoiser's state dict as (the model's under stock names, what edits own under full names)."""
    stock, own = {}, {}
    for key, value in state.items():
        inside = key.startswith(MODEL_PREFIX)
        name = stock_key(denoiser, key.removeprefix(MODEL_PREFIX)) if inside else None
        if name is None:
            own[key] = value
        else:
            stock[name] = value
    return stock, own


# ---- reading -------------------------------------------------------------------------------------------------------


def load(
    path: str | os.PathLike,
    device: str | torch.device = "cpu",
    trusted: tuple[str, ...] = (),
    verify: bool = True,
) -> Artifact:
    """Read an artifact, or a plain `diffusers` folder of a family we know.

    Args:
        path: the folder, or a run folder that has an `artifact` in it
        device: to put the weights on
        trusted: further packages whose edits may be imported; `edit` itself always is
        verify: compare the files with their checksums first: 2 GB/s for each shard, which are read side by side

    Raises:
        FileNotFoundError: if there is no artifact, or a file of it is missing
        ValueError: if it is of another format, a file is not what was saved, or its weights do not fit the model it
            describes (keys are named)
    """
    path = find(path)
    description = read_description(path)
    if verify:
        checksums.verify(path, description)
    denoiser = skeleton(path, trusted, verify)
    with _naming(path / "config.json", f"it does not fit the weights beside it and this version of {denoiser.name}"):
        load_weights(denoiser, path)
    denoiser.requires_grad_(True).eval().to(device)
    objective, sampler = description["objective"], description["sampler"]
    with _naming(path / "edits.json", "its objective or sampler cannot be made"):
        return Artifact(
            path=path,
            denoiser=denoiser,
            objective=editing.rebuild(objective, trusted, Objective) if objective else default_objective(denoiser),
            sampler=editing.rebuild(sampler, trusted, Sampler) if sampler else stock_sampler(denoiser, path),
            data=description["data"],
            run=description["run"],
        )


def stock_sampler(denoiser: Denoiser, path: Path) -> Sampler:
    """How a published model is sampled: as its family, on the steps of the scheduler beside it, where there is one."""
    sampler, beside = default_sampler(denoiser), path.parent / "scheduler" / "scheduler_config.json"
    if isinstance(sampler.solver, StockEuler) and beside.is_file():
        solver = StockEuler.of(_read_json(beside), sampler.solver.steps, sampler.solver.even)
        return replace(sampler, solver=solver or sampler.solver)
    return sampler


def skeleton(path: str | os.PathLike, trusted: tuple[str, ...] = (), verify: bool = True) -> Denoiser:
    """The denoiser of an artifact with its edits but without weights, on the meta device; of a hub id only the
    configuration is fetched. `verify` compares what it is built from with its checksums, not the weights."""
    published = is_hub_id(path)
    path = find(path, weights=False)
    description, config = read_description(path), _read_json(path / "config.json")
    if verify:
        checksums.verify(path, description, weights=False)
    family = _family(description["backbone"])
    _refuse_enormous(description, config, path)
    base = description["base"]
    with _naming(path / "edits.json", "its edits cannot be made"):
        live = {name: editing.rebuild(node, trusted, editing.Edit) for name, node in description["edits"].items()}
    with torch.device("meta"):
        if base is None:
            with _naming(path / "config.json", f"the configuration does not fit this version of {family.name}"):
                base = family.from_stock(config, _stock_state(config) if published else _Headers(path))[0]
        with _naming(path / "edits.json", f"the artifact's base does not fit this version of {family.name}"):
            denoiser = family.from_config(base)
        with _naming(path / "edits.json", "the artifact's edits do not fit its base"):
            editing.apply(denoiser, live, fresh=False)
    denoiser.folded = list(description["folded"])
    return denoiser


@contextmanager
def _naming(file: Path, complaint: str) -> Iterator[None]:
    """Whatever a damaged or foreign description makes constructors run into is said in one sentence with its file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        if isinstance(error, ValueError) and f"{file.parent.name}/" in said:  # it is named
            raise
        if not isinstance(error, ValueError):
            said = f"{type(error).__name__}: {said}"
        raise ValueError(f"{file}: {complaint}: {said}") from error


def _refuse_enormous(description: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
    """Nothing is built from a description whose numbers no model has."""
    trust.refuse_enormous({k: v for k, v in description.items() if k != "run"}, str(path / "edits.json"))
    trust.refuse_enormous(config, str(path / "config.json"))


def edits_of(path: str | os.PathLike) -> list[dict[str, Any]]:
    """What edits made an artifact, folded and live, each with its name, import path and fields."""
    description = read_description(find(path, weights=False))
    return [*description["folded"], *({"name": name, **node} for name, node in description["edits"].items())]


def read_description(path: Path) -> dict[str, Any]:
    """Content of edits.json; of a stock folder, what stands for it.

    Raises:
        FileNotFoundError: if it is missing where edits have left parameters
        ValueError: if it cannot be read, or is of another format
    """
    if not os.path.lexists(path / "edits.json"):
        if (path / "edits.safetensors").exists():
            raise FileNotFoundError(
                f"{path / 'edits.json'} is missing, which says what edits.safetensors belongs to: the artifact is not "
                "whole"
            )
        return _describe_stock(_read_json(path / "config.json"))
    description = _read_json(path / "edits.json")
    if description.get("format") != FORMAT:
        raise ValueError(f"{path} has artifact format {description.get('format')}, this version of edit reads {FORMAT}")
    if missing := [k for k in _PARTS if k not in description]:
        raise ValueError(f"{path / 'edits.json'} has no {missing[0]}: the artifact is not whole")
    _check_parts(description, path / "edits.json")
    return description


def _check_parts(description: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError where a part is not of the type that `save` writes."""
    for part, kinds in _PARTS.items():
        value = description[part]
        items = value.values() if part == "edits" and isinstance(value, dict) else value if part == "folded" else ()
        if not isinstance(value, kinds) or not all(isinstance(item, dict) for item in items):
            raise ValueError(f"{file} holds {trust.cut(value)} for {part}: it was not written by edit.save")
    if odd := [e for e in description["folded"] if not {"name", "_target_"} <= set(e)]:
        raise ValueError(f"{file} holds {trust.cut(odd[0])} for folded: an edit has a name and an import path")


_PARTS: dict[str, Any] = {
    "backbone": str,
    "base": dict | None,
    "edits": dict,
    "folded": list,
    "objective": dict | None,
    "sampler": dict | None,
    "data": dict,
    "run": dict,
}


def load_weights(denoiser: Denoiser, path: Path) -> None:
    """Fill a denoiser, on any device, from an artifact folder whose model and edits are the same."""
    wanted = {k: v.to("meta") for k, v in denoiser.state_dict().items()}
    stock_wanted, own_wanted = split_state(denoiser, wanted)
    headers = _Headers(path)
    expected = denoiser.to_stock(denoiser.config, stock_wanted)[1]
    check_layout(expected, headers, f"{path.name}/{WEIGHTS}")
    own_file = path / "edits.safetensors"
    own_headers = _headers_of(own_file) if own_file.exists() else {}
    check_layout(own_wanted, own_headers, f"{path.name}/edits.safetensors")

    stock: dict[str, Tensor] = {}
    for file in headers.files:
        with told_in_text(file) as name:
            stock.update(load_file(name))
    stock = denoiser.from_stock(_read_json(path / "config.json"), stock)[1]
    own = {}
    if own_headers:
        with told_in_text(own_file) as name:
            own = load_file(name)
    state = {}
    for key in wanted:
        name = stock_key(denoiser, key.removeprefix(MODEL_PREFIX)) if key.startswith(MODEL_PREFIX) else None
        state[key] = own[key] if name is None else stock[name]
    trainable = {n: p.requires_grad for n, p in denoiser.named_parameters()}
    denoiser.load_state_dict(state, assign=True)
    for n, p in denoiser.named_parameters():
        p.requires_grad_(trainable[n])


def load_official(denoiser: Denoiser, path: str | os.PathLike) -> None:
    """Fill a `DiT` from an official DiT or SiT `.pt` file (`DiT-XL-2-256x256.pt`, `SiT-XL-2-256.pt`), EMA first.

    Raises:
        FileNotFoundError: if there is no file
        ValueError: if it is not such a checkpoint, or not of this model (keys are named)
    """
    from edit.backbones.dit import DiT, from_official

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give the official .pt file, or an artifact folder")
    if not isinstance(denoiser, DiT):
        raise ValueError(f"{path.name}: official .pt checkpoints are read into the dit backbone, not {denoiser.name}")
    try:
        with torch.serialization.safe_globals([Namespace]):  # training checkpoints carry their parsed arguments
            mapped = str(path).isprintable()  # torch maps no file whose name is no UTF-8
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors alone: {error.__class__.__name__}"
        ) from error
    state = from_official(checkpoint, denoiser.spec)
    if denoiser.model.pos_embed.is_meta:
        denoiser.model.to_empty(device="cpu")
    denoiser.model.load_state_dict(state)


def find(path: str | os.PathLike, weights: bool = True) -> Path:
    """The artifact folder that `path` means: itself, the `artifact` inside a run folder, or the `transformer` inside a
    `diffusers` pipeline; a hub id `owner/name` is fetched first.

    A save that was killed between its two renames left the earlier artifact under another name: it is found, too.

    Args:
        path: folder or hub id
        weights: of a hub id; False fetches the configuration alone

    Raises:
        FileNotFoundError: if there is none, with the nearest name that is there; if the hub cannot be reached
        PermissionError: if it is gated, and its licence was not accepted
    """
    if not os.fspath(path):
        raise FileNotFoundError("no artifact at '': the path is empty")
    given, path = path, Path(path)
    inside = path / "artifact"
    for candidate in (path, inside, path / "transformer", _replaced(path), _replaced(inside)):
        if (candidate / "config.json").is_file():
            return candidate
    if path.exists() and not path.is_dir():
        raise FileNotFoundError(f"no artifact at {path}: it is a file, expected a folder")
    if path.exists():
        raise FileNotFoundError(f"no artifact at {path}: neither it nor {inside} holds a config.json")
    if is_hub_id(given):
        return find(_fetch(str(given), weights))
    raise FileNotFoundError(f"no artifact at {path}: there is no such folder{_hint(path)}")


def is_hub_id(path: str | os.PathLike) -> bool:
    """Whether a path can only mean a model on the hub: `owner/name`, and no folder `owner` is here."""
    return re.fullmatch(HUB_ID, str(path)) is not None and not Path(path).parent.exists()


def _hint(path: Path) -> str:
    near = _nearest(path)
    return f"; did you mean {near}?" if near else ""


def _nearest(path: Path) -> Path | None:
    """What is there under the names most like those of a path that is not."""
    parent = path.parent if path.parent.is_dir() else _nearest(path.parent)
    if parent is None or not parent.is_dir():
        return None
    if (parent / path.name).exists():
        return parent / path.name
    close = difflib.get_close_matches(path.name, os.listdir(parent), 1)
    return parent / close[0] if close else None


def _fetch(repository: str, weights: bool) -> str:
    """A published model's transformer, from the hub or its local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    files = ["config.json", "edits.json"]
    if weights:  # neither pickles nor variants of other precision
        stem = WEIGHTS.removesuffix(".safetensors")
        files += [WEIGHTS, f"{stem}-*-of-*.safetensors", f"{WEIGHTS}.index.json", "edits.safetensors"]
    no = f"no artifact at {repository}: there is no such folder"
    try:  # of a pipeline, its transformer alone
        return snapshot_download(repository, allow_patterns=[*files, *(f"transformer/{f}" for f in files)])
    except GatedRepoError as error:
        raise PermissionError(
            f"{repository} is gated on the hub: accept its licence on the model's page and log in with "
            "`hf auth login`, or give the folder of a copy"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{no}{_hint(Path(repository)) or ', nor a model on the hub that this login may see'}"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{no}, and the hub gave none ({type(error).__name__}){_hint(Path(repository))}"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{no}{_hint(Path(repository))}, and it cannot be fetched offline: fetch it where there is a network, or "
            "give its folder"
        ) from error


def fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 that changes when a model is trained further, edited or replaced; the folder's name, metrics and shards
    do not count.

    Milliseconds also for large models: of each tensor the name, type, shape and first 4 KiB are read. Training moves
    all elements of a tensor; one who changes some others on purpose is not found out.

    Args:
        path: artifact, run or `diffusers` folder, or hub id

    Raises:
        FileNotFoundError: if there is no model, or it is not whole
        ValueError: if it cannot be read
    """
    folder = find(path)
    config = {
        k: v for k, v in _read_json(folder / "config.json").items() if k == "_class_name" or not k.startswith("_")
    }
    described = read_description(folder)
    total = hashlib.sha256(json.dumps([config, described["edits"], described["folded"]], sort_keys=True).encode())
    own = folder / "edits.safetensors"
    tensors = sorted(t for file in [*_Headers(folder).files, *([own] if own.exists() else [])] for t in _sampled(file))
    for described_as, sample in tensors:
        total.update(described_as.encode())
        total.update(sample)
    return total.hexdigest()


@contextmanager
def told_in_text(file: Path) -> Iterator[Path]:
    """Another name of a file where its own is no UTF-8, which safetensors does not read; for as long as this lasts."""
    if os.fsencode(file).decode(errors="replace") == str(file):
        yield file
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        yield Path(f"/dev/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _sampled(file: Path) -> Iterator[tuple[str, bytes]]:
    """Of each tensor in a safetensors file, what it is and its first bytes."""
    _headers_of(file)  # raises where the header promises what is not there
    with open(file, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            first, end = tensor["data_offsets"]
            f.seek(8 + size + first)
            yield f"{name} {tensor['dtype']} {tensor['shape']}", f.read(min(SAMPLED, end - first))


def _replaced(path: Path) -> Path:
    """Where `save` puts the artifact that it is about to replace."""
    return path.parent / f"{path.name}.old"  # "/" and "." have no name


def _read_json(path: Path) -> dict[str, Any]:
    return trust.read_json(path)


def _family(target: str) -> type[Denoiser]:
    if not target.startswith("edit.backbones."):
        raise ValueError(f"the artifact's backbone {trust.cut(target, False)} is not one of edit.backbones")
    try:
        return trust.named(target, ("edit",), (Denoiser,), "the artifact's backbone")
    except ValueError as error:
        raise ValueError(str(error).replace("the artifact's backbone asks for", "the artifact's backbone")) from error


_STOCK_CLASSES = {
    "DiTTransformer2DModel": "edit.backbones.dit.DiT",
    "FluxTransformer2DModel": "edit.backbones.flux.Flux",
    "PixArtTransformer2DModel": "edit.backbones.pixart.PixArt",
    "QwenImageTransformer2DModel": "edit.backbones.qwen_image.QwenImage",
    "SD3Transformer2DModel": "edit.backbones.sd3.SD3",
}


def _stock_name(config: Mapping[str, Any]) -> str:
    """The stock class of a folder without edits.json: a published `diffusers` model."""
    name = config.get("_class_name")
    if name == "Transformer2DModel":  # what PixArt and DiT were called, and are in their published folders
        name = {"ada_norm_single": "PixArtTransformer2DModel", "ada_norm_zero": "DiTTransformer2DModel"}.get(
            str(config.get("norm_type")), name
        )
    if not isinstance(name, str) or name not in _STOCK_CLASSES:
        shown = trust.cut(name, quoted=False)
        raise ValueError(f"no backbone here reads a {shown}; known are {', '.join(_STOCK_CLASSES)}")
    return name


def _describe_stock(config: Mapping[str, Any]) -> dict[str, Any]:
    """A description for a folder without edits.json."""
    empty: dict[str, Any] = {"base": None, "edits": {}, "folded": [], "objective": None, "sampler": None}
    return {"format": FORMAT, "backbone": _STOCK_CLASSES[_stock_name(config)], **empty, "data": {}, "run": {}}


def _stock_state(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of the weights that a published configuration goes with; called on the meta device."""
    import diffusers

    cls = getattr(diffusers, _stock_name(config))
    known = inspect.signature(cls.__init__).parameters  # published ones carry fields of older versions, too
    return cls(**{k: v for k, v in config.items() if k in known}).state_dict()


class _Headers(dict):
    """Names and shapes of all weights in a folder as meta tensors, read from the file headers alone."""

    def __init__(self, path: Path):
        index = path / f"{WEIGHTS}.index.json"
        if index.exists():
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
                raise ValueError(f"{index} does not say which file holds which weight (weight_map): it is damaged")
            names = sorted(set(shards.values()))
            if bad := [n for n in names if Path(n).name != n]:
                raise ValueError(f"{index} points outside its folder: {bad[0]}")
            self.files = [path / n for n in names]
        else:
            self.files = [path / WEIGHTS]
        if missing := [f for f in self.files if not f.is_file()]:
            raise FileNotFoundError(f"{missing[0]} is missing: the artifact is not whole")
        super().__init__()
        for file in self.files:
            self.update(_headers_of(file))


def _headers_of(file: Path) -> dict[str, Tensor]:
    try:
        with told_in_text(file) as name, safe_open(name, framework="pt") as f:
            return {k: torch.empty(f.get_slice(k).get_shape(), device="meta") for k in f.keys()}
    except Exception as error:  # safetensors raises its own untyped errors for damaged headers
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
