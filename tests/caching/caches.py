"""Tiny models of all families with caches, and what is seen of their generations."""

from dataclasses import replace
from typing import Any

import torch
from families import CONFIGS, solver_at
from torch import Tensor
from weights import randomise

import edit
from edit.caching.engine import EXECUTED
from edit.denoiser import Denoiser
from edit.measuring.cost import count_generation, twin
from edit.measuring.flops import Flops
from edit.predictions import default_objective
from edit.sampling import Sampler
from edit.stream import Condition, Step
from edit.unit import core

MADE = {**CONFIGS, "sd3 dual": replace(CONFIGS["sd3"], num_layers=2, dual_attention_layers=(0,), qk_norm="rms_norm")}
FEW = ["dit", "flux", "sd3 dual", "pixart"]


def family(name: str, **edits: Any) -> Denoiser:
    """The same random weights every time, in fp32."""
    torch.manual_seed(0)
    denoiser = MADE[name].build()
    randomise(denoiser)
    return edit.apply(denoiser.eval(), edits)


def told(denoiser: Denoiser, count: int = 2) -> Condition:
    g = torch.Generator().manual_seed(1)
    return denoiser.example(count, text=5).map(
        lambda v: torch.randn(v.shape, generator=g) if v.is_floating_point() else v
    )


def sampler(denoiser: Denoiser, steps: int, **options: Any) -> Sampler:
    return Sampler(solver_at(denoiser, steps), **{"guidance": 2.0, **options})


def paint(denoiser: Denoiser, steps: int = 4, watch: Any = None, **options: Any) -> Tensor:
    given = denoiser, default_objective(denoiser), told(denoiser), torch.arange(2)
    return sampler(denoiser, steps, **options)(*given, watch=watch)


def executed(denoiser: Denoiser, steps: int = 4, name: str = "reuse", **options: Any) -> dict[str, list[list[float]]]:
    """Of each guidance branch, evaluation by evaluation: the executed part of each unit."""
    seen: dict[str, list[list[float]]] = {}

    def watch(step: Step, out: Any) -> None:
        shares = denoiser.applied[name].decisions(out.trace)[EXECUTED]  # u b
        assert torch.equal(shares, shares[:, :1].expand_as(shares))
        seen.setdefault(step.branch, []).append(shares[:, 0].tolist())

    paint(denoiser, steps, watch, **options)
    return seen


def branches_of(denoiser: Denoiser) -> tuple[int, dict[tuple[int, str], int]]:
    """Multiply-accumulates of one evaluation of one sample, and of each branch of each unit."""
    condition = told(denoiser, 1).map(lambda v: v.to("meta"))
    denoiser, spent = twin(denoiser), {}
    for i, unit in enumerate(denoiser.units):

        def spy(stream, branch, run, i=i):
            with Flops() as flops:
                out = run(stream)
            spent[i, branch] = flops.total // 2
            return out

        core(unit).slots.branch = spy
    with Flops() as flops, torch.no_grad():
        denoiser(torch.zeros(1, *denoiser.sample_shape, device="meta"), torch.zeros(1, device="meta"), condition)
    return flops.total // 2, spent


def generated(denoiser: Denoiser, steps: int) -> int:
    """Multiply-accumulates of a guided generation of one sample."""
    given = default_objective(denoiser), told(denoiser, 1), 1
    return count_generation(twin(denoiser), sampler(denoiser, steps), *given).macs
