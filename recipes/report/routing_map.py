"""The decisions of any edit over a generation: maps of units against time, and statistics.

An edit's `decisions` are shares in [0, 1] of each unit that run, per sample or per image token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from textwrap import wrap
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from recipes.report.drawing import count_rows, head, heat, image_of, over_time, spaced

if TYPE_CHECKING:
    from numpy import ndarray
    from PIL.Image import Image
    from torch import Tensor

    from edit.denoiser import Denoiser, Edit
    from edit.stream import Output, Step

CLASSES, PROMPTS = 10, 6  # most small maps in a row
SHOWN = 4  # samples whose tokens are shown
MOMENTS = 7  # most steps at which they are shown
LARGE, SMALL = 3.0, 1.9  # inches: height of a map, and of a row of small ones
BRANCHES = {"cond": "with the class or prompt", "uncond": "without it, for guidance"}


@dataclass(frozen=True)
class Map:
    """One quantity in one guidance branch over a generation, on the CPU.

    Args:
        times: in [0, 1], 1 = noise, of the s evaluations, by their number in the generation
        shares: s u b; means over tokens where the edit chooses tokens
        tokens: s k n, means over units, of the first k samples; None where the edit chooses no tokens
        grid: frames, rows and columns of the n tokens
    """

    times: Mapping[int, float]
    shares: Tensor
    tokens: Tensor | None = None
    grid: tuple[int, int, int] | None = None


Maps = Mapping[str, Mapping[str, Map]]  # of one edit, by quantity and guidance branch
Look = Callable[[int], "ndarray | None"]


class Decisions:
    """Records the decisions of a denoiser's edits at each evaluation of a sampler (`Sampler(..., watch=)`).

    Samples of successive batches are joined in order; an evaluation of the branch "joint" is one of cond and of uncond.
    """

    def __init__(self, denoiser: Denoiser):
        self.edits = drawn(denoiser)
        self.times: dict[int, float] = {}
        self.grid: tuple[int, int, int] | None = None
        self.shares: dict[tuple[str, str, str], dict[int, list[Tensor]]] = {}
        self.tokens: dict[tuple[str, str, str], dict[int, list[Tensor]]] = {}

    def __call__(self, step: Step, output: Output) -> None:
        self.times[step.index], self.grid = step.sigma, output.grid
        for name, edit in self.edits.items():
            for quantity, value in edit.decisions(output.trace).items():
                parts = [(step.branch, value)]
                if step.branch == "joint":
                    parts = list(zip(("cond", "uncond"), value.chunk(2, 1), strict=True))
                for branch, share in parts:
                    self._keep((name, quantity, branch), step.index, share.float())

    def _keep(self, key: tuple[str, str, str], index: int, value: Tensor) -> None:
        if value.ndim == 3:
            kept = self.tokens.setdefault(key, {}).setdefault(index, [])
            room = SHOWN - sum(map(len, kept))
            kept.append(value[:, :room].mean(0).cpu())
            value = value.mean(2)
        self.shares.setdefault(key, {}).setdefault(index, []).append(value.cpu())

    def maps(self) -> dict[str, Maps]:
        """The recorded decisions, by edit."""
        import torch

        found: dict[str, dict[str, dict[str, Map]]] = {}
        for (edit, quantity, branch), seen in self.shares.items():
            order, tokens = sorted(seen), self.tokens.get((edit, quantity, branch))
            found.setdefault(edit, {}).setdefault(quantity, {})[branch] = Map(
                {i: self.times[i] for i in order},
                torch.stack([torch.cat(seen[i], 1) for i in order]),
                None if tokens is None else torch.stack([torch.cat(tokens[i]) for i in order]),
                self.grid,
            )
        return dict(found)


def drawn(denoiser: Denoiser) -> dict[str, Edit]:
    """The applied edits that tell decisions."""
    from edit.denoiser import Edit

    return {name: e for name, e in denoiser.applied.items() if type(e).decisions is not Edit.decisions}


def groups(labels: Tensor | None, told: Sequence[str], classes: Sequence[str] | None = None) -> dict[str, list[int]]:
    """The samples of each small map, by title: evenly spaced classes, or prompts where there are no classes.

    Args:
        labels: b, classes of the samples; None without classes
        told: b, captions
        classes: their names, where known
    """
    from edit.routing.batches import by_key

    if labels is None:
        return evenly(by_key(told), PROMPTS)
    titles = [classes[int(label)] if classes else f"class {label}" for label in labels.tolist()]
    return evenly(by_key(titles), CLASSES)


def evenly(found: Mapping[str, list[int]], most: int) -> dict[str, list[int]]:
    names = list(found)
    return {names[i]: found[names[i]] for i in spaced(len(names), most)}


# ---- numbers --------------------------------------------------------------------------------------------------------


def numbers(maps: Maps) -> dict[str, Any]:
    """Statistics by quantity as JSON values: of each branch, and of the mean over the branches of an evaluation.

    `mean` and, unit by unit, `units`; `std_samples`, of the samples' means over units and evaluations;
    `std_timesteps`, of the evaluations' means over units and samples.
    """
    import torch

    def joined(branches: Mapping[str, Map]) -> Tensor:
        at: dict[int, list[Tensor]] = {}
        for seen in branches.values():
            for i, share in zip(seen.times, seen.shares, strict=True):
                at.setdefault(i, []).append(share)
        return torch.stack([torch.stack(at[i]).mean(0) for i in sorted(at)])

    return {
        quantity: summary(joined(branches)) | {"branches": {name: summary(m.shares) for name, m in branches.items()}}
        for quantity, branches in maps.items()
    }


def summary(shares: Tensor) -> dict[str, Any]:
    """Statistics of s u b; standard deviations have no Bessel correction."""
    shares = shares.double()
    return {
        "mean": shares.mean().item(),
        "units": shares.mean((0, 2)).tolist(),
        "std_samples": shares.mean((0, 1)).std(correction=0).item(),
        "std_timesteps": shares.mean((1, 2)).std(correction=0).item(),
    }


# ---- pictures -------------------------------------------------------------------------------------------------------


def draw(
    maps: Maps,
    groups: Mapping[str, Sequence[int]],
    look: Look = lambda k: None,
    decides: Mapping[str, str] = MappingProxyType({}),
) -> Image:
    """For each quantity: a map of units against time, mean over samples; small maps; tokens where the edit chooses any.

    Small maps and tokens show the first branch, the conditional one.

    Args:
        maps: of one edit
        groups: the samples averaged in each small map, by its title
        look: sample number -> its picture, uint8 y x 3, shown beside its tokens; None without a picture
        decides: of what each quantity is the share, in plain words
    """
    from matplotlib.figure import Figure

    rows: list[tuple[float, Callable[[Any], None]]] = []  # height in inches, and the function that draws
    for quantity, branches in maps.items():
        what = decides.get(quantity, f"{quantity}, as the edit tells it")
        rows.append((LARGE, partial(_large, what, branches)))
        first = next(iter(branches.values()))
        if len(groups) > 1:
            rows.append((SMALL, partial(_small, first, groups)))
        if first.tokens is not None:
            rows.append((0.7 + 1.2 * first.tokens.shape[1], partial(_tokens, first, look)))
    heights = [height for height, _ in rows]
    figure = Figure(figsize=(11, sum(heights)), dpi=110, layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (_, paint) in zip(parts, rows, strict=True):
        paint(part)
    return image_of(figure)


def _large(what: str, branches: Mapping[str, Map], part: Any) -> None:
    head(part, f"Share of {what}", bold=True)
    places = part.subplots(1, len(branches), squeeze=False)[0]
    for axes, (name, seen) in zip(places, branches.items(), strict=True):
        shares = heat(axes, seen.shares.mean(2).T)
        over_time(axes, list(seen.times.values()))
        count_rows(axes, "unit, 0 is the first")
        axes.set_title(f"{BRANCHES.get(name, name)}: {seen.shares.mean():.1%} on average", fontsize=9)
    bar = part.colorbar(shares, ax=places.tolist(), ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0 %, none", "50 %", "100 %, all"], fontsize=8)


def _small(seen: Map, groups: Mapping[str, Sequence[int]], part: Any) -> None:
    head(part, "The same for single classes or prompts: units downwards, noise on the left, image on the right")
    places = part.subplots(1, len(groups), squeeze=False)[0]
    for axes, (title, members) in zip(places, groups.items(), strict=True):
        heat(axes, seen.shares[:, :, list(members)].mean(2).T)
        axes.set(xticks=[], yticks=[])
        axes.set_title(_folded(title, len(groups)), fontsize=8, parse_math=False)


def _folded(title: str, count: int) -> str:
    """A title in at most three lines, as wide as one of `count` small maps."""
    return "\n".join(wrap(title, max(6, 150 // count), max_lines=3, placeholder=" …"))


def _tokens(seen: Map, look: Look, part: Any) -> None:
    tokens, grid = seen.tokens, seen.grid
    assert tokens is not None and grid is not None
    frames = "" if grid[0] == 1 else ", frames beside each other"
    head(part, f"The same for each token of single images, mean over units: a square is a token at its place{frames}")
    labels, moments = list(seen.times.values()), spaced(len(seen.times), MOMENTS)
    places = part.subplots(tokens.shape[1], 1 + len(moments), squeeze=False)
    for k, (left, *right) in enumerate(places):
        if (image := look(k)) is not None:
            left.imshow(image, interpolation="nearest")
            if k == 0:
                left.set_title("image", fontsize=8)
        for axes, i in zip(right, moments, strict=True):
            heat(axes, side_by_side(tokens[i, k], grid), aspect="equal")
            if k == 0:
                axes.set_title(f"noise {labels[i]:.2f}", fontsize=8)
        for axes in (left, *right):
            axes.set_axis_off()


def side_by_side(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Tokens in rows and columns, frames beside each other: n -> y (f x)."""
    return tokens.view(grid).transpose(0, 1).flatten(1)
