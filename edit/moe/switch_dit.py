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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.denoiser import Denoiser, Edit
from edit.groups import Group
from edit.inputs.limits import Count, NotNegative, Seed, check_numbers
from edit.moe.switch_prior import TIMES, divergence, matching, shared, top, window
from edit.routing.dydit_routers import Logits
from edit.stream import Condition, Stream
from edit.unit import Wrapper, core
from edit.widths import Scale

FAR = TIMES // 2  # between times whose experts should differ
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


# ---- parameters -----------------------------------------------------------------------------------------------------


class SwitchExperts(nn.Module):
    """Gates, in fp32, and experts of all units; the matching, which changes in training forwards that `begin` tells to.

    Args:
        denoiser: whose embedded times the gates read
        width: d
        experts, active: M and k
        seed: of permutations
    """

    scales: ClassVar = {r"router\.weight": Scale("output", "fan_in"), "bias": Scale("vector")}
    sigma: Tensor  # L M, int64: the prior's column for each expert, unit by unit
    steps: Tensor  # int64: training steps so far
    agreement: Tensor  # 2: of the choices at times that are near and far, at the latest matching

    def __init__(self, denoiser: Denoiser, width: int, experts: int, active: int, seed: int):
        super().__init__()
        self.size, self.active, self.seed = (len(denoiser.units), experts), active, seed
        units = self.size[0]
        self.router = Logits(width, units * experts)
        for part in self.router.weight.detach().view(units, experts, width):
            nn.init.xavier_uniform_(part)
        nn.init.zeros_(self.router.bias)
        self.experts = nn.ModuleList(Experts(denoiser.facts.width, experts) for _ in range(units))
        self.register_buffer("sigma", torch.arange(units * experts))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("agreement", torch.zeros(2))
        self.embed_times: Callable[[Tensor], Tensor] = denoiser.embed_times  # a copy of the denoiser has its own
        self.indexed = denoiser.prediction == "noise"  # over 1000 steps, of which step n lies at t = (n + 1) / 1000
        self.due, self.done, self.progress = False, None, None
        self.register_load_state_dict_post_hook(forget)

    def gates(self, time: Tensor) -> Tensor:
        """p: b d -> b u m."""
        return self.router(F.silu(time.float())).unflatten(1, self.size).softmax(2)

    @torch.no_grad()
    def table(self) -> Tensor:
        """p at all times, flows' in the middle of their bins: 1000 u m."""
        n = torch.arange(TIMES, device=self.sigma.device)
        return self.gates(self.embed_times((n + (1.0 if self.indexed else 0.5)) / TIMES))

    def bins(self, t: Tensor) -> Tensor:
        """n of times in [0, 1]: b, int64, 0 is next to clean data."""
        n = TIMES * t.float()
        return ((n - 1).round() if self.indexed else n.floor()).long().clamp(0, TIMES - 1)

    def prior(self, t: Tensor) -> Tensor:
        """Pi of these times at the columns that the experts are matched to, of sum 1: b (u m)."""
        return window(self.bins(t), self.sigma, *self.size, self.active).float() / (self.size[0] * self.active)

    # ---- the matching ---------------------------------------------------------------------------------------------

    def begin(self, progress: float, every: int) -> None:
        """A training step begins, or another micro-batch of it: now and then the next forward is to match."""
        if progress == self.progress:
            return
        if self.done is None:
            self.done = int(self.steps)  # waits for the device, once in a run
        self.progress, self.due = progress, self.due or self.done % every == 0
        self.done += 1
        self.steps += 1

    @torch.no_grad()
    def match(self) -> None:
        """Match the prior's columns to the present choices. The host waits for L M x L M costs."""
        chosen = (top(self.table(), self.active) > 0).double()  # autocast, which would round counts, leaves float64
        q, n = chosen.flatten(1), torch.arange(TIMES, device=chosen.device)
        pi = window(n, torch.arange(q.shape[1], device=q.device), *self.size, self.active).double()
        cost = q.sum(0)[:, None] + pi.sum(0) - 2 * q.T @ pi  # of 0 and 1: |q - pi| = q + pi - 2 q pi
        self.sigma.copy_(matching(cost, self.seed, self.done or 0))
        self.agreement.copy_(torch.stack([shared(chosen, self.active, apart) for apart in (1, FAR)]))
        self.due = False


def forget(own: SwitchExperts, *keys: Any) -> None:
    """After weights are loaded: the number of steps is read again."""
    own.due, own.done, own.progress = False, None, None


class Experts(nn.Module):
    """The M experts of one unit: x A_m + a_m of each sample's merged expert, zero at first.

    Args:
        width: d
        count: M
    """

    scales: ClassVar = {"weight": Scale("hidden", "zero", stack=True), "bias": Scale("vector", stack=True)}

    def __init__(self, width: int, count: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, width, width))  # m d d: from, to
        self.bias = nn.Parameter(torch.zeros(count, width))

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """b n d -> b n d.

        Args:
            x: tokens, as they are between units
            gates: b m, or 1 m for all samples alike; zeros at experts that are not active
        """
        m, d, _ = self.weight.shape
        if len(gates) > 1 and d > 8 * m * x.shape[1]:  # at 8 both ways take equally long, forward and backward, on CPUs
            return self.stacked(x, gates)
        return self.merged(x, gates)

    def merged(self, x: Tensor, gates: Tensor) -> Tensor:
        """One matrix for each sample, or one for all: d^2 products for a token."""
        g = gates.to(self.weight.dtype)
        matrix, bias = (g @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:]), g @ self.bias
        x = x.to(matrix.dtype)
        return x @ matrix[0] + bias[0] if len(g) == 1 else torch.baddbmm(bias[:, None], x, matrix)

    def stacked(self, x: Tensor, gates: Tensor) -> Tensor:
        """All experts in one product of the weighted tokens, b n (m d): M d^2 products for a token."""
        g = gates.to(self.weight.dtype)
        x = (x.to(g.dtype)[:, :, None] * g[:, None, :, None]).flatten(2)
        return x @ self.weight.flatten(0, 1) + (g @ self.bias)[:, None]


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
