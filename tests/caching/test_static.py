"""Static caches ask no number of a device, and compiled units are compiled once."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from caches import FEW, family, paint, told
from ranks import run_ranks
from torch.overrides import TorchFunctionMode

from edit.caching.first_block_cache import FirstBlockCache
from edit.caching.pab import PAB
from edit.caching.reuse import Reuse
from edit.caching.span_reuse import SpanReuse
from edit.caching.taylorseer import TaylorSeer
from edit.denoiser import Denoiser
from edit.predictions import default_objective
from edit.sampling import Sampler
from edit.solvers import Euler
from edit.unit import core

STATIC: dict[str, Any] = {
    "reuse": Reuse(3),
    "span_reuse": SpanReuse(3),
    "pab": PAB(2, 2, 2, window=(0.0, 1000.0)),
    "taylorseer": TaylorSeer(3, 2, first=2),
    "taylorseer last": TaylorSeer(3, 2, first=2, site="last", axis="logsnr"),
    "taylorseer newton": TaylorSeer(3, 2, first=2, site="span", spare=(1, 0), form="newton"),
}
WAITS = ["item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "equal", "is_nonzero"]
WAITS += ["unique", "masked_select", "numpy", "cpu", "allclose", "__contains__", "argwhere"]


class Waits(TorchFunctionMode):
    """Counts the calls for whose result the host has to wait for the device."""

    def __init__(self):
        super().__init__()
        self.found: Counter = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if (name := getattr(func, "__name__", "")) in WAITS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def waits(denoiser: Denoiser) -> Counter:
    """Of all evaluations of a generation; the sampler's own list of times is made on the CPU, once."""
    mode, forward = Waits(), denoiser.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    denoiser.forward = watched  # type: ignore[method-assign]
    paint(denoiser, 7)
    return mode.found


@pytest.mark.parametrize("cache", STATIC)
@pytest.mark.parametrize("name", FEW)
def test_a_static_cache_makes_no_host_sync(name, cache):
    dense = waits(family(name))  # PixArt asks once in an evaluation whether its text is padded
    assert waits(family(name, cache=replace(STATIC[cache]))) == dense and (name == "pixart" or not dense)


def test_a_dynamic_gate_does_and_is_found():
    assert waits(family("flux", cache=FirstBlockCache()))["item"] == 6, "once in an evaluation, but not the first"


@pytest.mark.parametrize("cache", STATIC)
def test_a_generation_of_tensors_without_numbers_can_be_made(cache):
    """On the meta device every look at a number, `tolist` included, is an error."""
    net = family("flux", cache=replace(STATIC[cache])).to("meta")
    given = told(net).map(lambda v: v.to("meta")), torch.arange(2, device="meta")
    assert Sampler(Euler(7))(net, default_objective(net), *given).device.type == "meta"


def compiled(name: str, cache: str) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()  # of what the process this one was forked from may have compiled
    counters.clear()
    net, graphs = family(name, cache=replace(STATIC[cache])), Counter()
    wanted = paint(net, 9)

    def counting(gm: torch.fx.GraphModule, inputs: Any) -> Callable:
        graphs["made"] += 1
        return gm.forward

    for unit in net.units:
        core(unit).compile(backend=counting)
    seen: list[tuple[int, int]] = []  # graphs, and frames that were looked at
    images = paint(net, 9, watch=lambda step, out: seen.append((graphs["made"], counters["frames"]["total"])))
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    assert seen[0][0] > 0 and set(seen) == {seen[0]}, f"compiled again: graphs and frames after each evaluation {seen}"
    paint(net, 6)  # another number of evaluations, other times
    assert (graphs["made"], counters["frames"]["total"]) == seen[0]


@pytest.mark.skipif(
    torch.__version__ < (2, 14), reason="2.11 compiles some frames again, with the same numbers; 2.14 does not"
)
@pytest.mark.parametrize(
    "name, cache",
    [("dit", "taylorseer")]
    + [pytest.param("dit", cache, marks=pytest.mark.slow) for cache in ("taylorseer last", "span_reuse", "pab")]
    + [pytest.param("flux", cache, marks=pytest.mark.slow) for cache in STATIC],  # seconds of tracing
)
def test_no_step_compiles_a_unit_again(name, cache):
    """Predictions are made outside of compiled regions, so that the extrapolation's factors are no constants in one."""
    run_ranks(compiled, 1, args=(name, cache))  # what has compiled cannot be forked from
