"""HarmoniCa: which residual branches are computed at which evaluation is learned on the sampler's own path.

HarmoniCa (ICML 2025, arXiv 2410.01723). Evaluations i are counted from the first one, the noisiest (the paper counts
them down), branches m are columns as in `edit.caching.table_reuse`. With a router r = sigmoid(rho), [T, M], that reads
no input, o the branch before its gate and C what is remembered of it:

    training (soft):   y = r o + (1 - r) C;  C <- y without gradient  where r > theta, else it stays
    inference (hard):  r > theta: y = o, C <- o;  else y = C, and the branch runs neither norm nor product

The first row is fixed: it computes all. `relaxation="ste"` trains with hard decisions and the gradient of the mixture,
so that training sees what inference does; its lambda_i is 0 as long as the hard row i repeats nothing. A router is soft
at evaluations of a generation while its module is in training mode: in updates of `recipe=rollout` and in
`StepWiseDenoising.refresh`. In eval mode (previews, reports) it is hard. Outside of generations the model is dense:
that is the teacher.

`edit.caching.harmonica_training` minimises the distance to the dense model and, for speed, beta sum_m r_(i,m) / M. The
paper has a sum over m with 7e-8 for the M = 56 of DiT-XL/2; here beta weighs the mean, 56 * 7e-8 = 4e-6, and means the
same at any M. Tune it with the number of steps, the latent's scale and `iepo`.

An artifact has the table alone (`TableReuse`). Ours: fused units, two-stream and PixArt's branches, "ste".

Specification: methods/harmonica.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from edit.caching.engine import each
from edit.caching.table_reuse import Rows, TableBranch, Tabled, TableReuse
from edit.denoiser import Denoiser
from edit.inputs.limits import Inside, NotNegative, Steps, check_numbers
from edit.sampling import Sampler
from edit.stream import Branch, Step, Stream
from edit.unit import Run, Unit

FIRST = 5.0  # rho of the first row
TABLE = -1  # in place of a unit, in the memory of a generation: the table that is read once


class Router(nn.Module):
    """rho, a parameter for each row: an update reaches one, and momentum moves no other.

    Args:
        steps: T, evaluations
        width: M, residual branches
    """

    on: Tensor  # T, bool: evaluations at which anything is replayed; all but in `StepWiseDenoising.refresh`

    def __init__(self, steps: int, width: int):
        super().__init__()
        first = nn.Parameter(torch.full((width,), FIRST), requires_grad=False)
        self.rho = nn.ParameterList([first, *(nn.Parameter(torch.randn(width)) for _ in range(steps - 1))])
        self.register_buffer("on", torch.ones(steps, dtype=torch.bool))

    def weight(self, index: int, column: int) -> Tensor:
        """r, a scalar with a graph."""
        return torch.where(self.on[index], self.rho[index][column].sigmoid(), 1.0)

    def rows(self, theta: float) -> Rows:
        """The hard table; of a router on the meta device, which has no numbers, all is computed."""
        if self.on.is_meta:
            return ["1" * len(row) for row in self.rho]
        hard = (torch.stack([*self.rho]).sigmoid() > theta).tolist()  # the host waits here alone
        return ["1" * len(hard[0]), *("".join("01"[on] for on in row) for row in hard[1:])]


@dataclass
class HarmoniCa(Tabled):
    """A cache with a learned table; all else is frozen.

    Args:
        steps: T, evaluations of a generation, for which the table is
        theta: a branch is computed where r is above; far below 0.5, as r is driven down where replay is harmless
        beta: weight of the mean of r; larger is faster
        relaxation: of decisions in training: "soft", as published, or "ste"
        units: which, counted from 0; none given: all
        branches: which of "attention", "feed", "cross", "second", "fused"; none given: all
        sampler: that it is trained for; others are refused. None: any of as many evaluations
    """

    steps: Steps = 10
    theta: Inside = 0.1
    beta: NotNegative = 4e-6
    relaxation: Literal["soft", "ste"] = "soft"
    units: tuple[int, ...] = ()
    branches: tuple[str, ...] = ()
    sampler: Sampler | None = None

    def __post_init__(self):
        check_numbers(self)
        self.units, self.branches = tuple(self.units), tuple(self.branches)
        if self.relaxation not in ("soft", "ste"):
            raise ValueError(f"HarmoniCa: relaxation is soft or ste, got {self.relaxation!r}")
        if self.sampler is not None and (made := self.sampler.solver.evaluations) != self.steps:
            raise ValueError(f"HarmoniCa: steps={self.steps}, but the sampler makes {made} evaluations: set it to that")

    @property
    def count(self) -> int:
        return self.steps

    def known(self, step: Step) -> Rows | None:
        return step.memory.get((self.name, TABLE, step.branch), {}).get("rows")

    def apply(self, denoiser: Denoiser) -> nn.Module:
        columns, units = self.columns(denoiser), self.sites(denoiser)
        self.refuse_cached(denoiser)
        own = Router(self.steps, sum(map(len, columns.values())))
        for i, mine in columns.items():
            units[i].slots.branch = RoutedBranch(units[i], i, self, mine, own)
        return own

    def trainable(self, name: str) -> bool:
        return name.startswith("edits.") and not name.endswith(".rho.0")  # the first row is fixed

    def losses(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights = self.weights(trace)
        return {} if weights is None else {"computed": self.beta * weights.mean(0)}

    def metrics(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights = self.weights(trace)
        return {} if weights is None else {"weight": weights.sum(0), "above": (weights > self.theta).float().mean()}

    def weights(self, trace: Mapping[str, Tensor]) -> Tensor | None:
        """r of an evaluation: m b; None: it was not soft."""
        found = [v for key, v in trace.items() if key.startswith(f"{self.name}.weight.")]
        return torch.stack(found) if found else None

    def compact(self, own: nn.Module | None) -> tuple[TableReuse, None]:
        assert isinstance(own, Router)
        return TableReuse(tuple(own.rows(self.theta)), self.units, self.branches, self.sampler), None


class RoutedBranch(TableBranch):
    """The slot `branch`: mixed while the router trains, else computed or repeated."""

    edit: HarmoniCa

    def __init__(self, unit: Unit, index: int, edit: HarmoniCa, columns: Mapping[str, int], own: Router):
        super().__init__(unit, index, edit, columns, self.table)
        self.own = own

    def table(self, step: Step) -> Rows:
        memory = step.recall(self.edit.name, TABLE)
        if "rows" not in memory:
            memory["rows"] = self.own.rows(self.edit.theta)
        return memory["rows"]

    @torch.compiler.disable(recursive=False)  # what is run stays compiled
    def __call__(self, stream: Stream, name: str, run: Run) -> Branch:
        if stream.step is None or not self.own.training or (column := self.column(name)) is None:
            return super().__call__(stream, name, run)
        return self.mixed(stream, stream.step, name, column, self.before(stream, name, run))

    @torch.compiler.disable
    def mixed(self, stream: Stream, step: Step, name: str, column: int, fresh: Branch) -> Branch:
        """The mixture of the computed and the remembered value; takes what is to be remembered."""
        edit, r = self.edit, self.own.weight(step.index, column)
        stream.layout.note(f"{edit.name}.weight.{column}", r.expand(len(stream.image)))
        memory = step.recall(edit.name, self.index).setdefault(name, {})
        if "value" not in memory:
            memory["value"] = each(Tensor.detach, fresh)
            return fresh
        old, kept = memory["value"], r > edit.theta
        w = r if edit.relaxation == "soft" else kept.to(r.dtype) + (r - r.detach())
        mixed = each(lambda o, c: torch.lerp(c, o, w.to(o.dtype)), fresh, old)
        # chosen on the device: the host does not wait
        memory["value"] = each(lambda y, c: torch.where(kept, y.detach(), c), mixed, old)
        return mixed
