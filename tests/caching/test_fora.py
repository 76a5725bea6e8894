"""FORA: its schedule, and that it is TaylorSeer of order 0 (oracle 2). `test_engine` has what all caches share."""

import pytest
import torch
from caches import FEW, MADE, executed, family, paint

from edit.caching.fora import FORA
from edit.caching.reuse import Reuse
from edit.caching.taylorseer import TaylorSeer
from edit.stream import Step


def computed(interval: int, count: int) -> list[int]:
    return [i for i in range(count) if FORA(interval).due(Step(i, count, 0.5), "feed")]


def test_the_first_is_computed_and_every_nth_counted_from_the_last():
    assert computed(3, 8) == [0, 1, 4, 7]
    assert computed(3, 7) == [0, 3, 6]
    assert computed(4, 4) == [0, 3]
    assert computed(1, 4) == [0, 1, 2, 3] and computed(9, 5) == [0, 4]


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in MADE])
def test_it_is_taylorseer_of_order_zero_at_the_same_evaluations_bit_for_bit(name):
    fora, taylor = family(name, cache=FORA(3)), family(name, cache=TaylorSeer(3, 0))
    taylor.applied["cache"].computed = lambda index: index in (0, 1, 4, 7)
    assert executed(fora, 8, "cache") == executed(taylor, 8, "cache")
    images = paint(fora, 8)
    assert torch.equal(images, paint(taylor, 8)) and not torch.equal(images, paint(family(name), 8))


def test_where_the_interval_divides_the_evaluations_it_is_the_schedule_of_taylorseers_paper():
    fora, taylor = (family("dit", cache=c) for c in (FORA(3), TaylorSeer(3, 0, first=1)))
    assert torch.equal(paint(fora, 7), paint(taylor, 7))


def test_it_counts_from_the_other_end_than_interval_reuse():
    fora, back, reuse = (family("dit", cache=c) for c in (FORA(3), Reuse(3, backwards=True), Reuse(3)))
    images = paint(fora, 8)
    assert torch.equal(images, paint(back, 8)) and not torch.equal(images, paint(reuse, 8))


def test_an_interval_that_is_none_is_refused():
    with pytest.raises(ValueError, match="FORA: interval must be at least 1, got 0; the default is 3"):
        FORA(0)
