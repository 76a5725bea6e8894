"""N:M patterns of depth pruning: of every M consecutive units, N stay.

A pattern is "2:4" for as many groups as fit, "2:4,3:4,..." for one after the other, or a list of pairs. In models with
several kinds of units (FLUX: double, single; SD3: the last one puts out no text) no group has two kinds. Source:
TinyFusion (arXiv 2412.01199); that what is left of a kind stays is ours. Specification: methods/tinyfusion.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, combinations, groupby

import torch
from torch import Tensor

from edit.denoiser import Denoiser
from edit.distillation.pairs import Pairs

Groups = tuple[tuple[int, int], ...]  # (n, m): n of m consecutive units stay
Pattern = str | Sequence[Sequence[int]]


def runs_of_one_kind(denoiser: Denoiser) -> tuple[int, ...]:
    """Lengths of the runs of units of one kind: same class, same parameters. FLUX.1: (19, 38)."""

    def kind(unit) -> tuple:
        return type(unit).__name__, tuple((name, tuple(p.shape)) for name, p in unit.named_parameters())

    return tuple(len(list(run)) for _, run in groupby(denoiser.units, kind))


def groups_of(pattern: Pattern, lengths: Sequence[int]) -> Groups:
    """The groups of a pattern over runs of units of these lengths.

    A single N:M is repeated within each run; what is left of a run stays, where there are several.

    Raises:
        ValueError: if the groups do not sum up to the units, hold two kinds of units, or keep none or more than all
    """
    given = [part.split(":") for part in pattern.replace(" ", "").split(",")] if isinstance(pattern, str) else pattern
    try:
        groups = [(int(n), int(m)) for n, m in given]
    except (TypeError, ValueError) as error:
        raise ValueError(f"pattern: expected such as 2:4, 2:4,3:4 or [[2, 4], [3, 4]], got {pattern!r}") from error
    if bad := next((g for g in groups if not 0 < g[0] <= g[1]), None):
        raise ValueError(f"pattern: {bad[0]}:{bad[1]} is no choice of 1 to {bad[1]} out of {bad[1]} units")
    if len(groups) == 1:
        m = groups[0][1]
        if len(lengths) == 1 and lengths[0] % m:
            raise ValueError(f"pattern {pattern!r}: {lengths[0]} units make no groups of {m}: list them, as in 2:4,3:4")
        groups = [g for length in lengths for g in groups * (length // m) + [(1, 1)] * (length % m)]
    ends = [0, *accumulate(m for _, m in groups)]
    if ends[-1] != sum(lengths):
        raise ValueError(f"pattern {pattern!r}: groups of {ends[-1]} units in all, and the model has {sum(lengths)}")
    if (border := next((b for b in accumulate(lengths) if b not in ends), None)) is not None:
        raise ValueError(
            f"pattern {pattern!r}: units {border - 1} and {border} are of two kinds and in one group: end one between"
        )
    return tuple(groups)


def options(n: int, m: int) -> Tensor:
    """Every way to keep n of m units, in lexicographic order: c m float, 1 = stays."""
    kept = torch.tensor(list(combinations(range(m), n)), device="cpu")
    return torch.zeros(len(kept), m, device="cpu").scatter_(1, kept, 1.0)


def aligned(pattern: Pattern, lengths: Sequence[int]) -> Pairs:
    """What is compared in recovery: the student's last unit of each group with the teacher's, whichever were kept.

    Args:
        pattern: of the pruning
        lengths: of the teacher's runs of units of one kind
    """
    groups = groups_of(pattern, lengths)
    return tuple(
        (s - 1, t - 1) for s, t in zip(accumulate(n for n, _ in groups), accumulate(m for _, m in groups), strict=True)
    )
