"""Seconds and bytes of a call."""

import torch
from torch import nn

from edit.measuring.timing import Spread, distinct_bytes, faster, in_turns, latency, peak_memory, ratio, steadiest


def test_quartiles_are_those_of_the_values():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(median=3.0, low=2.0, high=4.0, count=5)


def test_latency_times_each_round_after_the_warm_up():
    calls = []
    spread = latency(lambda: calls.append(0), rounds=7, warmup=2)
    assert len(calls) == 9 and spread.count == 7 and 0 < spread.low <= spread.median <= spread.high


def test_the_ratio_says_how_many_times_faster_the_first_is():
    small, large = torch.randn(64, 64), torch.randn(512, 512)  # 512 times the work
    assert ratio(lambda: small @ small, lambda: large @ large, rounds=5).median > 5
    assert ratio(lambda: large @ large, lambda: small @ small, rounds=5).median < 0.2


def test_the_peak_is_the_most_bytes_alive_at_once():
    x = torch.randn(1000)  # 4000 bytes

    def run():
        y = x + 1  # 8000 alive with x
        z = y * 2  # 12000
        del y  # 8000
        return z.view(10, 100) - 1  # 12000: a view is no new memory

    assert peak_memory(run, resident=[x]) == 12_000
    assert peak_memory(run) == 12_000  # what is read counts too
    assert peak_memory(run, resident=[x, torch.zeros(500)]) == 14_000


def test_training_keeps_activations_that_inference_frees():
    model = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(64, 64), nn.SiLU())))
    x = torch.randn(256, 64)

    def inference():
        with torch.no_grad():
            model(x)

    size = x.numel() * 4
    weights = sum(p.numel() for p in model.parameters()) * 4
    # the sequence of calls holds an input and an output at a time, beside x itself
    assert peak_memory(inference, resident=[x, *model.parameters()]) == weights + 3 * size
    trained = peak_memory(lambda: model(x).sum().backward(), resident=[x, *model.parameters()])
    assert trained > weights + 12 * size  # each of the twelve layers has kept one


def test_calls_take_turns_and_another_one_begins_each_round():
    calls = []
    seconds = in_turns([lambda n=n: calls.append(n) for n in range(3)], rounds=3, warmup=1)
    assert calls == [0, 1, 2, 0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert [len(s) for s in seconds] == [3, 3, 3]


def test_a_slow_round_does_not_change_a_quotient():
    spread = faster([1.0, 10.0, 1.0], [2.0, 20.0, 2.0])
    assert (spread.median, spread.low, spread.high) == (2.0, 2.0, 2.0)


def test_an_unsteady_measurement_is_repeated_at_most_thrice_and_the_steadiest_is_kept():
    steady, uneven, worse = [[1.0, 1.0, 1.1]], [[1.0, 2.0, 3.0]], [[1.0, 2.0, 9.0]]

    def measured(*found: list[list[float]]) -> tuple[list[list[float]], int]:
        left = list(found)
        return steadiest(lambda: left.pop(0)), len(found) - len(left)

    assert measured(steady, uneven) == (steady, 1)
    assert measured(uneven, steady, worse) == (steady, 2)
    assert measured(worse, uneven, worse, steady) == (uneven, 3)
    both = [[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]]  # one unsteady call is enough
    assert measured(both, steady) == (steady, 2)


def test_storages_that_tensors_share_are_counted_once():
    x, y = torch.zeros(100), torch.zeros(10)
    assert distinct_bytes([x, x[:50], x.view(10, 10), y]) == 440
