"""The coordinate check: whether what a model computes keeps its size, in training, as the model gets wider.

    l1_k(w) = mean |coordinate| of a module's output before update k, at width w;   slope = d log2 l1 / d log2 w

Models of several widths are trained for a few steps at a large rate, always on the same batch. Under muP every slope is
about 0 at every step: pass, |slope| <= 0.2. In the usual parametrisation they grow. The output before the first update
is no part of it: it may shrink as w^(-1/2) where it does not start at zero. What is zero has no slope.

Source: muP (arXiv 2203.03466, appendix D.1; 2505.15270); specification methods/mup.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import log2
from statistics import fmean

import torch
from torch import Tensor, nn

from edit.denoiser import Denoiser
from edit.edits import grouped, trains
from edit.groups import PLAIN
from edit.inputs.limits import Count, Inside, NotNegative, Positive, Share, Steps, check_numbers
from edit.predictions import default_objective
from edit.stream import Condition
from edit.widths import scale_of

STEEP = 0.2  # largest size of a slope that passes
OUTPUT = "end.output"
TEXT = 8  # tokens of a prompt


@dataclass(frozen=True)
class Trial:
    """How models are trained.

    Args:
        steps: updates
        seeds: models of each width, with a batch each; sizes are their means
        batch: samples
        lr, betas, eps, weight_decay: of AdamW; groups of edits multiply rate and decay
    """

    steps: Steps = 4
    seeds: Count = 3
    batch: Count = 16
    lr: Positive = 0.01
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Inside = 1e-8
    weight_decay: NotNegative = 0.0

    def __post_init__(self):
        check_numbers(self)


@dataclass(frozen=True)
class Row:
    """One module at one step.

    Args:
        name: "unit.<i>", "unit.<i>.text", "end.norm", "end.output", or of a module with parameters
        step: updates so far
        sizes: l1 at each width
        slope: None: some are zero
    """

    name: str
    step: int
    sizes: tuple[float, ...]
    slope: float | None

    @property
    def judged(self) -> bool:
        return self.slope is not None and not (self.step == 0 and self.name == OUTPUT)

    @property
    def passes(self) -> bool:
        return not self.judged or abs(self.slope or 0.0) <= STEEP


def coordinates(build: Callable[[int], Denoiser], widths: Sequence[int], trial: Trial) -> list[Row]:
    """The check of all modules, by step.

    Args:
        build: makes a fresh model of a width, its edits applied
        widths: at least two
        trial: how they are trained

    Raises:
        ValueError: if there are fewer widths, or one diverges to something that is no number
    """
    if len(set(widths)) < 2:
        raise ValueError(f"the coordinate check compares at least two widths, got {list(widths)}")
    found: dict[tuple[int, str], list[list[float]]] = {}
    for width in widths:
        for seed in range(trial.seeds):
            torch.manual_seed(seed)
            for step, sizes in enumerate(trained(build(width), seed, trial)):
                for name, size in sizes.items():
                    found.setdefault((step, name), [[] for _ in widths])[list(widths).index(width)].append(size)
    means = {key: tuple(fmean(sizes) for sizes in each) for key, each in found.items() if all(each)}
    if bad := next((key for key, sizes in means.items() if not all(size < float("inf") for size in sizes)), None):
        raise ValueError(f"{bad[1]} is no number any more after {bad[0]} updates: choose a smaller lr")
    return [Row(name, step, sizes, slope(widths, sizes)) for (step, name), sizes in means.items()]


def slope(widths: Sequence[float], sizes: Sequence[float]) -> float | None:
    """Least squares in logarithms of base 2; None: there is none of zero."""
    if min(sizes) <= 0:
        return None
    x, y = [log2(w) for w in widths], [log2(s) for s in sizes]
    mx, my = fmean(x), fmean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


# ---- one model ------------------------------------------------------------------------------------------------------


def trained(denoiser: Denoiser, seed: int, trial: Trial) -> Iterator[dict[str, float]]:
    """Sizes before each update, and after the last: by module."""
    objective = default_objective(denoiser)
    x, noise, t, condition = batch_for(denoiser, trial.batch, seed)
    x_t, taps = objective.corrupt(x, noise, t), (*range(len(denoiser.units)), *ends(denoiser))
    optimizer = optimizer_for(denoiser.train(), trial)
    for step in range(trial.steps + 1):
        with watched(denoiser) as sizes:
            out = denoiser(x_t, t, condition, taps=taps)
        sizes |= {k: v.detach() for k, v in out.trace.items() if k.startswith(("unit.", "end."))}
        yield {name: value.float().abs().mean().item() for name, value in sizes.items()}
        if step == trial.steps:
            return
        losses = dict(objective.losses(out, x, noise, x_t, t))
        for name, edit in denoiser.applied.items():
            losses |= {f"{name}.{k}": v for k, v in edit.losses(out.trace).items()}
        optimizer.zero_grad(set_to_none=True)
        torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
        optimizer.step()


def ends(denoiser: Denoiser) -> tuple[str, ...]:
    """The parts of the readout that can be tapped."""
    return () if denoiser.family.last_norm is Denoiser.last_norm else ("norm", "output")


def batch_for(denoiser: Denoiser, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Condition]:
    """Samples and noise b c *sizes, times b, conditions: all normal or even, and the same at every width."""
    g = torch.Generator().manual_seed(seed)

    def drawn(v: Tensor) -> Tensor:
        return torch.randn(v.shape, generator=g) if v.is_floating_point() else v

    x, noise = (torch.randn(count, *denoiser.sample_shape, generator=g) for _ in range(2))
    condition = denoiser.example(count, text=TEXT).map(drawn)
    if (classes := denoiser.facts.classes) is not None:
        condition = Condition(label=torch.randint(classes, (count,), generator=g))
    return x, noise, torch.rand(count, generator=g), condition


def optimizer_for(denoiser: Denoiser, trial: Trial) -> torch.optim.Optimizer:
    """AdamW with the groups of the edits."""
    said = grouped(denoiser)
    groups = []
    for name, p in denoiser.named_parameters():
        if trains(denoiser, name):
            own = said.get(name, PLAIN)
            groups.append({"params": [p], "lr": trial.lr * own.lr, "weight_decay": trial.weight_decay * own.decay})
    return torch.optim.AdamW(groups, betas=trial.betas, eps=trial.eps)


@contextmanager
def watched(denoiser: Denoiser) -> Iterator[dict[str, Tensor]]:
    """Outputs of all modules with parameters of their own inside the block; of one that is called again, the last.

    The output layer is left out: it is the tap "output".
    """
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, object, object], None]:
        def record(module: nn.Module, given: object, out: object) -> None:
            if isinstance(out, Tensor) and out.is_floating_point():
                outputs[name] = out.detach()

        return record

    parts = {name: m for name, m in denoiser.named_modules() if next(m.parameters(recurse=False), None) is not None}
    for name, _ in denoiser.model.named_parameters():
        if (scale := scale_of(denoiser.facts.scales, name)) is not None and scale.kind == "output":
            del parts[f"model.{name.rpartition('.')[0]}"]
    handles = [m.register_forward_hook(hook(name)) for name, m in parts.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
