"""How the kernels walk over one part: sizes of tiles, tables on the device, and the arguments of a launch.

Everything here comes from shapes, so that the host never waits for the device.

A tile has as many own tokens as share a list, from 16 (the least that tensor cores take) to 128, so that keys that many
queries share are read once for all of them. Steps have 64 tokens: the rows of Hopper's tensor cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edit.kernels.lists import transposed
from edit.kernels.parts import Part
from edit.kernels.tiles import table

LOG2E = 1.4426950408889634
PROGRAMS = 1024  # at most, for keys that all queries see: so many that all processors of a large chip have work


@dataclass(frozen=True)
class Tile:
    own: int  # tokens of the program
    step: int  # tokens of a step
    warps: int
    stages: int  # steps in flight

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


class Plan:
    """One part, with what its launches need. q b h n e; k and v are made contiguous."""

    def __init__(self, q: Tensor, part: Part, scale: float, deterministic: bool = True):
        self.b, self.h, self.n, self.e = q.shape
        self.k, self.v = part.k.contiguous(), part.v.contiguous()
        self.m, self.f = self.k.shape[2], self.v.shape[3]
        self.part, self.scale, self.deterministic = part, scale, deterministic
        self.index, self.index_step = self.shared(part.index)
        self.without, self.without_step = self.shared(part.without)
        self.bias, self.bias_step = self.shared(part.bias if isinstance(part.bias, Tensor) else None)
        # all queries see all keys: cut neither
        self.rows = None if part.index is None and part.without is None else part.rows
        self.columns = None if part.index is None else part.columns

    def shared(self, x: Tensor | None) -> tuple[Tensor | None, int]:
        """A table, and the step from one batch and head to the next: 0 where all have the same."""
        if x is None or x.shape[0] * x.shape[1] == 1:
            return None if x is None else x.contiguous(), 0
        x = x.expand(self.b, self.h, *x.shape[2:]).contiguous()
        return x, x[0, 0].numel()

    def tabled(self, cut: int | Tensor | None, tokens: int, tile: int) -> tuple[Tensor | None, int, int, int]:
        """A table of tiles with its step, or None; the number of tiles, and tokens in a group."""
        if isinstance(cut, Tensor):
            tiles, step = self.shared(table(cut, tokens, tile))
            return tiles, step, tiles.shape[2], 1
        group = tile if cut is None else cut
        return None, 0, -(-tokens // group) * -(-group // tile), group

    def common(self, keys: int) -> dict[str, Any]:
        """What all kernels are told; keys: the axis of logits along which keys run."""
        near, bias = self.part.near, self.part.bias
        return {
            **{"k": self.k, "v": self.v, "bias": self.bias, "without": self.without},
            **{"bias_step": self.bias_step, "without_step": self.without_step},
            **{"n": self.n, "m": self.m, "left": 0 if self.without is None else self.without.shape[3]},
            "near_queries": None if near is None else near.queries.contiguous(),
            "near_keys": None if near is None else near.keys.contiguous(),
            **{"limit": 0 if near is None else near.limit, "AXES": 1 if near is None else near.keys.shape[1]},
            "DISC": near is not None and near.shape == "disc",
            **{"scale": self.scale * LOG2E, "shift": LOG2E * bias if isinstance(bias, float | int) else 0.0},
            **{"E": self.e, "F": self.f, "EP": padded(self.e), "FP": padded(self.f), "KEYS": keys},
        }

    def queries(self, q: Tensor, backward: bool = False) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Grid and arguments of a kernel whose programs own queries."""
        nested = isinstance(self.columns, Tensor)
        tile = query_tile(self.rows, self.e, self.f, q.element_size(), backward)
        rows, step, tiles, group = self.tabled(self.rows, self.n, tile.own)
        cut, cut_step = self.shared(self.columns) if nested else (None, 0)
        entries = 1 if self.index is None else self.index.shape[3]
        column = 1 if nested or self.columns is None else self.columns
        reach = entries if nested else self.m if self.index is None else entries * column
        narrow = tile.own < 64
        return (tiles, self.b * self.h), {
            **self.common(0 if narrow else 1),
            **{"index": self.index, "index_step": self.index_step, "rows": rows, "rows_step": step},
            **{"columns": cut, "columns_step": cut_step, "reach": reach, "entries": entries},
            **{"blocks": self.part.blocks, "T": tile.own, "S": tile.step, "ROW": group, "COLUMN": column},
            **{"NARROW": narrow, "NESTED": nested, **tile.options},
        }

    def keys(self, q: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Grid (tiles, chunks of queries, b h) and arguments of the kernel whose programs own keys."""
        nested = isinstance(self.rows, Tensor) or self.without is not None
        tile = key_tile(self.columns, self.e, self.f, q.element_size(), self.rows if nested else None)
        columns, step, tiles, group = self.tabled(self.columns, self.m, tile.own)
        cut, cut_step = self.shared(self.rows) if isinstance(self.rows, Tensor) else (None, 0)
        row = 1 if self.rows is None or cut is not None else self.rows
        listed = starts = None
        reach = self.part.row_count if nested else self.n
        chunks = 1
        if self.index is None:
            most = reach if nested else -(-reach // (8 * tile.step))
            chunks = max(1, min(most, PROGRAMS // (tiles * self.b * self.h)))
        else:
            starts, listed = transposed(self.index, self.part.blocks, self.deterministic)
        each = -(-reach // chunks)
        narrow = tile.own < 64
        return (tiles, chunks, self.b * self.h), {
            **self.common(1 if narrow else 0),
            **{"starts": starts, "listed": listed, "columns": columns, "columns_step": step, "rows": cut},
            **{"starts_step": 0 if starts is None or self.index_step == 0 else starts.shape[-1]},
            **{"listed_step": self.index_step, "rows_step": cut_step, "reach": reach, "each": each},
            **{"groups": self.part.row_count, "T": tile.own, "S": tile.step, "COLUMN": group, "ROW": row},
            **{"NARROW": narrow, "NESTED": nested, **tile.options},
        }


def padded(width: int) -> int:
    """The power of two that holds a head: lanes beyond the width are masked and read nothing."""
    return max(16, 1 << (width - 1).bit_length())


def query_tile(rows: int | Tensor | None, e: int, f: int, itemsize: int, backward: bool) -> Tile:
    """Choices that leave no chip with spilled registers: `tests/kernels/test_compiled.py`."""
    own = 128 if rows is None else 64 if isinstance(rows, Tensor) else min(128, padded(rows))
    if itemsize > 2:  # fp32: for tests on a device, not for speed
        return Tile(own, 32 if own < 64 else 16, 8 if own == 128 else 4, 1)
    large = padded(e) + padded(f) > 128
    if backward and large:
        return Tile(min(own, 64), 64, 8, 2)
    if backward and own >= 64:
        return Tile(own, 64, 8, 3 if own == 128 else 2)
    if large and own == 64:
        return Tile(64, 64, 8, 3) if isinstance(rows, Tensor) else Tile(64, 32, 8, 2)
    small = padded(e) + padded(f) <= 64
    return Tile(own, 64, 8 if own == 128 else 4, 3 if not backward and (rows is None or small) else 2)


def key_tile(columns: int | Tensor | None, e: int, f: int, itemsize: int, rows: int | Tensor | None) -> Tile:
    """rows: those that are walked one by one, or None."""
    own = 64 if columns is None or isinstance(columns, Tensor) else min(64, padded(columns))
    step = min(64, padded(rows)) if isinstance(rows, int) else 64
    if itemsize > 2:
        return Tile(own, min(step, 32 if own < 64 else 16), 4, 1)
    if own == 64:  # groups that are walked one by one take more registers
        return Tile(64, step if rows is None else min(step, 32), 8, 2)
    return Tile(own, step, 4, 2)


def launch(kernel: Any, plan: tuple[tuple[int, ...], Mapping[str, Any]], given: Mapping[str, Any]) -> None:
    grid, arguments = plan
    names = {*kernel.arg_names, *Tile(0, 0, 0, 0).options}
    kernel[grid](**{key: x for key, x in {**arguments, **given}.items() if key in names})


def on(device: torch.device) -> AbstractContextManager:
    """Launches go to this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
