"""The layer of experts against dense feed-forwards of equal activated and of equal total width.

    python -m benchmarks.experts
    python -m benchmarks.experts --width 256 --tokens 1024 --layouts dense2moe,dit_moe
    python -m benchmarks.experts --device cuda --precision bf16 --tokens 1024,4096,8192,16384,65536

Widths are those of FLUX.1 (3072). `dense2moe` divides its feed-forward of four widths: one width is shared by all
tokens, and of twelve experts of a quarter each token takes two. `dit_moe` has SwiGLU experts of four widths, two of
eight, and two widths shared. `activated` is a dense feed-forward as wide as what a token is computed with, `total` one
as wide as all there is; forward, and forward with backward. They run in turns; ratios are over the experts' time, round
by round, so `activated` below 1 is what routing costs. With bf16 weights are bf16, too. GFLOP and GB are counted
without a device: GB is what operators read and write, each by itself. Target on a GPU: experts at most 1.15 times
`activated` at 8k tokens and more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import arguments, prepare, race, show, write
from edit.measuring.flops import Flops
from edit.measuring.timing import tensors
from edit.moe.experts import Experts, FeedForward, MoE
from edit.moe.routing import Router
from edit.stream import Layout

GELU = partial(F.gelu, approximate="tanh")
# experts, of which a token takes, width of each, shared width (in quarters of a token's width), activation, gated
LAYOUTS = {"dense2moe": (12, 2, 1, 4, GELU, False), "dit_moe": (8, 2, 16, 8, F.silu, True)}
LAYOUT = Layout((1, 1, 1))


def models(layout: str, width: int) -> dict[str, nn.Module]:
    """The layer of experts, and dense ones of its activated and its total width."""
    count, k, each, shared, act, gated = LAYOUTS[layout]
    quarter = width // 4
    experts = Experts(count, width, each * quarter, act, gated)
    always = FeedForward(width, shared * quarter, act, gated)
    dense = {"activated": shared + k * each, "total": shared + count * each}
    moe = MoE("moe", Router(width, count), experts, always, k)
    return {"experts": moe} | {n: FeedForward(width, h * quarter, act, gated) for n, h in dense.items()}


def forward(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, LAYOUT) if isinstance(model, MoE) else model(x)


def both(model: nn.Module, x: Tensor) -> None:
    for p in (x, *model.parameters()):
        p.grad = None
    y = forward(model, x)
    y.backward(torch.ones_like(y))


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            self.bytes += sum(t.numel() * t.element_size() for t in tensors((args, kwargs, out)))
        return out


def counted(layout: str, width: int, tokens: int, dtype: torch.dtype, step: Callable) -> dict[str, dict[str, float]]:
    """Billions of floating-point operations and of bytes of each model, without a device."""
    found = {}
    with torch.device("meta"):
        known = models(layout, width)
        x = torch.empty(1, tokens, width, dtype=dtype, requires_grad=step is both)
    for name, model in known.items():
        model.to(dtype)
        with Flops() as flops, Traffic() as traffic:
            step(model, x)
        found[name] = {"gflop": flops.total / 1e9, "gb": traffic.bytes / 1e9}
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--layouts", default="dense2moe", help="of dense2moe, dit_moe (dense2moe)")
    parser.add_argument("--width", type=int, default=3072, help="of a token, a multiple of 4 (3072)")
    parser.add_argument("--tokens", default="1024,4096", help="(1024,4096)")
    parser.add_argument("--passes", default="forward,both", help="of forward, both (both)")
    args = parser.parse_args()
    if unknown := set(args.layouts.split(",")) - set(LAYOUTS):
        parser.error(f"--layouts are {', '.join(LAYOUTS)}, got {', '.join(sorted(unknown))}")
    if args.width < 4 or args.width % 4:
        parser.error(f"--width must be a positive multiple of 4, got {args.width}")
    device, rows = prepare(args), []
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    for layout in args.layouts.split(","):
        torch.manual_seed(0)
        with device:
            known = models(layout, args.width)
        for model in known.values():
            model.to(dtype)
            if args.compile:
                model.compile()
        for tokens in map(int, args.tokens.split(",")):
            tokens_in = torch.randn(1, tokens, args.width, device=device, dtype=dtype)
            for name in args.passes.split(","):
                step: Callable[..., Any] = both if name == "both" else torch.no_grad()(forward)
                x = tokens_in.clone().requires_grad_(name == "both")
                runs = {n: partial(step, model, x) for n, model in known.items()}
                seconds, ratios = race(runs, device, args.rounds, args.warmup)
                row = show(f"{layout} {args.width} {tokens} {name}", seconds, ratios)
                work, over = counted(layout, args.width, tokens, dtype, step), 1 / ratios["activated"].median
                said = "  ".join(f"{n} {w['gflop']:.1f} GFLOP {w['gb']:.2f} GB" for n, w in work.items())
                print(f"{'':28s} experts / activated {over:.3f}  |  {said}", flush=True)
                rows.append(row | {"counted": work, "over_activated": over})
                write(args, device, rows)


if __name__ == "__main__":
    main()
