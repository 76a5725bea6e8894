"""The loads of experts over a generation: maps of experts against time and against units, and who has no token at all.

An edit's `loads` are, of each layer with experts, the shares of the assignments that each expert has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recipes.report.drawing import count_rows, head, heat, image_of, over_time, spaced

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from edit.denoiser import Denoiser, Edit
    from edit.stream import Output, Step

NAMED = 12  # most experts that a sentence names
Watch = Callable[["Step", "Output"], None]


@dataclass(frozen=True)
class Loads:
    """The loads of one edit's experts over a generation, on the CPU.

    Args:
        times: in [0, 1], 1 = noise, of the s evaluations, by their number in the generation
        layers: names of the u layers with experts: their units
        shares: s u E, means over samples and guidance branches, of sum 1 over experts
    """

    times: Mapping[int, float]
    layers: Sequence[str]
    shares: Tensor


class Loading:
    """Records the loads of a denoiser's experts at each evaluation of a sampler (`Sampler(..., watch=)`)."""

    def __init__(self, denoiser: Denoiser):
        self.edits = loaded(denoiser)
        self.times: dict[int, float] = {}
        self.layers: dict[str, list[str]] = {}
        self.sums: dict[str, dict[int, Tensor]] = {}
        self.counts: dict[str, dict[int, int]] = {}

    def __call__(self, step: Step, output: Output) -> None:
        import torch

        self.times[step.index] = step.sigma
        for name, edit in self.edits.items():
            if not (found := edit.loads(output.trace)):
                continue
            self.layers[name] = list(found)
            loads = torch.stack(list(found.values())).float()  # u b E
            sums, counts = self.sums.setdefault(name, {}), self.counts.setdefault(name, {})
            sums[step.index] = sums.get(step.index, 0) + loads.sum(1).cpu()
            counts[step.index] = counts.get(step.index, 0) + loads.shape[1]

    def found(self) -> dict[str, Loads]:
        """The recorded loads, by edit."""
        import torch

        return {
            name: Loads(
                {i: self.times[i] for i in sorted(sums)},
                self.layers[name],
                torch.stack([sums[i] / self.counts[name][i] for i in sorted(sums)]),
            )
            for name, sums in self.sums.items()
        }


def loaded(denoiser: Denoiser) -> dict[str, Edit]:
    """The applied edits that tell loads of experts."""
    from edit.denoiser import Edit

    return {name: e for name, e in denoiser.applied.items() if type(e).loads is not Edit.loads}


def together(*watches: Watch | None) -> Watch | None:
    """One watcher in place of several; None where there is none."""
    there = [w for w in watches if w is not None]
    if not there:
        return None

    def watch(step: Step, output: Output) -> None:
        for each in there:
            each(step, output)

    return watch


# ---- numbers --------------------------------------------------------------------------------------------------------


def load_numbers(loads: Loads) -> dict[str, Any]:
    """Statistics as JSON values: `fullest`, the load of the fullest expert over the mean, layer by layer of the whole
    generation and their mean; `std_timesteps`, of an expert's relative load between evaluations; `unreached`, experts
    without a token, by layer."""
    relative = loads.shares.double() * loads.shares.shape[2]  # 1 where experts are alike
    fullest = relative.mean(0).amax(1)
    idle = {n: (row == 0).nonzero()[:, 0].tolist() for n, row in zip(loads.layers, relative.mean(0), strict=True)}
    return {
        "fullest": fullest.mean().item(),
        "layers": dict(zip(loads.layers, fullest.tolist(), strict=True)),
        "std_timesteps": relative.std(0, correction=0).mean().item(),
        "experts": loads.shares.shape[2],
        "unreached": {n: which for n, which in idle.items() if which},
    }


def load_sentence(n: Mapping[str, Any]) -> str:
    """`load_numbers` as a sentence."""
    most = max(n["layers"], key=n["layers"].get)
    said = (
        f"the fullest of {n['experts']} experts has {n['fullest']:.2f} times the mean load, in unit {most} "
        f"{n['layers'][most]:.2f} times; standard deviation between timesteps {n['std_timesteps']:.2f} of the mean."
    )
    return f"{said} {idle[0].upper()}{idle[1:]}." if (idle := idle_experts(n)) else said


def idle_experts(n: Mapping[str, Any]) -> str:
    """The experts that no token has reached, by name; '' where there are none."""
    named = [f"{i} of unit {layer}" for layer, which in n["unreached"].items() for i in which]
    if not named:
        return ""
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return f"no token has reached expert {', '.join(named[:NAMED])}{more}"


# ---- pictures -------------------------------------------------------------------------------------------------------


def draw_loads(loads: Loads) -> Image:
    """Two maps: experts against time, mean over units, and experts against units, mean over time."""
    from matplotlib.figure import Figure

    relative = loads.shares * loads.shares.shape[2]
    figure = Figure(figsize=(11, 3.4), dpi=110, layout="constrained")
    head(figure, "Load of experts, over the mean", bold=True)
    by_time, by_unit = figure.subplots(1, 2)
    most = max(2.0, relative.mean(0).max().item())
    for axes, values in ((by_time, relative.mean(1).T), (by_unit, relative.mean(0).T)):
        drawn = heat(axes, values, most)
        count_rows(axes, "expert")
    over_time(by_time, list(loads.times.values()))
    by_time.set_title("at each moment, mean over units", fontsize=9)
    rows = spaced(len(loads.layers), 12)
    by_unit.set_xticks(rows, [loads.layers[i] for i in rows])
    by_unit.set_xlabel("unit, 0 is the first", fontsize=9)
    by_unit.set_title("in each unit, mean over the generation", fontsize=9)
    figure.colorbar(drawn, ax=[by_time, by_unit]).ax.tick_params(labelsize=8)
    return image_of(figure)
