"""Caches of residual branches whose feed-forward renews a part of its tokens: what ToCa and DuCa have in common.

An evaluation is computed, *partial* or replayed. At a partial one all branches are repeated but the feed-forward, which
runs on the k tokens of the highest score alone, gathered into a shorter sequence; their values replace the old ones in
the cache, and the others stay. Attention is never run on a part of the tokens.

Image tokens and, in two-stream families, text tokens are chosen apart, the same part of each; k is rounded down.
In a generation fused units run as the two branches that they are made of, so that the feed-forward has tokens of its
own; their computed evaluations then differ from the plain model's in the last bit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from edit.caching.branches import BranchCached
from edit.caching.engine import Latest, Predictor, each, names_of
from edit.denoiser import Denoiser
from edit.stream import Branch, Layout, Step, Stream
from edit.subset import best, gathered, wide
from edit.unit import Divides, Run, Unit

Kind = Literal["computed", "partial", "replayed"]
FEED = "feed"


class TokenCached(BranchCached):
    """A cache of branches that renews tokens; a method is a dataclass with a schedule, a share and scores."""

    interval: int  # N, in evaluations; 1 computes all

    units = ()
    branches = ()

    @property
    def predictor(self) -> Predictor:
        return Latest()

    @abstractmethod
    def kind(self, step: Step) -> Kind:
        """What an evaluation is, whatever is remembered."""

    @abstractmethod
    def share(self, step: Step, index: int, depth: int) -> float:
        """The part of the tokens that unit `index` of `depth` renews at a partial evaluation, in [0, 1]."""

    @abstractmethod
    def scores(self, stream: Stream, index: int, memory: dict, age: Branch) -> Branch:
        """What tokens are chosen by, the highest first.

        Args:
            stream: in front of the branch, with a step
            index: of the unit
            memory: of the unit in this generation and guidance branch, with what `watched` has put there
            age: b n of image tokens, b l of text tokens where the branch writes them: evaluations since each was run

        Returns:
            b n, and b l where there are ages of the text; of any type
        """

    def watched(self, unit: Unit, index: int) -> None:  # noqa: B027 - some scores need nothing
        """Fill further slots of a unit, which see what scores are made of."""

    def due(self, step: Step, branch: str) -> bool:
        return self.kind(step) == "computed"

    def remembers(self, step: Step, branch: str) -> bool:
        after = step.index + 1
        return self.interval > 1 and after < step.count and self.kind(replace(step, index=after)) != "computed"

    def apply(self, denoiser: Denoiser) -> None:
        """Raises ValueError, too, if tokens of a unit's feed-forward cannot be run apart."""
        units = self.sites(denoiser)
        for i, unit in units.items():
            self.refuse_filled(unit, i, denoiser, ("ffn", "text_ffn"), "may mix tokens")
            if unit.anatomy.feed is None:
                raise ValueError(
                    f"{type(self).__name__}: the feed-forward of unit {i} of this {denoiser.name} is not two linear "
                    "layers, so it is not known to run on single tokens: use a cache of whole branches"
                )
        self.refuse_cached(denoiser)
        for i, unit in units.items():
            unit.slots.branch = TokenBranch(unit, i, len(denoiser.units), self)
            if self.interval > 1:
                self.watched(unit, i)

    def refuse_filled(self, unit: Unit, index: int, denoiser: Denoiser, slots: tuple[str, ...], why: str) -> None:
        """Raises ValueError if another edit has filled one of these slots of a unit."""
        if found := [slot for slot in slots if slot in unit.slots]:
            raise ValueError(
                f"{type(self).__name__}: another edit has filled the slot {found[0]} of unit {index} of this "
                f"{denoiser.name}, which {why}: leave one of the two out"
            )


class TokenBranch(Divides):
    """The slot `branch`: computed, repeated, or renewed in part."""

    def __init__(self, unit: Unit, index: int, depth: int, edit: TokenCached):
        self.before, self.index, self.depth, self.edit = unit.slots.branch, index, depth, edit
        self.count = len(set(names_of(unit)) - {"fused"})

    @torch.compiler.disable(recursive=False)
    def __call__(self, stream: Stream, name: str, run: Run) -> Branch:
        step, edit = stream.step, self.edit
        if step is None:
            return self.before(stream, name, run)
        state = step.memory.get((edit.name, self.index, step.branch), {}).get(name)
        kind = "computed" if state is None else edit.kind(step)
        if kind == "computed":
            branch, executed = self.before(stream, name, run), 1.0
            if edit.remembers(step, name):
                step.recall(edit.name, self.index)[name] = {"value": branch, "run": ran(branch, step)}
        elif kind == "partial" and name == FEED:
            branch, executed = self.renewed(stream, run, state)
        else:
            branch, executed = state["value"], 0.0
        self.note(stream, executed)
        return branch

    def divides(self, stream: Stream) -> bool:
        return stream.step is not None and self.edit.interval > 1

    def note(self, stream: Stream, executed: float) -> None:
        """The executed part of the unit: the mean over its branches."""
        layout, record = stream.layout, self.edit.record(self.index)
        assert layout.notes is not None
        share = stream.image.new_full((len(stream.image),), executed / self.count)
        layout.note(record, layout.notes[record] + share if record in layout.notes else share)

    def renewed(self, stream: Stream, run: Run, state: dict) -> tuple[Branch, float]:
        """The value with chosen tokens run again, and the part of the image tokens that they are."""
        step, edit, old = stream.step, self.edit, state["value"]
        assert step is not None
        share = edit.share(step, self.index, self.depth)
        counts = [int(share * part.shape[1] + 1e-6) for part in old if part is not None]
        if not any(counts):
            return old, 0.0
        age = each(lambda at: step.index - at, state["run"])
        scores = edit.scores(stream, self.index, step.recall(edit.name, self.index), age)
        picks = [best(part, k) for part, k in zip(scores, counts, strict=False) if part is not None]
        rows = Branch(*picks)
        given = Branch(stream.image, None if old.text is None else stream.text)
        new = self.before(alone(stream, each(gathered, given, rows)), FEED, run)
        state["value"] = each(lambda v, i, part: v.scatter(1, wide(i, v), part.to(v.dtype)), old, rows, new)
        state["run"] = each(lambda at, i: at.scatter(1, i, float(step.index)), state["run"], rows)
        return state["value"], counts[0] / old.image.shape[1]


def ran(branch: Branch, step: Step) -> Branch:
    """The number of this evaluation for every token: b n, b l float."""
    return each(lambda v: v.new_full(v.shape[:2], step.index, dtype=torch.float32), branch)


def alone(stream: Stream, tokens: Branch) -> Stream:
    """The stream with these tokens alone, for parts that treat tokens one by one."""
    if tokens.text is None:
        return replace(stream, image=tokens.image)
    layout = replace(stream.layout, text_length=tokens.text.shape[1])
    return replace(stream, image=tokens.image, text=tokens.text, layout=layout)


class Watched:
    """An attention slot that also keeps what scores are made of, where the next evaluation is not computed.

    Args:
        before: what filled the slot
        index: of the unit
        edit: whose memory this is
        seen: makes b s of queries, keys, values and layout
        name: under which it is kept, as `Branch`
        joint: whether keys are those of a joint sequence
    """

    def __init__(
        self,
        before: Callable[..., Tensor],
        index: int,
        edit: TokenCached,
        seen: Callable[[Tensor, Tensor, Tensor, Layout], Tensor],
        name: str,
        joint: bool,
    ):
        self.before, self.index, self.edit, self.seen, self.name, self.joint = before, index, edit, seen, name, joint

    @torch.compiler.disable(recursive=False)
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, step: Step | None) -> Tensor:
        if step is not None and self.edit.remembers(step, ""):
            seen = self.seen(q, k, v, layout)
            parts = layout.split(seen) if self.joint else Branch(seen)
            step.recall(self.edit.name, self.index)[self.name] = parts
        return self.before(q, k, v, layout, step)
