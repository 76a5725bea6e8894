"""Attention over long sequences: LLSA on our block-sparse kernels against SDPA (flash attention) and flex_attention.

    python -m benchmarks.attention --device cuda --precision bf16 --tokens 4096,16384,65536,131072
    python -m benchmarks.attention --tokens 1024,4096 --block 4

Random queries, keys and values of unit variance, batch 1 and 6 heads of width 64 unless told. `ours` is all that LLSA
does in an attention: pooling, selection, block-sparse attention, with K blocks a level and the published levels.
`attend` is the last of these alone, with lists that are there. `sdpa` is dense: flash attention on a GPU. `flex` is the
attention step of LLSA as one compiled call of flex_attention: its lists of blocks are made before, as they cost N^2 of
memory there, and only up to 16,384 tokens. Forward, and forward with backward (`training`; flex needs a GPU for it).
`keys` is how many keys a query sees. On a CPU `ours` is the plain path, which gathers keys: it shows that all of it
runs, and no speed. All in turns; a ratio is a rival's time over ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.common import arguments, prepare, race, show, write
from edit.attention.llsa import LLSA, seen_by_images
from edit.attention.pyramid import pyramid, select
from edit.kernels.block_sparse import attend

FLEX_TOKENS = 16_384  # making a BlockMask takes a dense table of all pairs of blocks

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def ours(edit: LLSA, levels: int) -> Attention:
    return lambda q, k, v: attend(q, seen_by_images(q, k, v, edit, levels))[0]


def by_flex(edit: LLSA, levels: int, q: Tensor, k: Tensor) -> Attention:
    """The same attention in one compiled call over the keys of all levels, with the lists of these queries and keys."""
    block, count = edit.block, q.shape[2]
    index = select(pyramid(q, block, levels), pyramid(k, block, levels), block, edit.top_k)
    rows = count // block
    shown, first = [], 0
    for level in range(levels):  # whole blocks of `level`, whose tokens begin at `first`
        shown.append(index[level].repeat_interleave(block**level, 2) + first)
        first += count // block ** (level + 1)
    top = torch.arange(count // block ** (levels + 1), device=q.device, dtype=torch.int32) + first
    shown.append(top.expand(*q.shape[:2], rows, -1))
    lists = torch.cat(shown, -1).sort(-1).values.int()
    blocks = first + len(top)
    padded = F.pad(lists, (0, blocks - lists.shape[-1])).contiguous()
    counts = lists.new_full(lists.shape[:-1], lists.shape[-1])
    starts = torch.tensor([sum(count // block**below for below in range(level)) for level in range(levels + 1)])
    starts = starts.to(q.device)
    empty = torch.zeros_like(counts)
    mask = BlockMask.from_kv_blocks(empty, torch.zeros_like(padded), counts, padded, BLOCK_SIZE=(block, block))
    weight = math.log(block)

    def bias(score, b, h, t, j):
        level = sum((j >= starts[i]).to(score.dtype) for i in range(1, levels + 1))
        return score + level * weight

    compiled = torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = torch.cat((k, *(x.to(k.dtype) for x in pyramid(k, block, levels))), 2)
        values = torch.cat((v, *(x.to(v.dtype) for x in pyramid(v, block, levels))), 2)
        o = compiled(q, keys, values, score_mod=bias, block_mask=mask)
        assert isinstance(o, Tensor)
        return o

    return run


def forward(run: Attention, q: Tensor, k: Tensor, v: Tensor) -> None:
    with torch.no_grad():  # flex_attention on a CPU refuses tensors that want a gradient, even here
        run(q.detach(), k.detach(), v.detach())


def training(run: Attention, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> None:
    torch.autograd.grad(run(q, k, v), (q, k, v), gradient)


def measure(args: Any, device: torch.device, count: int) -> list[dict[str, Any]]:
    """The rows of one number of tokens: forward, then training."""
    edit = LLSA(block=args.block, top_k=args.top_k, levels=args.levels, dense_below=0)
    levels = edit.depth(count)
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    shape = (args.batch, args.heads, count, args.width)
    q, k, v, gradient = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    with torch.no_grad():
        parts = seen_by_images(q, k, v, edit, levels)
    lists: Attention = lambda q, k, v: attend(q, parts)[0]  # noqa: E731 - one line beside the others
    runs: dict[str, Attention] = {"ours": ours(edit, levels), "attend": lists, "sdpa": dense}
    if args.flex and count <= FLEX_TOKENS and count % args.block ** (levels + 1) == 0:
        with torch.no_grad():
            runs["flex"] = by_flex(edit, levels, q, k)
            plain = [x.detach() for x in (q, k, v)]
            error = float((runs["flex"](*plain) - runs["ours"](*plain)).abs().max())
        if error > (3e-2 if dtype == torch.bfloat16 else 1e-4):
            raise ValueError(f"flex_attention differs from ours by {error:.1e} at {count} tokens: nothing was timed")
    rows = []
    for kind, run in (("forward", forward), ("training", partial(training, gradient=gradient))):
        raced = {n: f for n, f in runs.items() if kind == "forward" or (n != "attend" and (n != "flex" or q.is_cuda))}
        seconds, ratios = race(
            {n: partial(run, f, q, k, v) for n, f in raced.items()}, device, args.rounds, args.warmup
        )
        row = show(f"{kind} {count} L={levels}", seconds, ratios)
        rows.append(row | {"keys": edit.keys_per_query(count), "batch": args.batch, "heads": args.heads})
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", default="1024,4096", help="numbers of tokens (1024,4096)")
    parser.add_argument("--heads", type=int, default=6, help="heads (6)")
    parser.add_argument("--width", type=int, default=64, help="of a head (64)")
    parser.add_argument("--block", type=int, default=16, help="B (16)")
    parser.add_argument("--top_k", type=int, default=8, help="K (8)")
    parser.add_argument("--levels", type=int, help="L (as published for the number of tokens)")
    parser.add_argument("--flex", action="store_true", help="flex_attention, too; it is compiled first")
    parser.set_defaults(batch=1, rounds=5, warmup=1)
    args = parser.parse_args()
    device, rows = prepare(args), []
    for count in (int(text) for text in args.tokens.split(",")):
        rows += measure(args, device, count)
        write(args, device, rows)


if __name__ == "__main__":
    main()
