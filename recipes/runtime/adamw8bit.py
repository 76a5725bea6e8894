"""AdamW whose moments take one byte each, in blocks of 256 with a scale of their own (arXiv 2110.02861).

Moments of tensors with fewer than 4096 elements, or a number of elements that 256 does not divide, keep the tensor's
type. bf16 weights are rounded stochastically, so that small updates survive on average (methods/distillation.md, D6
rule 6). torch compiles the update once per shape. Checkpoints hold codes and scales as plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torchao.optim
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchao.optim.subclass_8bit import OptimState8bit


class AdamW8bit(torchao.optim.AdamW8bit):
    """`torchao`'s AdamW8bit, whose rates are plain numbers between steps and which can skip a step without waiting.

    Where `found_inf` is 1, weights stay the same to the bit. Moments decay as after a zero gradient; those of a fused
    AdamW would stay, but here that would need a copy of all of them.

    Args:
        params, lr, betas, eps, weight_decay: as of `torch.optim.AdamW`
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        self.found_inf: Tensor = torch.zeros(())  # 1 or 0, on the device of the weights once it is measured
        super().__init__(params, lr, betas, eps, weight_decay, bf16_stochastic_round=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        rate = param_group.get("lr", self.defaults["lr"])
        super().add_param_group(param_group)
        self.param_groups[-1]["lr"] = rate  # torchao has made it a tensor, which logs cannot write

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()  # also sets found_inf
        rates, skipped = [group["lr"] for group in self.param_groups], self.found_inf.bool()
        for group in self.param_groups:
            group["lr"] = group["lr"] * (1 - self.found_inf)
            for g in (p.grad for p in group["params"] if p.grad is not None):
                (g.to_local() if isinstance(g, DTensor) else g).masked_fill_(skipped, 0)
        super().step()
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        return loss

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        state = {key: {name: _plain(v) for name, v in entry.items()} for key, entry in found["state"].items()}
        return {**found, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        entries = state_dict["state"].items()
        state = {key: {name: _packed(v, name == "exp_avg") for name, v in entry.items()} for key, entry in entries}
        super().load_state_dict({**state_dict, "state": state})

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        if isinstance(p, DTensor) and p.shape[0] % p.device_mesh.size():
            return torch.zeros_like(p)  # unequal shards: a checkpoint could not tell which rank owns a block
        return super()._new_buffer(p, signed)


def _plain(v: Tensor) -> Any:
    """A moment as a checkpoint holds it: one-byte codes, shaped as the weights, and a scale per block."""
    own = v.to_local() if isinstance(v, DTensor) else v
    if not isinstance(own, OptimState8bit):
        return v
    if not isinstance(v, DTensor):
        return {"codes": own.codes, "scale": own.scale}
    return {"codes": _shared(own.codes, v, v.shape), "scale": _shared(own.scale, v, (v.numel() // own.block_size,))}


def _packed(v: Any, signed: bool) -> Any:
    """The inverse of `_plain`."""
    if not isinstance(v, Mapping):
        return v
    codes, scale = (t.to_local() if isinstance(t, DTensor) else t for t in (v["codes"], v["scale"]))
    own = OptimState8bit.zeros(codes.shape, signed, codes.numel() // scale.numel(), codes.device, torch.float32)
    own.codes.copy_(codes)
    own.scale.copy_(scale)
    return _shared(own, v["codes"], v["codes"].shape) if isinstance(v["codes"], DTensor) else own


def _shared(part: Tensor, like: DTensor, shape: tuple[int, ...]) -> DTensor:
    """The tensor whose parts the ranks hold, sharded as `like`."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
