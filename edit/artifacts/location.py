"""Which folder a path means: an artifact, a run with one inside, a stock pipeline, or a hub id, which is fetched."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from edit.artifacts.weights import WEIGHTS
from edit.artifacts.whole import replaced

HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"  # owner/name


def find(path: str | os.PathLike, weights: bool = True) -> Path:
    """The artifact folder that `path` means: itself, the `artifact` inside a run folder, or the `transformer` inside a
    `diffusers` pipeline; a hub id `owner/name` is fetched first.

    An artifact that a killed save left under another name is found as well.

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
    for candidate in (path, inside, path / "transformer", replaced(path), replaced(inside)):
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
    """The existing path with the most similar name."""
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
