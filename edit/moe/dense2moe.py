"""Dense2MoE (arXiv 2510.09094): the feed-forwards of a trained DiT become a shared expert and many small routed ones.

    p = softmax(W_g u) in fp32,  (g_i, e_i) = TopK(p, k),  y = f_s(u) + sum_i g_i f_{e_i}(u),
    f_e(u) = W2[:, J_e] a(W1[J_e, :] u + b1[J_e]),  b2 belongs to f_s alone

The hidden channels of the dense feed-forward are divided: the r_s d most important ones (`edit.moe.taylor`) are the
shared expert, the others are dealt to n experts of r_n d. Nothing is added but the routers, and r_s + k r_n of
r_s + n r_n widths are computed: 37.5 % by default ("1S12E2A"). Gates are not divided by their sum, so the weight of an
expert does not depend on k, which may be lowered afterwards (`take`).

Three stages, each a run that begins with the artifact of the one before (`start`), against the dense teacher:

    shared    k = 0; the shared experts and the other weights of the units are trained (`scope`)
    experts   routed experts and routers alone are trained, with lambda n sum_i F_i P_i as a balance loss
    blocks    `edit.moe.mixture_of_blocks` says what is trained: each sample takes some of the units

Every feed-forward is a site of its own: of two-stream units those of image and text apart. Of fused units (FLUX's
single ones) the rows of the MLP leave the unit, and its output layer keeps the attention's columns alone, with the
bias, which the family has always counted to the attention.

Specification: methods/dense2moe.md, whose inferred choices are the defaults: no normalised gates, routers from
N(0, 0.02), snake order, what stages A and B train. Ours: `ranking` by magnitude or at random, for comparisons.
Modulation stays dense here; `edit.pruning.modulation` shares it, `edit.pruning.modulation_rank` factorises it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from edit.denoiser import Denoiser, Edit
from edit.groups import Group
from edit.inputs.limits import Count, Natural, NotNegative, Positive, Seed, check_numbers
from edit.moe.dense2moe_stages import STAGES, ranking_of, take_over
from edit.moe.division import deal, magnitude, names_inside, united
from edit.moe.experts import Experts, FeedForward, MoE, expert_groups, routed_parameters
from edit.moe.feeds import Dense, dense, divided, layers_of, replaced, take_neurons
from edit.moe.routing import (
    LOADS,
    PROBABILITIES,
    Gate,
    Router,
    balance,
    check_gate,
    layers,
    load_metrics,
    loads_of,
    recorded,
)
from edit.moe.taylor import Site, sites
from edit.pruning.width import narrow
from edit.routing.batches import mean_over_ranks
from edit.unit import core

STD = 0.02  # of a fresh router
CHOICES = {
    "deal": ("snake", "contiguous", "random"),
    "ranking": ("taylor", "magnitude", "random"),
    "stage": STAGES,
    "scope": ("units", "shared"),
}


@dataclass
class Dense2MoE(Edit):
    """Experts made of a trained model's feed-forwards.

    Args:
        r_s: width of the shared expert in widths of a token
        n: routed experts
        r_n: width of each in widths of a token; r_s + n r_n is that of the dense feed-forward
        k: experts of a token, 0 to n; in stage "shared" none is taken, whatever it is
        gate: "softmax", "softmax_renorm", "sigmoid" or "ones"
        gate_scale: factor of all gates
        deal: of the channels that are not shared to experts: "snake", by falling importance and back again;
            "contiguous", the most important to the first; "random"
        ranking: of channels: "taylor", that of `start`; "magnitude", |row into it| |column out of it|; "random"
        balance: lambda, of the balance loss in stage "experts"
        stage: what is trained, see above
        scope: of stage "shared": all weights of "units", or "shared" experts alone
        units: whose feed-forwards are replaced, counted from 0; none given: all
        start: run or artifact to begin with: in stage "shared" a `TaylorRanking`, whose model is the one that this edit
            is applied to; else the stage before, whose weights are taken over. None: with a ranking that needs none
        seed: of what is random
    """

    r_s: Positive = 1.0
    n: Count = 12
    r_n: Positive = 0.25
    k: Natural = 2
    gate: Gate = "softmax"
    gate_scale: Positive = 1.0
    deal: Literal["snake", "contiguous", "random"] = "snake"
    ranking: Literal["taylor", "magnitude", "random"] = "taylor"
    balance: NotNegative = 1e-2
    stage: Literal["shared", "experts", "blocks"] = "shared"
    scope: Literal["units", "shared"] = "units"
    units: tuple[int, ...] = ()
    start: str | None = None
    seed: Seed = 0

    def __post_init__(self):
        check_numbers(self)
        self.units = tuple(self.units)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"Dense2MoE: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        check_gate("Dense2MoE", self.gate, self.n, self.k)

    # ---- surgery ----------------------------------------------------------------------------------------------------

    def apply(self, denoiser: Denoiser) -> nn.ModuleDict:
        own, found = nn.ModuleDict(), sites("Dense2MoE", denoiser, self.units)
        for site in found:  # all are looked at before the first is changed
            self.width(denoiser, site)
        for site in found:
            own[site.key] = layer = self.layer(denoiser, site)
            path, first = site.features.readers[0]
            if first:  # the columns before are another branch's
                reader = site.unit.get_submodule(path)
                narrow(reader, 1, torch.arange(first, device=reader.weight.device))  # type: ignore[arg-type]
            setattr(site.unit.slots, site.slot, layer)
        self.inside = names_inside(denoiser, range(len(denoiser.units)))
        return own

    def width(self, denoiser: Denoiser, site: Site) -> tuple[int, int]:
        """Hidden channels of the shared expert and of a routed one."""
        d, hidden, features = denoiser.facts.width, site.features.size, site.features
        if features.activation is None and features.gate is None:
            raise ValueError(
                f"Dense2MoE: the activation of the feed-forward of a {type(site.unit).__name__} of this "
                f"{denoiser.name} is not known here: leave the unit out"
            )
        shared, each = round(self.r_s * d), round(self.r_n * d)
        if shared != self.r_s * d or each != self.r_n * d or shared + self.n * each != hidden:
            raise ValueError(
                f"Dense2MoE: {hidden} hidden channels of this {denoiser.name} are not {self.r_s:g} and {self.n} times "
                f"{self.r_n:g} widths of {d}: choose r_s, n and r_n that divide them"
            )
        return shared, divided("Dense2MoE", hidden, shared, self.n)

    def layer(self, denoiser: Denoiser, site: Site) -> MoE:
        """The experts of one site with its channels, the first of them shared, in their own order."""
        d, features = denoiser.facts.width, site.features
        shared, each = self.width(denoiser, site)
        whole, activation = dense(site.unit, features), features.activation or features.gate
        assert activation is not None
        gated, bias = features.activation is None, whole.into_bias is not None
        with whole.into.device:
            experts = Experts(self.n, d, each, activation, gated, bias).to(whole.into.dtype)
            always = FeedForward(d, shared, activation, gated, bias, whole.out_bias is not None).to(whole.into.dtype)
            router = Router(d, self.n, STD)
            order = torch.arange(features.size)
        name = f"{self.name}.{site.key.replace('_', '.')}"
        k, text = 0 if self.stage == "shared" else self.k, site.slot == "text_ffn"
        moe = MoE(name, router, experts, always, k, self.gate, self.gate_scale, text)
        take_neurons(moe, whole, order[:shared], order[shared:].view(self.n, each))
        return moe

    def initialise(self, denoiser: Denoiser) -> None:
        if self.start is not None and self.stage != "shared":
            take_over(self, denoiser)
            return
        own = denoiser.edits[self.name]
        ranked = ranking_of(self) if self.ranking == "taylor" else None
        generator = torch.Generator().manual_seed(self.seed)
        for key, layer in own.items():  # type: ignore[operator]
            whole = united(layer)
            scores = self.scores(whole, layer.experts.gated, ranked, key, generator)
            device = whole.into.device
            parts = deal(scores, layer.shared.out.in_features, self.n, self.deal, generator)
            take_neurons(layer, whole, *(part.to(device) for part in parts))

    def scores(
        self, whole: Dense, gated: bool, ranked: nn.Module | None, key: str, generator: torch.Generator
    ) -> Tensor:
        """Importance of the channels of one site, on the CPU."""
        size = whole.out.shape[1]
        if self.ranking == "random":
            return torch.rand(size, generator=generator)
        if ranked is None:
            return magnitude(whole, gated)
        found = dict(ranked.named_buffers()).get(key)
        if found is None or len(found) != size:
            there = "no scores" if found is None else f"{len(found)} scores"
            raise ValueError(
                f"{self.name} (Dense2MoE): start={self.start} has {there} for the {size} channels of feed-forward "
                f"{key}: rank the model that is converted"
            )
        return found

    # ---- what is said of parameters ---------------------------------------------------------------------------------

    def trainable(self, name: str) -> bool:
        head, _, rest = name.partition(f"edits.{self.name}.")
        mine = not head and bool(rest)
        routed = mine and rest.split(".")[1] != "shared"
        if self.stage == "experts":
            return routed
        if self.stage == "blocks":
            return True
        if mine:
            return not routed
        return self.scope == "units" and (name.startswith("edits.") or name.startswith(self.inside))

    def replaces(self, denoiser: Denoiser) -> list[str]:
        found = []
        for key in denoiser.edits[self.name]:  # type: ignore[union-attr]
            unit = core(denoiser.units[int(key.partition("_")[0])])
            found += layers_of(denoiser, unit, replaced(unit, text=key.endswith("_text")))
        return found

    def activated(self, denoiser: Denoiser) -> Mapping[str, float]:
        own = denoiser.edits[self.name]
        share = next(layer.k for layer in own.values()) / self.n  # type: ignore[operator]
        named = [*routed_parameters(denoiser, self.name)]
        if not share:
            named += [f"edits.{self.name}.{key}.router.weight" for key in own]  # type: ignore[union-attr]
        return {name: share for name in named}

    def groups(self, denoiser: Denoiser) -> Mapping[str, Group]:
        return expert_groups(denoiser, self.name)

    def shards(self, denoiser: Denoiser) -> list[nn.Module]:
        return list(denoiser.edits[self.name].values())  # type: ignore[operator]

    # ---- load -------------------------------------------------------------------------------------------------------

    def losses(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The balance loss, a mean over sites: lambda where all experts are loaded alike."""
        names = layers(trace, self.name)
        if self.stage != "experts" or not names or not self.balance:
            return {}
        f, p = (mean_over_ranks(recorded(trace, names, what).mean(1)) for what in (LOADS, PROBABILITIES))
        return {"balance": self.balance * balance(f, p).mean(0)}

    def metrics(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return load_metrics(trace, self.name)

    def loads(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return loads_of(trace, self.name)


def take(denoiser: Denoiser, k: int) -> None:
    """Let every token take another number of experts from now on, without training; 0: the shared expert alone.

    Args:
        denoiser: with a `Dense2MoE` edit
        k: 0 to n

    Raises:
        ValueError: if there is no such edit, or it has fewer experts
    """
    found = [(name, e) for name, e in denoiser.applied.items() if isinstance(e, Dense2MoE)]
    if not found:
        raise ValueError(f"this {denoiser.name} has no experts of Dense2MoE: apply it first")
    for name, e in found:
        check_gate(f"{name} (Dense2MoE)", e.gate, e.n, k)
        e.k = k
        for layer in denoiser.edits[name].values():  # type: ignore[operator]
            layer.k = k
