"""metrics.csv as curves: losses of training and held-out data, learning rate, gradient norm, and what else there is."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from recipes.report.drawing import dress, label_of, png_of

POINTS = 1500  # of a drawn curve; more are averaged in neighbours
DECADES = 20.0  # largest over smallest value, from which on an axis is logarithmic
HELD = ("heldout/", "held_out/", "held/", "val/", "validation/")  # beginnings of columns on held-out data
SEVERAL = 12  # curves that a plot or a set of plots has at most
LOSS = "train/loss"
HELD_LOSS = "heldout/loss"  # of the average, see recipes/heldout.py
NAMES = {LOSS: "training", HELD_LOSS: "held-out data, averaged weights"}  # in plots
PLAIN = ("step", "lr", "grad_norm", "skipped_steps", "images_per_second", "memory_gb", "mfu")


@dataclass(frozen=True)
class Curve:
    """Steps and finite values of a column; `lost` counts those that were not finite."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    lost: int = 0

    @property
    def end(self) -> float:
        """Mean of the last tenth of the values."""
        last = self.values[-max(1, len(self.values) // 10) :]
        return sum(last) / len(last)

    @property
    def held(self) -> bool:
        return self.name.startswith(HELD)

    def thin(self) -> tuple[list[float], list[float]]:
        """At most `POINTS` points, each the mean of neighbours."""
        size = -(-len(self.values) // POINTS)
        parts = range(0, len(self.values), size)
        return tuple([sum(p) / len(p) for i in parts if (p := v[i : i + size])] for v in (self.steps, self.values))  # type: ignore[return-value]

    def smooth(self) -> list[float]:
        """Moving means of the thinned values over a fiftieth of the curve, back in time."""
        _, values = self.thin()
        width, found = max(1, len(values) // 50), []
        total = 0.0
        for i, value in enumerate(values):
            total += value - (values[i - width] if i >= width else 0.0)
            found.append(total / min(i + 1, width))
        return found


def read_curves(path: Path) -> dict[str, Curve]:
    """The columns of metrics.csv that hold numbers, by name; rows torn by a kill are left out.

    Raises:
        OSError, ValueError: if it cannot be read
    """
    if not path.is_file():
        return {}
    found: dict[str, tuple[list[int], list[float], list[float]]] = {}
    with open(path, newline="", errors="replace") as file:
        try:
            for row in csv.DictReader(line.replace("\0", "") for line in file):
                step = row.pop("step", None) or ""
                if not step.isdigit() or None in row or None in row.values():
                    continue
                for name, cell in row.items():
                    try:
                        value = float(cell)
                    except ValueError:  # empty: this step did not log it
                        continue
                    steps, values, lost = found.setdefault(name, ([], [], []))
                    if isfinite(value):
                        steps.append(int(step))
                        values.append(value)
                    else:
                        lost.append(value)
        except csv.Error as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    return {n: Curve(n, tuple(s), tuple(v), len(lost)) for n, (s, v, lost) in found.items()}


def seconds(curves: Mapping[str, Curve], images: int) -> float | None:
    """Time that training took, without previews and checkpoints; None: not known.

    Args:
        curves: by name
        images: of an optimiser step
    """
    speed = curves.get("images_per_second")
    if speed is None or not images or not speed.values:
        return None
    before = (0, *speed.steps[:-1])
    gaps = zip(speed.steps, before, speed.values, strict=True)
    return sum((step - last) * images / value for step, last, value in gaps if value > 0)


@dataclass(frozen=True)
class Plot:
    """A drawn plot: its title, the picture as PNG, and what it shows in words."""

    title: str
    png: bytes
    text: str


def plots(curves: Mapping[str, Curve]) -> list[Plot]:
    """The plots that every reader wants: losses, then learning rate and gradient norm."""
    shown = losses(curves)
    made = [_plot("loss", shown, smooth=True)] if shown else []
    for name, title in (("lr", "learning rate"), ("grad_norm", "gradient norm")):
        if name in curves and curves[name].values:
            made.append(_plot(title, [curves[name]]))
    return made


def losses(curves: Mapping[str, Curve]) -> list[Curve]:
    """The curves of the first plot: the loss and that of held-out data; where roles take turns, the parts, for the loss
    is then another one at each step."""
    turns = any(name.startswith("train/critic/") for name in curves)
    parts = [c for n, c in curves.items() if n.startswith("train/") and n != LOSS]
    train = parts[:SEVERAL] if turns else [curves[LOSS]] if LOSS in curves else []
    held = [c for c in curves.values() if c.held and "loss" in c.name]
    return [c for c in (*train, *held) if c.values]


def others(curves: Mapping[str, Curve]) -> list[Plot]:
    """Small plots of what else the run has logged."""
    known = {c.name for c in losses(curves)} | set(PLAIN) | {LOSS}
    rest = [c for n, c in curves.items() if n not in known and len(c.values) > 1]
    speed = [curves["images_per_second"]] if len(getattr(curves.get("images_per_second"), "values", ())) > 1 else []
    return [_plot(c.name.removeprefix("train/"), [c]) for c in (*rest[:SEVERAL], *speed)]


def is_decades(values: Sequence[float]) -> bool:
    """Whether positive values spread over so much that an axis is better logarithmic."""
    return bool(values) and min(values) > 0 and max(values) >= DECADES * min(values)


def _plot(title: str, curves: Sequence[Curve], smooth: bool = False) -> Plot:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.15, right=0.97, bottom=0.15, top=0.93)  # a computed layout takes as long as drawing
    for i, curve in enumerate(curves):
        steps, values = curve.thin()
        label = label_of(NAMES.get(curve.name, curve.name).removeprefix("train/"))
        noisy = smooth and not curve.held and len(values) > 20
        if noisy:
            axes.plot(steps, values, color=f"C{i % 10}", alpha=0.25, linewidth=0.8)
        line = curve.smooth() if noisy else values
        mark = "o" if len(values) == 1 or (curve.held and len(values) < 50) else None
        axes.plot(steps, line, color=f"C{i % 10}", label=label, marker=mark, markersize=4, linewidth=1.4)
    shown = [v for curve in curves for v in (curve.smooth() if smooth else curve.values)]
    if title != "learning rate" and is_decades(shown):
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-2, 4))  # as wide as the margin, at most
    dress(axes, "step", label_of(title))
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8)
    return Plot(title, png_of(figure), "; ".join(map(_said, curves)))


def _said(curve: Curve) -> str:
    """A curve in words, for those who do not see it."""
    name = {LOSS: "training loss", HELD_LOSS: "held-out loss"}.get(curve.name, curve.name)
    lost = f", {curve.lost} values not finite" if curve.lost else ""
    return f"{name} {curve.values[0]:.4g} at step {curve.steps[0]:,}, {curve.end:.4g} at step {curve.steps[-1]:,}{lost}"
