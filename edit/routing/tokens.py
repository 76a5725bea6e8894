"""Units that run their feed-forward on some of the image tokens: factors while training, fewer rows afterwards.

Which tokens is chosen between a unit's two branches, where a DiT's router sees what attention has made of them; FLUX's
single units, whose branches read the same tokens, choose from their input and run their output layer on as few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edit.backbones.flux import SingleUnit, split
from edit.backbones.stock import finite
from edit.denoiser import Unit
from edit.routing.slices import masked, one_sequence
from edit.stream import Branch, Routing, Stream, add, residual

Run = Callable[..., Tensor]  # (unit, f, kept, *tokens) -> f(*tokens) where kept, else zero


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


def with_others(routing: Routing | None, count: int) -> Tensor:
    """Which of `count` tokens are kept, b count: those in front of the image's, registers and text, all are."""
    assert routing is not None and routing.tokens is not None
    return F.pad(routing.tokens, (count - routing.tokens.shape[1], 0), value=1.0)


def choosing(unit: Unit, choose: Callable[[Stream], Stream], run: Run) -> Unit:
    """The unit, changed in place. Its `forward` is replaced, not its call, where FSDP2 and compilation work; and by a
    method of the unit, since `torch.compile` takes up no frame without a module in it.

    Args:
        unit: of DiT, or FLUX's
        choose: gives the stream `Layout.routing.tokens`
        run: `multiplied` or `gathered`
    """
    u: Any = unit
    u.choose, u.run = choose, run
    if isinstance(unit, SingleUnit):
        u.forward = MethodType(forward_single, unit)
    else:
        u.ffn, u.forward = ChosenFeed(unit, run), MethodType(forward, unit)
    return unit


class ChosenFeed:
    """The slot `ffn` on the chosen tokens."""

    def __init__(self, unit: Unit, run: Run):
        self.unit, self.feed, self.run = unit, unit.ffn, run

    def __call__(self, tokens: Tensor, routing: Routing | None = None) -> Tensor:
        return self.run(self.unit, lambda x: self.feed(x, routing), with_others(routing, tokens.shape[1]), tokens)


def forward(unit: Any, stream: Stream) -> Stream:
    """`Unit.forward` of DiT's and FLUX's double units, with the choice between its branches."""
    modulation = unit.modulate(stream)
    stream = residual(stream, "attention", unit.attend(stream, modulation), modulation.attention_gate)
    stream = unit.choose(stream)
    stream = residual(stream, "feed", unit.feed(stream, modulation), modulation.feed_gate)
    return stream if stream.text is None else replace(stream, text=finite(stream.text))


def forward_single(unit: Any, stream: Stream) -> Stream:
    """`SingleUnit.forward` with the choice before it: the output layer and the MLP on chosen tokens, attention on all.

    Of the branches it traces where they are wanted, tokens that were not chosen are zero.
    """
    stream = unit.choose(stream)
    modulation, routing = unit.modulate(stream), stream.layout.routing
    tokens, gate = modulation.tokens.image, modulation.attention_gate
    kept = with_others(routing, tokens.shape[1])

    def branch(f: Callable[..., Tensor], *inputs: Tensor) -> Branch:
        return split(unit.run(unit, f, kept, *inputs), stream.layout)

    def both(attended: Tensor, tokens: Tensor) -> Tensor:
        return unit.proj_out(torch.cat((attended, masked(unit.act_mlp(unit.proj_mlp(tokens)), routing)), 2))

    if stream.tap:
        attended = branch(lambda x: x, unit.mixer(stream, tokens))
        stream = residual(stream, "attention", attended, gate)
        stream = residual(stream, "feed", branch(lambda x: unit.ffn(x, routing), tokens), gate)
    else:
        stream = add(stream, branch(both, unit.heads_of(stream, tokens), tokens), gate)
    return replace(stream, image=finite(stream.image), text=finite(stream.text))
