"""Every launch that is shipped, compiled for three chips of which none is here."""

import re

import pytest

from benchmarks.kernels import SHAPES, SHARED, Compiled, compiled, launches
from edit.kernels.language import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
REGISTERS = {True: 176, False: 255}  # of a thread; narrow tiles, of which many share a processor, and wide ones
CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# each kind of part; other shapes have the same launches
KINDS = ("llsa_16k", "llsa_16k_64", "pisa_32k", "pisa_16", "svg_ear_75k", "blade_32k", "clear_16k")


def fits(done: Compiled, arguments: dict, target: int) -> None:
    assert done.spilled == 0, f"{done.spilled} bytes of registers spilled"
    assert done.shared <= SHARED[target], f"{done.shared} bytes of shared memory"
    assert done.registers <= REGISTERS[arguments["NARROW"]], f"{done.registers} registers"
    assert done.resident(target) >= 8
    # sums are in the same order at each run, as long as lists are
    assert not re.search(r"\b(atom|red)\.", done.ptx), "atomic additions"
    cores = done.tensor_cores()
    # the new instructions want 64 rows: a step of fewer tokens, or a sum [width, T] with a width below 64, has not
    few = arguments["NARROW"] and arguments["S"] < 64
    some_few = few or arguments["NARROW"] and min(arguments["EP"], arguments["FP"]) < 64
    assert cores["mma.sync" if few else CORES[target]] > 0
    if target > 80 and not some_few:
        assert cores["mma.sync"] == 0


# by default one chip, that of the targets of speed: each compiles for 3 to 5 s
@pytest.mark.parametrize(
    "target", [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
)
def test_one_launch_of_each_kernel_keeps_within_a_chip(target):
    done = set()
    for _, kernel, _, arguments in launches(*SHAPES["llsa_16k"](64)):
        if kernel not in done:
            fits(compiled(kernel, arguments, target), arguments, target)
            done.add(kernel)
    assert len(done) == 3


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize(
    ("shape", "width"), [(s, w) for s in KINDS for w in (64, 128)] + [("llsa_16k", w) for w in (32, 72, 96)]
)
def test_every_launch_keeps_within_a_chip(shape, width, target):
    for name, kernel, _, arguments in launches(*SHAPES[shape](width)):
        try:
            fits(compiled(kernel, arguments, target), arguments, target)
        except AssertionError as broken:
            raise AssertionError(f"{name}: {broken}") from broken
