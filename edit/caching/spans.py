"""The site of a cache that is a span of units: computed together or predicted together.

The other site, residual branches, is in `edit.caching.branches`, gates and predictors in `edit.caching.engine`.

Specification: methods/feature-cache-baselines.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from edit.caching.engine import Cached, Gate, Predictor, anywhere, covered, each, put
from edit.denoiser import Denoiser
from edit.denoiser import End as Slot
from edit.stream import Branch, Step, Stream
from edit.unit import Wrapper, core

Target = Literal["residual", "hidden"]
End = Literal["units", "norm", "output"]


@dataclass
class Span:
    """Units first, ..., last, which are computed together or predicted together.

    Args:
        edit: whose memory this is
        first: unit in front of which the gate decides
        last: unit behind which the value is taken
        gate: decides
        predictor: of the value
        target: "residual", tokens behind the last unit less those in front of the first, added to the present ones; or
            "hidden", the tokens behind the last unit
        at: the place of an evaluation, for the predictor
        end: where the value is taken: behind the last of the "units"; where that is the model's last, also behind the
            last "norm" or the "output" layer
        text: of the span, found by `read`: "kept", it writes no text that is read later; "written"; "ended", its last
            unit leaves none
    """

    edit: Cached
    first: int
    last: int
    gate: Gate
    predictor: Predictor
    target: Target
    at: Callable[[Step], Any]
    end: End = "units"
    text: Literal["kept", "written", "ended"] = "kept"

    def wrap(self, denoiser: Denoiser, front: int | None = None) -> None:
        """Stand around the units of a denoiser.

        Args:
            denoiser: to change
            front: unit in front of which the gate wants the image tokens, in its state as "front"; None: it does not
        """
        if front is not None:
            denoiser.units[front] = Front(denoiser.units[front], self)
        self.read(denoiser)
        for i in self.places:
            denoiser.units[i] = SpanUnit(denoiser.units[i], i, self)
        for name in {"units": (), "norm": ("norm",), "output": ("norm", "output")}[self.end]:
            denoiser.ends[name] = SpanEnd(self, name, denoiser.ends.get(name))

    def read(self, denoiser: Denoiser) -> None:
        """Find what the span does to the text."""
        kinds = [core(denoiser.units[i]).anatomy.text for i in self.places]
        ends = self.last == len(denoiser.units) - 1  # nothing reads the text behind it
        self.text = "ended" if kinds[-1] == "ends" else "written" if "along" in kinds and not ends else "kept"

    def tokens(self, stream: Stream) -> Branch:
        """The tokens that the span writes."""
        return Branch(stream.image, stream.text if self.text == "written" else None)

    def around(self, index: int, unit: Callable[[Stream], Stream], stream: Stream) -> Stream:
        """A unit of the span: computed, or, where the span is predicted, passed by."""
        if stream.step is None:
            return unit(stream)
        memory = stream.step.recall(self.edit.name, self.first)
        if index == self.first:
            stream = self.enter(unit, stream, memory)
        if memory["computed"]:
            stream = unit(stream)
        if index == self.last and self.end == "units":
            stream = self.leave(stream, memory)
        return stream

    def enter(self, unit: Any, stream: Stream, memory: dict) -> Stream:
        """Decide in front of the first unit. The memory keeps for `leave`: `whole`, the stream of all samples; `rows`,
        those that are computed, None: all; `computed`, whether there are any.

        Returns:
            The stream of the samples that are computed; if none is, the predicted stream behind the last unit
        """
        chosen = self.gate.computes(core(unit), stream, memory.setdefault("gate", {}))
        if "value" not in memory:  # the sampler has begun to join branches, or ended, between two computed evaluations
            chosen = True
        flags = [chosen] if isinstance(chosen, bool) else chosen.tolist()  # the host waits here alone
        some = any(flags) if isinstance(chosen, bool) else anywhere(core(unit), any(flags), stream.image.device)
        memory["computed"], memory["whole"], memory["rows"] = some, stream, None
        if not some:
            return stream if self.end != "units" else self.rebuilt(stream, self.predicted(stream, memory))
        if all(flags):
            return stream
        assert isinstance(chosen, Tensor)
        rows = memory["rows"] = chosen.nonzero().flatten()
        run = rows if any(flags) else slice(1)  # for the other ranks alone: what comes out is left
        return stream.map(lambda v: v[run])

    def leave(self, stream: Stream, memory: dict) -> Stream:
        """Take the computed value; the stream of all samples behind the last unit, with what was computed."""
        whole, rows, computed = memory.pop("whole"), memory.pop("rows"), memory.pop("computed")
        assert whole.step is not None
        if rows is not None and not len(rows):
            stream = replace(self.rebuilt(whole, self.predicted(whole, memory)), trace=whole.trace)
        elif computed:
            value, at = self.tokens(stream), self.at(whole.step)
            entry = self.tokens(whole)
            if self.target == "residual":
                value = each(torch.sub, value, entry if rows is None else each(lambda v: v[rows], entry))
            if rows is not None:
                joined = put(self.predicted(whole, memory), rows, self.tokens(stream))
                stream = replace(self.rebuilt(whole, joined), trace=whole.trace)
            self.predictor.observe(memory.setdefault("value", {}), at, value, rows)
        executed = whole.image.new_full((len(whole.image),), float(computed))
        if rows is not None:
            executed = torch.zeros_like(executed).index_fill(0, rows, 1.0)
        return replace(stream, trace={**stream.trace, **{self.edit.record(i): executed for i in self.places}})

    @property
    def places(self) -> range:
        return range(self.first, self.last + 1)

    def predicted(self, stream: Stream, memory: dict) -> Branch:
        """The tokens behind the last unit, predicted for all samples of the stream in front of the first."""
        assert stream.step is not None
        value = self.predictor.predict(memory["value"], self.at(stream.step))
        return value if self.target == "hidden" else each(torch.add, self.tokens(stream), value)

    def rebuilt(self, stream: Stream, tokens: Branch) -> Stream:
        """The stream behind the last unit with these tokens."""
        text = {"kept": stream.text, "written": tokens.text, "ended": None}[self.text]
        return replace(stream, image=tokens.image, text=text)


class SpanEnd:
    """A part of the readout that belongs to a span: a slot of `Denoiser.ends`, around what stood there (`inner`)."""

    def __init__(self, span: Span, name: str, inner: Slot | None = None):
        self.span, self.name, self.inner = span, name, inner

    def __call__(self, stream: Stream, run: Callable[[Stream], Stream]) -> Stream:
        if self.inner is not None:
            run = partial(self.inner, run=run)
        if stream.step is None:
            return run(stream)
        memory = stream.step.recall(self.span.edit.name, self.span.first)
        last = self.name == self.span.end
        if memory["computed"]:
            stream = run(stream)
        elif last:
            stream = self.span.rebuilt(stream, self.span.predicted(stream, memory))
        return self.span.leave(stream, memory) if last else stream


class SpanCached(Cached):
    """A cache of one span: all units but those that always run."""

    @property
    def spared(self) -> tuple[int, int]:
        """Units in front of the span and behind it, which always run."""
        return 0, 0

    def units_of(self, denoiser: Denoiser) -> range:
        """The units of the span.

        Raises:
            ValueError: if there are none
        """
        depth, (front, back) = len(denoiser.units), self.spared
        if not (found := range(front, depth - back)):
            raise ValueError(
                f"{type(self).__name__}: of the {depth} units of this {denoiser.name} the first {front} and the last "
                f"{back} always run, so none is left to cache: lower these numbers"
            )
        return found

    def covers(self, denoiser: Denoiser) -> Collection[tuple[int, str]]:
        return covered(denoiser, self.units_of(denoiser))

    def cache(
        self,
        denoiser: Denoiser,
        gate: Gate,
        predictor: Predictor,
        target: Target = "residual",
        front: int | None = None,
        end: End = "units",
    ) -> None:
        """Stand around the units of the span; arguments as of `Span` and `Span.wrap`.

        Raises:
            ValueError: if the family's readout has no such end, or another cache predicts one of these units
        """
        units = self.units_of(denoiser)
        self.refuse_cached(denoiser)
        if end != "units" and denoiser.family.last_norm is Denoiser.last_norm:
            raise ValueError(
                f"{type(self).__name__}: this {denoiser.name} does not tell its last norm from its output layer: cache "
                "behind the last unit"
            )
        Span(self, units[0], units[-1], gate, predictor, target, self.at, end).wrap(denoiser, front)


class Front(Wrapper):
    """A unit in front of a span, whose input the gate compares with the span's."""

    def __init__(self, unit: Any, span: Span):
        super().__init__(unit)
        self.span = span

    def __call__(self, stream: Stream) -> Stream:
        if stream.step is not None:
            memory = stream.step.recall(self.span.edit.name, self.span.first)
            memory.setdefault("gate", {})["front"] = stream.image
        return self.unit(stream)


class SpanUnit(Wrapper):
    """A unit of a span."""

    def __init__(self, unit: Any, index: int, span: Span):
        super().__init__(unit)
        self.index, self.span = index, span

    def __call__(self, stream: Stream) -> Stream:
        return self.span.around(self.index, self.unit, stream)
