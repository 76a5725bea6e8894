"""Repeated spans: when they are computed. `test_engine` has what all caches have in common."""

from collections import Counter

import pytest
import torch
from caches import executed, family, paint, told

import edit
from edit.caching.engine import Gate, Latest
from edit.caching.span_reuse import SpanReuse
from edit.stream import Step
from edit.unit import core


@pytest.mark.parametrize(
    "settings, computed",
    [
        (dict(interval=2), {0, 2, 4, 6}),
        (dict(interval=3), {0, 3, 6}),
        (dict(interval=3, start=0.25), {0, 1, 2, 5}),
        (dict(interval=3, start=0.3), {0, 1, 2, 3, 6}),
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


@torch.no_grad()
@pytest.mark.parametrize("front, back", [(1, 1), (1, 2), (2, 0)])
def test_what_the_span_adds_to_image_and_text_is_added_again(front, back):
    """FLUX has two units of two streams, then two of one; nothing reads the text behind the last."""
    net, memory, added = family("flux", cache=SpanReuse(4, front, back)), {}, []
    ends = front - 1, len(net.units) - back - 1
    for index, t in enumerate((0.9, 0.2)):
        step, x = Step(index, 4, t, memory=memory), torch.randn(2, *net.sample_shape)
        trace = net(x, torch.full((2,), t), told(net), step=step, taps=ends).trace
        a, b = (trace[f"unit.{i}"] for i in ends)
        added.append(b - a)
        if back:
            a, b = (trace[f"unit.{i}.text"] for i in ends)
            added.append(b - a)
    half = len(added) // 2
    for first, again in zip(added[:half], added[half:], strict=True):  # fp32 differences of numbers of about 10
        torch.testing.assert_close(again, first, rtol=0, atol=1e-5)


class Told(Gate):
    """All samples, then the second alone, then none."""

    def computes(self, unit, stream, state):
        return (True, torch.tensor([False, True]), False)[stream.step.index]


@torch.no_grad()
def test_samples_that_are_computed_apart_keep_what_the_span_added_to_each():
    net, cache, memory, added = family("dit"), SpanReuse(front=1), {}, []
    cache.name = "cache"
    cache.cache(net, Told(), Latest())
    for index, t in enumerate((0.9, 0.5, 0.2)):
        step, x = Step(index, 3, t, memory=memory), torch.randn(2, *net.sample_shape)
        trace = net(x, torch.full((2,), t), told(net), step=step, taps=(0, 1)).trace
        added.append(trace["unit.1"] - trace["unit.0"])
    # fp32 differences of numbers of about 10
    torch.testing.assert_close(added[2], torch.stack((added[0][0], added[1][1])), rtol=0, atol=1e-5)
    assert (added[1][1] - added[0][1]).abs().max() > 1e-2
