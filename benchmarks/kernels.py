"""Kernels of block-sparse attention without a GPU: compiled for one, with work, traffic and the roofline of each launch.

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
from edit.kernels.parts import Near, Part
from edit.kernels.plans import Plan

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
        return {kind: len(re.findall(rf"\b{kind}\.", self.ptx)) for kind in ("mma.sync", "wgmma.mma_async", "tcgen05.mma")}

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
        signature[name] = POINTERS[value.dtype] if isinstance(value, Tensor) else {int: "i32", float: "fp32"}[type(value)]
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
        made = {"dk": plan.k, "dv": plan.v} if grid[1] == 1 else {"dk": summed, "dv": wide}
        yield f"keys {i}", key_kernel, grid, {**arguments, **seen, **made}
