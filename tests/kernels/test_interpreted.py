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
from edit.kernels.lists import transposed

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
    return interpreted((*SMALL, "raced"), tmp_path_factory.mktemp("quick"))


@pytest.mark.parametrize("name", SMALL)
def test_kernels_equal_the_plain_path(name, quick):
    agree(name, quick)


def test_lists_transposed_by_atomics_hold_the_same_in_any_order(quick):
    starts, rows = transposed(quick["raced/index"], 9)
    assert torch.equal(quick["raced/starts"], starts)
    for a, b, ends in zip(quick["raced/rows"].flatten(0, 1), rows.flatten(0, 1), starts.flatten(0, 1), strict=True):
        for start, end in zip(ends, ends[1:], strict=False):
            assert torch.equal(a[start:end].sort().values, b[start:end])


@pytest.mark.slow
def test_compiled_without_a_break_of_the_graph_it_gives_the_same(tmp_path):
    found = interpreted(["small wide", "compiled"], tmp_path)
    names = {key.partition("/")[2] for key in found}
    assert all(torch.equal(found[f"compiled/{key}"], found[f"small wide/{key}"]) for key in names)


@pytest.mark.slow
def test_torch_finds_nothing_wrong_with_the_operator(tmp_path):
    found = interpreted(["checked"], tmp_path)
    assert len(found) >= 4 and all(found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_plain_path_in_all_cases(name, tmp_path):
    agree(name, interpreted([name], tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", (*SMALL, "wide rows"))
def test_in_fp16_sums_are_as_exact_as_those_of_the_plain_path(name, tmp_path):
    """Weights are rounded to fp16 before the second product, those of the plain path are not: a relative 2^-11 each."""
    found = interpreted([f"{name} in fp16"], tmp_path)
    for key, value in results(name, attend, torch.float16).items():
        ours = found[f"{name} in fp16/{key}"]
        torch.testing.assert_close(ours, value, rtol=4e-3, atol=8e-3, msg=lambda m, key=key: f"{name} {key}: {m}")
