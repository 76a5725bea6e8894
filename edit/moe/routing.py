"""Which experts a token takes, and with which gates; how evenly experts are loaded, and the losses that even it out.

    p = softmax(W_r u),  S = TopK(p, k),  y = sum_{i in S} g_i f_i(u)

All of it is computed in fp32. Nothing is drawn, nothing is dropped, and the host waits for no device.

Sources: DeepSeekMoE (arXiv 2401.06066), Switch Transformer (2101.03961); specifications methods/dit-moe.md and
methods/dense2moe.md.

Letters in shape comments: b samples, s tokens of a sample, n tokens, d width, E experts, k experts of a token, u layers
with experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from edit.stream import Layout
from edit.widths import Scale

Gate = Literal["softmax", "softmax_renorm", "sigmoid", "ones"]
LOADS, PROBABILITIES = "loads", "probabilities"  # records of a layer, after its name and a dot


class Choice(NamedTuple):
    """The experts of each token, by falling probability."""

    experts: Tensor  # n k, int64
    gates: Tensor  # n k, fp32: factors of the experts' outputs, with a gradient to the router unless they are ones
    probabilities: Tensor  # n E, fp32, of sum 1: what balance losses even out


def choose(logits: Tensor, k: int, gate: Gate = "softmax", scale: float = 1.0) -> Choice:
    """The k most probable experts of each token.

    Args:
        logits: n E
        k: 1 to E
        gate: "softmax", the probabilities as they are, whose sum is below 1 where k < E; "softmax_renorm", divided by
            their sum; "sigmoid", each logit by itself; "ones"
        scale: factor of all gates
    """
    logits = logits.float()
    scores = logits.sigmoid() if gate == "sigmoid" else logits.softmax(-1)
    taken, experts = scores.topk(k, dim=-1)
    if gate == "softmax_renorm":
        taken = taken / taken.sum(-1, keepdim=True)
    elif gate == "ones":
        taken = torch.ones_like(taken)
    probabilities = scores / scores.sum(-1, keepdim=True) if gate == "sigmoid" else scores
    return Choice(experts, taken if scale == 1 else scale * taken, probabilities)


def check_gate(who: str, gate: str, experts: int, k: int) -> None:
    """Refuse a routing that cannot be.

    Raises:
        ValueError: naming `who`, if there is no such gate, or k is not between 0 and the number of experts
    """
    if gate not in get_args(Gate):
        raise ValueError(f"{who}: gate must be one of {', '.join(get_args(Gate))}, got {gate!r}")
    if not 0 <= k <= experts:
        raise ValueError(f"{who}: a token cannot take {k} of {experts} experts: choose 0 to {experts}")


class Router(nn.Module):
    """Logits of the experts, n d -> n E, in fp32 under autocast, too; no bias.

    Args:
        width: d
        experts: E
        std: of a normal start; None: uniform within 1 / sqrt(d), as linear layers of torch start
    """

    scales: ClassVar = {"weight": Scale("output", "fan_in")}

    def __init__(self, width: int, experts: int, std: float | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        if std is None:
            nn.init.uniform_(self.weight, -1 / math.sqrt(width), 1 / math.sqrt(width))
        else:
            nn.init.normal_(self.weight, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        kind = "cpu" if tokens.is_meta else tokens.device.type
        with torch.autocast(kind, enabled=False):
            return torch.nn.functional.linear(tokens.float(), self.weight.float())


# ---- load -----------------------------------------------------------------------------------------------------------


def counted(experts: Tensor, count: int, samples: int, kept: Tensor | None = None) -> Tensor:
    """How many tokens of each sample each expert takes: b E, int32.

    Args:
        experts: (b s) k
        count: E
        samples: b
        kept: b s, bool, the tokens that count; None: all
    """
    each = experts.view(samples, -1)
    weigh = torch.ones_like(each, dtype=torch.int32)
    if kept is not None:
        weigh = weigh * kept.repeat_interleave(experts.shape[1], 1)
    return weigh.new_zeros(samples, count).scatter_add_(1, each, weigh)


def record(layout: Layout, name: str, choice: Choice, samples: int, kept: Tensor | None = None) -> None:
    """Hand the load of a layer to the trace: `name`.loads, the share of its assignments that each expert has, and
    `name`.probabilities, the mean over tokens; b E both.

    Args:
        layout: of the unit's call under way; outside of one nothing is recorded
        name: of the layer
        choice: of (b s) tokens
        samples: b
        kept: b s, bool, the tokens that count (padding does not); None: all
    """
    if layout.notes is None:
        return
    p = choice.probabilities
    found = counted(choice.experts, p.shape[1], samples, kept).float()
    layout.note(f"{name}.{LOADS}", found / found.sum(1, keepdim=True).clamp_min(1))
    p = p.view(samples, -1, p.shape[1])
    if kept is None:
        mean = p.mean(1)
    else:
        mean = (p * kept[..., None]).sum(1) / kept.sum(1, keepdim=True).clamp_min(1)
    layout.note(f"{name}.{PROBABILITIES}", mean)


def layers(trace: Mapping[str, Tensor], edit: str) -> list[str]:
    """Names of the layers of an edit that have recorded a load, in the order of units: <edit>.<unit>[.<which>]."""
    found = [k.removesuffix(f".{LOADS}") for k in trace if k.startswith(f"{edit}.") and k.endswith(f".{LOADS}")]
    return sorted(found, key=lambda name: (int(name.removeprefix(f"{edit}.").partition(".")[0]), name))


def recorded(trace: Mapping[str, Tensor], names: Sequence[str], what: str) -> Tensor:
    """LOADS or PROBABILITIES of some layers: u b E."""
    return torch.stack([trace[f"{name}.{what}"] for name in names])


def loads_of(trace: Mapping[str, Tensor], edit: str) -> dict[str, Tensor]:
    """The loads of an edit's layers by unit, b E each (`Edit.loads`)."""
    return {name.removeprefix(f"{edit}."): trace[f"{name}.{LOADS}"] for name in layers(trace, edit)}


def load_metrics(trace: Mapping[str, Tensor], edit: str) -> dict[str, Tensor]:
    """Means over layers, of this rank's batch: the fullest expert's load over the mean, experts without a token."""
    if not (names := layers(trace, edit)):
        return {}
    found = recorded(trace, names, LOADS).mean(1)
    return {"unevenness": unevenness(found).mean(), "idle": (found == 0).float().sum(-1).mean()}


def balance(loads: Tensor, probabilities: Tensor) -> Tensor:
    """E sum_i F_i P_i: ... E and ... E -> ...; 1 where all experts are alike, E / k where k have everything.

    F, the share of assignments, has no gradient; P, the mean probability, has.
    """
    return loads.shape[-1] * (loads.detach() * probabilities).sum(-1)


def unevenness(loads: Tensor) -> Tensor:
    """The load of the fullest expert over the mean: ... E -> ..., from 1 to E."""
    return loads.amax(-1) * loads.shape[-1]
