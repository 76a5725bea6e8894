"""An artifact's weight files: names and shapes from their headers, values, and which of them belong to edits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from edit.denoiser import Denoiser
from edit.inputs import trust
from edit.state_dicts import check_layout

WEIGHTS = "diffusion_pytorch_model.safetensors"
OWN = "edits.safetensors"
MODEL_PREFIX = "model."  # of parameters that edits put inside the model, in edits.safetensors


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


def to_store(v: Tensor, dtype: torch.dtype | None) -> Tensor:
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


def check_headers(path: Path, stock: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Headers:
    """Compare the weights of a folder with what a model wants, by names and shapes; returns those of the stock files.

    Raises:
        FileNotFoundError: if there are none
        ValueError: if they differ
    """
    headers = Headers(path)
    check_layout(stock, headers, f"{path.name}/{WEIGHTS}")
    check_layout(own, headers_of(path / OWN) if (path / OWN).exists() else {}, f"{path.name}/{OWN}")
    return headers


def stock_state(denoiser: Denoiser) -> dict[str, Tensor]:
    """The model's state under the names that it has without edits; what edits own is left out."""
    inside = {k.removeprefix(MODEL_PREFIX): v for k, v in denoiser.state_dict().items() if k.startswith(MODEL_PREFIX)}
    return {name: v for k, v in inside.items() if (name := stock_key(denoiser, k)) is not None}


def load_weights(denoiser: Denoiser, path: Path, shared: Mapping[str, Tensor] | None = None) -> None:
    """Fill a denoiser, on any device, from an artifact folder whose model and edits are the same.

    Args:
        denoiser: to fill
        path: the folder
        shared: `stock_state` of a model that was filled from the same stock files, whose tensors are taken as they are
    """
    wanted = {k: v.to("meta") for k, v in denoiser.state_dict().items()}
    stock_wanted, own_wanted = split_state(denoiser, wanted)
    headers = check_headers(path, denoiser.to_stock(denoiser.config, stock_wanted)[1], own_wanted)
    own_file = path / OWN

    stock = dict(shared or {})
    if not shared:
        for file in headers.files:
            with told_in_text(file) as name:
                stock.update(load_file(name))
        stock = denoiser.from_stock(trust.read_json(path / "config.json"), stock)[1]
    own = {}
    if own_file.exists():
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


def first_difference(denoiser: Denoiser, path: Path) -> str | None:
    """The first stock weight, by its stored name, in which a model differs from the stock files of a folder; None: in
    none. Of each weight the first row is read: training moves all rows.

    Args:
        denoiser: with weights
        path: folder that holds the files
    """
    mine = denoiser.to_stock(denoiser.config, stock_state(denoiser))[1]
    headers = Headers(path)
    for name in (*mine, *headers):
        if name not in headers or name not in mine or mine[name].shape != headers[name].shape:
            return name
    for file in headers.files:
        with told_in_text(file) as name, safe_open(name, framework="pt") as f:
            for key in f.keys():
                stored = f.get_slice(key)[:1] if mine[key].ndim else f.get_tensor(key)
                own = mine[key][:1] if mine[key].ndim else mine[key]
                if not torch.equal(own.detach().to(stored), stored):
                    return key
    return None


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


class Headers(dict):
    """Names and shapes of all weights in a folder as meta tensors, read from the file headers alone."""

    def __init__(self, path: Path):
        index = path / f"{WEIGHTS}.index.json"
        if index.exists():
            shards = trust.read_json(index).get("weight_map")
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
            self.update(headers_of(file))


def headers_of(file: Path) -> dict[str, Tensor]:
    try:
        with told_in_text(file) as name, safe_open(name, framework="pt") as f:
            return {k: torch.empty(f.get_slice(k).get_shape(), device="meta") for k in f.keys()}
    except Exception as error:  # safetensors raises its own untyped errors for damaged headers
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
