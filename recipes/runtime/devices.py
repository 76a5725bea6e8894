"""The devices and the precision of a run on this machine. Torch is imported only to look for GPUs."""

from __future__ import annotations

from recipes.config.errors import UserError
from recipes.config.schema import TrainerConfig


def accelerator_of(t: TrainerConfig) -> str:
    if t.accelerator != "auto":
        return t.accelerator
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


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
    import torch

    here = torch.cuda.device_count()
    if not here:
        raise UserError("trainer.accelerator=gpu, but torch sees no GPU here: use trainer=cpu, or check the driver")
    if t.devices == "auto":
        return here
    if t.devices > here:
        raise UserError(f"trainer.devices={t.devices}, but this machine has {here} GPUs: ask for at most {here}")
    return t.devices
