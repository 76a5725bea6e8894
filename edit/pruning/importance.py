"""Which units to drop, judged without training: the baselines of learned depth pruning.

Every criterion keeps N of each M consecutive units (`edit.pruning.patterns`); one group over a whole model gives the
unconstrained form. Influence after ShortGPT (arXiv 2403.03853). Losses right after pruning, of units left out one by
one (sensitivity) or of whole patterns (calibration), are measured by `recipes.prune`; TinyFusion (2412.01199) shows
that they say little about the loss after training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from edit.denoiser import Denoiser
from edit.pruning.patterns import Groups, options
from edit.stream import Condition


@contextmanager
def only(denoiser: Denoiser, kept: Sequence[int]) -> Iterator[None]:
    """Inside the block, all other units are left out; nothing is moved or copied."""
    units = denoiser.units
    denoiser.units = [units[i] for i in kept]
    try:
        yield
    finally:
        denoiser.units = units


def starts(groups: Groups) -> list[int]:
    """Number of the first unit of each group."""
    return [0, *accumulate(m for _, m in groups)][:-1]


def draw(groups: Groups, generator: torch.Generator) -> list[int]:
    """Units of one pattern at random: in each group, every way is as likely as any other."""
    kept = []
    for start, (n, m) in zip(starts(groups), groups, strict=True):
        kept += sorted((start + torch.randperm(m, generator=generator, device="cpu")[:n]).tolist())
    return kept


def even(groups: Groups) -> list[int]:
    """Evenly spaced units in each group, with both ends where two or more stay, the first where one does."""
    kept = []
    for start, (n, m) in zip(starts(groups), groups, strict=True):
        kept += (start + torch.linspace(0, m - 1, n, dtype=torch.float64, device="cpu").round().long()).tolist()
    return kept


def strongest(scores: Sequence[float], groups: Groups) -> list[int]:
    """The units with the largest scores of each group, the first of equal ones."""
    kept = []
    for start, (n, m) in zip(starts(groups), groups, strict=True):
        order = sorted(range(start, start + m), key=lambda i: -scores[i])
        kept += sorted(order[:n])
    return kept


@torch.no_grad()
def influence(denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """ShortGPT's block influence of each unit, 1 - mean cosine of a token before and after it, in [0, 2].

    Args:
        denoiser: the model to be pruned
        x_t: b c *sizes, noisy samples
        t: b, times
        condition: of the same batch

    Returns:
        One number per unit and sample: units b.
    """
    depth = len(denoiser.units)
    embedded = denoiser.embed(**denoiser.pack(x_t, t, condition))
    tokens = [embedded.image[:, embedded.layout.registers :]]
    trace = denoiser(x_t, t, condition, taps=range(depth)).trace
    tokens += [trace[f"unit.{i}"] for i in range(depth)]
    cosines = [
        F.cosine_similarity(a.float(), b.float(), dim=2).mean(1) for a, b in zip(tokens, tokens[1:], strict=False)
    ]
    return 1 - torch.stack(cosines)


def candidates(groups: Groups, count: int, seed: int) -> list[tuple[int, ...]]:
    """Distinct patterns to be tried: all of them in order if there are no more than `count`, else `count` drawn."""
    ways = [options(n, m).bool() for n, m in groups]
    if math.prod(map(len, ways)) <= count:
        found: list[tuple[int, ...]] = [()]
        for start, way in zip(starts(groups), ways, strict=True):
            found = [(*a, *(start + w.nonzero()[:, 0]).tolist()) for a in found for w in way]
        return found
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < count:
        drawn[tuple(draw(groups, generator))] = None
    return list(drawn)
