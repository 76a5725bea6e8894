"""Mixture of Blocks (Dense2MoE, arXiv 2510.09094): each sample takes kappa of the m units of a group, at each step.

A group (a, m, kappa) is the units a .. a + m - 1, of one kind. Its router sees the group's input and the conditioning:

    x_p = mean_image tokens,  c_p = mean_text tokens,  y = all that modulates the units
    r = alpha [x_p, c_p] W_x + (1 - alpha) y W_y,  q = softmax(r),  S_b = TopK(q_b, kappa)
    gate_i = 1[i in S_b] q_i / stopgrad(q_i),  z <- z + gate_i (Block_i(z) - z)  in the order of depth

The gate is 1 or 0, and has the gradient of log q_i where it is 1, so kappa = m computes the dense stack and trains the
router all the same. `selection="window"` takes the kappa adjacent units whose mean r is largest: one source says that
adjacent ones are meant, the formula above is quoted from the paper. Training computes every unit and multiplies;
afterwards a group decides once, and each unit runs on the samples that take it; what such a unit records (loads of
experts) is then left out, as it is of some samples.

Only units inside groups and the routers are trained (stage C of Dense2MoE; `others` trains the rest, too). Nothing
balances the routers, and none is published: a router that ignores its input is static depth pruning, which `entropy`
and `spread` in the metrics tell.

Inferred: alpha, the form of the gate, pooled tokens as means, routers from N(0, 0.02) without bias; models without text
have no c_p. Specification: methods/dense2moe.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edit.denoiser import Denoiser, Edit
from edit.inputs.limits import Share, check_numbers
from edit.moe.block_groups import Groups, as_groups, check_groups
from edit.moe.division import names_inside
from edit.moe.routing import Router
from edit.pruning.tinyfusion import mix
from edit.routing.batches import run_grouped, sharded
from edit.stream import Stream
from edit.unit import Wrapper, core

STD = 0.02  # of a fresh router


@dataclass
class MixtureOfBlocks(Edit):
    """Routers in front of groups of units.

    Args:
        blocks: groups of (first unit, units, units that a sample takes), increasing and disjoint; see
            `edit.moe.block_groups.layout`
        alpha: part of tokens in a router's logits, the rest is the conditioning's
        selection: "topk", the likeliest units, or "window", adjacent ones
        others: train the units outside of groups, and what is in none, too
    """

    blocks: Groups
    alpha: Share = 0.5
    selection: Literal["topk", "window"] = "topk"
    others: bool = False

    adaptive = True
    excludes = ("MixtureOfBlocks", "TinyFusion", "Elastic", "DyDiT", "ModulationApproximator")
    decides = {"open": "units that were run"}

    def __post_init__(self):
        check_numbers(self)
        self.blocks = as_groups("MixtureOfBlocks", self.blocks)
        if self.selection not in ("topk", "window"):
            raise ValueError(f"MixtureOfBlocks: selection must be topk or window, got {self.selection!r}")

    def apply(self, denoiser: Denoiser) -> nn.ModuleList:
        check_groups("MixtureOfBlocks", self.blocks, denoiser)
        facts, units = denoiser.facts, list(denoiser.units)
        first = next(core(units[0]).parameters())
        with first.device:
            parts = 2 if facts.text else 1
            own = nn.ModuleList(BlockRouter(facts.width, parts, m, self.alpha) for _, m, _ in self.blocks)
        for g, (a, m, _) in enumerate(self.blocks):
            for place in range(m):
                units[a + place] = GroupedUnit(units[a + place], own[g], self, g, place)
        denoiser.units, self.depth = units, len(units)
        self.inside = names_inside(denoiser, self.members)
        return own

    @property
    def members(self) -> list[int]:
        """All units that are in groups."""
        return [i for a, m, _ in self.blocks for i in range(a, a + m)]

    def trainable(self, name: str) -> bool:
        return self.others or name.startswith((*self.inside, f"edits.{self.name}."))

    def activated(self, denoiser: Denoiser) -> Mapping[str, float]:
        shares = {i: kappa / m for a, m, kappa in self.blocks for i in range(a, a + m)}
        names, found = [name for name, _ in denoiser.named_parameters()], {}
        for i, share in shares.items():
            beginnings = names_inside(denoiser, [i])
            found |= {name: share for name in names if name.startswith(beginnings)}
        return found

    # ---- what was decided -------------------------------------------------------------------------------------------

    def metrics(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`entropy`: of a sample's q, a mean over groups, over that of m equal units. `spread`: entropy of what the
        batch takes, likewise: both near 0 and fixed in static pruning. How often each unit is taken."""
        if f"{self.name}.0.q" not in trace:
            return {}
        sharp, taken, each = [], [], {}
        for g, (a, m, kappa) in enumerate(self.blocks):
            q, opened = (trace[f"{self.name}.{g}.{what}"].detach() for what in ("q", "open"))
            usage = opened.mean(0)
            sharp.append(torch.special.entr(q).sum(1).mean() / math.log(max(m, 2)))
            taken.append(torch.special.entr(usage / kappa).sum() / math.log(max(m, 2)))
            each |= {f"open/{a + i}": share for i, share in enumerate(usage)}
        return {"entropy": torch.stack(sharp).mean(), "spread": torch.stack(taken).mean()} | each

    def decisions(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which units were run: u b."""
        if f"{self.name}.0.open" not in trace:
            return {}
        rows = [trace[f"{self.name}.{g}.open"].detach().T for g in range(len(self.blocks))]
        members = torch.tensor(self.members, device=rows[0].device)
        everywhere = rows[0].new_ones(self.depth, rows[0].shape[1])
        return {"open": everywhere.index_copy(0, members, torch.cat(rows))}


# ---- routers --------------------------------------------------------------------------------------------------------


class BlockRouter(nn.Module):
    """Logits of the units of a group, in fp32: alpha [x_p, c_p] W_x + (1 - alpha) y W_y.

    Args:
        width: d
        parts: 2 where there is text, else 1
        units: m
        alpha: part of the tokens
    """

    def __init__(self, width: int, parts: int, units: int, alpha: float):
        super().__init__()
        self.alpha = alpha
        self.tokens, self.signal = Router(parts * width, units, STD), Router(width, units, STD)

    def forward(self, stream: Stream) -> Tensor:  # b m
        pooled = [stream.layout.of_image(stream.image).mean(1, dtype=torch.float32)]
        if stream.text is not None:
            pooled.append(mean_text(stream.text, stream.layout.text_mask))
        assert stream.signal is not None
        return self.alpha * self.tokens(torch.cat(pooled, 1)) + (1 - self.alpha) * self.signal(stream.signal)


def mean_text(text: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the tokens that are no padding, in fp32: b l d -> b d."""
    if mask is None:
        return text.mean(1, dtype=torch.float32)
    kept = mask[..., None].float()
    return (text.float() * kept).sum(1) / kept.sum(1).clamp_min(1)


def selected(logits: Tensor, kappa: int, selection: str) -> Tensor:
    """Which units each sample takes: b m -> b m, bool, kappa in each row."""
    if selection == "window":
        first = logits.unfold(1, kappa, 1).mean(2).argmax(1, keepdim=True)
        chosen = first + torch.arange(kappa, device=logits.device)
    else:
        chosen = logits.topk(kappa, 1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, chosen, True)


class GroupedUnit(Wrapper):
    """A unit of a group. The first of them asks the router; what it says is in the trace, and on the host once."""

    def __init__(self, unit: Any, router: BlockRouter, edit: MixtureOfBlocks, group: int, place: int):
        super().__init__(unit)
        self.router, self.edit, self.group, self.place = router, edit, group, place

    @property
    def head(self) -> str:
        """Of the group's records."""
        return f"{self.edit.name}.{self.group}"

    def __call__(self, stream: Stream) -> Stream:
        if self.place == 0:
            stream = self.decide(stream)
        elif f"{self.head}.open" not in stream.trace:
            raise RuntimeError(
                f"{self.head}: a unit was run whose group has not decided, as its first unit was left out: leave the "
                "cache of units out, or let it end between groups"
            )
        if self.factored(stream):
            after, m = self.unit(stream), stream.trace[f"{self.head}.gates"][:, self.place, None, None]
            text = after.text
            if stream.text is not None and text is not None and text is not stream.text:
                text = mix(stream.text, text, m)
            return replace(after, image=mix(stream.image, after.image, m), text=text)
        taken = stream.trace[f"{self.head}.host"][:, self.place].tolist()
        after = run_grouped(stream, [key or None for key in taken], lambda _, part: self.unit(part))
        return replace(after, trace=stream.trace)  # what the unit records is of some samples, if of any

    def factored(self, stream: Stream) -> bool:
        """Whether the unit runs on all samples, times 0 or 1: where gradients are wanted, where it is a collective that
        no rank may leave out, and where its branches are wanted."""
        return self.router.training or sharded(core(self.unit)) or stream.tap is not None

    def decide(self, stream: Stream) -> Stream:
        """The stream with the group's decision in its trace: b m each."""
        r, kappa = self.router(stream), self.edit.blocks[self.group][2]
        log_q = r.log_softmax(1)
        opened = selected(r, kappa, self.edit.selection)
        gates = opened * (log_q - log_q.detach()).exp()  # q / stopgrad(q), also where q is too small for a quotient
        found = {"q": log_q.exp(), "open": opened.float(), "gates": gates}
        if r.is_meta:  # without weights any choice costs the same
            found["host"] = (torch.arange(r.shape[1], device="cpu") < kappa).expand(len(r), -1)
        elif not self.factored(stream):
            found["host"] = opened.cpu()  # the one wait of the group
        return replace(stream, trace={**stream.trace, **{f"{self.head}.{k}": v for k, v in found.items()}})
