"""Delta-DiT: whose turn it is, and what is repeated. `test_engine` has what all caches have in common."""

from collections import Counter

import pytest
import torch
from caches import executed, family, paint

import edit
from edit.caching.delta_dit import DeltaDiT
from edit.caching.reuse import Reuse
from edit.stream import Step
from edit.unit import core


def test_the_interval_begins_anew_where_the_front_takes_turns():
    def computed(**settings):
        cache = DeltaDiT(1, **settings)
        return [i for i in range(9) if cache.due(Step(i, 9, 0.5))]

    assert computed(interval=3) == [0, 3, 5, 8]  # the front's turn begins at 5 of 9
    assert computed(interval=2, switch=0.0) == computed(interval=2, switch=1.0) == [0, 2, 4, 6, 8]
    assert computed(interval=1) == list(range(9))


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("name", ["flux"])
def test_rear_units_rest_early_and_front_units_late_and_the_others_always_run(name, blocks):
    """Ranges of three of four units overlap."""
    net, calls = family(name, cache=DeltaDiT(blocks, interval=4)), []
    for i, unit in enumerate(map(core, net.units)):
        unit.register_forward_pre_hook(lambda m, a, i=i: calls[-1].append(i))
    calls.append([])
    paint(net, 8, lambda step, out: calls.append([]))
    depth, every = len(net.units), list(range(len(net.units)))
    early, late = every[: depth - blocks], every[blocks:]
    assert calls[:-1] == [every, early, early, early, every, late, late, late]


def test_what_is_executed_is_told_of_the_same_units_at_every_evaluation():
    rows = executed(family("flux", cache=DeltaDiT(3, interval=2)), 4, "cache")["joint"]
    assert rows == [[1.0] * 4, [1.0, 0.0, 0.0, 0.0], [1.0] * 4, [0.0, 0.0, 0.0, 1.0]]


@torch.no_grad()
def test_the_deviation_is_repeated_and_not_the_output(make_dit):
    """Two evaluations of other tokens at the same time: behind the rear they differ by what they differ in front."""
    net, seen = edit.apply(make_dit(), {"cache": DeltaDiT(2)}), []
    first, last = net.units[1], net.units[2]

    def entering(stream):
        seen.append(stream.image)
        return first(stream)

    def leaving(stream):
        out = last(stream)
        seen.append(out.image)
        return out

    net.units[1], net.units[2] = entering, leaving
    memory: dict = {}
    for index in range(2):
        x = torch.randn(2, *net.sample_shape, generator=torch.Generator().manual_seed(index))
        net(x, torch.full((2,), 0.5), net.example(2), step=Step(index, 8, 0.5, memory=memory))
    a, b, c, d = seen
    assert not torch.equal(a, c)
    torch.testing.assert_close(d - b, c - a, rtol=0, atol=1e-5)


def test_half_of_the_generation_saves_the_rear_and_half_the_front():
    net, calls = family("flux", cache=DeltaDiT(2, interval=2)), Counter()
    for i, unit in enumerate(map(core, net.units)):
        unit.register_forward_pre_hook(lambda m, a, i=i: calls.update([i]))
    paint(net, 8)
    assert calls == {0: 6, 1: 6, 2: 6, 3: 6}


def test_settings_that_cannot_be_are_refused(make_dit):
    with pytest.raises(ValueError, match="DeltaDiT: interval must be at least 1, got 0"):
        DeltaDiT(1, interval=0)
    with pytest.raises(ValueError, match="DeltaDiT: switch must be at most 1, got 1.5"):
        DeltaDiT(1, switch=1.5)
    with pytest.raises(ValueError, match="DeltaDiT: blocks must be fewer than the 3 units of this dit, got 3: one"):
        edit.apply(make_dit(), {"cache": DeltaDiT(3)})
    net = edit.apply(make_dit(), {"reuse": Reuse(units=(2,))})
    with pytest.raises(ValueError, match="DeltaDiT: 'reuse' caches attention of unit 2 already"):
        edit.apply(net, {"cache": DeltaDiT(1)})
