"""Expert parallelism: each rank of a group holds a part of the experts, and rows travel to them and back.

    rows by expert -> counts (all-to-all of E integers) -> rows (all-to-all) -> by own expert -> products -> back

Routing, gates and the shared expert stay where the tokens are, so that outputs and gradients are those of one process
with all experts. How many rows travel is known on the device alone: one copy of the counts to the host in each layer
and pass is the price of such an exchange, and breaks CUDA graphs. Nothing is dropped and nothing is padded.

Gradients: rows of all ranks of the group reach an expert, so its gradient is their sum; it is divided by the group's
size. It is then the gradient of the mean of the ranks' losses, as data parallelism leaves it for all other weights.
Specification: methods/dit-moe.md ("Expert parallelism").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edit.moe.experts import Experts, MoE, computing
from edit.moe.order import Order, ordered, to_experts, to_tokens
from edit.moe.routing import Choice

if TYPE_CHECKING:  # a second, which one process needs nothing of
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class _Exchanged(torch.autograd.Function):
    """Rows to other ranks and from them: the first `send[0]` to the first, ...; the gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradients[0], ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
    import torch.distributed as dist

    out = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out


class ParallelExperts(nn.Module):
    """This rank's experts, in place of all.

    Args:
        local: the experts from number rank x count on
        group: of the ranks among which experts are divided, in the order of experts
    """

    def __init__(self, local: Experts, group: ProcessGroup):
        super().__init__()
        self.local, self.group, self.ranks = local, group, group.size()
        for p in local.parameters():
            p.register_hook(lambda g, ranks=self.ranks: g / ranks)

    def forward(self, tokens: Tensor, choice: Choice) -> Tensor:
        """The gated sum of the chosen experts, wherever they are: n d -> n d."""
        dtype, k, own = computing(tokens), choice.experts.shape[1], len(self.local.into)
        order = ordered(choice.experts, own * self.ranks)
        counts = order.ends.diff(prepend=order.ends.new_zeros(1))
        theirs = _exchange(counts, [own] * self.ranks, [own] * self.ranks, self.group).view(self.ranks, own)
        send, receive = torch.stack((counts.view(self.ranks, own).sum(1), theirs.sum(1))).tolist()  # the host waits
        rows = to_experts(tokens.to(dtype), order, k)
        mine = _Exchanged.apply(rows, send, receive, self.group)  # by rank, and of each by expert
        each = torch.arange(own, device=rows.device).repeat(self.ranks)
        expert = each.repeat_interleave(theirs.flatten(), output_size=len(mine))
        inner = ordered(expert[:, None], own)
        done = self.local.compute(to_experts(mine, inner, 1), inner)
        back = _Exchanged.apply(_returned(done, inner), receive, send, self.group)
        return to_tokens(back, order, choice.gates).to(dtype)


def _returned(rows: Tensor, order: Order) -> Tensor:
    """Rows by expert in the order that they came in."""
    return to_experts(rows, Order(order.places, order.rows, order.ends, order.experts), 1)


def divide(moe: MoE, mesh: DeviceMesh, dimension: str) -> MoE:
    """Leave to each rank its part of a layer's experts; called before weights are sharded or an optimiser is made.

    Args:
        moe: with all experts, the same on all ranks; changed in place
        mesh: of devices
        dimension: its dimension among whose ranks the experts are divided

    Raises:
        ValueError: if the number of experts is no multiple of the number of ranks
    """
    group, whole = mesh.get_group(dimension), moe.experts
    count, ranks = len(whole.into), group.size()
    if count % ranks:
        raise ValueError(
            f"{moe.name}: {count} experts cannot be divided among {ranks} ranks of the dimension {dimension!r}: choose "
            "a size of the dimension that divides them"
        )
    own, first = count // ranks, group.rank() * (count // ranks)
    width, hidden = whole.out.shape[1:]
    with whole.into.device:
        biases = whole.into_bias is not None, whole.out_bias is not None
        local = Experts(own, width, hidden, whole.activation, whole.gated, *biases).to(whole.into.dtype)
    with torch.no_grad():
        for mine, all_ in zip(local.parameters(), whole.parameters(), strict=True):
            mine.copy_(all_[first : first + own]).requires_grad_(all_.requires_grad)
    moe.experts = ParallelExperts(local, group)  # type: ignore[assignment]
    return moe
