"""Random numbers as a pure function of (seed, sample, stream): no generator state anywhere.

The same sample gets the same numbers whatever the batch size, the number of ranks, the device or the history of the
run: this is what makes resuming exact, two ranks equal to one process, and an image depend on its seed alone.

Counter-based: element i of a sample is the SplitMix64 finaliser (Steele, Lea, Flood 2014) of key + i * golden ratio,
with the key itself a hash of (seed, stream, sample). Normals by Box-Muller. Integer arithmetic is exact on every
device; the transcendental functions agree to about one unit in the last place.
"""

import math

import torch
from torch import Tensor

# streams: independent uses of one sample's randomness
TIME, NOISE, DROP, FLIP, GUIDANCE, FORCE = 1, 2, 3, 4, 5, 6
MATCHING, SHARED = 200, 100  # MATCHING + k: uses of a few-step method; + SHARED where all ranks draw one number
RESAMPLE, SHUFFLE = 101, 102  # latents from their moments; the order of an epoch
MOVE, GRAIN = 103, 104  # where a picture is moved; the grain of one that shows nothing
PICK = 105  # which tokens are run
SHUFFLED = 106  # the columns of a matching, for ties
SOLVER = 1000  # SOLVER + k: noise of the sampler's k-th step
TERMS = 1 << 20  # TERMS + a number of 42 bits: uses of a loss term

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed 64-bit
_M1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_M2 = 0x94D049BB133111EB - (1 << 64)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's >> on int64 carries the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _M1
    z = (z ^ _shift(z, 27)) * _M2
    return z ^ _shift(z, 31)


def hashes(seed: int, samples: Tensor, stream: int, count: int) -> Tensor:
    """`count` 64-bit hashes for each sample: b int64 -> b count int64."""
    samples = samples.to(torch.int64)
    key = _mix(samples * _GOLDEN + _host_mix(_host_mix(seed) + stream))
    counter = torch.arange(1, count + 1, device=samples.device) * _GOLDEN
    return _mix(key[:, None] + counter)


def _host_mix(z: int) -> int:
    """The same finaliser on one Python integer: the seed needs no kernel."""
    mask = (1 << 64) - 1
    z = (z + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z


def uniform(seed: int, samples: Tensor, stream: int) -> Tensor:
    """One number in (0, 1) per sample: b int64 -> b float32. Never exactly 0 or 1."""
    bits = _shift(hashes(seed, samples, stream, 1)[:, 0], 40)  # 24 bits: exact in float32
    return (bits.float() + 0.5).clamp_max_(2.0**24 - 1) * 2.0**-24


def gaussian(seed: int, samples: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise: b int64 -> b *shape float32."""
    count = math.prod(shape)
    z = hashes(seed, samples, stream, (count + 1) // 2)
    radius = ((_shift(z, 32).float() + 0.5) * 2.0**-32).log_().mul_(-2).clamp_min_(0).sqrt_()
    angle = (z & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
    normals = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return normals.flatten(1)[:, :count].reshape(len(samples), *shape)
