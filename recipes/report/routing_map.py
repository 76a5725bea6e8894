"""What edits decide over a generation, whatever the edit: maps of units against time, and numbers.

An edit that decides says so (`Edit.decides`), and its `decisions` are shares in [0, 1] of each unit, for each sample or
for each of a sample's image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import log
from textwrap import shorten
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import ndarray
    from PIL.Image import Image
    from torch import Tensor

    from edit.denoiser import Denoiser
    from edit.stream import Output, Step

CLASSES, PROMPTS = 10, 6  # small maps beside each other, at most
SHOWN = 4  # samples whose tokens are shown
MOMENTS = 7  # steps at which they are shown, at most


@dataclass(frozen=True)
class Map:
    """One quantity in one guidance branch over a generation, on the CPU.

    Args:
        times: of the s evaluations, 1 = noise, by their number in the generation
        shares: s u b; means over tokens where tokens are chosen
        tokens: s k n, means over units, of the first k samples; None where no tokens are chosen
    """

    times: Mapping[int, float]
    shares: Tensor
    tokens: Tensor | None = None


Maps = Mapping[str, Mapping[str, Map]]  # of one edit, by quantity and guidance branch
Look = Callable[[int], "ndarray | None"]


class Decisions:
    """Watches a sampler (`Sampler(..., watch=)`): what a denoiser's edits decide at each evaluation.

    Batches may follow each other: their samples are joined in order.
    """

    def __init__(self, denoiser: Denoiser):
        self.edits = {name: edit for name, edit in denoiser.applied.items() if edit.decides}
        self.times: dict[int, float] = {}
        self.shares: dict[tuple[str, str, str], dict[int, list[Tensor]]] = {}
        self.tokens: dict[tuple[str, str, str], dict[int, list[Tensor]]] = {}

    def __call__(self, step: Step, output: Output) -> None:
        self.times[step.index] = step.sigma
        for name, edit in self.edits.items():
            for quantity, value in edit.decisions(output.trace).items():
                key, value = (name, quantity, step.branch), value.float()
                if value.ndim == 3:
                    kept = self.tokens.setdefault(key, {}).setdefault(step.index, [])
                    room = SHOWN - sum(map(len, kept))
                    kept.append(value[:, :room].mean(0).cpu())
                    value = value.mean(2)
                self.shares.setdefault(key, {}).setdefault(step.index, []).append(value.cpu())

    def maps(self) -> dict[str, Maps]:
        """What was seen, by edit."""
        import torch

        found: dict[str, dict[str, dict[str, Map]]] = {}
        for (edit, quantity, branch), seen in self.shares.items():
            order, tokens = sorted(seen), self.tokens.get((edit, quantity, branch))
            found.setdefault(edit, {}).setdefault(quantity, {})[branch] = Map(
                {i: self.times[i] for i in order},
                torch.stack([torch.cat(seen[i], 1) for i in order]),
                None if tokens is None else torch.stack([torch.cat(tokens[i]) for i in order]),
            )
        return dict(found)


def decides(denoiser: Denoiser) -> bool:
    """Whether what is run depends on samples or times."""
    return any(edit.decides for edit in denoiser.applied.values())


def groups(labels: Tensor | None, told: Sequence[str], classes: Sequence[str] | None = None) -> dict[str, list[int]]:
    """Whom the small maps are of: classes or, where there are none, prompts, evenly from all there are.

    Args:
        labels: b, classes of the samples; None: there are none
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
    """JSON values by quantity: of each branch, and of all, for which the branches of an evaluation are averaged.

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
    """Of s u b; standard deviations are of these samples and evaluations, without a correction."""
    shares = shares.double()
    return {
        "mean": shares.mean().item(),
        "units": shares.mean((0, 2)).tolist(),
        "std_samples": shares.mean((0, 1)).std(correction=0).item(),
        "std_timesteps": shares.mean((1, 2)).std(correction=0).item(),
    }


# ---- pictures -------------------------------------------------------------------------------------------------------


def draw(maps: Maps, groups: Mapping[str, Sequence[int]], look: Look = lambda k: None) -> Image:
    """For each quantity a map of units against time, mean over samples, then small ones, then tokens where chosen.

    The small ones and the tokens are of the first branch, the conditional one.

    Args:
        maps: of one edit
        groups: the samples that each small map is the mean of, by its title
        look: at one of the first samples, beside its tokens: its number -> uint8 y x 3, None where there is no way to
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    rows: list[tuple[float, Callable[[Any], None]]] = []  # inches, and what is drawn there
    for quantity, branches in maps.items():
        rows.append((2.7, partial(_large, quantity, branches)))
        first = next(iter(branches.values()))
        rows.append((1.5, partial(_small, first, groups)))
        if first.tokens is not None:
            rows.append((0.4 + 1.2 * first.tokens.shape[1], partial(_tokens, first.times, first.tokens, look)))
    heights = [height for height, _ in rows]
    figure = Figure(figsize=(11, sum(heights)), dpi=110, layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (_, paint) in zip(parts, rows, strict=True):
        paint(part)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _heat(axes: Any, values: Tensor, aspect: str = "auto") -> Any:
    return axes.imshow(values.numpy(), vmin=0, vmax=1, cmap="viridis", aspect=aspect, interpolation="nearest")


def _large(quantity: str, branches: Mapping[str, Map], part: Any) -> None:
    places = part.subplots(1, len(branches), squeeze=False)[0]
    for axes, (name, seen) in zip(places, branches.items(), strict=True):
        heat = _heat(axes, seen.shares.mean(2).T)
        times = list(seen.times.values())
        columns = spaced(len(times), 8)
        axes.set_xticks(columns, [f"{times[i]:.2f}" for i in columns], fontsize=8)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="time (1 = noise)", ylabel="unit")
        axes.set_title(f"{quantity}, {name}: {seen.shares.mean():.1%}", fontsize=10)
    part.colorbar(heat, ax=places.tolist())


def _small(seen: Map, groups: Mapping[str, Sequence[int]], part: Any) -> None:
    places = part.subplots(1, len(groups), squeeze=False)[0]
    for axes, (title, members) in zip(places, groups.items(), strict=True):
        _heat(axes, seen.shares[:, :, list(members)].mean(2).T)
        axes.set(xticks=[], yticks=[])
        axes.set_title(shorten(title, 150 // len(groups), placeholder=" …"), fontsize=8, parse_math=False)


def _tokens(times: Mapping[int, float], tokens: Tensor, look: Look, part: Any) -> None:
    labels, moments = list(times.values()), spaced(len(times), MOMENTS)
    places = part.subplots(tokens.shape[1], 1 + len(moments), squeeze=False)
    for k, (left, *right) in enumerate(places):
        image = look(k)
        height, width = (1, 1) if image is None else image.shape[:2]
        if image is not None:
            left.imshow(image, interpolation="nearest")
        for axes, i in zip(right, moments, strict=True):
            _heat(axes, tokens[i, k].view(grid(tokens.shape[2], height, width)), "equal")
            if k == 0:
                axes.set_title(f"time {labels[i]:.2f}", fontsize=8)
        for axes in (left, *right):
            axes.set_axis_off()


def grid(n: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of n tokens that are nearest to the shape of the image."""
    rows = min((r for r in range(1, n + 1) if n % r == 0), key=lambda r: abs(log(r * r * width / (n * height))))
    return rows, n // rows


def spaced(length: int, most: int) -> list[int]:
    """At most `most` indices, evenly spaced from the first to the last."""
    count = min(length, most)
    return [round(i * (length - 1) / max(1, count - 1)) for i in range(count)]
