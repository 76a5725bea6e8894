"""Additions of a unit that E-DiT repeats at later steps of a generation (see `elastic.py`)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from edit.routing.batches import rows_on
from edit.stream import Stream


class Residuals:
    """A unit's last addition to the tokens of each sample, and the number of repetitions since."""

    def __init__(self, samples: int):
        self.count: list[float] = [math.inf] * samples  # nothing there that could be repeated
        self.near = [False] * samples  # in the band now or before
        self.image: Tensor | None = None  # b n d
        self.text: Tensor | None = None  # b l d

    def where(self, rows: list[int], device: torch.device) -> Tensor | None:
        """None: all."""
        return None if len(rows) == len(self.count) else rows_on(device, rows)

    def store(self, rows: list[int], before: Stream, after: Stream, text: bool) -> None:
        where = self.where(rows, after.image.device)
        self.image = put(self.image, where, before.image, after.image)
        if text and before.text is not None and after.text is not None:
            self.text = put(self.text, where, before.text, after.text)
        for i in rows:
            self.count[i] = 0

    def added(self, stream: Stream, rows: list[int]) -> Stream:
        where = self.where(rows, stream.image.device)
        for i in rows:
            self.count[i] += 1

        def plus(tokens: Tensor | None, kept: Tensor | None) -> Tensor | None:
            if tokens is None or kept is None:
                return tokens
            kept = kept.to(tokens.dtype)
            return tokens + kept if where is None else tokens.index_add(0, where, kept.index_select(0, where))

        image = plus(stream.image, self.image)
        assert image is not None
        return replace(stream, image=image, text=plus(stream.text, self.text))


def put(kept: Tensor | None, rows: Tensor | None, before: Tensor, after: Tensor) -> Tensor:
    """The differences of some samples, None: of all, in place of those kept so far."""
    change = (after - before).to(after.dtype)
    return change if kept is None or rows is None else kept.index_copy_(0, rows, change.index_select(0, rows))
