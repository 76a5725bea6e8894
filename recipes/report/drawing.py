"""The look of all plots and maps: axes, labels, and figures as pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image
    from torch import Tensor


def dress(axes: Axes, x: str, y: str) -> None:
    """The look of all plots."""
    axes.set(xlabel=x, ylabel=y)
    if x == "step":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def heat(axes: Axes, values: Tensor, most: float = 1.0, aspect: str = "auto") -> Any:
    """A map of values from 0 to `most`: y x."""
    return axes.imshow(values.numpy(), vmin=0, vmax=most, cmap="viridis", aspect=aspect, interpolation="nearest")


def over_time(axes: Axes, times: Sequence[float]) -> None:
    """Name the columns of a map, which are evaluations of a generation at these levels of noise."""
    columns = spaced(len(times), 8)
    axes.set_xticks(columns, [f"{times[i]:.2f}" for i in columns])
    axes.set_xlabel("level of noise, from noise (1) to image (0)", fontsize=9)


def count_rows(axes: Axes, what: str) -> None:
    """Name the rows of a map, which are counted from 0."""
    axes.set_ylabel(what, fontsize=9)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=8)


def head(part: Any, text: str, bold: bool = False) -> None:
    """The title of a figure, or of a part of it."""
    part.suptitle(text, x=0.01, ha="left", fontsize=11 if bold else 9, fontweight="bold" if bold else "normal")


def spaced(length: int, most: int) -> list[int]:
    """At most `most` indices, evenly spaced from the first to the last."""
    count = min(length, most)
    return [round(i * (length - 1) / max(1, count - 1)) for i in range(count)]


def png_of(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def image_of(figure: Figure) -> Image:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def label_of(name: str) -> str:
    """A name for matplotlib, which reads $ as mathematics and hides labels that begin with an underscore."""
    shown = name.replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{shown}" if shown.startswith("_") else shown
