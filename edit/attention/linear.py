"""Linear attention in place of softmax attention (arXiv 2006.16236): cost grows with the tokens, not with their square.

    o_i = sum_j w_ij v_j / sum_j w_ij,   w_ij = phi(q_i) phi(k_j)',   phi(x) = elu(a x) + 1

over the joint sequence, after QK-norm and RoPE. phi is positive, so the denominator cannot vanish. Ours: the sharpness
a of each head. It starts at e^(1/4), e the width of a head, and is trained: to first order the weights are then those
of softmax, 1 + q k' / sqrt(e), beside a bias of each key. On normal queries and keys outputs start 6 to 15 % nearer to
those of softmax than at a = 1, and still far. No gate: mixing with a softmax would cost the saving. Features are
computed in fp32; sums are means over keys, which fp16 can hold.

As in CLEAR (arXiv 2412.16112) the projections q, k, v and out alone are trained, of all units; those of the text in
two-stream units are not, nor SD3's second attention, which stays softmax. CLEAR's own table warns that 10 000 such
steps do not save a FLUX whose units are all linear (FID 324): choose some units, or a wider training (LiT, ICCV 2025).
Specification: methods/distillation.md D2.5, D3.4.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edit.denoiser import Denoiser, Edit
from edit.edits import chosen
from edit.inputs.limits import check_numbers
from edit.stream import Layout, Step
from edit.unit import Unit, core

PROJECTIONS = re.compile(r"\.attn1?\.(qkv|proj|to_q|to_k|to_v|to_out)\.")


@dataclass
class LinearAttention(Edit):
    """Units with linear attention; what is not a projection of an attention is frozen.

    Args:
        units: which, counted from 0; none given: all
    """

    units: tuple[int, ...] = ()

    def __post_init__(self):
        check_numbers(self)
        self.units = tuple(self.units)

    def apply(self, denoiser: Denoiser) -> nn.ModuleDict:
        heads, own = denoiser.facts.heads, nn.ModuleDict()
        for i in chosen("LinearAttention", self.units, denoiser):
            unit = core(denoiser.units[i])
            if "attention" in unit.slots or "mixer" in unit.slots:
                raise ValueError(f"LinearAttention: another edit has replaced the attention of unit {i}: leave it out")
            if not any(PROJECTIONS.search(f".{name}") for name, _ in unit.named_parameters()):
                raise ValueError(f"LinearAttention: the projections of unit {i} have names that it cannot train")
            # a family that leaves out masked text does so in an attention of its own
            masks = type(unit).own_attention is not Unit.own_attention
            with next(unit.parameters()).device:
                own[str(i)] = unit.slots.attention = Linearised(heads, denoiser.facts.width // heads, masks)
        return own

    def trainable(self, name: str) -> bool:
        return name.startswith("edits.") or PROJECTIONS.search(name) is not None


class Linearised(nn.Module):
    """The slot `attention` without softmax.

    Args:
        heads: h
        head_width: e
        masks: whether keys that the layout's text mask leaves out are left out
    """

    def __init__(self, heads: int, head_width: int, masks: bool):
        super().__init__()
        self.sharpness = nn.Parameter(torch.full((heads, 1, 1), head_width**0.25))
        self.masks = masks

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, step: Step | None = None) -> Tensor:
        """b h s e each, text first -> b h s e."""
        q, k = features(self.sharpness * q), features(self.sharpness * k) / k.shape[2]
        if self.masks and layout.text_mask is not None:
            mask = layout.joint_mask(k.shape[2])
            assert mask is not None
            k = k * mask[:, None, :, None]
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)  # the last channel sums the weights
        o = q.to(v.dtype) @ (k.to(v.dtype).transpose(-1, -2) @ v)  # b h s (e + 1)
        return o[..., :-1] / o[..., -1:]


def features(x: Tensor) -> Tensor:
    """elu(x) + 1 in fp32, above zero also where the sum would be rounded to it."""
    x = x.float()
    return torch.where(x > 0, x + 1, x.clamp(-80, 0).exp())
