"""Switch-DiT (arXiv 2403.09176): experts that are chosen by the time alone mask the stream in front of each unit.

Each of N = 1000 times is a task. A gate of each unit sees the embedded time e(t) and nothing else; k of M linear
experts A (d x d), a (d), times their probabilities, which are not normalised again, modulate what the unit's branches
read, and the skip path is untouched:

    p(t) = softmax(W SiLU(e(t)) + c),  m = 1 + sum_{i in top-k(p)} p_i (x A_i + a_i)
    r = x * m,  x' = U(r) + (1 - m) * x = x + the branches of U at r

A = a = 0 at first, so a fresh edit changes nothing. A prior assigns times to the L M experts of all L units by a window
of L k columns, which moves slowly from clean data (n = 0) to noise:

    Pi[n, j] = 1 for s(n) <= j < s(n) + L k,  s(n) = round((n / (N - 1))^4 L (M - k))

A bipartite matching sigma of the columns of Pi to those of Q, the top-k choices at all times, minimises
C_ij = sum_n |Q_ni - Pi_nj|; then, for each sample, p of all units over L is pulled to its row of Pi by the divergence
JSD(u, v) = 1/2 KL(u | z) + 1/2 KL(v | z) with z = (u + v) / 2, u = p / L, v = Pi[n, sigma] / (L k): neighbouring times
share experts, distant ones do not. With 2k > M, L(2k - M) columns are in every window: experts of all times.

Experts are linear, so those of a time are one: A_m = sum_i p_i A_i. A generation, whose samples have one time, pays one
d x d product for each token and unit whatever k and M are; with mixed times a sample has a matrix of its own, or, where
that would be larger than its tokens (`Experts.forward`), experts are one product of width M d.

Specification: methods/switch-dit.md. Ours: families other than DiT and SiT; a flow's times in bins n = floor(1000 t),
gates at the exact time; in two-stream units the mask is on image tokens, in fused ones on the whole sequence; the
matching's window and sigma are integers; permutations for ties are functions of (seed, step), so that all ranks find
one sigma without a word, and a resumed run the same. Left out: the weighting of losses by learned uncertainty ("uw"),
as no loss here scales the objective's; min-SNR is `FlowMatching.weighting`. In fp16, which recipes do not train in,
x (x A) may overflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from edit.denoiser import Denoiser, Edit
from edit.groups import Group
from edit.inputs.limits import Count, NotNegative, Seed, check_numbers
from edit.moe.switch_experts import SwitchExperts
from edit.moe.switch_prior import divergence, top
from edit.stream import Condition, Stream
from edit.unit import Wrapper, core

P, CHOSEN, PRIOR, AGREEMENT = (f"switch_dit.{what}" for what in ("p", "chosen", "prior", "agreement"))


@dataclass
class SwitchDiT(Edit):
    """Experts in front of every unit. Prune units before, and fold that.

    Args:
        experts: M of each unit
        active: k of these at each time, at most M; 2k > M for experts that are active at all times
        weight: lambda, of the prior's divergence
        every: training steps for which a matching is kept
        seed: of the permutations that break ties of the matching
    """

    experts: Count = 3
    active: Count = 2
    weight: NotNegative = 1.0
    every: Count = 1
    seed: Seed = 0

    # some change what is inside of units alone, some leave out units that the prior counts, the last one the time
    excludes = ("SwitchDiT", "DyDiT", "Elastic", "TinyFusion", "DepthPruning", "Collapse", "ModulationApproximator")

    def __post_init__(self):
        check_numbers(self)
        if self.active > self.experts:
            raise ValueError(
                f"SwitchDiT: active is a number of experts, at most all {self.experts}, got {self.active}: lower it, "
                "or raise experts"
            )

    @property
    def decides(self) -> Mapping[str, str]:  # type: ignore[override]
        return {f"expert {i}": f"samples that expert {i} of the unit serves" for i in range(self.experts)}

    def apply(self, denoiser: Denoiser) -> SwitchExperts:
        weight, units = next(denoiser.parameters()), denoiser.units
        try:
            with torch.no_grad():
                width = denoiser.embed_times(torch.ones(1, device=weight.device)).shape[1]
        except ValueError as error:
            raise ValueError(f"SwitchDiT: gates read the embedded time, and {error}") from error
        with weight.device:
            own = SwitchExperts(denoiser, width, self.experts, self.active, self.seed)
            own.experts.to(weight.dtype)
        denoiser.units = [Switched(unit, own, i) for i, unit in enumerate(units)]  # type: ignore[arg-type]
        return own

    def advance(self, progress: float, own: nn.Module | None) -> None:
        assert isinstance(own, SwitchExperts)
        own.begin(progress, self.every)

    def embed(self, stream: Stream, t: Tensor, condition: Condition, own: nn.Module | None) -> Stream:
        assert isinstance(own, SwitchExperts) and stream.time is not None
        p = own.gates(stream.time)
        stream = stream.record(P, p).record(CHOSEN, top(p, self.active))
        if not own.training:
            return stream
        if own.due:
            own.match()
        return stream.record(PRIOR, own.prior(t)).record(AGREEMENT, own.agreement.clone())

    def losses(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The divergence of each sample's gates and their prior: b."""
        if PRIOR not in trace:
            return {}
        return {"prior": self.weight * divergence(trace[P].flatten(1) / trace[P].shape[1], trace[PRIOR])}

    def metrics(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which part of its active experts a time shares with the next (`near`), and with one that is 500 away (`far`),
        mean over times and units, at the latest matching; of random choices it is k / M."""
        return dict(zip(("near", "far"), trace[AGREEMENT], strict=True)) if AGREEMENT in trace else {}

    def decisions(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whether a sample is served by each expert of each unit."""
        served = (trace[CHOSEN].detach() > 0).float()  # b u m
        return {name: served[..., i].T for i, name in enumerate(self.decides)}

    def activated(self, denoiser: Denoiser) -> Mapping[str, float]:
        return dict.fromkeys(self._stacked(denoiser), self.active / self.experts)

    def groups(self, denoiser: Denoiser) -> Mapping[str, Group]:
        return {key: Group(kind="stack") for key in self._stacked(denoiser) if key.endswith(".weight")}

    def _stacked(self, denoiser: Denoiser) -> list[str]:
        """Full names of the experts' parameters."""
        own = denoiser.edits[self.name].get_submodule("experts")
        return [f"edits.{self.name}.experts.{key}" for key, _ in own.named_parameters()]

    def shards(self, denoiser: Denoiser) -> Sequence[nn.Module]:
        own = denoiser.edits[self.name]
        assert isinstance(own, SwitchExperts)
        return list(own.experts)


def gate_table(denoiser: Denoiser) -> Tensor:
    """Gates p of all times, experts and units: 1000 u m, fp32; `top` of it tells the experts that are active.

    Raises:
        ValueError: if the denoiser has no SwitchDiT edit
    """
    own = next((own for own in denoiser.edits.values() if isinstance(own, SwitchExperts)), None)
    if own is None:
        raise ValueError(f"this {denoiser.name} has no gates over times: apply SwitchDiT first")
    return own.table()


# ---- units ----------------------------------------------------------------------------------------------------------


class Switched(Wrapper):
    """A unit whose branches read the masked stream, and which adds them to the stream as it was."""

    def __init__(self, unit: Any, own: SwitchExperts, index: int):
        super().__init__(unit)
        self.own, self.index = own, index
        self.whole = core(unit).anatomy.fused  # one sequence of text and image tokens, one bank

    def __call__(self, stream: Stream) -> Stream:
        if CHOSEN not in stream.trace:
            raise RuntimeError("SwitchDiT: units were run without the denoiser's forward, which decides: call that")
        gates = stream.trace[CHOSEN][:, self.index]  # b m
        if stream.step is not None:
            gates = gates[:1]  # all samples of an evaluation have one time
        image, text = stream.image, stream.text
        if self.whole and text is not None:
            length = text.shape[1]
            tokens = torch.cat((text, image), 1)
            added = tokens * self.own.experts[self.index](tokens, gates)  # (m - 1) x
            more, extra = added[:, length:], added[:, :length]
            after = self.unit(replace(stream, image=image + more, text=text + extra))
            kept = None if after.text is None else after.text - extra
            return replace(after, image=after.image - more, text=kept)
        more = image * self.own.experts[self.index](image, gates)
        after = self.unit(replace(stream, image=image + more))
        return replace(after, image=after.image - more)
