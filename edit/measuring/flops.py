"""FLOPs of executed operators: torch's counter, with formulas for the attention operators that it lacks.

Which operator `scaled_dot_product_attention` becomes depends on the device, the release and the gradient: on a CPU it
is one that torch does not count. Formulas are handed to the counter and never registered with torch, whose registry is
shared by everything in the process.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count


class Uncounted(UserWarning):
    """An operator without a formula has run: the count is a lower bound."""


def _attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """Shapes b h s e."""
    return sdpa_flop_count(q, k, v)


def _attention_backward(g: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(g, q, k, v)


def _flash(q: Tensor, k: Tensor, v: Tensor, starts_q: Any, starts_k: Any, max_q: int, max_k: int) -> int:
    """b s h e, or sequences end to end, s h e with where each starts: these as torch counts them."""
    if starts_q is None:  # torch 2.13 takes these shapes for b h s e
        return sdpa_flop_count(*(x.transpose(1, 2).shape for x in (q, k, v)))
    count = flop_registry[torch.ops.aten._flash_attention_forward]
    return count(q, k, v, starts_q, starts_q if starts_k is None else starts_k, max_q, max_k)


def _written(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *starts_and_lengths: Any, **_: Any) -> int:
    """Flash attention or cuDNN's that writes to its first argument."""
    return _flash(q, k, v, *starts_and_lengths[:4])


def _cudnn(q: Tensor, k: Tensor, v: Tensor, bias: Any, *starts_and_lengths: Any, **_: Any) -> int:
    """b h s e, or sequences end to end."""
    if starts_and_lengths[0] is None:
        return sdpa_flop_count(q.shape, k.shape, v.shape)
    return _flash(q, k, v, *starts_and_lengths[:4])


# the counter hands them tensors, not shapes
_written._get_raw = _cudnn._get_raw = True  # pyright: ignore[reportFunctionMemberAccess]


def _joined_heads(q: torch.Size, k: torch.Size, v: torch.Size, width: int, heads: int, *_: Any, **__: Any) -> int:
    """`nn.MultiheadAttention` in one operator: projections in and out, attention between. Shapes b s d."""
    batch, rows = q[0], q[1]
    shapes = [torch.Size((batch, heads, s[1], width // heads)) for s in (q, k, v)]
    tokens = 2 * rows + k[1] + v[1]  # of queries, outputs, keys and values
    return 2 * batch * tokens * width * width + sdpa_flop_count(*shapes)


def _grouped(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """One product for each group of rows, as experts make them: r k and g k n -> r n, or with the groups along another
    axis. Rows behind the last group count, too: offsets are values, and shapes are all there is to count by."""
    return 2 * math.prod(a) * b[-1] if len(a) == 3 or len(b) == 3 else 2 * a[0] * a[1] * b[1]


# By name, since no release has them all. The first four are what fused attention becomes on a CPU, an accelerator from
# outside torch, Apple's GPU; the others are what its own fused forms become.
_KNOWN: Mapping[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_attention_math_for_mps": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_cudnn_attention_forward": _cudnn,
    "_cudnn_attention_forward_no_dropout_inplace": _written,
    "_flash_attention_forward_no_dropout_inplace": _written,
    "_native_multi_head_attention": _joined_heads,
    "_grouped_mm": _grouped,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
}
FORMULAS: dict[Any, Callable[..., int]] = {
    op: formula
    for name, formula in _KNOWN.items()
    if (op := getattr(torch.ops.aten, name, None)) is not None and op not in flop_registry
}

# products whose FLOPs would be missed if they had no formula
_PRODUCT = re.compile(r"(mm|mv|dot|linear|lstm|gru)$|_mm_|attention|convolution|encoder_layer")


def uncounted(func: Any) -> bool:
    """Whether an operator that was run is a product, or not torch's own, and has no formula."""
    if func is flex_attention:
        return False  # counted by `Flops` itself
    packet = getattr(func, "overloadpacket", func)
    if packet in flop_registry or packet in FORMULAS:
        return False
    namespace, name = getattr(func, "namespace", ""), func.__name__.split(".")[0]
    return namespace not in ("aten", "prims", "prim") or bool(_PRODUCT.search(name))


class Flops:
    """Context that counts the FLOPs of everything run inside; `total` can be read at any time, also afterwards."""

    def __init__(self) -> None:
        self._counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        self._flex = _Flex()

    @property
    def total(self) -> int:
        return self._counter.get_total_flops() + self._flex.flops

    def __enter__(self) -> Flops:
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code hides its operators
            stack.enter_context(self._counter)
            stack.enter_context(self._flex)  # sees operators first
            self._leave = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._leave.__exit__(*error)


class _Flex(TorchDispatchMode):
    """Counts `flex_attention`, which torch's counter cannot stand around: only the blocks that its mask leaves."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not flex_attention:
            return func(*args, **(kwargs or {}))
        q, k, v, _, mask = args[:5]
        self.flops += round(_attention(q.shape, k.shape, v.shape) * visible(mask, q.shape[-2], k.shape[-2]))
        with _disable_current_modes():
            return func(*args, **(kwargs or {}))


def visible(mask: tuple, queries: int, keys: int) -> float:
    """Part of all pairs of a query and a key that the blocks of a mask cover, 0 to 1.

    Args:
        mask: `BlockMask.as_tuple()`: lengths, numbers of partial blocks, ..., numbers of full blocks, ..., block sizes
        queries: tokens
        keys: tokens
    """
    partial, full, (rows, columns) = mask[2], mask[4], mask[-3:-1]
    blocks = partial if full is None else partial + full
    rows, columns = min(rows, queries), min(columns, keys)  # no mask is one block of all there is
    pairs = blocks.double().mean(dim=(0, 1)).sum() * rows * columns
    return min(1.0, pairs.item() / (queries * keys))
