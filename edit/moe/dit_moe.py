"""DiT-MoE (arXiv 2407.11633): every feed-forward becomes shared experts and the best two of many routed ones.

    p = softmax(W_r h),  (w, i) = TopK(p, K),  y = sum_k w_k f_{i_k}(h) + f_shared(h),
    f(h) = W2 (SiLU(W1 h) * W3 h),  L_bal = alpha sum_j f_j P_j,  f_j = E / (K N) #{n: j in i_n},  P_j = mean_n p_nj

Routed experts are 4 d wide, the shared ones are one feed-forward of S d; there are no biases. Gates are the
probabilities as they are, of sum below 1 (`gate_norm`). The balance losses of all units are added to the loss, with a
gradient through P alone. Over how many tokens f and P are taken is `aux_scope`: the released code pools the batch, here
that of all ranks, the paper each sample. Attention, adaLN and embeddings stay dense.

`start="copies"` begins with a trained dense model: every expert is a copy of its feed-forward, with its activation and
biases, the router is drawn from N(0, 0.02), and the shared expert's last layer is zero. With gates of sum 1
(`gate_norm="topk"`) the function is then exactly the dense one's, for any router. (The release copies with gates of sum
K / E, which changes it.)

Specification: methods/dit-moe.md. Code and paper differ in alpha: 0.01 and 0.005, which is the best of their table and
ours. Beyond class-conditional DiTs it is ours: of two-stream units the image's feed-forward is replaced; fused units
(FLUX's single ones) stay dense. "Deep half better than shallow half" (their ablation) is `half`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.denoiser import Denoiser
from edit.inputs.limits import Count, Natural, NotNegative, Positive, check_numbers
from edit.moe.experts import Experts, FeedForward, MoE, routed_parameters
from edit.moe.feeds import dense, replaced, separate, take_neurons
from edit.moe.in_feeds import InFeeds
from edit.moe.routing import LOADS, PROBABILITIES, Gate, Router, balance, layers, load_metrics, recorded
from edit.routing.batches import mean_over_ranks
from edit.unit import Features, Unit, core, hidden_of

GATES: dict[str, Gate] = {"none": "softmax", "topk": "softmax_renorm"}


@dataclass
class DiTMoE(InFeeds):
    """Experts in place of feed-forwards.

    Args:
        experts: E
        k: K, experts of a token, 1 to E
        shared: S, the shared expert's width in widths of a token; 0: there is none
        alpha: weight of the balance loss; the value is alpha for each unit whose experts are loaded alike
        aux_scope: "batch" or "sample"
        gate_norm: "none", or "topk": gates divided by their sum
        start: "fresh", or "copies" of the trained feed-forwards
        units: whose feed-forwards are replaced, counted from 0; none given: all that have one by itself, and of them
            those that `every` and `half` leave
        every: the last of each so many units
        half: "all", or the "deep" or "shallow" half of the units
        ratio: width of a routed expert in widths of a token; with copies it is that of what they are copies of
    """

    experts: Count = 8
    k: Count = 2
    shared: Natural = 2
    alpha: NotNegative = 0.005
    aux_scope: Literal["batch", "sample"] = "batch"
    gate_norm: Literal["none", "topk"] = "none"
    start: Literal["fresh", "copies"] = "fresh"
    units: tuple[int, ...] = ()
    every: Count = 1
    half: Literal["all", "deep", "shallow"] = "all"
    ratio: Positive = 4.0

    def __post_init__(self):
        check_numbers(self)
        self.units = tuple(self.units)
        if self.k > self.experts:
            raise ValueError(f"DiTMoE: a token cannot take {self.k} of {self.experts} experts: choose k up to experts")
        choices = {
            "aux_scope": ("batch", "sample"),
            "gate_norm": tuple(GATES),
            "start": ("fresh", "copies"),
            "half": ("all", "deep", "shallow"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"DiTMoE: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.units and (self.every > 1 or self.half != "all"):
            raise ValueError("DiTMoE: units are listed, so every and half choose nothing: leave out one or the other")

    # ---- surgery --------------------------------------------------------------------------------------------------

    def apply(self, denoiser: Denoiser) -> nn.ModuleDict:
        own = nn.ModuleDict()
        for i in self.places(denoiser):
            unit = core(denoiser.units[i])
            weight = next(unit.parameters())
            with weight.device:
                layer = self.layer(denoiser, f"{self.name}.{i}", hidden_of(unit), unit)
            layer.experts.to(weight.dtype)
            if layer.shared is not None:
                layer.shared.to(weight.dtype)
            own[str(i)] = unit.slots.ffn = layer
        return own

    def places(self, denoiser: Denoiser) -> list[int]:
        """The units whose feed-forwards are replaced."""
        depth, middle = len(denoiser.units), (len(denoiser.units) + 1) // 2
        halves = {"all": range(depth), "deep": range(middle, depth), "shallow": range(middle)}
        units = separate("DiTMoE", self.units, denoiser)
        found = [i for i in units if i in halves[self.half] and (i + 1) % self.every == 0]
        if not found:
            raise ValueError(
                f"DiTMoE: every={self.every} and half={self.half} leave none of the {depth} units of this "
                f"{denoiser.name} whose feed-forward is a layer of its own: choose a smaller every"
            )
        return found

    def layer(self, denoiser: Denoiser, name: str, features: Features, unit: Unit) -> MoE:
        """The experts of one unit, in fp32."""
        d, hidden, act, gated, biases = denoiser.facts.width, features.size, F.silu, True, (False, False)
        if self.start == "copies":
            known = features.activation or features.gate
            if known is None:
                raise ValueError(
                    f"DiTMoE: the activation of the feed-forward of a {type(unit).__name__} is not known here: set "
                    "start=fresh"
                )
            act, gated, own = known, features.activation is None, dense(unit, features)
            biases = own.into_bias is not None, own.out_bias is not None
        else:
            hidden = round(self.ratio * d)
            if hidden != self.ratio * d:
                raise ValueError(
                    f"DiTMoE: experts of {self.ratio:g} times the width {d} of this {denoiser.name} have no whole "
                    "number of channels: choose another ratio"
                )
        experts = Experts(self.experts, d, hidden, act, gated, *biases)
        shared = FeedForward(d, self.shared * d, act, gated) if self.shared else None
        router = Router(d, self.experts, 0.02 if self.start == "copies" else None)
        return MoE(name, router, experts, shared, self.k, GATES[self.gate_norm])

    def initialise(self, denoiser: Denoiser) -> None:
        if self.start == "fresh":
            return
        for i, layer in self.stacks(denoiser).items():
            unit = core(denoiser.units[i])
            features = replaced(unit)
            every = torch.arange(features.size, device=layer.router.weight.device).expand(self.experts, -1)
            take_neurons(layer, dense(unit, features), None, every)
            if layer.shared is not None:
                nn.init.zeros_(layer.shared.out.weight)

    # ---- what is said of parameters -------------------------------------------------------------------------------

    def activated(self, denoiser: Denoiser) -> Mapping[str, float]:
        return dict.fromkeys(routed_parameters(denoiser, self.name), self.k / self.experts)

    # ---- load -----------------------------------------------------------------------------------------------------

    def losses(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = layers(trace, self.name)
        if not names or not self.alpha:
            return {}
        f, p = recorded(trace, names, LOADS), recorded(trace, names, PROBABILITIES)  # u b E
        if self.aux_scope == "batch":
            f, p = mean_over_ranks(f.mean(1)), mean_over_ranks(p.mean(1))
        return {"balance": self.alpha * balance(f, p).sum(0)}

    def metrics(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return load_metrics(trace, self.name)
