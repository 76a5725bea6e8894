"""Static policies as graphs: the few kinds of evaluations, recorded once, make the same images.

No GPU is needed: `Tape` runs recorded operators again on tensors at fixed places, as a CUDA graph does its kernels.
What a recording holds besides contents of tensors (a factor as a Python float, a branch that was taken) would make
another image. That CUDA captures what a tape records is measured by `python -m benchmarks.gpu entries=graphs` on a GPU.
"""

from dataclasses import replace

import pytest
import torch
from caches import family, paint, sampler, told
from torch.utils._python_dispatch import TorchDispatchMode

from edit.caching.cg_taylor import CGTaylor
from edit.caching.delta_dit import DeltaDiT
from edit.caching.dmd import DMD
from edit.caching.duca import DuCa
from edit.caching.first_block_cache import FirstBlockCache
from edit.caching.foca import FoCa
from edit.caching.graphs import Graphed, kind_of
from edit.caching.pab import PAB
from edit.caching.recorders import Tape
from edit.caching.reuse import Reuse
from edit.caching.span_reuse import SpanReuse
from edit.caching.taylorseer import TaylorSeer
from edit.caching.toca import ToCa
from edit.predictions import default_objective
from edit.routing.dydit import DyDiT
from edit.solvers import Heun
from edit.stream import Step, unpack

STATIC = {
    "module": TaylorSeer(3, 2, first=3),
    "module newton": TaylorSeer(3, 2, first=3, form="newton", axis="logsnr"),
    "last": TaylorSeer(3, 1, first=2, site="last", axis="t"),
    "span": TaylorSeer(3, 2, first=3, site="span", spare=(1, 0)),
    "order 0": TaylorSeer(3, 0, first=1),
    "reuse": Reuse(3),
    "span reuse": SpanReuse(3, front=0),
    "fnbn": SpanReuse(3, front=1),
    "pab": PAB(2, 2, 3, window=(0.0, 900.0)),
    "delta": DeltaDiT(1, interval=3),
}
FAMILIES = ["dit", pytest.param("flux", marks=pytest.mark.slow), pytest.param("sd3 dual", marks=pytest.mark.slow)]
STEPS = 12


def made(name: str, cache: str):
    return family(name, cache=replace(STATIC[cache])) if cache else family(name)


@pytest.mark.parametrize("cache", ["", *STATIC])
@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_kinds_make_the_images_bit_for_bit_and_again_in_the_next_generation(name, cache):
    wanted, net = paint(made(name, cache), STEPS), Graphed(made(name, cache))
    assert torch.equal(paint(net, STEPS), wanted)
    kinds = dict(net.kinds)
    assert torch.equal(paint(net, STEPS), wanted)
    assert net.kinds.keys() == kinds.keys(), "the next generation has no kinds of its own"
    recorded = [k for k in net.kinds.values() if k is not None]
    assert len(recorded) == len(net.kinds) <= 6


@pytest.mark.parametrize("cache", [DMD(3), FoCa(3)])
def test_predictors_that_count_on_the_host_have_a_kind_for_each_evaluation(cache):
    wanted, net = paint(family("dit", cache=replace(cache)), 10), Graphed(family("dit", cache=replace(cache)))
    for _ in range(3):  # runs, is recorded, is run again
        assert torch.equal(paint(net, 10), wanted)
    assert len(net.kinds) >= 9  # the first of a generation always runs


@pytest.mark.parametrize("cache", ["module", "last", "reuse"])
def test_an_evaluation_that_is_run_again_runs_nothing_of_the_model(cache, monkeypatch):
    net = Graphed(made("dit", cache))
    for _ in range(2):
        paint(net, STEPS)
    calls = []
    net.denoiser.register_forward_pre_hook(lambda m, a: calls.append(1))
    paint(net, STEPS)
    assert len(calls) == 1, "the first of the generation alone"


@pytest.mark.parametrize("options", [{"interval": (0.3, 0.8)}, {"guidance": 1.0}])
@pytest.mark.parametrize("cache", ["module", "span"])
def test_guidance_that_begins_and_ends_is_followed(cache, options):
    wanted, net = paint(made("dit", cache), STEPS, **options), Graphed(made("dit", cache))
    for _ in range(2):
        assert torch.equal(paint(net, STEPS, **options), wanted)


@pytest.mark.parametrize("axis", ["step", "t"])
def test_a_solver_that_comes_to_a_time_twice_is_followed(axis):
    def painted(net):
        given = default_objective(net), told(net), torch.arange(2)
        return replace(sampler(net, 1), solver=Heun(6))(net, *given)

    cache = TaylorSeer(2, 2, first=3, axis=axis, site="last")
    wanted, net = painted(family("dit", cache=replace(cache))), Graphed(family("dit", cache=replace(cache)))
    assert wanted.isfinite().all()
    for _ in range(2):
        assert torch.equal(painted(net), wanted)


# ---- the property that graphs stand on -------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """Operators, and all their arguments that are no tensors."""

    def __init__(self):
        super().__init__()
        self.calls: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def shown(v):
            if isinstance(v, torch.Tensor):
                return tuple(v.shape), v.dtype
            if isinstance(v, list | tuple):
                return [shown(w) for w in v]
            return v

        self.calls.append((str(func), shown(args), sorted((k, shown(v)) for k, v in (kwargs or {}).items())))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cache", STATIC)
def test_evaluations_of_one_kind_differ_in_the_contents_of_tensors_alone(cache):
    net, forward, seen = made("dit", cache), {}, []

    class Watched(Graphed):
        def __call__(self, x, t, condition, step=None, taps=()):
            with torch.inference_mode(), Seen() as mode:
                out = self.denoiser(x, t, condition, step=step, taps=taps)
            kind = kind_of(self.denoiser, step), step.index < 6  # until then degrees build up
            seen.append(kind)
            if not kind[-1]:
                assert forward.setdefault(kind, mode.calls) == mode.calls
            return out

    paint(Watched(net), 18)
    assert len(forward) >= 2 and len(seen) == 18


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edits",
    [{"c": e} for e in (FirstBlockCache(), CGTaylor(reduction="per_sample"), DyDiT(), ToCa(), DuCa(by="norm"))],
)
def test_what_decides_by_numbers_is_refused(edits):
    with pytest.raises(ValueError, match="c .* decides by numbers that only a run knows"):
        Graphed(family("dit", **edits))


def test_values_that_change_places_are_not_overwritten_on_the_way():
    net, step = Graphed(made("dit", "reuse")), Step(0, 4, 0.5, memory={})
    step.recall("cache", 0)["v"] = [torch.tensor(1.0), torch.tensor(2.0)]
    first, second = unpack(net._settle(step))["cache", 0, step.branch]["v"]
    step.recall("cache", 0)["v"] = [second, first]
    net._settle(step)
    assert (first.item(), second.item()) == (2.0, 1.0)


def test_two_generations_at_once_are_refused():
    net = Graphed(made("dit", "reuse"))
    given = default_objective(net), told(net), torch.arange(2)
    first, second = (sampler(net, 4).walk(net, *given) for _ in range(2))
    for walk in (first, second):
        walk.moment.give(walk.moment.ask())
    with pytest.raises(ValueError, match="another began: finish one first"):
        first.moment.ask()


def test_a_tape_runs_again_on_new_contents_and_refuses_what_a_graph_cannot_hold():
    x, kept = torch.ones(2), torch.zeros(2)

    def run():
        y = x.view(2, 1).expand(2, 2).sum(1)
        kept.add_(y)
        return y

    tape = Tape(run, [kept])
    assert kept.tolist() == [0, 0]
    x.fill_(3)
    tape.replay()
    assert tape.result.tolist() == [6, 6] and kept.tolist() == [6, 6]
    for refused in (lambda: x.sum().item(), lambda: torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match="what host and device tell each other"):
            Tape(refused, [])
