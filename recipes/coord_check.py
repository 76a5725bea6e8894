"""The coordinate check of any backbone: whether what it computes keeps its size, in training, as it gets wider.

    python -m recipes.coord_check experiment=dit_digits/mup
    python -m recipes.coord_check backbone=pixart_alpha backbone.num_layers=4 edits=mup widths=[144,288,576] lr=0.02

Settings are those of train.py, of which backbone, edits and optimiser matter, and those below. Models of several
widths, with heads of one width, are trained on one random batch; no data and no weights are read. With a muP among the
edits the usual parametrisation, from the same first values, is measured beside it. The table has the steepest slope of
each kind of module at each step; coord_check.json has all modules, coord_check.png the picture. The exit code is 0
where all slopes pass, else 1.

`edit.scaling.coordinates` measures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import edit
from edit.denoiser import Denoiser, Edit
from edit.inputs import words
from edit.inputs.command import guarded, helped
from edit.inputs.limits import Count, Positive, Steps
from edit.scaling.coordinates import OUTPUT, STEEP, Row, Trial, coordinates
from edit.scaling.mup import MuP
from edit.scaling.mup_rules import scaled
from recipes.models import made
from recipes.plan import compose
from recipes.report.drawing import dress, label_of, png_of
from recipes.runtime.files import write

CONFIGS = Path(__file__).parents[1] / "configs"
TIMES = (1, 2, 4, 8)  # the default widths, in those of the base
KINDS = {"units": "unit.", "last norm": "end.norm", "output": OUTPUT, "layers": ""}
Arms = Mapping[str, list[Row]]


@dataclass(frozen=True)
class Asked:
    """What is measured.

    Args:
        widths: of the models: multiples of the head width, at least two; none: 1, 2, 4 and 8 times muP's base, or the
            backbone's own
        lr: of Adam: large, so that a few steps show what many do
        steps: updates
        seeds: models of each width
        batch: samples
        out: folder of the picture and the numbers
    """

    widths: list[int] = field(default_factory=list)
    lr: Positive = 0.01
    steps: Steps = 4
    seeds: Count = 3
    batch: Count = 16
    out: str = "runs/coord_check"


@guarded(mistakes=(ValueError, TypeError, OSError))
@helped(Asked)
def main(argv: list[str]) -> int:
    known = words.keys(Asked)
    own = [word for word in argv if word.partition("=")[0] in known]
    asked = words.read(Asked, own)
    cfg = compose(CONFIGS, [word for word in argv if word not in own])
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    widths, arms = measured(asked, cfg)
    path = store(asked, widths, arms)
    show(widths, asked, arms)
    print(f"picture   {path.with_suffix('.png')}\nnumbers   {path}")
    return 0 if all(row.passes for row in next(iter(arms.values()))) else 1


def measured(asked: Asked, cfg: DictConfig) -> tuple[list[int], Arms]:
    """The widths, and the rows of each parametrisation: what is asked first, the usual one behind it.

    Raises:
        ValueError: for widths that this backbone cannot have
    """
    spec, edits = made(cfg.backbone), made(cfg.edits) or {}
    with torch.device("meta"):
        own = spec.build()
    head = own.facts.width // own.facts.heads
    mup = next((name for name, e in edits.items() if isinstance(e, MuP)), None)
    base = own.facts.width if mup is None else edits[mup].base_width
    widths = sorted(set(asked.widths)) or [n * base for n in TIMES]
    if odd := next((w for w in widths if w <= 0 or w % head), None):
        raise ValueError(f"widths are multiples of the head width {head} of this {own.name}, got {odd}")
    wide = {width: widened(spec, own, width // head) for width in widths}
    o = cfg.optimizer
    trial = Trial(asked.steps, asked.seeds, asked.batch, asked.lr, tuple(o.betas), o.eps, o.weight_decay)
    ways: dict[str, Callable[[int], dict[str, Edit]]] = {"usual" if mup is None else "muP": lambda width: edits}
    if mup is not None:
        ways["usual"] = lambda width: {**edits, mup: replace(edits[mup], base_width=width)}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("models", total=len(ways) * len(widths) * asked.seeds)

        def build(width: int, chosen: Callable[[int], dict[str, Edit]]) -> Denoiser:
            progress.advance(task)
            return edit.apply(wide[width].build(), {name: replace(e) for name, e in chosen(width).items()})  # type: ignore[type-var]

        return widths, {
            name: coordinates(lambda width, chosen=chosen: build(width, chosen), widths, trial)
            for name, chosen in ways.items()
        }


def widened(spec: Any, own: Denoiser, heads: int) -> Any:
    """A backbone's configuration with so many heads. Raises ValueError if it tells no widths, or has no such one."""
    if not own.facts.grows:
        raise ValueError(f"this {own.name} does not tell which keys of its configuration grow with its width (facts)")
    mine = {f.name for f in fields(spec)}  # others follow from these
    return replace(spec, **{key: value for key, value in scaled(own, heads).items() if key in mine})


# ---- what is shown --------------------------------------------------------------------------------------------------


def kind_of(row: Row) -> str:
    return next(kind for kind, start in KINDS.items() if row.name.startswith(start))


def steepest(rows: Sequence[Row], kind: str, step: int) -> Row | None:
    """The judged module of a kind whose size changes most with the width."""
    mine = [row for row in rows if row.step == step and row.judged and kind_of(row) == kind]
    return max(mine, key=lambda row: abs(row.slope or 0.0), default=None)


def show(widths: Sequence[int], asked: Asked, arms: Arms) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for head in ("", "steepest slope of", *(f"step {k}" for k in range(asked.steps + 1)), ""):
        table.add_column(head, justify="right" if head.startswith("step ") else "left")
    for name, rows in arms.items():
        for kind in KINDS:
            found = [steepest(rows, kind, k) for k in range(asked.steps + 1)]
            if any(found):
                cells = ["–" if row is None else f"{row.slope:+.2f}" for row in found]
                passes = all(row is None or row.passes for row in found)
                table.add_row(name, kind, *cells, "pass" if passes else "FAIL", style=None if passes else "red")
    Console().print(table)
    first, rows = next(iter(arms.items()))
    bad = sorted((row for row in rows if not row.passes), key=lambda row: -abs(row.slope or 0.0))
    print(f"widths {', '.join(map(str, widths))}; a slope passes up to {STEEP} in size; lr {asked.lr:g}")
    for row in bad[:5]:
        print(f"{first}: {row.name} has slope {row.slope:+.2f} after {row.step} updates")
    if first != "muP" and bad:
        print("no muP is among the edits: add edits=mup")


def store(asked: Asked, widths: Sequence[int], arms: Arms) -> Path:
    """Write picture and numbers, and return the path of the numbers."""
    told = {name: [vars(row) | {"passes": row.passes} for row in rows] for name, rows in arms.items()}
    passes = {name: all(row.passes for row in rows) for name, rows in arms.items()}
    whole = {**vars(asked), "widths": list(widths), "passes": passes, "rows": told}
    folder = Path(asked.out)
    write(folder / "coord_check.png", plot(widths, arms))
    return write(folder / "coord_check.json", json.dumps(whole, indent=1) + "\n")


def plot(widths: Sequence[int], arms: Arms) -> bytes:
    """Sizes of units and readout over the width: a row for each parametrisation, a column for each step."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    every = [row for rows in arms.values() for row in rows]
    steps, names = 1 + max(row.step for row in every), [*dict.fromkeys(r.name for r in every if kind_of(r) != "layers")]
    drawn = Figure(figsize=(2.3 * steps, 2.5 * len(arms) + 0.5), layout="constrained")
    axes = drawn.subplots(len(arms), steps, squeeze=False, sharex=True, sharey="row")
    for line, (name, rows) in zip(axes, arms.items(), strict=True):
        for step, ax in enumerate(line):
            for row in rows:
                if row.step != step or row.name not in names or min(row.sizes) <= 0:
                    continue
                place = names.index(row.name) / len(names)
                colour = "k" if row.name == OUTPUT else colormaps["viridis"](place)
                style = "--" if row.name.startswith("end.") else "-"
                ax.plot(widths, row.sizes, style, marker=".", color=colour, label=label_of(row.name), linewidth=1.2)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.set_xticks(widths, [str(w) for w in widths])
            dress(ax, "width" if line is axes[-1] else "", f"{name}: mean |coordinate|" if step == 0 else "")
            ax.set_title(f"after {step} update{'s' * (step > 1)}" if step else "at the start", fontsize=10)
    handles, shown = axes[0][-1].get_legend_handles_labels()
    drawn.legend(handles, shown, loc="outside lower center", ncols=min(8, len(shown)), frameon=False, fontsize=8)
    return png_of(drawn)


if __name__ == "__main__":
    sys.exit(main())
