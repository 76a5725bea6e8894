"""The kernels under Triton's interpreter, which must be chosen before they are imported: run in a process of its own.

    python tests/kernels/interpreted.py FILE case,case,...

Saves o, lse and gradients of each case in fp32, or of "case in fp16", as "case/name". "raced", "compiled" and "checked"
are no cases.
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from attended import case, lists, moved, results  # noqa: E402
from torch import Tensor  # noqa: E402

from edit.kernels.block_sparse import attend  # noqa: E402
from edit.kernels.lists import raced  # noqa: E402
from edit.kernels.operator import flat  # noqa: E402


def kernel(q, parts, scale):
    return attend(q, parts, scale, path="kernel")


def by_atomics() -> dict[str, Tensor]:
    index = lists(2, 2, 40, 3, 9)
    starts, rows = raced(index, 9)
    return {"index": index, "starts": starts, "rows": rows}


def compiled() -> dict[str, Tensor]:
    """Without a break of the graph."""
    return results("small wide", torch.compile(kernel, fullgraph=True, backend="aot_eager"), torch.float32)


def checked() -> dict[str, Tensor]:
    """What torch asks of an operator: schema, gradients, shapes without values, tracing of both."""
    q, parts = case("small clusters")
    q, parts = q.float().requires_grad_(), [moved(part, torch.float32) for part in parts]
    found = torch.library.opcheck(torch.ops.edit.block_sparse.default, (q, *flat(parts), 0.3, True))
    return {key: torch.tensor(value == "SUCCESS") for key, value in found.items()}


HALF = " in fp16"  # with the tiles of half precisions; bf16 is wrong under the interpreter
OTHERS = {"raced": by_atomics, "compiled": compiled, "checked": checked}

if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {}
    for name in sys.argv[2].split(","):
        dtype = torch.float16 if name.endswith(HALF) else torch.float32
        each = OTHERS[name]() if name in OTHERS else results(name.removesuffix(HALF), kernel, dtype)
        found |= {f"{name}/{key}": value for key, value in each.items()}
    torch.save(found, sys.argv[1])
