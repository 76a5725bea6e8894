"""One matrix product for each group of rows: the groups lie one behind the other and may be empty.

torch's `grouped_mm` where it takes the case, else two batched products' worth of padded segments; both have static
shapes, so that the host need not know how many rows an expert has. Without values (on the meta device, on fake tensors)
groups are taken to be of equal size, so that operators, shapes and memory can be counted in any precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edit.kernels.valueless import counted

ALIGNED = 16  # bytes: what torch's operator wants strides to be multiples of


def grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows[g] weight[g]' of each group g: r i, E o i, E -> r o.

    Args:
        rows: r i, those of the first group first
        weight: E o i, a linear layer for each group
        ends: E, int32, the row behind each group; the last is r
    """
    if counted(rows):
        return evenly(rows, weight)
    return torch._grouped_mm(rows, weight.mT, offs=ends) if direct(rows, weight) else segmented(rows, weight, ends)


def direct(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch's operator takes this case.

    It wants bf16 on CUDA, from Ampere on, and where it is compiled; three precisions on a CPU.
    """
    if rows.shape[1] * rows.itemsize % ALIGNED or weight.shape[1] * rows.itemsize % ALIGNED:
        return False
    if rows.device.type == "cuda":
        return rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    if torch.compiler.is_compiling():
        return rows.dtype == torch.bfloat16
    return rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)


def segmented(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same by segments of ceil(r / E) rows of one group each, filled with zeros, in one batched product.

    There are at most 2 E of them: this many are computed, whatever the groups. Arguments as of `grouped`.
    """
    r, count = len(rows), len(weight)
    size = max(1, -(-r // count))
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    pieces = (ends - starts + size - 1) // size  # E, segments of each group
    last = pieces.cumsum(0)
    place = torch.arange(r, device=rows.device, dtype=ends.dtype)
    group = torch.searchsorted(ends, place, right=True)  # r
    place = (last - pieces)[group] * size + place - starts[group]  # r, where each row goes
    owner = torch.searchsorted(last, torch.arange(2 * count, device=rows.device), right=True).clamp_max(count - 1)
    padded = rows.new_zeros(2 * count * size, rows.shape[1]).index_copy(0, place, rows)
    return torch.bmm(padded.view(2 * count, size, -1), weight[owner].mT).flatten(0, 1)[place]


def evenly(rows: Tensor, weight: Tensor) -> Tensor:
    """The shape of the answer, and the work that it takes, with groups of equal size; arguments as of `grouped`."""
    r, count = len(rows), len(weight)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -r % count)) if r % count else rows
    return torch.bmm(padded.view(count, -1, rows.shape[1]), weight.mT).flatten(0, 1)[:r]
