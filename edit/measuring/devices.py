"""Devices: whether one is here, its name, and the share of its peak that work amounts to."""

from __future__ import annotations

import re

import torch

# Dense bf16 FLOP/s with fp32 accumulation, from the makers' data sheets (half of the figure "with sparsity").
# A name is looked up as `torch.cuda.get_device_name` gives it; the first pattern found decides.
_PEAKS = (
    (r"H100 PCIe", 756e12),  # NVIDIA H100 data sheet
    (r"H100 NVL", 835e12),
    (r"\b(H100|H800|H200|GH200)\b", 989e12),  # SXM; H200 and GH200 share the die
    (r"\bH20\b", 148e12),
    (r"\b(A100|A800)\b", 312e12),  # NVIDIA A100 data sheet
    (r"\bGB200\b", 2500e12),  # NVIDIA GB200 NVL72 data sheet, per GPU
    (r"\b(B200|B300)\b", 2250e12),  # NVIDIA HGX B200 and B300 data sheets
    (r"\bL40S\b", 362e12),  # NVIDIA L40S data sheet
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bA40\b", 149.7e12),
    (r"RTX A6000\b", 154.8e12),
    (r"\bA10\b", 125e12),  # the A10G of cloud machines is another chip
    (r"RTX 5090\b(?! D)", 209.5e12),  # NVIDIA RTX Blackwell white paper
    (r"RTX 4090\b(?! D)", 165.2e12),  # NVIDIA Ada white paper
    (r"RTX 3090\b(?! Ti)", 71e12),  # NVIDIA Ampere GA102 white paper
    (r"\b(MI300X|MI325X)\b", 1307.4e12),  # AMD data sheets
)


def peak_flops(name: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s by its name; None if it is unknown, a laptop part or a MIG slice."""
    if re.search(r"\b(MIG|Laptop|Max-Q)\b", name):
        return None
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, name)), None)


def mfu(flops: float, seconds: float, name: str) -> float | None:
    """Share of a device's bf16 peak, 0 to 1, that `flops` of useful work in `seconds` amount to; None: peak unknown."""
    peak = peak_flops(name)
    return None if peak is None else flops / seconds / peak


def find_device(name: str) -> torch.device:
    """Raises ValueError unless it is a device of this machine on which something can be computed."""
    try:
        device = torch.device(name)
        if device.type == "cuda":  # counted, not initialised: a process that forks later must not find CUDA in use
            here = (device.index or 0) < torch.cuda.device_count()
        else:
            here = device.type != "meta" and torch.empty(1, device=device) is not None
        if here:
            return device
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ):  # torch's, for what it does not know or was built without
        pass
    found = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    raise ValueError(
        f"device={name} is not on this machine, which has {', '.join(['cpu', *found])}: choose one of them"
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
