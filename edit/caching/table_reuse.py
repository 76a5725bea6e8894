"""Table reuse: a table says at which evaluation each residual branch is computed; else its last value is repeated.

With F a branch before its gate, norm included, and s the evaluation, counted from the first one, the noisiest:

    F_s = F(x_s)  where the table has 1 at (s, F), else F_s = F_(s-1);  x <- x + g_s F_s

A column is a residual branch of a chosen unit: units in order, and in each of them its branches in the order of
`edit.caching.engine.names_of`. A fused unit has one column, also where another edit divides its branch. In two-stream
families image and text of a branch share a column. Gates and modulation are those of the present step; a repeated
branch runs neither norm nor product. The first evaluation computes all, as nothing is remembered.

A table is written by hand, or is what is left of a learned one (`edit.caching.harmonica`). It belongs to the sampler
that it was made for. A value is remembered only where the next evaluation repeats it.

Specification: methods/harmonica.md, arXiv 2410.01723.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from edit.caching.branches import BranchCached, CachedBranch
from edit.caching.engine import Latest, Predictor, names_of
from edit.denoiser import Denoiser
from edit.inputs.limits import check_numbers
from edit.sampling import Sampler
from edit.stream import Branch, Step, Stream
from edit.unit import Run, Unit

Rows = Sequence[str]  # of each evaluation a digit for each column, or one for all: "1" is computed, "0" is repeated


class Tabled(BranchCached):
    """A cache of residual branches that decides for each evaluation, unit and branch."""

    sampler: Sampler | None  # that the table was made for

    @property
    @abstractmethod
    def count(self) -> int:
        """Evaluations of the table."""

    @abstractmethod
    def known(self, step: Step) -> Rows | None:
        """The table, if it is known without the edit's own module; `graphs` asks before an evaluation."""

    @property
    def predictor(self) -> Predictor:
        return Latest()

    def due(self, step: Step, branch: str) -> bool:
        """Whether any unit computes a branch; which ones, `kind` tells."""
        rows = self.known(step)
        return rows is None or "1" in rows[step.index]

    def kind(self, step: Step) -> Hashable:
        rows = self.known(step)
        return None if rows is None else (rows[step.index], *rows[step.index + 1 : step.index + 2])

    def columns(self, denoiser: Denoiser) -> dict[int, dict[str, int]]:
        """Of each unit with columns, by index: its branches, and the column of each."""
        found: dict[int, dict[str, int]] = {}
        count = 0
        for i, unit in self.sites(denoiser).items():
            names = ("fused",) if unit.anatomy.fused else names_of(unit)
            if names := [n for n in names if not self.branches or n in self.branches]:
                found[i] = {name: count + k for k, name in enumerate(names)}
                count += len(names)
        return found

    def check(self, sampler: Sampler, times: tuple[float, ...]) -> None:
        super().check(sampler, times)
        who, count = type(self).__name__, len(times) - 1
        if count != self.count:
            raise ValueError(
                f"{who}: the table is of {self.count} evaluations, this sampler makes {count}: sample in as many, or "
                "make a table for them"
            )
        if self.sampler is None:
            return
        if sampler.solver != self.sampler.solver:
            raise ValueError(
                f"{who}: the table was made for {self.sampler.solver}, got {sampler.solver}: sample with that one, or "
                "make a table for this one"
            )
        if (given := regime(sampler)) != (wanted := regime(self.sampler)):
            raise ValueError(
                f"{who}: the table was made for a sampler {wanted}, got one {given}: guide as it did, at any scale, or "
                "make a table for this one"
            )


def regime(sampler: Sampler) -> str:
    """What a sampler asks a model at each evaluation, in words; the scale of guidance is no part of it."""
    words = [
        "without guidance" if sampler.guidance == 1 else f"with guidance at times {list(sampler.interval)}",
        "" if sampler.guidance == 1 or sampler.channels is None else f"of {sampler.channels} channels",
        "with perturbation" if sampler.perturbation else "",
    ]
    return ", ".join(word for word in words if word)


@dataclass
class TableReuse(Tabled):
    """A cache of residual branches with a table; it does nothing while the model is trained.

    Args:
        rows: for each evaluation, from the first one on, a digit for each column, or one digit for all: "1" computes,
            "0" repeats. In YAML with quotes
        units: which, counted from 0; none given: all
        branches: which of "attention", "feed", "cross", "second", "fused"; none given: all
        sampler: that the table was made for: another solver, and guidance where it had none, are refused. None: any of
            as many evaluations
    """

    rows: tuple[str, ...]
    units: tuple[int, ...] = ()
    branches: tuple[str, ...] = ()
    sampler: Sampler | None = None

    def __post_init__(self):
        check_numbers(self)
        self.rows, self.units, self.branches = tuple(self.rows), tuple(self.units), tuple(self.branches)
        odd = [row for row in self.rows if not isinstance(row, str) or not row or set(row) - {"0", "1"}]
        if odd or not self.rows:
            raise ValueError(
                f"TableReuse: each of rows is a text of the digits 0 and 1, got {odd[0] if odd else 'no row'!r}: write "
                'one for each evaluation, as in ["1", "0"]'
            )

    @property
    def count(self) -> int:
        return len(self.rows)

    def known(self, step: Step) -> Rows:
        return self.rows

    def apply(self, denoiser: Denoiser) -> None:
        columns, units = self.columns(denoiser), self.sites(denoiser)
        width = sum(map(len, columns.values()))
        if odd := [row for row in self.rows if len(row) not in (1, width)]:
            raise ValueError(
                f"TableReuse: the chosen units of this {denoiser.name} have {width} residual branches, got a row of "
                f"{len(odd[0])}: choose the units and branches that the table is of"
            )
        self.refuse_cached(denoiser)
        for i, mine in columns.items():
            units[i].slots.branch = TableBranch(units[i], i, self, mine, self.known)


class TableBranch(CachedBranch):
    """The slot `branch`: computed, or repeated.

    Args:
        unit, index, edit: as of `CachedBranch`
        columns: of the unit's branches
        rows: makes the table at an evaluation
    """

    edit: Tabled

    def __init__(self, unit: Unit, index: int, edit: Tabled, columns: Mapping[str, int], rows: Callable[[Step], Rows]):
        super().__init__(unit, index, edit)
        self.columns, self.rows = columns, rows

    def column(self, name: str) -> int | None:
        """Of a branch, and of both parts of a fused one; None: it has none."""
        return self.columns.get(name, self.columns.get("fused"))

    @torch.compiler.disable(recursive=False)  # what is run stays compiled
    def __call__(self, stream: Stream, name: str, run: Run) -> Branch:
        if self.column(name) is None:
            return self.before(stream, name, run)
        return super().__call__(stream, name, run)

    @torch.compiler.disable
    def predicted(self, stream: Stream, step: Step, name: str) -> Branch | None:
        edit, layout = self.edit, stream.layout
        state = step.memory.get((edit.name, self.index, step.branch), {}).get(name)
        executed = state is None or self.computes(step, name)
        assert layout.notes is not None
        share = executed / (len(self.columns) if name in self.columns else 2)  # of a fused branch that is divided
        before = layout.notes.get(record := edit.record(self.index))
        now = stream.image.new_full((len(stream.image),), share)
        layout.note(record, now if before is None else before + now)
        return None if executed else edit.predictor.predict(state, None)

    @torch.compiler.disable
    def observe(self, step: Step, name: str, branch: Branch) -> None:
        memory = step.recall(self.edit.name, self.index)
        if step.index + 1 < self.edit.count and not self.computes(step, name, 1):
            self.edit.predictor.observe(memory.setdefault(name, {}), None, branch)
        else:
            memory.pop(name, None)

    def computes(self, step: Step, name: str, ahead: int = 0) -> bool:
        """What the table says of this evaluation, or of one that follows."""
        row, column = self.rows(step)[step.index + ahead], self.column(name)
        assert column is not None
        return row[column if len(row) > 1 else 0] == "1"
