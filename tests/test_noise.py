import math

import pytest
import torch
from scipy import stats

from edit import noise

MASK = (1 << 64) - 1


def splitmix64(state: int, count: int) -> list[int]:
    """The published generator in plain Python integers: `count` outputs from a state."""
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


def finalise(z: int) -> int:
    """The finaliser alone: the first output of the state one step before z."""
    return splitmix64((z - 0x9E3779B97F4A7C15) & MASK, 1)[0]


def test_the_reference_is_splitmix64():
    assert splitmix64(0, 3) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("seed, sample, stream", [(0, 0, 1), (1, 7, 2), (123456789, 2**40 + 3, 1017), (-5, 12, 4)])
def test_hashes_are_splitmix64_started_from_a_hash_of_seed_stream_and_sample(seed, sample, stream):
    domain = splitmix64((splitmix64(seed & MASK, 1)[0] + stream) & MASK, 1)[0]
    key = finalise((sample * 0x9E3779B97F4A7C15 + domain) & MASK)
    got = noise.hashes(seed, torch.tensor([sample]), stream, 5)[0]
    assert [int(z) & MASK for z in got] == splitmix64(key, 5)


def test_numbers_are_those_of_every_machine_and_version():
    # recorded once: a change here changes every run's data, images and resumed losses
    samples = torch.tensor([0, 1, 41])
    uniform = noise.uniform(3, samples, noise.TIME)
    assert [int(v * 2**24) for v in uniform.tolist()] == [3843744, 8493016, 15799342]
    normals = noise.gaussian(3, samples, noise.NOISE, (3,))
    # log, cos and sin may differ in the last place between machines
    golden = [[1.939533, -1.138227, -1.094671], [0.754556, 0.880467, 0.142992], [1.172161, -0.855245, -0.686978]]
    torch.testing.assert_close(normals, torch.tensor(golden), rtol=1e-5, atol=1e-6)


def test_a_sample_has_its_numbers_whatever_batch_it_is_in():
    samples = torch.tensor([5, 900, 17, 0, 2**33])
    whole = noise.gaussian(1, samples, noise.NOISE, (2, 3))
    alone = torch.cat([noise.gaussian(1, s[None], noise.NOISE, (2, 3)) for s in samples])
    assert torch.equal(whole, alone)
    assert torch.equal(whole.flip(0), noise.gaussian(1, samples.flip(0), noise.NOISE, (2, 3)))
    assert torch.equal(noise.uniform(1, samples, 9)[3:], noise.uniform(1, samples[3:], 9))


def test_the_global_generator_is_neither_read_nor_moved():
    samples = torch.arange(4)
    torch.manual_seed(0)
    first, after = noise.gaussian(0, samples, 2, (8,)), torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(first, noise.gaussian(0, samples, 2, (8,)))


def test_uniform_numbers_are_uniform_and_never_0_or_1():
    u = noise.uniform(0, torch.arange(200_000), noise.TIME)
    assert 0 < u.min() and u.max() < 1
    assert stats.kstest(u.double().numpy(), "uniform").pvalue > 0.01  # seed fixed: passes for ever or never
    assert abs(u.double().mean() - 0.5) < 4 * math.sqrt(1 / 12 / 200_000)  # four standard errors


def test_uniform_stays_inside_at_the_extreme_hashes(monkeypatch):
    for bits in (0, -1):  # all zeros, all ones
        monkeypatch.setattr(noise, "hashes", lambda *a, bits=bits: torch.full((1, 1), bits))
        assert 0 < noise.uniform(0, torch.zeros(1, dtype=torch.int64), 0).item() < 1


@pytest.mark.parametrize("bits", [0, -1, 0xFFFFFFFF, -1 << 32])
def test_gaussian_is_finite_at_the_extreme_hashes(monkeypatch, bits):
    monkeypatch.setattr(noise, "hashes", lambda *a: torch.full((1, 1), bits))
    assert noise.gaussian(0, torch.zeros(1, dtype=torch.int64), 0, (2,)).isfinite().all()


@pytest.mark.parametrize("samples, shape", [(200_000, (1,)), (20, (10_001,))], ids=["across samples", "within samples"])
def test_gaussian_numbers_are_standard_normal(samples, shape):
    z = noise.gaussian(0, torch.arange(samples), noise.NOISE, shape).double().flatten()
    n = len(z)
    assert stats.kstest(z.numpy(), "norm").pvalue > 0.01
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 4 * math.sqrt(variance / n)  # four standard errors


def test_hashes_do_not_collide():
    # 1.2e6 of 2^64: a chance collision has probability 4e-8
    streams = (noise.TIME, noise.NOISE, noise.SOLVER, noise.SOLVER + 1)
    z = [noise.hashes(seed, torch.arange(5000), s, 30) for seed in (0, 1) for s in streams]
    z = torch.stack(z).flatten()
    assert len(z.unique()) == len(z)


@pytest.mark.parametrize(
    "a, b",
    [
        ((0, 0, noise.NOISE), (0, 1, noise.NOISE)),
        ((0, 0, noise.NOISE), (1, 0, noise.NOISE)),
        ((0, 0, noise.NOISE), (0, 0, noise.TIME)),
        ((0, 0, noise.SOLVER), (0, 0, noise.SOLVER + 1)),
        ((0, 1, noise.SOLVER), (0, 0, noise.SOLVER + 1)),
        ((0, 1, noise.NOISE), (1, 0, noise.NOISE)),
    ],
    ids=["samples", "seeds", "streams", "steps", "sample and step", "sample and seed"],
)
def test_samples_streams_and_seeds_are_independent(a, b):
    n = 100_000
    x, y = (noise.gaussian(seed, torch.tensor([s]), stream, (n,))[0].double() for seed, s, stream in (a, b))
    bound = 4 / math.sqrt(n)  # four standard errors of a correlation
    for shift in (0, 1, 2):
        assert abs((x[: n - shift] * y[shift:]).mean()) < bound
    assert abs(((x**2 - 1) * (y**2 - 1)).mean()) / 2 < bound  # nor do they share magnitudes


def test_neighbouring_numbers_of_one_sample_are_independent():
    n = 100_000
    z = noise.gaussian(0, torch.tensor([0]), noise.NOISE, (n,))[0].double()
    for shift in (1, 2, 3):  # 1 within a Box-Muller pair
        assert abs((z[:-shift] * z[shift:]).mean()) < 4 / math.sqrt(n)


def test_odd_counts_are_a_prefix_of_even_ones():
    samples = torch.arange(3)
    odd, even = noise.gaussian(0, samples, 2, (5,)), noise.gaussian(0, samples, 2, (6,))
    assert torch.equal(odd, even[:, :5])
