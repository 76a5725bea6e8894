"""E-DiT (arXiv 2602.13993): every sample decides which units it needs, how wide their MLPs, and which it may repeat.

A router in front of each unit sees the unit's input and the time. It gives the probability p that the unit is run, and
a distribution q over four widths, prefixes of the hidden channels of the (image) MLP:

    h = mean_tokens ReLU(W ((1 + g) LN(x) + s)),  p = sigmoid(w h),  q = softmax(V h),  [s, g] = M SiLU(c)
    x <- x + 1[p >= 1/2] (U(x; width argmax q) - x)

Decisions are hard, with straight-through gradients. Unit and router are trained together on the ordinary loss plus
(mean p - rho_g)^2 + (mean width of open units - rho_w)^2. Training runs everything, with factors of 0 and 1. Afterwards
a closed unit is skipped, a narrow MLP is a slice of the weights, and a unit that is barely open may repeat its addition
from an earlier step of the same generation.

The budget constrains the mean of p, and p gathers near 1/2: a target of 0.6 does not mean that 60 % of the units run.
Report the executed fraction (`open`).

If units are sharded over ranks (FSDP2, ZeRO-3), each call is a collective that no rank may skip: everything runs as in
training, with the same decisions, and nothing is repeated. The same holds for a unit with requested branches or maps.

Specification: methods/elastic-dit.md. Ours: families other than Qwen-Image; p >= 1/2 in both modes (the release trains
on >); decisions per sample (the release averages p over a batch); a modulation that starts at zero and has no third
part; memory that ends with the generation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import Literal

import torch
from torch import Tensor, nn

from edit.denoiser import Denoiser, Edit
from edit.inputs.limits import Count, check_numbers
from edit.objectives import Ramp, Weight, weight_at
from edit.pruning.tinyfusion import mix
from edit.routing.batches import mean_over_ranks, rows_on, run_grouped, sharded
from edit.routing.elastic_residuals import Residuals
from edit.routing.elastic_routers import EPS, OPEN, WIDTHS, ElasticRouters, Router
from edit.routing.ranking import check_order, order_channels
from edit.routing.slices import compiled_as, narrowed
from edit.stream import Condition, Routing, Stream
from edit.unit import Unit, Wrapper, hidden_of

GATE, WIDTH = "elastic.gate", "elastic.width"  # the budgets of a training pass


@dataclass
class Elastic(Edit):
    """Routers in front of all units. Apply last: other edits, such as a LoRA, come before.

    Args:
        gate: rho_g, target mean open probability at t = 0: a constant or a Ramp. Start a Ramp at the value of fresh
            routers, 0.7 or, with `hard`, 1: a closed unit is not trained
        gate_at_noise: the target at t = 1, linear in t between the two; None: equal to `gate`
        width: rho_w, target mean width of open units' MLPs; fresh routers have 0.86 or, with `hard`, 1. None: MLPs
            stay whole
        width_from: fraction of the run before which MLPs stay whole and the width heads are not trained
        weight: lambda, of both budgets
        threshold: a unit is open if p reaches this value; below 0.7, so that fresh units are open
        reduction: "sample": each sample meets the budgets by itself (published); "batch": all samples of all ranks
            together, so that easy and hard ones may differ
        hard: the budgets count executed work, straight-through, instead of p and the expected width under q, which can
            meet theirs although nothing is closed or narrowed
        router: width of a router
        order: sort hidden channels by magnitude first, so that a prefix holds the largest; not on a LoRA
        band: a unit whose p is at most this above the threshold may repeat its last addition; negative: no unit may
        reuse: repetitions in a row before the unit runs again; 0: none
        cache_from: Fraction of the sampling steps after which caching starts; 1 disables it. Additions are cached for
            samples whose p is or was in the band (for all samples with `cache_on_closed`)
        cache_on_closed: a closed unit repeats its cached addition
    """

    gate: Weight = 0.6
    gate_at_noise: Weight | None = None
    width: Weight | None = 0.75
    width_from: float = 0.0
    weight: float = 1.0
    threshold: float = 0.5
    reduction: Literal["sample", "batch"] = "sample"
    hard: bool = False
    router: Count = 128
    order: bool = False
    band: float = 0.015
    reuse: int = 10
    cache_from: float = 0.5
    cache_on_closed: bool = False

    last = adaptive = True
    excludes = ("Elastic", "TinyFusion", "DyDiT")
    decides = {
        "open": "units that were run",
        "width": "the MLP's width that was run",
        "cached": "units that repeated what they had added before",
    }

    def __post_init__(self):
        check_numbers(self)
        for name in ("gate", "gate_at_noise", "width"):
            if (value := getattr(self, name)) is not None:
                ends = (value.start, value.end) if isinstance(value, Ramp) else (value,)
                if bad := [v for v in ends if not 0 < v <= 1]:
                    raise ValueError(f"Elastic: {name} is a part of the model, above 0 and at most 1, got {bad[0]:g}")
        if not 0 < self.threshold < OPEN:
            raise ValueError(
                f"Elastic: threshold is above 0 and below {OPEN}, which is the p of a fresh router, got "
                f"{self.threshold:g}"
            )
        if not 0 <= self.width_from < 1:
            raise ValueError(f"Elastic: width_from is a part of the run, 0 to below 1, got {self.width_from:g}")
        if min(self.weight, self.reuse, self.cache_from) < 0:
            given = f"{self.weight:g}, {self.reuse} and {self.cache_from:g}"
            raise ValueError(f"Elastic: weight, reuse and cache_from are at least 0, got {given}")
        if self.router < 1:
            raise ValueError(f"Elastic: router is the width of a router, at least 1, got {self.router}")
        if self.reduction not in ("sample", "batch"):
            raise ValueError(f"Elastic: reduction is sample or batch, got {self.reduction!r}")

    def apply(self, denoiser: Denoiser) -> ElasticRouters:
        units: list = list(denoiser.units)
        first: list = [unit.get_submodule(hidden_of(unit).writers[0][0]) for unit in units]
        for unit in units if self.order else ():
            check_order(unit, hidden_of(unit))
        with first[0].weight.device:
            own = ElasticRouters(
                [Router(layer.in_features, self.router, self.width is not None) for layer in first]
            ).float()
        self.advance(0.0, own)
        denoiser.units = [ElasticUnit(unit, own, i, self) for i, unit in enumerate(units)]
        return own

    def initialise(self, denoiser: Denoiser) -> None:
        if self.order:
            for unit in denoiser.units:
                assert isinstance(unit, ElasticUnit)
                order_channels(unit.widths[WIDTHS])

    def advance(self, progress: float, own: nn.Module | None) -> None:
        assert isinstance(own, ElasticRouters)
        own.gate = weight_at(self.gate, progress)
        own.gate_at_noise = own.gate if self.gate_at_noise is None else weight_at(self.gate_at_noise, progress)
        whole = self.width is None or progress < self.width_from
        own.width = None if whole else weight_at(self.width, progress)  # type: ignore[arg-type]

    def embed(self, stream: Stream, t: Tensor, condition: Condition, own: nn.Module | None) -> Stream:
        assert isinstance(own, ElasticRouters)
        if not own.training:
            return stream
        stream = stream.record(GATE, own.gate + (own.gate_at_noise - own.gate) * t.float())
        return stream if own.width is None else stream.record(WIDTH, torch.full_like(stream.trace[GATE], own.width))

    def losses(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The squared error of the mean p, and of the mean width that open units expect; b each, or one number."""
        if GATE not in trace:
            return {}
        p, opened = stacked(trace, "p"), stacked(trace, "open")  # u b
        error = (p - p.detach() + opened if self.hard else p).mean(0) - trace[GATE]
        if self.reduction == "batch":
            error = mean_over_ranks(error.mean())
        gate = self.weight * error.square()
        if self.width is None:
            return {"gate": gate}
        q = stacked(trace, "q")  # u b k
        if WIDTH not in trace:  # not yet; DDP waits for the gradient of every parameter
            return {"gate": gate, "width": 0.0 * q.sum()}
        expected = (q * torch.arange(1, WIDTHS + 1, device=q.device)).sum(2) / WIDTHS
        if self.hard:
            expected = expected - expected.detach() + stacked(trace, "width")
        total, number, wanted = (opened * expected).sum(0), opened.sum(0), trace[WIDTH]
        if self.reduction == "batch":
            total, number, wanted = mean_over_ranks(total.mean()), mean_over_ranks(number.mean()), wanted.mean()
        return {"gate": gate, "width": self.weight * (total / number.clamp_min(EPS) - wanted).square()}

    def metrics(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean p; the part of units that is open, which the budget does not fix; `executed`, the mean width at which
        open ones are run; `spread`, the standard deviation over samples of the number of open units, 0 in static
        pruning; and how often each unit is open, where 0 means that it is not trained any more."""
        if "elastic.0.p" not in trace:
            return {}
        p, opened, width = (stacked(trace, what).detach() for what in ("p", "open", "width"))
        seen = {"p": p.mean(), "open": opened.mean(), "executed": width.sum() / (width > 0).sum().clamp_min(1)}
        seen["spread"] = opened.sum(0).std(correction=0)
        return seen | {f"open/{i}": v for i, v in enumerate(opened.mean(1))}

    def decisions(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which units were open, the width at which MLPs were run (0 where the unit was not), and, where any may,
        which units repeated what they had added before instead."""
        if "elastic.0.p" not in trace:
            return {}
        caches = self.band >= 0 and self.reuse > 0 and self.cache_from < 1
        told = ("open", "width", "cached") if caches else ("open", "width")
        return {what: stacked(trace, what).detach() for what in told}


def stacked(trace: Mapping[str, Tensor], what: str) -> Tensor:
    """The records of all units under one name: u b ..."""
    return torch.stack([trace[n] for n in takewhile(trace.__contains__, (f"elastic.{i}.{what}" for i in count()))])


class ElasticUnit(Wrapper):
    """A unit behind its router: with factors while training, afterwards run at the width that each sample needs, if at
    all."""

    def __init__(self, unit: Unit, own: ElasticRouters, index: int, edit: Elastic):
        super().__init__(unit)
        self.own, self.index, self.edit = own, index, edit
        features = hidden_of(unit)
        self.size, self.joint = features.size, unit.anatomy.joint
        self.last = unit.anatomy.text == "ends"
        self.widths: dict[int, Unit] = {WIDTHS: unit}
        if edit.width is not None:
            parts = {k: slice(0, -(-k * self.size // WIDTHS)) for k in range(1, WIDTHS)}
            self.widths |= {k: narrowed(unit, [(features, part)]) for k, part in parts.items()}

    def __call__(self, stream: Stream) -> Stream:
        p, q = self.route(stream)
        decision = self.decide(p, q)
        repeated: list[int] = []
        if self.own.training or sharded(self.unit) or stream.tap is not None:
            after = self.factored(stream, p, q, decision)
        else:
            after, repeated = self.executed(stream, p, decision)
        cached = torch.zeros_like(p)
        if repeated:
            cached = cached.index_fill(0, rows_on(p.device, repeated), 1.0)
        seen = {"p": p, "open": (decision > 0).float(), "width": decision * (1 - cached) / WIDTHS, "cached": cached}
        if q is not None:
            seen["q"] = q
        trace = {**after.trace, **{f"elastic.{self.index}.{k}": v for k, v in seen.items()}}
        return replace(after, text=None if self.last else after.text, trace=trace)

    def route(self, stream: Stream) -> tuple[Tensor, Tensor | None]:
        """p [b] and q [b 4]."""
        image, text = stream.layout.of_image(stream.image), stream.text if self.joint else None
        return self.own[self.index](stream.signal, image, text, stream.layout.text_mask)

    @property
    def narrows(self) -> bool:
        return self.edit.width is not None and (
            not self.own.training or self.own.width is not None or self.own.rule is not None
        )

    def decide(self, p: Tensor, q: Tensor | None) -> Tensor:
        """b int64: 0 closed, 1 to 4 the width in quarters."""
        if self.own.rule is not None:
            return self.own.rule(self.index, p, q).long()
        opened = p >= self.edit.threshold
        return opened * (q.argmax(1) + 1) if q is not None and self.narrows else opened * WIDTHS

    def factored(self, stream: Stream, p: Tensor, q: Tensor | None, decision: Tensor) -> Stream:
        """All of it, times 0 or 1 with a gradient: the one of p also where the unit is closed."""
        opened, inner = decision > 0, stream
        if q is not None and self.narrows:
            width = torch.where(opened, decision, q.argmax(1) + 1)
            reach = q.flip(1).cumsum(1).flip(1)  # b 4: of each quarter, the probability that the width reaches it
            quarters = reach - reach.detach() + (torch.arange(WIDTHS, device=q.device) < width[:, None])
            channels = quarters[:, torch.arange(self.size, device=q.device) * WIDTHS // self.size]
            inner = replace(stream, layout=replace(stream.layout, routing=Routing(channels=channels)))
        after = self.unit(inner)
        m = (p - p.detach() + opened)[:, None, None]
        text = after.text
        if self.joint and stream.text is not None and text is not None:
            text = mix(stream.text, text, m)
        return replace(after, image=mix(stream.image, after.image, m), text=text, layout=stream.layout)

    def executed(self, stream: Stream, p: Tensor, decision: Tensor) -> tuple[Stream, list[int]]:
        """What was decided and nothing else, and the samples that repeat. Reading decisions waits for the device."""
        if p.is_meta:  # without weights: the decision of a fresh router
            return self.run(WIDTHS, stream), []
        kept, edit = self.residuals(stream), self.edit
        near = (p >= edit.threshold) & (p <= edit.threshold + edit.band)
        codes, close = torch.stack((decision, near)).tolist()  # one transfer for both
        if bad := set(codes) - {0, *self.widths}:
            known = ", ".join(map(str, (0, *sorted(self.widths))))
            raise ValueError(f"unit {self.index} was to be run at {min(bad)} quarters, it has {known}: mend the rule")
        if kept is None:
            return run_grouped(stream, [code or None for code in codes], self.run), []
        kept.near = [bool(a or b) for a, b in zip(kept.near, close, strict=True)]
        may = [near if code else edit.cache_on_closed for code, near in zip(codes, close, strict=True)]
        repeated = [i for i, times in enumerate(kept.count) if may[i] and times < edit.reuse]
        before = kept.added(stream, repeated) if repeated else stream
        keys = [None if i in repeated else code or None for i, code in enumerate(codes)]
        after = run_grouped(before, keys, self.run)
        if rows := [i for i, key in enumerate(keys) if key is not None and (kept.near[i] or edit.cache_on_closed)]:
            kept.store(rows, before, after, self.joint)
        return after, repeated

    def residuals(self, stream: Stream) -> Residuals | None:
        """Of this unit, guidance branch and generation, once they are kept."""
        edit, step = self.edit, stream.step
        if step is None or edit.band < 0 or edit.reuse == 0 or step.index < edit.cache_from * step.count:
            return None
        return step.recall(self.edit.name, self.index).setdefault("residuals", Residuals(len(stream.image)))

    def run(self, width: int, stream: Stream) -> Stream:
        """The unit at a width, compiled where the unit is."""
        return compiled_as(self.unit, self.widths[width])(stream)
