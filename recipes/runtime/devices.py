"""The devices and the precision of a run on this machine. Torch is imported only where there may be a GPU."""

from __future__ import annotations

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

from edit.importing import uncollected
from recipes.config.errors import UserError
from recipes.config.schema import TrainerConfig


def accelerator_of(t: TrainerConfig) -> str:
    if t.accelerator != "auto":
        return t.accelerator
    return "gpu" if gpus() else "cpu"


def gpus() -> int:
    """The number of GPUs that torch sees here."""
    if "torch" not in sys.modules and not may_have_gpu():
        return 0
    with uncollected():
        import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def may_have_gpu() -> bool:
    """Whether torch might see a GPU, told without its import of three seconds.

    False if it is made for NVIDIA's or for none, and their driver cannot be loaded here.
    """
    found = find_spec("torch")
    if sys.platform != "linux" or found is None or found.origin is None:
        return True
    try:
        made = run_path(str(Path(found.origin).with_name("version.py")))  # constants
    except OSError:
        return True
    if made.get("hip") or made.get("xpu") or "cuda" not in made:
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return made["cuda"] is not None


def precision_of(t: TrainerConfig) -> str:
    """The precision of the run: fp32, or bf16 autocast over fp32 weights."""
    if t.precision == "auto":
        return "bf16-mixed" if accelerator_of(t) == "gpu" else "32-true"
    return t.precision


def recipe_casts(t: TrainerConfig) -> bool:
    """Whether the recipe casts: DeepSpeed's own bf16 would round weights and average to bf16."""
    return t.strategy.startswith("zero") and precision_of(t) == "bf16-mixed"


def count_devices(t: TrainerConfig) -> int:
    """The number of devices per node.

    Raises:
        UserError: if there are fewer than asked for
    """
    if accelerator_of(t) != "gpu":
        return 1 if t.devices == "auto" else t.devices
    here = gpus()
    if not here:
        raise UserError("trainer.accelerator=gpu, but torch sees no GPU here: use trainer=cpu, or check the driver")
    if t.devices == "auto":
        return here
    if t.devices > here:
        raise UserError(f"trainer.devices={t.devices}, but this machine has {here} GPUs: ask for at most {here}")
    return t.devices
