"""TinyFusion (arXiv 2412.01199): learn which units of a DiT to drop so that training afterwards repairs the most.

The depth is split into groups of consecutive units, of which N of M stay. Each group has one logit per way to do that;
every sample draws its own ways (Gumbel-softmax, straight-through), and the logits are trained together with a cheap
update of the weights, a LoRA on every linear layer, which stands in for the training to come:

    p_g = softmax(kappa l_g),  y_g = one_hot(argmax(kappa l_g + G)),  m_g = y_g O_g,  x <- m U(x) + (1 - m) x

Training runs dropped units as well, so that every way gets its gradient. The decision is the largest averaged logit;
the LoRA is discarded, and recovery starts from the original weights (`python -m recipes.prune`). Outside of training
dropped units are skipped.

Specification: methods/tinyfusion.md. Families other than DiT and SiT, where text and image share one gate, are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from edit.denoiser import Denoiser, Edit
from edit.inputs.limits import NotNegative, check_numbers
from edit.objectives import Ramp
from edit.pruning.patterns import Groups, Pattern, groups_of, options, runs_of_one_kind
from edit.stream import Condition, Stream
from edit.unit import Wrapper

MASK, CONFIDENCE, CHOICE = "tinyfusion.mask", "tinyfusion.confidence", "tinyfusion.choice"


@dataclass
class TinyFusion(Edit):
    """Gates around the units, to search with.

    Args:
        pattern: "N:M", several of them or pairs, see `edit.pruning.patterns`
        start: of every logit
        kappa: factor of the logits at the start and the end of the run: with 100, a step of 1e-3 moves one by 0.1
        tau: temperature of the straight-through gradient, linear over the run; which way is drawn does not depend on it
        frozen: without a LoRA, train the logits alone; otherwise the weights too, or a LoRA where one is applied (rank
            8, alpha 16 on all linear layers)
    """

    pattern: Pattern = "1:2"
    start: NotNegative = 0.02
    kappa: tuple[float, float] = (100.0, 100.0)
    tau: tuple[float, float] = (4.0, 0.1)
    frozen: bool = False

    excludes = ("TinyFusion",)

    def __post_init__(self):
        check_numbers(self)
        self.pattern = self.pattern if isinstance(self.pattern, str) else tuple((n, m) for n, m in self.pattern)
        self.kappa, self.tau = (self.kappa[0], self.kappa[1]), (self.tau[0], self.tau[1])
        if min(*self.kappa, *self.tau) <= 0:
            raise ValueError(f"TinyFusion: kappa and tau are positive, got {self.kappa} and {self.tau}")

    def apply(self, denoiser: Denoiser) -> Gates:
        try:
            groups = groups_of(self.pattern, runs_of_one_kind(denoiser))
        except ValueError as error:
            raise ValueError(f"TinyFusion on this {denoiser.name}: {error}") from error
        gates = Gates(groups, self.start, self.kappa[0], self.tau[0])
        choice = [n < m for n, m in groups for _ in range(m)]
        units = enumerate(zip(denoiser.units, choice, strict=True))
        denoiser.units = [Gated(unit, gates, i) if open_ else unit for i, (unit, open_) in units]
        return gates

    def trainable(self, name: str) -> bool:
        return not self.frozen or name.startswith("edits.")

    def advance(self, progress: float, own: nn.Module | None) -> None:
        assert isinstance(own, Gates)
        own.kappa.fill_(Ramp(*self.kappa)(progress))
        own.tau.fill_(Ramp(*self.tau)(progress))

    def embed(self, stream: Stream, t: Tensor, condition: Condition, own: nn.Module | None) -> Stream:
        assert isinstance(own, Gates)
        if not own.training:
            own.decision = frozenset(own.kept())  # in every pass: FSDP2 changes logits without a trace of it
            return stream
        p = own.probabilities()
        stream = stream.record(MASK, own.draw(len(stream.image)))
        return stream.record(CONFIDENCE, p.detach().amax(1)).record(CHOICE, p.detach().argmax(1).float())

    def metrics(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of each group: its largest probability, which should stay below 0.9 for most in the first third of a run, and
        the number of that way."""
        if CONFIDENCE not in trace:
            return {}
        named = {"confidence": trace[CONFIDENCE]}
        named |= {f"confidence/{g}": v for g, v in enumerate(trace[CONFIDENCE])}
        return named | {f"choice/{g}": v for g, v in enumerate(trace[CHOICE])}

    def fold(self, denoiser: Denoiser) -> None:
        """Drop the units that lost. The search's own weights stay: recovery from the original ones is
        `recipes.prune`'s."""
        gates = next(own for own in denoiser.edits.values() if isinstance(own, Gates))
        denoiser.units = [u.unit if isinstance(u, Gated) else u for u in denoiser.units]
        denoiser.keep(gates.kept())


class Gates(nn.Module):
    """The logits of a search. Under FSDP2 with bf16 a pass sees them rounded to bf16, kappa l to 0.01 near the start.

    Args:
        groups: (n, m) each
        start: of every logit
        kappa, tau: at the beginning
    """

    def __init__(self, groups: Groups, start: float, kappa: float, tau: float):
        super().__init__()
        self.groups = groups
        ways = [options(n, m) for n, m in groups]
        c, width = max(map(len, ways)), max(m for _, m in groups)
        padded = torch.zeros(len(groups), c, width, device="cpu")
        for g, way in enumerate(ways):
            padded[g, : len(way), : way.shape[1]] = way
        self.logits = nn.Parameter(torch.full((len(groups), c), start))
        device = self.logits.device  # meta where only the structure is wanted
        self.register_buffer("options", padded.to(device))  # g c m, filled up with zeros
        self.register_buffer("exists", (padded.sum(2) > 0).to(device))  # g c
        self.register_buffer("kappa", torch.tensor(float(kappa), device=device))
        self.register_buffer("tau", torch.tensor(float(tau), device=device))
        places = [g * width + i for g, (_, m) in enumerate(groups) for i in range(m)]
        self.register_buffer("places", torch.tensor(places, device="cpu").to(device))  # of the units in g x m
        self.decision: frozenset[int] | None = None  # units that stay, of the pass under way outside of training

    def scaled(self) -> Tensor:
        """kappa l: g c, minus infinity where a group has no such way."""
        return (self.kappa * self.logits.float()).masked_fill(~self.exists, -torch.inf)

    def probabilities(self) -> Tensor:
        """softmax(kappa l): g c."""
        return self.scaled().softmax(1)

    def draw(self, count: int) -> Tensor:
        """Which units stay, for each sample on its own: b units, 0 or 1 up to rounding, with a gradient to the logits.

        tau shapes the gradient alone: the largest of kappa l + G does not depend on it.
        """
        scaled = self.scaled()
        gumbel = -torch.empty(count, *scaled.shape, device=scaled.device).exponential_().log()
        soft = ((scaled + gumbel) / self.tau).softmax(2)  # b g c
        hard = torch.zeros_like(soft).scatter_(2, soft.argmax(2, keepdim=True), 1.0)
        return self.mask(hard - soft.detach() + soft)

    def mask(self, chosen: Tensor) -> Tensor:
        """Units of the chosen ways: b g c -> b units."""
        return torch.einsum("bgc,gcm->bgm", chosen, self.options).flatten(1)[:, self.places]

    def kept(self) -> list[int]:
        """Units that stay, by the largest logit of each group. Reading the logits waits for the device."""
        best = self.scaled().argmax(1)
        if best.is_meta:  # no weights yet: any way costs the same
            ends = [0, *accumulate(m for _, m in self.groups)]
            return [end + i for end, (n, _) in zip(ends, self.groups, strict=False) for i in range(n)]
        ways = self.options[torch.arange(len(best), device=best.device), best]  # g m
        return ways.flatten()[self.places].nonzero()[:, 0].tolist()


class Gated(Wrapper):
    """A unit with its gate: mixed with its input while the search draws, run or skipped afterwards."""

    def __init__(self, unit: Any, gates: Gates, index: int):
        super().__init__(unit)
        self.gates, self.index = gates, index

    def __call__(self, stream: Stream) -> Stream:
        mask = stream.trace.get(MASK)
        if mask is None:
            decision = self.gates.decision
            if decision is None:
                raise RuntimeError(
                    "TinyFusion: units were run without the denoiser's forward, which decides: call that"
                )
            return self.unit(stream) if self.index in decision else stream
        after, m = self.unit(stream), mask[:, self.index, None, None]
        text = after.text if stream.text is None else mix(stream.text, after.text, m)
        return replace(after, image=mix(stream.image, after.image, m), text=text)


def mix(before: Tensor, after: Tensor, m: Tensor) -> Tensor:
    """m after + (1 - m) before, in the type of `after`: under autocast a unit may hand on another than it got."""
    return torch.lerp(before.to(after.dtype), after, m.to(after.dtype))
