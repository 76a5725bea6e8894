"""The machine that a number was measured on: which device is used, and the versions installed."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.config.errors import UserError

if TYPE_CHECKING:
    import torch


def pick_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda`, `cuda:1`, ... names on this machine.

    Raises:
        UserError: if the machine has no such device
    """
    import torch

    from edit.measuring.devices import find_device

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return find_device(name)
    except ValueError as error:
        raise UserError(str(error)) from error


def device_name(device: torch.device) -> str:
    """A device as numbers that were measured on it tell it."""
    import torch

    cpu = platform.processor() or platform.machine()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({cpu})"


def environment(device: torch.device) -> dict[str, Any]:
    """Everything that a number depends on besides artifact and settings: hardware, revision, versions."""
    import torch

    import edit

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    def git(*words: str) -> str:
        try:
            here = Path(__file__).parent
            return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "revision": git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
        "edit": edit.__version__,
        "torch": torch.__version__,
        "diffusers": installed("diffusers"),
        "transformers": installed("transformers"),
        "torchmetrics": installed("torchmetrics"),
        "python": platform.python_version(),
    }
