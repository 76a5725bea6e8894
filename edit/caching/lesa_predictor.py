"""What LESA predicts with: a mixture of the history and a step size from a network of times, or from its table.

LESA (arXiv 2602.20497). With h_1, ..., h_K the values at the K evaluations before, h_K the newest, and the first
repeated where there are fewer,

    z = sum_k w_k h_k + b,   alpha_s = KAN(tau_s - tau_0, ..., tau_s - tau_T),   h = h_K + alpha_s z

An expert has w_1, ..., w_K, b and the KAN of one stage, apart for cond and uncond. The cache is `edit.caching.lesa`.

Specification: methods/lesa.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edit.caching.engine import Predictor
from edit.caching.kan import Kan
from edit.stream import Branch, Step

RING = 8  # evaluations that are remembered
SETS = {"cond": slice(0, 1), "uncond": slice(1, 2), "joint": slice(0, 2)}  # of weights, by guidance branch


class Told(Protocol):
    """Fields of `edit.caching.lesa.Learned` that a predictor reads."""

    interval: int
    steps: int
    windows: tuple[int, ...]
    guided: bool

    def stage(self, level: float) -> int: ...


class Untrained(Told, Protocol):
    """And those of `edit.caching.lesa.LESA`."""

    network: Any
    hidden: int
    init: Any


# ---- weights ---------------------------------------------------------------------------------------------------------

Weights = tuple[Tensor, Tensor, Tensor]  # w, b and alpha


class Expert(nn.Module):
    """w, b and the network of one stage and guidance branch."""

    def __init__(self, edit: Untrained, window: int):
        super().__init__()
        sizes = (edit.steps + 1, edit.hidden, edit.hidden, 1)
        self.mix = nn.Linear(window, 1)
        self.network = Kan(sizes) if edit.network == "kan" else perceptron(sizes)
        if edit.init == "reuse" and not self.mix.weight.is_meta:
            last = self.network[-1]
            last.zero() if edit.network == "kan" else (nn.init.zeros_(last.weight), nn.init.zeros_(last.bias))

    def alpha(self, offsets: Tensor) -> Tensor:  # ... T+1 -> ...
        return self.network(offsets)[..., 0].float()


def perceptron(sizes: Sequence[int]) -> nn.Sequential:
    a, b, c, d = sizes
    return nn.Sequential(nn.Linear(a, b), nn.SiLU(), nn.Linear(b, c), nn.SiLU(), nn.Linear(c, d))


class Predictors(nn.Module):
    """The experts of all stages, for cond and, if guided, for uncond. They stay in fp32."""

    def __init__(self, edit: Untrained):
        super().__init__()
        self.edit = edit
        self.sets = nn.ModuleList(
            nn.ModuleList(Expert(edit, k) for k in edit.windows) for _ in range(2 if edit.guided else 1)
        )

    def offsets(self, levels: Sequence[float]) -> Tensor:
        """tau_s - tau_j of noise levels, 0 at the end: T T+1."""
        taus = torch.tensor(levels, dtype=torch.float64, device="cpu")
        found = (taus[:-1, None] - taus).float()
        return found.to(self.sets[0][0].mix.weight.device)

    def now(self, chosen: slice, step: Step) -> Weights:
        """Of an evaluation, with a graph: w c K, b c, alpha c, for c sets."""
        stage, offsets = self.edit.stage(step.level), self.offsets(step.levels or step.times)[step.index]
        experts = [experts[stage] for experts in self.sets[chosen]]
        mix = torch.cat([e.mix.weight for e in experts]).float()
        bias = torch.cat([e.mix.bias for e in experts]).float()
        return mix, bias, torch.stack([e.alpha(offsets) for e in experts])

    def mixtures(self) -> tuple[Tensor, Tensor]:
        """Of all stages: w c e 8, the newest last, and b c e, for e stages."""
        mix = [[nn.functional.pad(e.mix.weight[0], (RING - k, 0)) for e, k in self._each(s)] for s in self.sets]
        biases = [[e.mix.bias[0] for e in experts] for experts in self.sets]  # type: ignore[union-attr]
        return stacked(mix).float(), stacked(biases).float()

    def alphas(self, levels: Sequence[float]) -> Tensor:
        """Of all evaluations: c T."""
        offsets, stages = self.offsets(levels), [self.edit.stage(t) for t in levels[:-1]]
        found = [[e.alpha(offsets) for e in experts] for experts in self.sets]  # type: ignore[union-attr]
        return stacked([[rows[e][i] for i, e in enumerate(stages)] for rows in found])

    def _each(self, experts: Any) -> zip:
        return zip(experts, self.edit.windows, strict=True)


def stacked(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(list(row)) for row in rows])


class Table(nn.Module):
    """What `Predictors` comes to on one schedule, as buffers."""

    mix: Tensor
    bias: Tensor
    table: Tensor

    def __init__(self, edit: Told):
        super().__init__()
        sets, stages = 2 if edit.guided else 1, len(edit.windows)
        self.register_buffer("mix", torch.zeros(sets, stages, RING))
        self.register_buffer("bias", torch.zeros(sets, stages))
        self.register_buffer("table", torch.zeros(sets, edit.steps))

    def mixtures(self) -> tuple[Tensor, Tensor]:
        return self.mix.float(), self.bias.float()

    def alphas(self, levels: Sequence[float]) -> Tensor:
        return self.table.float()


# ---- prediction ------------------------------------------------------------------------------------------------------


def remember(state: dict, image: Tensor) -> None:
    """Put the tokens of one more evaluation behind those that are remembered."""
    state["history"] = [*state.get("history", []), image][-RING:]


@dataclass(frozen=True)
class Mixed(Predictor):
    """The newest tokens, and alpha times a mixture of those before; places are steps.

    While the model trains, weights come with a graph; else the memory has those of all evaluations, and which is next
    is a number on the device (`edit.caching.graphs`).
    """

    edit: Told
    own: Any  # Predictors | Table

    def observe(self, state: dict, at: Step, value: Branch, rows: Tensor | None = None) -> None:
        assert rows is None, "the schedule is the same for all samples"
        self.tick(state, at, value.image.device)
        remember(state, value.image)

    def predict(self, state: dict, at: Step) -> Branch:
        history, window = state["history"], self.edit.windows[self.edit.stage(at.level)]
        chosen = SETS[at.branch]
        self.tick(state, at, history[-1].device)
        with uncast(history[-1].device):
            mix, bias, alpha = self.own.now(chosen, at) if self.learns else self.looked_up(state, chosen, at)
            image = ahead(history, mix[:, -window:], bias, alpha)
        remember(state, image)
        return Branch(image)

    @property
    def learns(self) -> bool:
        return self.own.training and isinstance(self.own, Predictors)

    def tick(self, state: dict, at: Step, device: torch.device) -> None:
        """Begin the memory, or go to the next evaluation."""
        if self.learns or self.edit.interval == 1:
            return
        if "next" in state:
            state["next"] = state["next"] + 1
            return
        with uncast(device):
            state["table"] = self.own.alphas(at.levels or at.times)
        state["next"] = torch.full((1,), at.index, dtype=torch.int64, device=device)

    def looked_up(self, state: dict, chosen: slice, at: Step) -> Weights:
        mix, bias = self.own.mixtures()
        stage, table = self.edit.stage(at.level), state["table"][chosen]
        return mix[chosen, stage], bias[chosen, stage], table.index_select(1, state["next"])[:, 0]


def uncast(device: torch.device) -> AbstractContextManager[Any]:
    """Whatever is cast outside, fp32 stays; there is nothing to cast on the meta device."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def ahead(history: Sequence[Tensor], mix: Tensor, bias: Tensor, alpha: Tensor) -> Tensor:
    """h_K + alpha (sum_k w_k h_k + b), of c guidance branches one after the other.

    Args:
        history: b n d each, the newest last
        mix: c K
        bias, alpha: c
    """
    newest, many = history[-1], len(history[-1]) // len(mix)

    def of_samples(v: Tensor) -> Tensor:  # c -> b 1 1
        return v.repeat_interleave(many)[:, None, None]

    z: Tensor = of_samples(bias)
    for back, w in enumerate(mix.flip(1).unbind(1), 1):  # from the newest
        z = torch.addcmul(z, of_samples(w), history[max(len(history) - back, 0)].float())
    return torch.addcmul(newest.float(), of_samples(alpha), z).to(newest.dtype)
