"""Kernels of block-sparse attention without a GPU: compiled for one, with work, traffic and roofline of each launch.

    python -m benchmarks.kernels                          # for sm_90, LLSA at 16k and 65k tokens
    python -m benchmarks.kernels --shapes llsa_131k,pisa --target 100

Each launch of a call's forward and backward is a row: tiles (own tokens x tokens of a step), FLOPs, bytes that programs
ask for (L2) and that must come from memory at least once, FLOPs over the latter, the time that an H200 needs at least,
and from the compiled result registers of a thread, bytes spilled, shared memory of a program and how many of a
processor's 64 warps are there. Nothing here is measured: times are bounds, and no GPU has run these kernels.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edit.kernels.backward import key_kernel, query_kernel
from edit.kernels.forward import forward_kernel
from edit.kernels.operator import part_pairs
from edit.kernels.parts import Near, Part
from edit.kernels.plans import Plan

Case = tuple[Tensor, list[Part]]
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
MEMORY, CACHE, FLOPS = 4.3e12, 5.5e12, 790e12  # of an H200, a second: bytes, bytes from L2 (an estimate), bf16
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program may have
PROCESSOR = {"registers": 65536, "warps": 64, "shared": {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}}


@dataclass(frozen=True)
class Compiled:
    registers: int
    spilled: int  # bytes of a thread's stack
    shared: int
    warps: int
    ptx: str

    def tensor_cores(self) -> dict[str, int]:
        """Instructions of the tensor cores, by kind."""
        return {
            kind: len(re.findall(rf"\b{kind}\.", self.ptx)) for kind in ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
        }

    def resident(self, target: int) -> int:
        """Warps of a processor that registers and shared memory leave room for."""
        by_registers = PROCESSOR["registers"] // (-(-self.registers // 8) * 8 * 32 * self.warps)
        by_shared = PROCESSOR["shared"][target] // (self.shared + 1024)
        return min(by_registers, by_shared, PROCESSOR["warps"] // self.warps) * self.warps


def compiled(kernel: Any, arguments: Mapping[str, Any], target: int) -> Compiled:
    """A kernel compiled for a chip that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if name in constexprs or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        signature[name] = (
            POINTERS[value.dtype] if isinstance(value, Tensor) else {int: "i32", float: "fp32"}[type(value)]
        )
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {key: value for key, value in arguments.items() if key.startswith("num_")}
    source = ASTSource(kernel, signature, constants, attributes)
    done = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    spilled = numbers["STACK"] + numbers["LOCAL"]
    return Compiled(numbers["REG"], spilled, done.metadata.shared, options["num_warps"], done.asm["ptx"])


def launches(q: Tensor, parts: list[Part], scale: float = 0.125) -> Iterator[tuple[str, Any, tuple, dict[str, Any]]]:
    """Name, kernel, grid and arguments of every launch of forward and backward; tensors may be without values."""
    plans = [Plan(q, part, scale) for part in parts]
    b, h, n, e = q.shape
    f = plans[0].f
    lse = q.new_empty(b, h, n, dtype=torch.float32)
    wide, out = q.new_empty(b, h, n, f, dtype=torch.float32), q.new_empty(b, h, n, f)
    summed = q.new_empty(b, h, n, e, dtype=torch.float32)
    last = len(plans) - 1
    for i, plan in enumerate(plans):
        before = {"o_before": wide if i else None, "lse_before": lse if i else None}
        grid, arguments = plan.queries(q)
        given = {"q": q, **before, "o": out if i == last else wide, "lse": lse}
        yield f"forward {i}", forward_kernel, grid, {**arguments, **given}
    seen = {"q": q, "lse": lse, "do": out, "delta": lse, "factor": scale}
    for i, plan in enumerate(plans):
        grid, arguments = plan.queries(q, backward=True)
        sums = {"dq_before": summed if i else None, "dq": q if i == last else summed}
        yield f"queries {i}", query_kernel, grid, {**arguments, **seen, "o": out, "dlse": lse, **sums}
    for i, plan in enumerate(plans):
        grid, arguments = plan.keys(q)
        dtype = plan.k.dtype if grid[1] == 1 else torch.float32  # chunks are summed afterwards
        made = {f"d{s}": x.new_empty(grid[1], *x.shape, dtype=dtype) for s, x in (("k", plan.k), ("v", plan.v))}
        yield f"keys {i}", key_kernel, grid, {**arguments, **seen, **made}


@dataclass(frozen=True)
class Work:
    flops: int
    cache: int  # bytes that programs read and write, mostly from L2
    memory: int  # bytes, each tensor once

    def bound(self) -> float:
        """Seconds at least: by tensor cores or by memory."""
        return max(self.flops / FLOPS, self.memory / MEMORY)


PRODUCTS = {"forward": (1, 1), "queries": (2, 1), "keys": (2, 2)}  # that many of the width of keys and of values


def work(name: str, part: Part, q: Tensor, arguments: Mapping[str, Any]) -> Work:
    """Of one launch, from shapes."""
    of_keys, of_values = PRODUCTS[name.split()[0]]
    e, f = q.shape[3], part.v.shape[3]
    seen = part_pairs(q, part)
    group = arguments["COLUMN" if name.startswith("keys") else "ROW"]
    own = min(arguments["T"], group) if group > 1 else arguments["T"]
    tensors = {key: x for key, x in arguments.items() if isinstance(x, Tensor)}
    memory = sum(x.numel() * x.element_size() for x in tensors.values())
    return Work(2 * seen * (of_keys * e + of_values * f), seen // own * (e + f) * q.element_size() + memory, memory)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def numbers(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int32)


def llsa(n: int, e: int = 64, levels: int = 2, block: int = 16, k: int = 8, h: int = 6, text: int = 0) -> Case:
    """A pyramid of `levels`; `text` tokens that are always seen."""
    parts = [Part(*[empty(1, h, n, e)] * 2, numbers(1, h, n // block, k), block, block)]
    for level in range(1, levels):
        index, rows = numbers(1, h, n // block ** (level + 1), k), block ** (level + 1)
        parts.append(Part(*[empty(1, h, n // block**level, e)] * 2, index, rows, block, bias=1.0))
    parts.append(Part(*[empty(1, h, n // block**levels, e)] * 2, bias=1.0))
    return empty(1, h, n, e), parts + ([Part(*[empty(1, h, text, e)] * 2)] if text else [])


def pisa(n: int, e: int = 64, block: int = 64, density: float = 0.125, h: int = 6) -> Case:
    """Exact blocks, and the means of the others."""
    index = numbers(1, h, n // block, int(density * n / block))
    means = Part(*[empty(1, h, n // block, e)] * 2, rows=block, without=index, bias=1.0)
    return empty(1, h, n, e), [Part(*[empty(1, h, n, e)] * 2, index, block, block), means]


def clusters(n: int, e: int = 64, rows: int = 300, columns: int = 1000, k: int = 200, h: int = 6) -> Case:
    """SVG-EAR: groups of given lengths, and the means of the others."""
    index, cut = numbers(1, h, rows, k), numbers(1, h, rows + 1)
    bias = empty(1, h, columns, dtype=torch.float32)
    means = Part(*[empty(1, h, columns, e)] * 2, rows=cut, without=index, bias=bias)
    return empty(1, h, n, e), [Part(*[empty(1, h, n, e)] * 2, index, cut, numbers(1, h, columns + 1)), means]


def blade(n: int, e: int = 64, k: int = 48, pooled: int = 32, h: int = 6) -> Case:
    """Blocks of 128, and means of 32 tokens."""
    exact = Part(*[empty(1, h, n, e)] * 2, numbers(1, h, n // 128, k), 128, 128)
    return empty(1, h, n, e), [exact, Part(*[empty(1, h, n // pooled, e)] * 2, bias=1.0)]


def clear(n: int, e: int = 64, k: int = 9, border: int = 16, h: int = 6) -> Case:
    """Whole blocks inside a disc, and those on its border; text is always seen."""
    key, near = empty(1, h, n, e), Near(numbers(n, 2), numbers(n, 2), 255)
    whole, part = (numbers(1, 1, n // 64, x) for x in (k, border))
    parts = [Part(key, key, whole), Part(key, key, part, near=near), Part(*[empty(1, h, 512, e)] * 2)]
    return empty(1, h, n, e), parts


SHAPES: dict[str, Callable[[int], Case]] = {  # by head width
    "llsa_16k": lambda e: llsa(2**14, e),
    "llsa_65k": lambda e: llsa(2**16, e),
    "llsa_131k": lambda e: llsa(2**17, e),
    "llsa_262k": lambda e: llsa(2**18, e, levels=3),
    "llsa_16k_64": lambda e: llsa(2**14, e, levels=1, block=64),
    "llsa_joint": lambda e: llsa(2**14, e, text=512),
    "pisa_32k": lambda e: pisa(2**15, e),
    "pisa_16": lambda e: pisa(2**14, e, block=16, density=0.03),
    "svg_ear_75k": lambda e: clusters(75_600, e),
    "blade_32k": lambda e: blade(2**15, e),
    "clear_16k": lambda e: clear(2**14, e),
}


def row(
    name: str, part: Part, q: Tensor, grid: tuple, arguments: Mapping[str, Any], done: Compiled, target: int
) -> str:
    w = work(name, part, q, arguments)
    cores = ", ".join(kind for kind, count in done.tensor_cores().items() if count)
    return " | ".join((
        "",
        f"{name:9}", "x".join(map(str, grid)), f"{arguments['T']}x{arguments['S']}", f"{w.flops / 1e9:.1f}",
        f"{w.cache / 1e6:.0f}", f"{w.memory / 1e6:.0f}", f"{w.flops / w.memory:.0f}", f"{1e6 * w.bound():.0f}",
        f"{1e6 * w.cache / CACHE:.0f}", str(done.registers), str(done.spilled), f"{done.shared / 1024:.0f}",
        f"{done.resident(target)}/64", cores, "",
    )).strip()  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llsa_16k,llsa_65k", help="of " + ", ".join(SHAPES))
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--target", type=int, default=90, choices=tuple(SHARED))
    options = parser.parse_args()
    unknown = set(options.shapes.split(",")) - set(SHAPES)
    if unknown:
        parser.error(f"--shapes are of {', '.join(SHAPES)}; got {', '.join(sorted(unknown))}")
    print(f"bf16, batch 1, 6 heads of {options.width}, compiled for sm_{options.target}.")
    print("Nothing is measured: no GPU has run these kernels.")
    print("us: at least, by 790 TFLOP/s and 4.3 TB/s; L2 us: at an estimated 5.5 TB/s.")
    for shape in options.shapes.split(","):
        q, parts = SHAPES[shape](options.width)
        print(f"\n{shape}\n")
        print(
            "| launch | grid | tile | GFLOP | L2 MB | MB | FLOP/B | us | L2 us | regs | spilled | KB | warps | cores |"
        )
        print("|---" * 14 + "|")
        least = {"forward": 0.0, "all": 0.0}
        for name, kernel, grid, arguments in launches(q, parts):
            part = parts[int(name.split()[1])]
            print(row(name, part, q, grid, arguments, compiled(kernel, arguments, options.target), options.target))
            w = work(name, part, q, arguments)
            slowest = max(w.bound(), w.cache / CACHE)
            least = {"forward": least["forward"] + slowest * name.startswith("forward"), "all": least["all"] + slowest}
        dense = 4 * q.shape[1] * q.shape[2] ** 2 * options.width / FLOPS
        for what, once in (("forward", dense), ("all", 3.5 * dense)):
            print(f"{what}: at least {1e6 * least[what]:.0f} us; dense attention at 790 TFLOP/s {1e6 * once:.0f} us")


if __name__ == "__main__":
    main()
