"""Artifacts: the result of a run as a folder, which stock `diffusers` reads where it can express the model.

    config.json, diffusion_pytorch_model.safetensors    the model under its stock names; `_needs_edits` in config.json
                                                        names edits that replaced layers, whose weights are not there
    edits.json                                          backbone, live and folded edits, objective, sampler, data, run,
                                                        checksums of all files
    edits.safetensors                                   parameters that edits added, if any

With `refers` in edits.json, the weights are those of another folder (`edit.artifacts.reference`).

`load` compares all files with their checksums, builds the model on the meta device from the base configuration, applies
the edits again, compares names and shapes with the file headers, and only then reads weights. Nothing pickled is ever
read except official `.pt` checkpoints, and those with `weights_only`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from edit import edits as editing
from edit.artifacts import checksums
from edit.artifacts.artifact import Artifact
from edit.artifacts.description import FORMAT, family_of, import_path, read_description
from edit.artifacts.location import find, is_hub_id
from edit.artifacts.reference import home
from edit.artifacts.weights import (
    Headers,
    check_headers,
    check_weights,
    load_weights,
    split_state,
    stock_state,
    to_store,
)
from edit.artifacts.whole import replacing
from edit.denoiser import Denoiser, Edit
from edit.inputs import trust
from edit.objectives import Objective
from edit.predictions import default_objective
from edit.replaced import gone
from edit.sampling import Sampler, default_sampler
from edit.solvers import StockEuler


def described(denoiser: Denoiser, objective: Objective | None, sampler: Sampler | None) -> dict[str, Any]:
    """What edits.json says of the model, and of how it is sampled; None: by the backbone's convention."""
    return {
        "format": FORMAT,
        "backbone": import_path(denoiser.family),
        "base": denoiser.base,
        "edits": {name: editing.describe(e) for name, e in denoiser.applied.items()},
        "folded": denoiser.folded,
        "objective": editing.describe(objective or default_objective(denoiser)),
        "sampler": editing.describe(sampler or default_sampler(denoiser, objective)),
    }


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
    refers: Path | None = None,
) -> Path:
    """Write an artifact; an existing one at `path` is replaced only when the new one is whole.

    Args:
        denoiser: gives structure and edits; its weights too, unless `state` is given
        path: folder to write
        objective: of the model; None: by the backbone's convention
        sampler: the default way to generate
        data: configuration of the data set
        run: provenance and metrics, JSON
        state: full `denoiser.state_dict()` to write instead of the live weights (gathered from shards)
        dtype: to cast floating-point weights to; None keeps them
        max_shard_size: of one weight file
        refers: folder of weights that this denoiser has unchanged: they are not written but referred to

    Returns:
        The folder.

    Raises:
        Unwritable: if weights are not finite, or `dtype` cannot hold them
        ValueError: if those in `refers` have other names or shapes
    """
    path = Path(path)
    state = denoiser.state_dict() if state is None else state
    check_weights(state, dtype)
    stock, own = split_state(denoiser, state)
    config, stock = denoiser.to_stock(denoiser.config, stock)
    if needed := dict.fromkeys(layer.by for layer in gone(denoiser.model)):
        config["_needs_edits"] = list(needed)
    if refers is not None:
        check_headers(refers, stock, own)
    description = described(denoiser, objective, sampler) | {"data": dict(data or {}), "run": dict(run or {})}
    with replacing(path) as folder, _system_errors(path):
        if refers is None:
            _write_weights(folder, stock, own, dtype, max_shard_size)
        else:
            description["refers"] = checksums.reference(path, refers)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        description = checksums.signed(description, folder)
        (folder / "edits.json").write_text(json.dumps(description, indent=2) + "\n")
    return path


def _write_weights(
    folder: Path,
    stock: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    max_shard_size: str,
) -> None:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(
        {k: to_store(v, dtype) for k, v in stock.items()},
        folder,
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    if own:
        save_file({k: to_store(v, dtype) for k, v in own.items()}, folder / "edits.safetensors")


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """Raises OSError, as other writes do, where safetensors names an error of the system: a full disk."""
    try:
        yield
    except SafetensorError as error:
        if code := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise


def load(
    path: str | os.PathLike,
    device: str | torch.device = "cpu",
    trusted: tuple[str, ...] = (),
    verify: bool = True,
    beside: Sequence[Artifact] = (),
) -> Artifact:
    """Read an artifact, or a plain `diffusers` folder of a family we know.

    Args:
        path: the folder, or a run folder that has an `artifact` in it
        device: to put the weights on
        trusted: further packages whose edits may be imported; `edit` itself always is
        verify: compare the files with their checksums first: 2 GB/s for each shard, which are read side by side
        beside: artifacts that are loaded on that device: one whose stock weights are the same files shares its tensors,
            so that nobody may change them in place. Needs `verify`

    Raises:
        FileNotFoundError: if there is no artifact, or a file of it is missing
        ValueError: if it has another format, a file differs from its checksum, or the weights do not fit the described
            model (keys are named)
    """
    given, path = path, find(path)
    description = read_description(path)
    _refuse_published(given, description)
    weights = home(path, description)
    if verify:
        checksums.verify(path, description)
    denoiser = skeleton(path, trusted, verify)
    identity = checksums.identity(path, description) if verify else ""
    same = next((a for a in beside if identity and a.identity == identity), None)
    with _naming(path / "config.json", f"it does not fit the weights beside it and this version of {denoiser.name}"):
        load_weights(denoiser, weights, None if same is None else stock_state(same.denoiser))
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
            home=weights,
            identity=identity,
            trusted=tuple(trusted),
        )


def _refuse_published(given: str | os.PathLike, description: Mapping[str, Any]) -> None:
    """Raises ValueError where a model from the hub wants files of this machine."""
    if description.get("refers") is not None and is_hub_id(given):
        raise ValueError(
            f"{given} comes from the hub and refers to a folder of this machine: it is not followed; ask for an "
            "artifact with weights of its own (copy=true)"
        )


def stock_sampler(denoiser: Denoiser, path: Path) -> Sampler:
    """How a published model is sampled: as its family, on the steps of the scheduler beside it, where there is one."""
    sampler, beside = default_sampler(denoiser), path.parent / "scheduler" / "scheduler_config.json"
    if isinstance(sampler.solver, StockEuler) and beside.is_file():
        solver = StockEuler.of(trust.read_json(beside), sampler.solver.steps, sampler.solver.even)
        return replace(sampler, solver=solver or sampler.solver)
    return sampler


def skeleton(path: str | os.PathLike, trusted: tuple[str, ...] = (), verify: bool = True) -> Denoiser:
    """The denoiser of an artifact with its edits but without weights, on the meta device; of a hub id only the
    configuration is fetched. `verify` compares the descriptions with their checksums, not the weights."""
    given, published = path, is_hub_id(path)
    path = find(path, weights=False)
    description, config = read_description(path), trust.read_json(path / "config.json")
    _refuse_published(given, description)
    if verify:
        checksums.verify(path, description, weights=False)
    family = family_of(description["backbone"])
    _refuse_enormous(description, config, path)
    base = description["base"]
    with _naming(path / "edits.json", "its edits cannot be made"):
        live = {name: editing.rebuild(node, trusted, Edit) for name, node in description["edits"].items()}
    with torch.device("meta"):
        if base is None:
            with _naming(path / "config.json", f"the configuration does not fit this version of {family.name}"):
                base = family.from_stock(config, {} if published else Headers(home(path, description)))[0]
        with _naming(path / "edits.json", f"the artifact's base does not fit this version of {family.name}"):
            denoiser = family.from_config(base)
        with _naming(path / "edits.json", "the artifact's edits do not fit its base"):
            editing.apply(denoiser, live, fresh=False)
    denoiser.folded = list(description["folded"])
    return denoiser


@contextmanager
def _naming(file: Path, complaint: str) -> Iterator[None]:
    """Errors that constructors raise for a damaged or foreign description become one sentence with its file."""
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
    """Refuse a description with larger numbers than any model has."""
    trust.refuse_enormous({k: v for k, v in description.items() if k != "run"}, str(path / "edits.json"))
    trust.refuse_enormous(config, str(path / "config.json"))
