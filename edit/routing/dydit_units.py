"""DyDiT's units: masked while training, slices of the weights and gathered tokens afterwards (see `dydit.py`)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from edit.routing.batches import run_grouped, sharded, uploaded
from edit.routing.dydit_routers import TOKENS, WIDTHS, DyDiTRouters
from edit.routing.slices import compiled_as, narrowed, variant
from edit.routing.tokens import Pointwise, choosing, gathered, multiplied
from edit.stream import Routing, Stream
from edit.unit import Unit, Wrapper, heads_of, hidden_of

PLAN, WHOLE = "dydit.plan", "dydit.whole"  # names in the trace: widths on the host, samples of the complete network


class Routed(Wrapper):
    """A unit with its decisions: masked while training, sliced to the open parts afterwards.

    Masks replace slices, with equal outputs and full cost, while training and when (a) taps are requested, (b) under
    ZeRO-3, which gathers no weights of copies, (c) sharded with mixed times, where ranks would call a unit different
    numbers of times and deadlock.
    """

    def __init__(self, unit: Unit, own: DyDiTRouters, index: int):
        super().__init__(unit)
        self.own, self.index, self.fused = own, index, unit.anatomy.fused
        self.plain = variant(unit, {})  # source of narrow copies
        self.whole = self.choosing(variant(unit, {}), gathered)
        self.choosing(unit, multiplied)

    def choosing(self, unit: Unit, run: Pointwise) -> Unit:
        """The unit with its choice of tokens, where there is one."""
        if self.own.tokens is None:
            return unit
        return choosing(unit, TokenChoice(self.own, self.own.tokens[self.index]), run, self.fused)

    def __call__(self, stream: Stream) -> Stream:
        zero = hasattr(next(self.unit.parameters()), "ds_id")
        if zero or self.own.training or stream.tap is not None:
            return self.factored(stream)
        if PLAN not in stream.trace:
            raise RuntimeError("DyDiT: units were run without the denoiser's forward, which decides: call that")
        plans = stream.trace[PLAN][:, self.index]  # b 2 h, or 1 2 h
        if len(plans) == 1:
            return self.call(self.at(plans[0], stream), stream)
        if sharded(self.unit):
            return self.factored(stream)
        plans, which = plans.unique(dim=0, return_inverse=True)
        tokens: dict[int, Tensor] = {}

        def run(key: int, part: Stream) -> Stream:
            after = self.call(self.at(plans[key], part), part)
            if self.own.tokens is not None:
                tokens[key] = after.trace[f"{TOKENS}.{self.index}"]
            return after

        after = run_grouped(stream, which.tolist(), run)
        if self.own.tokens is None:
            return after
        chosen = stream.image.new_empty(len(which), *tokens[0].shape[1:], dtype=torch.float32)
        for key, mask in tokens.items():
            rows = uploaded((which == key).nonzero()[:, 0], mask.device)
            chosen.index_copy_(0, rows, mask)
        return after.record(f"{TOKENS}.{self.index}", chosen)

    def factored(self, stream: Stream) -> Stream:
        routing = None
        if self.own.width is not None:
            h, g = stream.trace[WIDTHS][:, self.index].unbind(1)
            size = self.own.works[self.index].channels // self.own.heads
            routing = Routing(heads=h, channels=g.repeat_interleave(size, 1))
        return self.call(self.unit, stream, routing)

    def call(self, unit: Unit, stream: Stream, routing: Routing | None = None) -> Stream:
        """A unit sees the same kind of trace whichever it is: compiled, all share one graph."""
        seen = {WHOLE: stream.trace[WHOLE]} if WHOLE in stream.trace else {}
        after = unit(replace(stream, trace=seen, layout=replace(stream.layout, routing=routing)))
        found = {f"{k}.{self.index}" if k == TOKENS else k: v for k, v in after.trace.items()}
        return replace(after, trace={**stream.trace, **found}, layout=stream.layout)

    def at(self, plan: Tensor, stream: Stream) -> Unit:
        """The unit with some heads and channel groups; of a generation the latest is kept.

        All of it is compiled where the unit is. Narrow ones are not: each width would be a graph of its own, made while
        a generation waits, and soon more than torch keeps.

        Args:
            plan: 2 h, bool, on the host
            stream: that it is for
        """
        if plan.all():
            return compiled_as(self.unit, self.whole)
        memory = {} if stream.step is None else stream.step.memory
        kept = memory.get(("dydit", self.index))
        if kept is not None and torch.equal(kept[0], plan):
            return kept[1]
        unit = self.narrow(plan, stream.image.device, keep=stream.step is not None)
        memory["dydit", self.index] = plan, unit
        return unit

    def narrow(self, plan: Tensor, device: torch.device, keep: bool) -> Unit:
        parts = []
        for features, live in zip((heads_of(self.plain), hidden_of(self.plain)), plan, strict=True):
            if not live.all():
                places = torch.arange(features.size, device="cpu").view(len(live), -1)[live].flatten()
                parts.append((features, uploaded(places, device)))
        return self.choosing(narrowed(self.plain, parts, int(plan[0].sum()), keep), gathered)


class TokenChoice:
    """A router's choice of image tokens."""

    def __init__(self, own: DyDiTRouters, router: nn.Module):
        self.own, self.router = own, router

    def __call__(self, stream: Stream) -> Tensor:
        """b n, 0 or 1."""
        mask = self.own.opened(self.router(stream))
        return torch.where(stream.trace[WHOLE][:, None], 1.0, mask) if WHOLE in stream.trace else mask  # it takes all
