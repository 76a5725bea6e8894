"""A feed-forward of experts: each token goes through k of E, and all tokens through a shared one.

    y = f_shared(u) + sum_{i in S} g_i f_i(u),  f(u) = W2 a(W1 u + b1) + b2,  or gated: W2 (a(W1 u) * W3 u)

Tokens are brought into the order of their experts, each matrix is one grouped product, and each token gathers its
outputs again: no loop over experts, no wait for the device, no token dropped, and no sum whose order is left open,
forward and backward. Weights of all experts are one parameter each: FSDP2 shards them by experts, ZeRO-3 gathers them
whole, and an expert that no token has reached has a gradient of zero.

Specifications: methods/dit-moe.md ("Inference procedure"), methods/dense2moe.md.

Letters in shape comments: b samples, s tokens of a sample, n = b s tokens, r = n k rows, d width, E experts, k experts
of a token, h hidden channels of an expert, w rows of W1: h, or 2 h where it is gated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.denoiser import Denoiser
from edit.groups import Group
from edit.moe.grouped import grouped
from edit.moe.order import Order, ordered, to_experts, to_tokens
from edit.moe.routing import Choice, Gate, Router, check_gate, choose, record
from edit.stream import Layout
from edit.widths import Scale

Activation = Callable[[Tensor], Tensor]


# ---- feed-forwards --------------------------------------------------------------------------------------------------


def computing(x: Tensor) -> torch.dtype:
    """The precision of matrix products: that of autocast, which knows no grouped ones, else the tensor's own."""
    kind = "cpu" if x.is_meta else x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def activated(hidden: Tensor, activation: Activation, gated: bool) -> Tensor:
    """... w -> ... h; the gate is the first half."""
    if not gated:
        return activation(hidden)
    gate, value = hidden.chunk(2, -1)
    return activation(gate) * value


class FeedForward(nn.Module):
    """One feed-forward for all tokens: ... d -> ... d.

    Args:
        width: d
        hidden: h
        activation: of hidden channels
        gated: whether half of the rows of `into` are gates
        bias: b1
        out_bias: b2
    """

    scales: ClassVar = {r"(into|out)\.weight": Scale("hidden", "xavier"), "bias": Scale("vector")}

    def __init__(
        self, width: int, hidden: int, activation: Activation, gated: bool, bias: bool = False, out_bias: bool = False
    ):
        super().__init__()
        self.activation, self.gated = activation, gated
        self.into = nn.Linear(width, (1 + gated) * hidden, bias=bias)
        self.out = nn.Linear(hidden, width, bias=out_bias)
        for part in (*self.into.weight.detach().chunk(1 + gated), self.out.weight):
            nn.init.xavier_uniform_(part)
        for b in (self.into.bias, self.out.bias):
            if b is not None:
                nn.init.zeros_(b)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(activated(self.into(tokens), self.activation, self.gated))


class Experts(nn.Module):
    """E feed-forwards, of which each token goes through those that were chosen for it.

    Args:
        count: E
        width: d
        hidden: h
        activation, gated, bias, out_bias: as of `FeedForward`
    """

    scales: ClassVar = {
        "into|out": Scale("hidden", "xavier", 2, stack=True),
        "into_bias|out_bias": Scale("vector", stack=True),
    }

    def __init__(
        self,
        count: int,
        width: int,
        hidden: int,
        activation: Activation,
        gated: bool,
        bias: bool = False,
        out_bias: bool = False,
    ):
        super().__init__()
        self.activation, self.gated = activation, gated
        self.into = nn.Parameter(torch.empty(count, (1 + gated) * hidden, width))
        self.out = nn.Parameter(torch.empty(count, width, hidden))
        self.into_bias = nn.Parameter(torch.zeros(count, (1 + gated) * hidden)) if bias else None
        self.out_bias = nn.Parameter(torch.zeros(count, width)) if out_bias else None
        for stack in (*self.into.detach().chunk(1 + gated, 1), self.out):
            bound = (6 / (stack.shape[1] + stack.shape[2])) ** 0.5  # Xavier, each expert by itself
            nn.init.uniform_(stack, -bound, bound)

    def forward(self, tokens: Tensor, choice: Choice) -> Tensor:
        """The gated sum of the chosen experts: n d -> n d."""
        dtype, k = computing(tokens), choice.experts.shape[1]
        order = ordered(choice.experts, len(self.into))
        rows = self.compute(to_experts(tokens.to(dtype), order, k), order)
        return to_tokens(rows, order, choice.gates).to(dtype)

    def compute(self, rows: Tensor, order: Order) -> Tensor:
        """Each row through its expert: r d -> r d, in the order of experts."""

        def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y = grouped(x, weight.to(x.dtype), order.ends)
            return y if bias is None else y + F.embedding(order.experts, bias.to(x.dtype))

        hidden = activated(product(rows, self.into, self.into_bias), self.activation, self.gated)
        return product(hidden, self.out, self.out_bias)


class MoE(nn.Module):
    """A feed-forward of experts with its router: the slot `ffn` or `text_ffn` of a unit, and what FSDP2 gathers by
    itself (`Edit.shards`).

    Args:
        name: of the layer's records in the trace, `<name>.loads` and `<name>.probabilities`
        router: of E logits
        experts: E of them; None: there is the shared one alone
        shared: of all tokens, not weighted; None: there is none
        k: experts of a token, 0 to E. It may be changed at any time: with 0 the shared one alone is run
        gate, scale: as of `choose`
        text: whether it stands in the slot `text_ffn`: padding then has no part in the load
    """

    def __init__(
        self,
        name: str,
        router: Router,
        experts: Experts,
        shared: FeedForward | None,
        k: int,
        gate: Gate = "softmax",
        scale: float = 1.0,
        text: bool = False,
    ):
        super().__init__()
        check_gate(name, gate, len(experts.into), k)
        self.name, self.k, self.gate, self.scale, self.text = name, k, gate, scale, text
        self.router, self.experts, self.shared = router, experts, shared

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:  # b s d -> b s d
        always = None if self.shared is None else self.shared(tokens)
        if self.k == 0:
            return torch.zeros_like(tokens) if always is None else always
        flat = tokens.flatten(0, 1)
        choice = choose(self.router(flat), self.k, self.gate, self.scale)
        record(layout, self.name, choice, len(tokens), layout.text_mask if self.text else None)
        y = self.experts(flat, choice).view(tokens.shape)
        return y if always is None else always + y


# ---- parameters -----------------------------------------------------------------------------------------------------


def routed_parameters(denoiser: Denoiser, edit: str) -> dict[str, nn.Parameter]:
    """Routed experts' parameters by their full names, of an edit whose own module has its `MoE` layers by name."""
    return {
        f"edits.{edit}.{key}.experts.{leaf}": p
        for key, layer in denoiser.edits[edit].named_children()
        for leaf, p in layer.experts.named_parameters()  # type: ignore[union-attr]
    }


def expert_groups(denoiser: Denoiser, edit: str) -> dict[str, Group]:
    """Their kinds of parameters (`Edit.groups`): matrices of experts are stacks."""
    found = routed_parameters(denoiser, edit)
    return {name: Group(kind="stack" if p.ndim == 3 else "vector") for name, p in found.items()}
