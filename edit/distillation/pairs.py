"""Pairs of units of student and teacher that are compared.

A pair is (student unit, teacher unit), both counted from 0 over all units of a model: FLUX's 19 double units are 0 to
18, its 38 single ones 19 to 56. Functions here make pairs from the edits of the student; published pairs
without a rule are constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from edit.denoiser import Denoiser
from edit.facts import check_units
from edit.losses import Seen

Pairs = tuple[tuple[int, int], ...]

# TinyFusion (arXiv 2412.01199), a student of 19 blocks of DiT-XL/2: the ends of 7 groups
TINYFUSION_D19: Pairs = ((2, 3), (5, 7), (7, 11), (10, 15), (12, 19), (15, 23), (18, 27))
# FLUX-mini (TencentARC/FluxKits), 5 double and 10 single units kept of FLUX.1-dev
FLUX_MINI_KEPT = (0, 1, 2, 10, 18, *(19 + k for k in (3, 7, 11, 15, 19, 23, 27, 31, 35, 37)))
FLUX_MINI_DOUBLE: Pairs = ((0, 3), (1, 7), (2, 11), (3, 15), (4, 18))  # as intended; the last pair weighs 0.1
FLUX_MINI_DOUBLE_RELEASED: Pairs = ((0, 0), (1, 1), (2, 2), (3, 10), (4, 18))  # its code reads the list of kept units
FLUX_MINI_SINGLE: Pairs = tuple(enumerate(FLUX_MINI_KEPT))[5:]  # the very units they were made from; 0.05 in all


def same(first: int, last: int, every: int = 1) -> Pairs:
    """Each unit with itself: `first`, `first` + `every`, ... up to `last`, which is included where it is met."""
    return tuple((i, i) for i in range(first, last + 1, every))


def grouped(depth: int, teacher_depth: int, groups: int | None = None) -> Pairs:
    """The ends of equally many contiguous groups of both models.

    Args:
        depth: units of the student
        teacher_depth: units of the teacher
        groups: how many; None: one per student unit (TinyFusion's D14: j with 2 j + 1)
    """
    groups = depth if groups is None else groups
    if not 0 < groups <= min(depth, teacher_depth):
        raise ValueError(f"cannot make {groups} groups of {depth} student and {teacher_depth} teacher units")
    return tuple((round(g * depth / groups) - 1, round(g * teacher_depth / groups) - 1) for g in range(1, groups + 1))


def interval_ends(kept: Sequence[int], depths: Sequence[int]) -> Pairs:
    """Each student unit with the end of what it replaces: all from its own position up to the next kept one.

    Args:
        kept: positions in the teacher that the student was made of, increasing
        depths: lengths of the teacher's lists of units (FLUX: 19 and 38); no unit replaces one of another list
    """
    borders = list(accumulate(depths))
    if list(kept) != sorted(set(kept)) or not kept or not 0 <= kept[0] <= kept[-1] < borders[-1]:
        raise ValueError(f"kept units must be increasing and in 0 to {borders[-1] - 1}, got {list(kept)}")
    ends = []
    for k, following in zip(kept, [*kept[1:], borders[-1]], strict=True):
        ends.append(min(following, next(b for b in borders if k < b)) - 1)
    return tuple(enumerate(ends))


def collapsed(intervals: Sequence[tuple[int, int]], depth: int) -> Pairs:
    """Each unit of a student made by `Collapse(intervals)` with the last teacher unit it stands for.

    Args:
        intervals: first and last teacher unit of each, as `Collapse` has them
        depth: units of the teacher
    """
    inside = {i for first, last in intervals for i in range(first, last)}
    return tuple(enumerate(i for i in range(depth) if i not in inside))


# ---- checks; errors name the caller ----------------------------------------------------------------------------------


def as_pairs(who: str, pairs: Sequence[Sequence[int]]) -> Pairs:
    """Pairs from configuration, lists included.

    Raises:
        ValueError: if there are none, or one is not made of two units
    """
    if not pairs or not all(len(p) == 2 and all(isinstance(i, int) and i >= 0 for i in p) for p in pairs):
        raise ValueError(f"{who}: pairs are (student unit, teacher unit), counted from 0, at least one; got {pairs}")
    return tuple((s, t) for s, t in pairs)


def as_intervals(who: str, intervals: Sequence[Sequence[int]]) -> Pairs:
    """Intervals from configuration: first and last unit of each, increasing and without overlap.

    Raises:
        ValueError: if they are not
    """
    ends = [-1, *(i for interval in intervals for i in interval)]
    ordered = all(a < b if k % 2 == 0 else a <= b for k, (a, b) in enumerate(zip(ends, ends[1:], strict=False)))
    if not intervals or any(len(i) != 2 for i in intervals) or not ordered:
        raise ValueError(f"{who}: intervals are (first, last), increasing and disjoint, at least one; got {intervals}")
    return tuple((first, last) for first, last in intervals)


def check_pairs(who: str, pairs: Pairs, denoiser: Denoiser, teacher: Denoiser | None, widths: bool = True) -> Denoiser:
    """The teacher, if every pair names units of the two models and (`widths`) their tokens have one width.

    Raises:
        ValueError: if not
    """
    if teacher is None:
        raise ValueError(f"{who} compares with a teacher and there is none: give one (teacher.path), or drop the term")
    for i, (role, model) in enumerate((("student", denoiser), ("teacher", teacher))):
        check_units(f"{who}: pairs", [pair[i] for pair in pairs], len(model.units), f"the {role}")
    if widths and (mine := denoiser.facts.width) != (theirs := teacher.facts.width):
        raise ValueError(f"{who}: tokens of the student are {mine} wide, those of the teacher {theirs}: not comparable")
    return teacher


def both(seen: Seen, pair: tuple[int, int], part: str = "") -> list[tuple[Tensor, Tensor]]:
    """Tokens of the student and the teacher, fp32: of the image, b n d, and of the text, b l d, where both have it.

    Args:
        seen: with the taps of the pair in both traces
        pair: units
        part: "" for the outputs of units, ".attention" or ".feed" for a branch

    Raises:
        ValueError: if one was not tapped, or they do not have the same number of tokens
    """
    found = []
    for stream in ("", ".text"):
        mine = seen.output.trace.get(f"unit.{pair[0]}{part}{stream}")
        theirs = seen.taught.trace.get(f"unit.{pair[1]}{part}{stream}")
        if mine is None or theirs is None:
            if stream:
                continue
            raise ValueError(
                f"pair {pair}: a pass without these units: ask the models for the term's taps and branches"
            )
        if mine.shape[:2] != theirs.shape[:2]:
            raise ValueError(
                f"unit {pair[0]} of the student has {mine.shape[1]} tokens, unit {pair[1]} of the teacher "
                f"{theirs.shape[1]}: they need the same patch size and text length"
            )
        found.append((mine.float(), theirs.detach().float()))
    return found
