"""DyDiT (arXiv 2410.03456; DyDiT++, 2504.06803): heads and channel groups by time, tokens by content.

Timestep-wise dynamic width (TDW): from the embedded time E alone a router of each unit opens H attention heads and as
many groups of hidden channels; the first of each is always open. Spatial-wise dynamic tokens (SDT): a second router
reads the stream after the attention and chooses the image tokens of the feed-forward:

    m = [1, G(W E + b)],  s = G(R(x)),  x <- x + g1 A(x; m_heads),  x <- x + g2 s M(x; m_groups)

G is a Gumbel-sigmoid: hard(z + g - g' > 0) with the gradient of sigmoid((z + g - g') / tau) in training, z > 0
afterwards. One loss holds the executed fraction of the multiply-accumulates, a mean over the batch, at lambda. The
first part of the run also trains the complete network, on the same noisy samples.

Decisions are hard at inference. A generation reads all units' widths once per evaluation, for both branches; units run
slices of their weights, kept until the widths change, and chosen tokens are gathered. The host waits for the device
once per evaluation for the widths, and once in each unit for the number of its tokens.

Families with text in the joint sequence follow DyFLUX: a modulated router chooses tokens, in fused units (FLUX's single
ones) from their input; tokens left out are only keys and values, and neither attention nor MLP changes them; text
always runs. Ours: width by time in double units as well; families other than DiT, SiT and FLUX; and routers beside text
whose last layer starts at zero, since a random one with a bias of 5 closes some parts at once.

Specification: methods/dydit.md, without its TD-LoRA. Ours: routers read detached streams, so that the budget moves no
backbone weight; costs come from shapes, text and registers included; large gradients are clipped (the release skips
such steps); masks by time are not tabulated in the checkpoint (pitfall 8 there), as averaged weights change in place,
but decided once per evaluation, in fp32. The budget's mean depends on times stratified over the batch: setting
`strata`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edit.denoiser import Denoiser, Edit
from edit.inputs.limits import check_numbers
from edit.objectives import Ramp, Weight, weight_at
from edit.routing.batches import mean_over_ranks
from edit.routing.dydit_routers import TOKENS, WIDTHS, DyDiTRouters, ModulatedTokenRouter, TimeRouter, TokenRouter, work
from edit.routing.dydit_units import PLAN, WHOLE, Routed
from edit.routing.ranking import check_order, order_channels, order_heads
from edit.stream import Condition, Output, Stream
from edit.unit import Unit, heads_of

RATIO, TARGET = "dydit.ratio", "dydit.target"  # names in the trace
SAMPLE, VARIANCE = "dydit.complete.sample", "dydit.complete.variance"


@dataclass
class DyDiT(Edit):
    """Routers for every unit. Apply last: in the first part of a run, `embed` doubles the batch, and `readout`
    halves it together with the records of other edits.

    Args:
        ratio: lambda, target fraction of the units' multiply-accumulates, in (0, 1]: a constant or a Ramp. In the paper
            1 up to step 100 of 200k, then down to its end at step 1100
        weight: of the budget's squared error; 1 in the paper, 2 in its code
        temperature: tau, of the gradient alone; draws do not depend on it
        bias: of fresh width routers, so that everything is open; None: 15 or, with text in the joint
            sequence (FLUX), 5
        token_bias: likewise of the token routers; None: 35 or 5
        complete: fraction of the run, from its start, that also trains the complete network, at about twice the cost
        width: choose heads and channel groups by time
        tokens: choose the tokens of the feed-forward
        order: sort heads and channels by magnitude first, so that the largest are always on; not over a LoRA
    """

    ratio: Weight = Ramp(1.0, 0.5, begin=0.0005, until=0.0055)
    weight: float = 2.0
    temperature: float = 5.0
    bias: float | None = None
    token_bias: float | None = None
    complete: float = 0.15
    width: bool = True
    tokens: bool = True
    order: bool = True

    last = adaptive = True
    subsets = False  # the complete model's pass doubles the samples
    alone = "complete=0"
    excludes = ("DyDiT", "TinyFusion", "Elastic")
    decides = {
        "heads": "attention heads that were run",
        "groups": "groups of MLP channels that were run",
        "tokens": "tokens that were chosen for the unit",
    }

    def __post_init__(self):
        check_numbers(self)
        if not all(0 < weight_at(self.ratio, progress) <= 1 for progress in (0.0, 1.0)):
            raise ValueError(f"DyDiT: ratio is the share of the work to run, in (0, 1], got {self.ratio}")
        if self.temperature <= 0 or self.weight < 0:
            raise ValueError(
                f"DyDiT: temperature must be positive and weight not negative, got {self.temperature}, {self.weight}"
            )
        if not 0 <= self.complete <= 1:
            raise ValueError(f"DyDiT: complete is a part of the run, in [0, 1], got {self.complete}; 0 leaves it out")
        if not (self.width or self.tokens):
            raise ValueError("DyDiT: with width=false and tokens=false there is nothing to choose: turn one of them on")

    def apply(self, denoiser: Denoiser) -> DyDiTRouters:
        units = denoiser.units
        for unit in units:
            if not isinstance(unit, Unit):
                raise ValueError(
                    f"DyDiT chooses within units, but a {type(unit).__name__} wraps one of this {denoiser.name}: put "
                    "DyDiT in the place of the edit that does"
                )
            if self.order and self.width:
                check_order(unit)
        first, weight = units[0].anatomy, next(denoiser.parameters())
        beside = first.joint  # text: as in DyFLUX
        bias, token_bias = (5.0, 5.0) if beside else (15.0, 35.0)
        works = [work(unit) for unit in units]
        d, h = heads_of(units[0]).size, first.heads
        if self.width and (h == 1 or any(w.channels % h for w in works)):
            raise ValueError(
                f"DyDiT: hidden channels form as many groups as there are heads, at least two, but this {denoiser.name}"
                f" has {h} and {works[0].channels} channels: choose widths that fit, or set width=false"
            )
        bias = bias if self.bias is None else self.bias
        token_bias = token_bias if self.token_bias is None else self.token_bias
        router = ModulatedTokenRouter if beside else TokenRouter
        with weight.device:
            width = TimeRouter(d, len(units), h, bias, zero=beside) if self.width else None
            tokens = nn.ModuleList(router(d, token_bias) for _ in units) if self.tokens else None
            own = DyDiTRouters(works, h, width, tokens, self.temperature).float()
        self.advance(0.0, own)
        denoiser.units = [Routed(unit, own, i) for i, unit in enumerate(units)]  # type: ignore[arg-type]
        return own

    def initialise(self, denoiser: Denoiser) -> None:
        for routed in denoiser.units:
            if self.order and self.width and isinstance(routed, Routed):
                order_heads(routed.plain)
                order_channels(routed.plain)

    def advance(self, progress: float, own: nn.Module | None) -> None:
        assert isinstance(own, DyDiTRouters)
        own.target, own.complete = weight_at(self.ratio, progress), progress < self.complete

    def embed(self, stream: Stream, t: Tensor, condition: Condition, own: nn.Module | None) -> Stream:
        assert isinstance(own, DyDiTRouters) and stream.time is not None
        if not own.training:
            widths, plan = own.plan(stream)
            return stream.record(WIDTHS, widths).record(PLAN, plan)
        widths = own.widths(stream.time)
        stream = stream.record(TARGET, widths.new_full((), own.target))
        if own.complete:
            stream, widths = doubled(stream), torch.cat((widths, torch.ones_like(widths)))
        return stream.record(WIDTHS, widths)

    def readout(self, output: Output, stream: Stream, own: nn.Module | None) -> Output:
        assert isinstance(own, DyDiTRouters)
        sample, variance, both = output.sample, output.variance, len(output.sample)
        trace = {k: v for k, v in output.trace.items() if k not in (PLAN, WHOLE)}
        if WHOLE in output.trace:
            b = both // 2
            trace = {k: v[:b] if v.shape[:1] == (both,) else v for k, v in trace.items()}
            sample, trace[SAMPLE] = sample[:b], sample[b:]
            if variance is not None:
                variance, trace[VARIANCE] = variance[:b], variance[b:]
        trace[RATIO] = own.ratio(trace, stream.layout, stream.layout.of_image(stream.image).shape[1])
        return Output(sample, variance, trace)

    def further(self, output: Output) -> dict[str, Output]:
        """The prediction of the complete network, in the part of the run that trains it."""
        trace = output.trace
        return {"complete": Output(trace[SAMPLE], trace.get(VARIANCE), {})} if SAMPLE in trace else {}

    def losses(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if TARGET not in trace:
            return {}
        return {"budget": self.weight * (mean_over_ranks(trace[RATIO].mean()) - trace[TARGET]) ** 2}

    def metrics(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Executed fractions: of the work and, where they are chosen, of heads, channel groups and tokens."""
        shares = {name: share.mean() for name, share in self.decisions(trace).items()}
        return {"ratio": trace[RATIO].detach().mean(), **shares}

    def decisions(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        if self.width:
            shares = trace[WIDTHS].detach().mean(3)  # b u 2
            found = {"heads": shares[..., 0].T, "groups": shares[..., 1].T}
        if self.tokens:
            units = range(trace[WIDTHS].shape[1])
            found["tokens"] = torch.stack([trace[f"{TOKENS}.{i}"].detach() for i in units])
        return found


def doubled(stream: Stream) -> Stream:
    """Every sample a second time, marked in the trace for the complete network."""

    whole = torch.arange(2 * len(stream.image), device=stream.image.device) >= len(stream.image)
    return stream.map(lambda v: torch.cat((v, v))).record(WHOLE, whole)
