"""Groups of units of which each sample takes some (`edit.moe.mixture_of_blocks`), and the pairs that losses compare.

Specification: methods/dense2moe.md, "Mixture of Blocks".
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from edit.denoiser import Denoiser
from edit.distillation.pairs import Pairs
from edit.facts import check_units
from edit.pruning.patterns import runs_of_one_kind
from edit.unit import core

Groups = Sequence[Sequence[int]]  # (a, m, kappa) each: first unit, units, units that a sample takes


def as_groups(who: str, groups: Groups) -> tuple[tuple[int, int, int], ...]:
    """Groups from configuration, lists included.

    Raises:
        ValueError: if there are none, or one is no (first unit, units, units that are taken), or they overlap
    """
    found = tuple((a, m, kappa) for a, m, kappa in (g for g in groups if len(g) == 3))
    if not found or len(found) != len(groups):
        raise ValueError(
            f"{who}: groups are (first unit, units, units that a sample takes), at least one; got {groups}"
        )
    if bad := next((g for g in found if not 0 < g[2] <= g[1]), None):
        raise ValueError(
            f"{who}: a sample cannot take {bad[2]} of the {bad[1]} units from {bad[0]} on: choose 1 to {bad[1]}"
        )
    ends = [0, *(a + m for a, m, _ in found)]
    if any(a < end for (a, _, _), end in zip(found, ends, strict=False)):
        raise ValueError(
            f"{who}: groups are increasing and disjoint, counted from unit 0; got {[list(g) for g in found]}"
        )
    return found


def check_groups(who: str, groups: Groups, denoiser: Denoiser) -> None:
    """Refuse groups that a model has no units for, in one sentence that names both."""
    lengths, depth = runs_of_one_kind(denoiser), len(denoiser.units)
    borders = [0, *accumulate(lengths)]
    for a, m, _ in groups:
        check_units(f"{who}: groups", [a + m - 1], depth, f"this {denoiser.name}")
        if not any(low <= a and a + m <= high for low, high in zip(borders, borders[1:], strict=False)):
            raise ValueError(
                f"{who}: units {a} to {a + m - 1} of this {denoiser.name} are of two kinds: let a group end at one of "
                f"{', '.join(str(b - 1) for b in borders[1:])}"
            )
        if core(denoiser.units[a + m - 1]).anatomy.text == "ends":
            raise ValueError(
                f"{who}: unit {a + m - 1} of this {denoiser.name} leaves no text, so no sample can do without it: "
                "leave it out of groups"
            )


def layout(lengths: Sequence[int], active: Sequence[int] | float) -> Groups:
    """Groups by which some units of each kind are taken, never the first or the last of a kind.

    R units are left out by R groups of two, as more and smaller groups distil better; where there is no room, by some
    groups of three that take one. Groups are spread evenly. The rule is ours, the method's paper has none.

    Args:
        lengths: of the runs of units of one kind; FLUX.1: (19, 38)
        active: units of each kind that a sample takes, or their share

    Raises:
        ValueError: if so many cannot be left out
    """
    wanted = [round(active * size) for size in lengths] if isinstance(active, float | int) else list(active)
    if len(wanted) != len(lengths):
        raise ValueError(
            f"layout: active has {len(wanted)} numbers for {len(lengths)} kinds of units: give one for each"
        )
    groups, start = [], 0
    for size, taken in zip(lengths, wanted, strict=True):
        left = size - taken
        threes = max(0, 2 * left - max(0, size - 2)) if left else 0
        twos = left - 2 * threes
        if left < 0 or twos < 0:
            raise ValueError(
                f"layout: {taken} of {size} units cannot be what groups of two and three take, where the first and the "
                f"last always run: choose {size - 2 * max(0, size - 2) // 3} to {size}"
            )
        count, free, at = twos + threes, max(0, size - 2) - 2 * twos - 3 * threes, start + 1
        for j in range(count):
            m = 3 if (j + 1) * threes // count > j * threes // count else 2
            gap = (j + 1) * free // (count + 1) - j * free // (count + 1)
            groups.append((at + gap, m, 1))
            at += gap + m
        start += size
    return tuple(groups)


def ends(groups: Groups) -> Pairs:
    """The last unit of each group with the teacher's own: what the group loss compares."""
    return tuple((a + m - 1, a + m - 1) for a, m, _ in groups)


def outside(lengths: Sequence[int], groups: Groups = ()) -> Pairs:
    """Each unit that is in no group with the teacher's own."""
    inside = {i for a, m, _ in groups for i in range(a, a + m)}
    return tuple((i, i) for i in range(sum(lengths)) if i not in inside)
