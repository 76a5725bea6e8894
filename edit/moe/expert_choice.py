"""Expert choice (arXiv 2202.09368) as in MicroDiT (2407.15811): experts choose tokens of a sample, not tokens experts.

    s = softmax_E(W_g x),  T_e = the k tokens of largest s_te,  k = max(1, floor(f_c t / E))
    y_t = sum_{e: t in T_e} s_te W2_e gelu(W1_e x_t)

Every expert has k of the t tokens of each sample, so there is nothing to balance and no further loss; a token has f_c
experts on average, and some have none. The s of the chosen are not divided by their sum. Every second unit has experts
in place of its (image) feed-forward, the last one never. Tokens are gathered by index and added up in their own order,
forward and backward, without one-hot tensors, loops over experts or waits for the device.

A token's output depends on the sample's other tokens, not on other samples: caches and routers of single tokens do not
know its output. Those that run feed-forwards on some tokens (ToCa, DuCa, DyDiT) are refused.

With `edit.scaling.layer_wise` before it, an expert's ratio is that of its unit; else it is `ratio`.

Specification: methods/micro-dit.md ("MoE"). Its release builds one-hot tensors (b, E, k, t). Inferred: GELU is the tanh
one; other families' experts and gates are drawn as MicroDiT's; fused units and text streams stay dense.

Letters in shape comments: b samples, t tokens of a sample, d width, E experts, k tokens of an expert, r = b E k rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.denoiser import Denoiser
from edit.inputs.limits import Count, Positive, check_numbers
from edit.moe.experts import Experts, computing, routed_parameters
from edit.moe.feeds import separate
from edit.moe.in_feeds import InFeeds
from edit.moe.order import Rows, from_choosers, rows_of, to_choosers
from edit.moe.routing import LOADS, Router, layers, recorded
from edit.scaling.layer_wise import feed_ratio, round_up
from edit.stream import Layout
from edit.unit import Unit, core, hidden_of
from edit.widths import Scale

STD = 0.02  # of W1
IDLE = "unserved"  # record of a layer, after its name and a dot: the share of a sample's tokens that no expert takes


# ---- the layer ------------------------------------------------------------------------------------------------------


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class ChoosingExperts(Experts):
    """Their weights, which start with the same deviation at every width."""

    scales: ClassVar = {"into|out": Scale("hidden", "constant", 2, stack=True)}


class ExpertChoiceFeed(nn.Module):
    """The slot `ffn` with experts that choose tokens: b t d -> b t d.

    Args:
        name: of the layer's records in the trace
        width: d
        hidden: channels of an expert
        experts: E
        capacity: f_c, experts of a token on average
        std: of W2
    """

    def __init__(self, name: str, width: int, hidden: int, experts: int, capacity: float, std: float):
        super().__init__()
        self.name, self.capacity = name, capacity
        self.router = Router(width, experts)
        self.experts = ChoosingExperts(experts, width, hidden, gelu, gated=False)
        nn.init.xavier_uniform_(self.router.weight)
        nn.init.trunc_normal_(self.experts.into, std=STD)
        nn.init.trunc_normal_(self.experts.out, std=std)

    def taken(self, length: int) -> int:
        """k of a sample of t tokens."""
        count = int(self.capacity * length / len(self.experts.into))
        return min(max(1, count), length)

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        b, t, d = tokens.shape
        dtype = computing(tokens)
        s = self.router(tokens).softmax(-1)  # b t E
        gates, chosen = s.transpose(1, 2).topk(self.taken(t), dim=-1)  # b E k
        rows = rows_of(chosen, t)
        x = to_choosers(tokens.to(dtype).flatten(0, 1), rows).view(s.shape[-1], -1, d)  # E (b k) d
        hidden = gelu(torch.bmm(x, self.experts.into.to(dtype).mT))
        y = torch.bmm(hidden, self.experts.out.to(dtype).mT).flatten(0, 1)
        y = y * gates.transpose(0, 1).reshape(-1, 1)  # in fp32
        self.record(layout, rows, b)
        return from_choosers(y, rows).view(b, t, d).to(dtype)

    def record(self, layout: Layout, rows: Rows, samples: int) -> None:
        """Hand to the trace which share of tokens no expert takes, b, and the experts' load, b E, which is even."""
        if layout.notes is None:
            return
        ends = torch.cat((rows.starts[1:], rows.starts.new_full((1,), len(rows.tokens))))
        layout.note(f"{self.name}.{IDLE}", (ends == rows.starts).float().view(samples, -1).mean(1))
        count = len(self.experts.into)
        layout.note(f"{self.name}.{LOADS}", self.router.weight.new_full((samples, count), 1 / count).float())


def put(unit: Unit, name: str, hidden: int, experts: int, capacity: float, std: float) -> ExpertChoiceFeed:
    """Put experts in the place of a unit's feed-forward, whose own layers then no longer run.

    Args:
        unit: of any family, with a feed-forward by itself
        name: of the layer's records in the trace
        hidden: channels of an expert
        experts: E
        capacity: f_c
        std: of W2: 0.02 / sqrt(2 (i + 1)) in unit i of a backbone of depth N, 0.02 / sqrt(2 N) in its mixer

    Returns:
        The layer, which the caller registers with its own parameters.

    Raises:
        ValueError: if another edit has replaced the feed-forward
    """
    into: Any = unit.get_submodule(hidden_of(unit).writers[0][0])
    with into.weight.device:
        layer = ExpertChoiceFeed(name, into.in_features, hidden, experts, capacity, std)
    layer.experts.to(into.weight.dtype)
    unit.slots.ffn = layer
    return layer


# ---- the edit -------------------------------------------------------------------------------------------------------


@dataclass
class ExpertChoice(InFeeds):
    """Experts that choose tokens in place of every second feed-forward.

    Args:
        experts: E
        capacity: f_c, experts of a token on average, at most E
        every: the last of each so many units has experts, unless it is the last of all
        units: whose feed-forwards are replaced, counted from 0; none given: those of `every`
        ratio: width of an expert in widths of a token, where widths are not scaled
        multiple: the width is rounded up to multiples of it
    """

    experts: Count = 8
    capacity: Positive = 2.0
    every: Count = 2
    units: tuple[int, ...] = ()
    ratio: Positive = 4.0
    multiple: Count = 256

    excludes = ("DuCa", "DyDiT", "ToCa")  # they run feed-forwards on some of the tokens

    def __post_init__(self):
        check_numbers(self)
        self.units = tuple(self.units)
        if self.capacity > self.experts:
            raise ValueError(
                f"ExpertChoice: a token cannot have {self.capacity:g} of {self.experts} experts: choose capacity up to "
                "experts"
            )

    # ---- surgery --------------------------------------------------------------------------------------------------

    def apply(self, denoiser: Denoiser) -> nn.ModuleDict:
        own, d = nn.ModuleDict(), denoiser.facts.width
        for i in self.places(denoiser):
            ratio = feed_ratio(denoiser, i) or self.ratio
            hidden, std = round_up(d * ratio, self.multiple), STD / (2 * (i + 1)) ** 0.5
            own[str(i)] = put(core(denoiser.units[i]), f"{self.name}.{i}", hidden, self.experts, self.capacity, std)
        return own

    def places(self, denoiser: Denoiser) -> list[int]:
        """The units whose feed-forwards are replaced."""
        depth = len(denoiser.units)
        found = separate("ExpertChoice", self.units, denoiser)
        if self.units:
            return found
        found = [i for i in range(self.every - 1, depth - 1, self.every) if i in found]
        if not found:
            raise ValueError(
                f"ExpertChoice: every={self.every} leaves none of the {depth} units of this {denoiser.name} whose "
                "feed-forward is a layer of its own, as the last one stays dense: list some in units"
            )
        return found

    # ---- what is said of parameters -------------------------------------------------------------------------------

    def activated(self, denoiser: Denoiser) -> Mapping[str, float]:
        """On average over tokens."""
        return dict.fromkeys(routed_parameters(denoiser, self.name), self.capacity / self.experts)

    # ---- load -----------------------------------------------------------------------------------------------------

    def metrics(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The share of tokens that no expert takes, mean over layers and samples."""
        names = layers(trace, self.name)
        return {IDLE: recorded(trace, names, IDLE).mean()} if names else {}
