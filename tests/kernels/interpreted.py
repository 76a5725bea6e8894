"""The kernels under Triton's interpreter, which must be chosen before they are imported: run in a process of its own.

    python tests/kernels/interpreted.py FILE case,case,...

Saves o, lse and gradients of each case in fp32, as "case/name".
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from attended import results  # noqa: E402

from edit.kernels.block_sparse import attend  # noqa: E402


def kernel(q, parts, scale):
    return attend(q, parts, scale, path="kernel")


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {name: results(name, kernel, torch.float32) for name in sys.argv[2].split(",")}
    torch.save({f"{name}/{key}": value for name, each in found.items() for key, value in each.items()}, sys.argv[1])
