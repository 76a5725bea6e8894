"""Repeated spans: when they are computed. `test_engine` has what all caches have in common."""

from collections import Counter

import pytest
from caches import executed, family, paint

import edit
from edit.caching.span_reuse import SpanReuse
from edit.unit import core


@pytest.mark.parametrize(
    "settings, computed",
    [
        (dict(interval=2), {0, 2, 4, 6}),
        (dict(interval=3), {0, 3, 6}),
        (dict(interval=3, start=0.25), {0, 1, 2, 5}),
        (dict(interval=1), set(range(8))),
    ],
)
def test_evaluations_are_computed_as_the_settings_say(settings, computed, make_dit):
    seen = executed(edit.apply(make_dit(), {"cache": SpanReuse(**settings)}), 8, "cache")["joint"]
    assert seen == [[float(i in computed)] * 2 for i in range(8)]


@pytest.mark.parametrize("front, back", [(0, 0), (1, 2), (0, 3)])
def test_units_in_front_and_behind_always_run(front, back):
    net, calls = family("flux", cache=SpanReuse(4, front, back)), Counter()
    for i, unit in enumerate(map(core, net.units)):
        unit.register_forward_pre_hook(lambda m, a, i=i: calls.update([i]))
    paint(net, 8)
    depth = len(net.units)
    assert calls == {i: 2 if front <= i < depth - back else 8 for i in range(depth)}
