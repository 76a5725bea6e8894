"""Parts of keys for block-sparse attention, and the sentences that refuse bad ones.

Lists hold int32 numbers. Their values lie on the device, where reading them would stop the host: on a CPU a number
beyond the last block or key is refused, on a GPU nothing is read through such a number and it counts as absent.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edit.kernels.language import HAS_TRITON
from edit.kernels.valueless import valueless

WIDEST = 128  # head width that the kernels take


@dataclass(frozen=True, eq=False)
class Near:
    """An element predicate on integer positions, so that borders are exact.

    "disc": the sum over axes of squared differences is at most `limit`. CLEAR's "< r^2" is limit = r^2 - 1.
    "box": each difference is at most `limit` in size.
    """

    queries: Tensor  # n a, int32, a = 1..3 axes
    keys: Tensor  # m a, int32
    limit: int
    shape: Literal["disc", "box"] = "disc"


@dataclass(frozen=True, eq=False)
class Part:
    """Keys of one kind, and which rows of queries see which of their blocks."""

    k: Tensor  # b h m e, rotated and normalised already
    v: Tensor  # b h m f
    # b h r n, int32 (1 allowed for b and h): the blocks of keys that each row of queries sees; below 0: none.
    # None: every row sees every key. A block that is listed twice counts twice.
    index: Tensor | None = None
    # queries in a row; the last row may be shorter. Or offsets b h r+1, int32, ascending from 0 to all queries
    rows: int | Tensor = 64
    # keys in a block; the last block may be shorter. Or offsets b h c+1, int32, ascending from 0 to all keys
    columns: int | Tensor = 64
    # added to logits, natural logarithm, without gradient: ln of how many tokens a key stands for; -inf: not there.
    # A number, or b h m (1 allowed for b and h)
    bias: float | Tensor | None = None
    # b h r n', int32: single keys that a row does not see, though list or "every key" shows them; below 0: none
    without: Tensor | None = None
    near: Near | None = None  # what else must hold for a query to see a key: for blocks on a border

    @property
    def row_count(self) -> int:
        """Rows that the lists are for: r."""
        if self.index is not None:
            return self.index.shape[2]
        return 1 if self.without is None else self.without.shape[2]

    @property
    def blocks(self) -> int:
        """Blocks of keys: c."""
        if isinstance(self.columns, Tensor):
            return self.columns.shape[-1] - 1
        return -(-self.k.shape[2] // self.columns)


def readable(x: Tensor) -> bool:
    """Whether looking at numbers neither stops the host for a device nor breaks a compiler's graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not valueless(x)


def check(q: Tensor, parts: Sequence[Part]) -> None:
    """Refuse what does not fit together.

    Raises:
        ValueError: in one sentence
    """
    if q.ndim != 4 or not q.is_floating_point() or 0 in q.shape:
        raise ValueError(f"q is b h n e in floating point, none of them 0, got {told(q)}")
    if not parts:
        raise ValueError("attend needs at least one part of keys, got none")
    for i, part in enumerate(parts):
        check_keys(f"parts[{i}]", q, part, parts[0].v.shape[-1])
        check_lists(f"parts[{i}]", q, part)
        check_bias(f"parts[{i}].bias", q, part)
        if part.near is not None:
            check_near(f"parts[{i}].near", q, part, part.near)


def check_kernel(q: Tensor, parts: Sequence[Part]) -> None:
    """Refuse what the kernels do not take; `check` has passed.

    Raises:
        ValueError: in one sentence
    """
    if not HAS_TRITON and not valueless(q):
        raise ValueError('the kernels need Triton, which is not installed; path="plain" does without')
    if not (q.is_cuda or valueless(q) or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(f'the kernels run on a GPU, got tensors on {q.device}; path="plain" runs anywhere')
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f'the kernels take bf16, fp16 or fp32, got {q.dtype}; path="plain" takes it')
    for width in (q.shape[3], parts[0].v.shape[3]):
        if width > WIDEST:
            raise ValueError(f'the kernels take heads up to {WIDEST} wide, got {width}; path="plain" takes it')
    if q.shape[0] * q.shape[1] > 65535:
        raise ValueError(
            f"the kernels take up to 65535 heads of a batch, got {q.shape[0] * q.shape[1]}; split the batch"
        )
    longest = max(q.shape[2], *(part.k.shape[2] for part in parts))
    if longest * WIDEST >= 2**31:
        raise ValueError(f'the kernels take up to {2**31 // WIDEST - 1} tokens, got {longest}; path="plain" takes it')


def check_keys(name: str, q: Tensor, part: Part, width: int) -> None:
    b, h, _, e = q.shape
    k, v = part.k, part.v
    if k.ndim != 4 or k.shape[:2] != (b, h) or k.shape[3] != e or k.shape[2] < 1:
        raise ValueError(f"{name}.k is b h m e with q's batch, heads and width ({b}, {h}, any, {e}), got {told(k)}")
    if v.shape != (*k.shape[:3], width):
        raise ValueError(f"{name}.v is as k, and as wide as that of the first part ({width}), got {told(v)}")
    for x, letter in ((k, "k"), (v, "v")):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name}.{letter} has q's type and device ({q.dtype}, {q.device}), got {x.dtype}, {x.device}"
            )


def check_lists(name: str, q: Tensor, part: Part) -> None:
    n, m = q.shape[2], part.k.shape[2]
    check_cut(f"{name}.rows", q, part.rows, n)
    check_cut(f"{name}.columns", q, part.columns, m)
    rows = part.rows.shape[-1] - 1 if isinstance(part.rows, Tensor) else -(-n // part.rows)
    for label, x, last in (("index", part.index, part.blocks), ("without", part.without, m)):
        if x is None:
            continue
        check_table(f"{name}.{label}", q, x, 4)
        if x.shape[2] != rows or x.shape[3] < 1:
            raise ValueError(
                f"{name}.{label} has a list of 1 or more for each of {rows} rows of queries, got shape {tuple(x.shape)}"
            )
        if readable(x) and int(x.max()) >= last:
            raise ValueError(f"{name}.{label} counts from 0 to {last - 1}, got {int(x.max())}")


def check_cut(name: str, q: Tensor, cut: int | Tensor, tokens: int) -> None:
    """A number of tokens, or offsets of groups of given lengths."""
    if not isinstance(cut, Tensor):
        if isinstance(cut, bool) or not isinstance(cut, int) or cut < 1:
            raise ValueError(f"{name} is a number of tokens from 1, or offsets, got {cut!r}")
        return
    check_table(name, q, cut, 3)
    if cut.shape[-1] < 2:
        raise ValueError(f"{name} are offsets of 1 or more groups, so 2 or more numbers, got shape {tuple(cut.shape)}")
    if not readable(cut):
        return
    if bool((cut[..., 0] != 0).any() | (cut[..., -1] != tokens).any() | (cut.diff(dim=-1) < 0).any()):
        raise ValueError(f"{name} are offsets that ascend from 0 to {tokens}, got {cut.flatten()[:8].tolist()} ...")


def check_table(name: str, q: Tensor, x: Tensor, axes: int) -> None:
    b, h = q.shape[:2]
    if x.dtype != torch.int32 or x.device != q.device:
        raise ValueError(f"{name} is int32 on {q.device}, got {x.dtype} on {x.device}")
    if x.ndim != axes or x.shape[0] not in (1, b) or x.shape[1] not in (1, h):
        raise ValueError(f"{name} has {axes} axes, the first two {b} (or 1) and {h} (or 1), got shape {tuple(x.shape)}")


def check_bias(name: str, q: Tensor, part: Part) -> None:
    bias, (b, h), m = part.bias, q.shape[:2], part.k.shape[2]
    if isinstance(bias, Tensor):
        if not bias.is_floating_point() or bias.device != q.device or bias.requires_grad:
            raise ValueError(f"{name} is in floating point on {q.device} and takes no gradient, got {told(bias)}")
        if bias.ndim != 3 or bias.shape[0] not in (1, b) or bias.shape[1] not in (1, h) or bias.shape[2] != m:
            raise ValueError(f"{name} is b h m: {b} (or 1), {h} (or 1), {m}; got shape {tuple(bias.shape)}")
    elif bias is not None and (math.isnan(bias) or bias == math.inf):
        raise ValueError(f"{name} is a logarithm, finite or -inf, got {bias}")


def check_near(name: str, q: Tensor, part: Part, near: Near) -> None:
    for label, x, tokens in (("queries", near.queries, q.shape[2]), ("keys", near.keys, part.k.shape[2])):
        if x.dtype != torch.int32 or x.device != q.device or x.ndim != 2 or x.shape[0] != tokens:
            raise ValueError(f"{name}.{label} is {tokens} x axes, int32 on {q.device}, got {told(x)}")
    if not 1 <= near.queries.shape[1] == near.keys.shape[1] <= 3:
        raise ValueError(f"{name} has 1 to 3 axes, as many for queries as for keys, got {told(near.queries)}")
    if near.shape not in ("disc", "box"):
        raise ValueError(f'{name}.shape is "disc" or "box", got {near.shape!r}')
    if near.limit < 0:
        raise ValueError(f"{name}.limit is 0 or more, got {near.limit}")


def told(x: Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)} on {x.device}" + (" with a gradient" if x.requires_grad else "")
