"""Block-sparse attention with coarse levels: one softmax over all that lists of blocks, and dense parts, show.

    o_t = sum_e w_te v_e / sum_e w_te,     w_te = exp(s q_t k_e' + bias_e),     lse_t = ln sum_e w_te

LLSA (arXiv 2512.16615) is a part per level of its pyramid with bias l ln B. PISA of order 0 (arXiv 2602.01077), SVG-EAR
(arXiv 2603.08982) and Video-BLADE (arXiv 2508.10774) are exact blocks and a part of pooled keys with the bias ln n.
CLEAR (arXiv 2412.16112) is a part of whole blocks, and one of border blocks with `near`. Text that is always seen is a
part without a list. Results of calls over disjoint keys can be merged outside, as gradients come through lse, too.

Two paths give the same: Triton kernels (`forward.py`, `backward.py`) on a GPU, and plain PyTorch (`plain.py`).
flex_attention expresses the same and is a test, not a third path: its masks are transposed through a dense table of
rows and columns, the quadratic cost that lists avoid, and have one tile for all kinds of keys; compiled for a GPU it
wants blocks of 128, uncompiled it ignores lists; on a CPU it has no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from edit.kernels.language import HAS_TRITON
from edit.kernels.operator import attend_kernel
from edit.kernels.parts import Near, Part, check, check_kernel
from edit.kernels.plain import attend_plain
from edit.kernels.valueless import counted

__all__ = ["Near", "Part", "attend"]


def attend(
    q: Tensor,
    parts: Sequence[Part],
    scale: float | None = None,
    deterministic: bool = False,
    path: Literal["kernel", "plain"] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of all queries to all that they see; gradients of q, every k and v come through both results.

    Args:
        q: b h n e
        parts: keys and values, with who sees them; a key in two parts counts twice
        scale: s; None: 1 / sqrt(e)
        deterministic: sums of gradients in the same order at each run
        path: None: the kernel where q is on a GPU and there is Triton, else plain PyTorch. A q that is faked stands for
            one on a GPU, so that plans of a run's memory (`edit.measuring.probe`) see what kernels hold

    Returns:
        o b h n f in q's type, and lse b h n in fp32 (fp64 where q is). A query that sees nothing: 0, -inf, no gradients

    Raises:
        ValueError: if shapes, types or numbers do not fit together
    """
    check(q, parts)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if path not in ("kernel", "plain", None):
        raise ValueError(f'path is "kernel", "plain" or None, got {path!r}')
    if path is None:
        path = "kernel" if counted(q) and not q.is_meta or HAS_TRITON and q.is_cuda else "plain"
    if path == "plain":
        kind = "cpu" if q.is_meta else q.device.type  # there is no autocast of meta
        with torch.autocast(kind, enabled=False):  # as kernels do: sums in fp32, whatever is on outside
            return attend_plain(q, parts, scale)
    check_kernel(q, parts)
    return attend_kernel(q, parts, scale, deterministic)
