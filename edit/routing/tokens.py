"""Units that run their feed-forward on some of the image tokens: factors while training, fewer rows afterwards.

A router chooses tokens in front of the feed-forward, from the output of attention. Fused units, whose branches read the
same tokens, choose from their input and run their output layer on the chosen tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from edit.routing.adapted import one_sequence
from edit.routing.dydit_routers import TOKENS
from edit.stream import Branch, Layout, Routing, Stream
from edit.unit import Run, Unit

Pointwise = Callable[..., Tensor]  # (unit, f, kept, *tokens) -> f(*tokens) where kept, else zero


def multiplied(unit: Unit, f: Callable[..., Tensor], kept: Tensor, *tokens: Tensor) -> Tensor:
    """Run on all of b s c, times `kept` b s."""
    out = f(*tokens)
    return out * kept[..., None].to(out.dtype)


def gathered(unit: Unit, f: Callable[..., Tensor], kept: Tensor, *tokens: Tensor) -> Tensor:
    """Run on those tokens of the whole batch that are kept, as one sequence; their number is waited for."""
    rows = None if kept.is_meta else kept.flatten().nonzero()[:, 0]
    if rows is None or len(rows) == kept.numel():
        return f(*tokens)
    with one_sequence(unit, rows // kept.shape[1]):
        out = f(*(x.flatten(0, 1)[None, rows] for x in tokens))[0]
    return out.new_zeros(kept.numel(), out.shape[1]).index_copy(0, rows, out).unflatten(0, kept.shape)


def with_others(layout: Layout, count: int) -> Tensor:
    """Which of `count` tokens are kept, b count: registers, further tokens and text all are."""
    assert layout.routing is not None and layout.routing.tokens is not None
    image = layout.routing.tokens
    stream = F.pad(image, (layout.registers, layout.further), value=1.0)
    if (text := count - stream.shape[1]) == 0:
        return stream
    return F.pad(stream, (text, 0) if layout.side == "front" else (0, text), value=1.0)


def choosing(unit: Unit, choose: Callable[[Stream], Tensor], run: Pointwise, fused: bool) -> Unit:
    """The unit with its slots filled, in place.

    Args:
        unit: of any family
        choose: which image tokens of a stream are kept: b n
        run: `multiplied` or `gathered`
        fused: as its anatomy tells, which a narrow copy cannot
    """
    for name in ("ffn", "fused") if fused else ("ffn",):
        setattr(unit.slots, name, OnChosen(unit, name, run))
    unit.slots.branch = Choice(unit, choose, fused)
    return unit


class OnChosen:
    """A slot of functions of single tokens, run on the chosen ones."""

    def __init__(self, unit: Unit, name: str, run: Pointwise):
        self.unit, self.part, self.run = unit, getattr(unit.slots, name), run

    def __call__(self, *given: Any) -> Tensor:
        *tokens, layout = given
        kept = with_others(layout, tokens[0].shape[1])
        return self.run(self.unit, lambda *chosen: self.part(*chosen, layout), kept, *tokens)


class Choice:
    """The slot `branch`: tells the layout which tokens are chosen, once per call of the unit, and notes it as TOKENS.

    Of branches that a fused unit traces apart, tokens that were not chosen are zero.
    """

    def __init__(self, unit: Unit, choose: Callable[[Stream], Tensor], fused: bool):
        self.before, self.choose, self.fused = unit.slots.branch, choose, fused

    def __call__(self, stream: Stream, name: str, run: Run) -> Branch:
        if name != "feed" and not self.fused:
            return self.before(stream, name, run)
        layout = stream.layout
        assert layout.notes is not None
        if TOKENS not in layout.notes:
            layout.note(TOKENS, self.choose(stream))
        tokens = layout.notes[TOKENS]
        routing = replace(layout.routing or Routing(), tokens=tokens)
        branch = self.before(replace(stream, layout=replace(layout, routing=routing)), name, run)
        if name != "attention":
            return branch
        return Branch(branch.image * tokens[..., None].to(branch.image.dtype), branch.text)
