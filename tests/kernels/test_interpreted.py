"""The kernels, run by Triton's interpreter, against the plain path in fp32: values and all gradients.

The interpreter is slow, and it must be chosen before Triton is imported. So cases run in processes of their own.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from attended import CASES, SMALL, results
from torch import Tensor

from edit.kernels.block_sparse import attend
from edit.kernels.language import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
# sums of some hundred products in fp32, in another order
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def interpreted(names: Sequence[str], folder: Path) -> dict[str, Tensor]:
    file = folder / "found.pt"
    script = Path(__file__).with_name("interpreted.py")
    done = subprocess.run([sys.executable, script, file, ",".join(names)], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return torch.load(file, weights_only=True)


def agree(name: str, found: dict[str, Tensor]) -> None:
    for key, value in results(name, attend, torch.float32).items():
        torch.testing.assert_close(found[f"{name}/{key}"], value, **CLOSE, msg=lambda m, key=key: f"{name} {key}: {m}")


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> dict[str, Tensor]:
    return interpreted(SMALL, tmp_path_factory.mktemp("quick"))


@pytest.mark.parametrize("name", SMALL)
def test_kernels_equal_the_plain_path(name, quick):
    agree(name, quick)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_plain_path_in_all_cases(name, tmp_path):
    agree(name, interpreted([name], tmp_path))
