"""The order of rows in a layer of experts: a row is a token at one expert. Rows of one expert stand together, so that
each matrix is one grouped product; sums of a token's rows keep one order, forward and backward.

Letters in shape comments: b samples, t tokens of a sample, n = b t, d width, E experts, r rows; where tokens choose, k
experts of a token, r = n k; where experts choose, k tokens of an expert, r = b E k.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- tokens choose experts ------------------------------------------------------------------------------------------


class Order(NamedTuple):
    """Rows by expert. A row is a token at one of its k experts; tokens' own order is that of (token, place)."""

    rows: Tensor  # r, int64: which row stands at each place
    places: Tensor  # r, int64, the inverse: where each row stands
    ends: Tensor  # E, int32: the place behind each expert's rows
    experts: Tensor  # r, int64: the expert at each place


def ordered(experts: Tensor, count: int) -> Order:
    """The order of rows for the experts that tokens take: n k -> Order. Among one expert's rows it is the tokens'."""
    each = experts.flatten()
    found, rows = each.sort(stable=True)
    places = torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows), device=rows.device))
    counts = torch.zeros(count, dtype=torch.int32, device=each.device)
    counts = counts.scatter_add_(0, each, torch.ones_like(each, dtype=torch.int32))  # bincount's shape would wait
    return Order(rows, places, counts.cumsum(0, dtype=torch.int32), found)


class _Gathered(torch.autograd.Function):
    """x[rows], with a gradient that is gathered, too, instead of being added up in whatever order.

    It has no forward mode, as torch's grouped product has none, and compilers take no function with one of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, back: Tensor, times: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.times = times
        return x[rows]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        g = gradients[0][back]
        return g if ctx.times == 1 else g.unflatten(0, (-1, ctx.times)).sum(1), None, None, None


def to_experts(tokens: Tensor, order: Order, k: int) -> Tensor:
    """A row for each expert of each token, by expert: n d -> r d."""
    return _Gathered.apply(tokens, order.rows // k, order.places, k)


def to_tokens(rows: Tensor, order: Order, gates: Tensor) -> Tensor:
    """The gated sum of each token's rows, in fp32: r d, n k -> n d."""
    own = _Gathered.apply(rows, order.places, order.rows, 1)
    return (own.unflatten(0, gates.shape) * gates[..., None]).sum(1)


# ---- experts choose tokens ------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """The tokens of all experts: row (e, b, i) is the i-th token that expert e takes of sample b."""

    tokens: Tensor  # r, int64: each row's token among (b t)
    order: Tensor  # r, int64: rows by token
    starts: Tensor  # (b t), int64: the first row of each token in `order`


def rows_of(chosen: Tensor, length: int) -> Rows:
    """The order of rows for the tokens that experts take: b E k, each below `length` -> Rows."""
    b = chosen.shape[0]
    first = torch.arange(b, device=chosen.device).view(-1, 1, 1) * length
    tokens = (chosen + first).transpose(0, 1).flatten()  # e b k
    counts = tokens.new_zeros(b * length).scatter_add_(0, tokens, torch.ones_like(tokens))
    return Rows(tokens, tokens.argsort(stable=True), counts.cumsum(0) - counts)


def summed(rows: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """The sum of each token's rows, in their order: r d -> (b t) d; zeros where there is none."""
    return F.embedding_bag(order, rows, starts, mode="sum")


class _Taken(torch.autograd.Function):
    """The token of each row, with a gradient that is summed in the rows' order: (b t) d -> r d."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, order: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(order, starts)
        return x[tokens]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return summed(gradients[0].contiguous(), *ctx.saved_tensors), None, None, None


class _Returned(torch.autograd.Function):
    """The sum of each token's rows: r d -> (b t) d."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tokens: Tensor, order: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        return summed(rows, order, starts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (tokens,) = ctx.saved_tensors
        return gradients[0][tokens], None, None, None


def to_choosers(x: Tensor, rows: Rows) -> Tensor:
    """The token of each row: (b t) d -> r d."""
    return _Taken.apply(x, *rows)


def from_choosers(x: Tensor, rows: Rows) -> Tensor:
    """The sum of each token's rows: r d -> (b t) d."""
    return _Returned.apply(x, *rows)
