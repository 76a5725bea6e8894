"""CG-Taylor: the last hidden state is extrapolated where the same extrapolation of the first unit's output was right.

Confidence-gated Taylor (arXiv 2508.02240). With u the image tokens behind the first unit, which always runs, h the
tokens behind the last, and two ladders of finite differences (`edit.caching.taylor`), A of u and B of h:

    e = mean|A(s) - u_s| / mean|u_s|
    e < tau, s > W and s not the last:   h = B(s);   else the other units run, and A and B take u_s and h_s

A is refreshed with B alone: so both look equally far ahead, and e tells how far B can be trusted. Were A refreshed at
every evaluation, e would stay small while B drifts.

The mean is over the batch, as published. Ours: `reduction` takes the largest error of a sample, or each sample decides
for itself; those that fail run as one batch, with anchors of their own.

Defaults are those of the release for DiT-XL/2 at 50 steps of DDIM; it has tau = 0.13 or 0.03 and order_gate = 1 for
FLUX, 0.36 and 3 for Wan 2.1. tau depends on model, steps and schedule. Gate and target look at image tokens (inferred
for two-stream families: nothing reads the text behind the last unit).

Specification: methods/cg-taylor.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from edit.caching.engine import Gate, Predictor, anywhere, quotient
from edit.caching.spans import SpanCached
from edit.caching.taylor import Ladder, Order, RowLadder
from edit.denoiser import Denoiser
from edit.inputs.limits import Count, Natural, NotNegative, check_numbers
from edit.stream import Branch, Stream
from edit.unit import Unit

Reduction = Literal["batch_mean", "batch_max", "per_sample"]


@dataclass
class CGTaylor(SpanCached):
    """A cache that extrapolates as long as it is confident; it needs no training.

    Args:
        tau: relative error of the gate's extrapolation below which the target's is trusted
        order_gate: of the polynomial of the first unit's output
        order_target: of the polynomial of the last unit's output
        warmup: W, the last of the evaluations at the beginning that are all computed
        max_skip: predicted evaluations one after the other at most; none, as published: no limit
        reduction: of the error over the batch: "batch_mean", as published; "batch_max"; "per_sample": each decides
    """

    tau: NotNegative = 0.008
    order_gate: Order = 3
    order_target: Order = 1
    warmup: Natural = 2
    max_skip: Count | None = None
    reduction: Reduction = "batch_mean"

    @property
    def batchwise(self) -> bool:  # type: ignore[override] - here a consequence
        return self.reduction != "per_sample"

    def __post_init__(self):
        check_numbers(self)

    @property
    def spared(self) -> tuple[int, int]:
        return 1, 0

    def check(self, sampler: Any, times: tuple[float, ...]) -> None:
        super().check(sampler, times)
        if (count := len(times) - 1) <= self.warmup + 2:
            raise ValueError(
                f"{self.name} (CGTaylor): evaluations 0 to {self.warmup} and the last are computed, which are all "
                f"{count} of this sampler: take more steps, or lower warmup"
            )

    def apply(self, denoiser: Denoiser) -> None:
        ladder = RowLadder if self.reduction == "per_sample" else Ladder
        gate = Confidence(self.tau, ladder(self.order_gate), self.warmup, self.max_skip, self.reduction)
        self.cache(denoiser, gate, ladder(self.order_target), "hidden")


@dataclass(frozen=True)
class Confidence(Gate):
    """Computes where the extrapolation of the tokens in front of the span is wrong; arguments as of `CGTaylor`."""

    tau: float
    ladder: Predictor
    warmup: int
    max_skip: int | None = None
    reduction: Reduction = "batch_mean"

    def computes(self, unit: Unit, stream: Stream, state: dict) -> bool | Tensor:
        step, image = stream.step, stream.image
        assert step is not None
        at, row = float(step.index), state.get("row", torch.zeros(len(image), device=image.device))
        if step.index <= self.warmup or step.index == step.count - 1 or "ladder" not in state:
            computed: bool | Tensor = True
        else:
            computed = self.wrong(unit, self.ladder.predict(state["ladder"], at).image, image)
            if self.max_skip is not None:
                computed = computed | (row >= self.max_skip)
        if self.reduction != "per_sample":
            computed = anywhere(unit, bool(torch.as_tensor(computed).any()), image.device)
        if computed is False:
            state["row"] = row + 1
            return False
        rows = None if computed is True else computed.nonzero().flatten()
        state["row"] = torch.where(torch.as_tensor(computed, device=image.device), 0.0, row + 1)
        tokens = Branch(image if rows is None else image[rows])
        if rows is None or len(rows):
            self.ladder.observe(state.setdefault("ladder", {}), at, tokens, rows)
        return computed

    def wrong(self, unit: Unit, guess: Tensor, image: Tensor) -> Tensor:
        """Whether the relative error is not below the tolerance: b bool, or of the whole batch, 1 bool."""
        guess, image = guess.float(), image.float()
        if self.reduction == "batch_mean":
            error = quotient(unit, (guess - image).abs().mean(), image.abs().mean(), len(image))
            return error.reshape(1) >= self.tau
        return (guess - image).abs().mean((1, 2)) / image.abs().mean((1, 2)) >= self.tau
