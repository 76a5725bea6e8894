"""How a teacher is asked for samples: its solver, its shift of the times, its condition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data import manifest
from data.making.frozen import PromptEncoders
from data.making.request import Request
from data.sets.latents import padded, text_length
from edit.artifacts.location import find, is_hub_id
from edit.data_set import collate
from edit.denoiser import Denoiser
from edit.facts import check_units
from edit.predictions import default_objective
from edit.solvers import (
    DDIMSolver,
    DDPMSolver,
    DPMSolver,
    Euler,
    Heun,
    Solver,
    dynamic_shift,
    log_shift,
    times,
)
from edit.stream import Condition


def solver_of(request: Request, shift: float) -> Solver:
    if request.solver in ("euler", "heun", "dpm"):
        return {"euler": Euler, "heun": Heun, "dpm": DPMSolver}[request.solver](steps=request.steps, shift=shift)
    return {"ddim": DDIMSolver, "ddpm": DDPMSolver}[request.solver](steps=request.steps)


def stored_times(request: Request, shift: float) -> list[float]:
    """Times of the stored states, from noise to data without both ends: evenly chosen solver times."""
    return times(request.steps, shift)[:: request.steps // (request.points + 1)][1:-1]


def described_taps(
    request: Request, denoiser: Denoiser, encoders: PromptEncoders, shape: tuple[int, ...], shift: float
) -> dict[str, Any]:
    """Of stored features: the times of the evaluations, units, guidance branches, and the shape n d of a unit's tokens.

    Args:
        denoiser: the teacher, on the meta device

    Raises:
        ValueError: if the teacher does not have such a unit, or cannot be run without weights
    """
    depth = len(denoiser.units)
    check_units("taps", request.taps, depth, "the teacher", -depth)
    taps = sorted({i % depth for i in request.taps})
    told = condition_of(request, denoiser, encoders, encoders.embed([""]))[0]
    try:
        with torch.no_grad(), torch.device("meta"):
            out = denoiser(torch.zeros(1, *shape), torch.ones(1), told.map(lambda v: v.to("meta")), taps=taps)
    except RuntimeError as error:  # torch's, for what cannot be decided without values
        raise ValueError(f"taps: the teacher cannot be run without weights: {str(error).splitlines()[0]}") from error
    tokens = {tuple(out.trace[f"unit.{i}"].shape[1:]) for i in taps}
    if len(tokens) > 1:
        raise ValueError(f"taps: the units have tokens of different shapes, {sorted(tokens)}: take units of one shape")
    guided = request.guidance != 1 and not denoiser.facts.told
    times = solver_of(request, shift).times_of(default_objective(denoiser), shape)
    return {"evaluations": list(times[:-1]), "taps": taps, "branches": 1 + guided, "tokens": list(tokens.pop())}


def check_text(request: Request, denoiser: Denoiser, encoders: PromptEncoders, shape: tuple[int, ...]) -> None:
    """Raises ValueError if the teacher does not take the text of these encoders."""
    condition = condition_of(request, denoiser, encoders, encoders.embed([""]))[0]
    try:
        denoiser.pack(torch.zeros(1, *shape), torch.ones(1), condition)
        if encoders.text is not None:
            denoiser.need_length(text_length(encoders.text.description))
    except ValueError as error:
        raise ValueError(f"{request.teacher} cannot be given prompts with these encoders: {error}") from error


def default_shift(request: Request, denoiser: Denoiser, tokens: int) -> float:
    """The shift of the artifact's sampler, else of the pipeline's scheduler, else of the family's sampler, else 1."""
    sampler = description_of(request.teacher).get("sampler")
    if not sampler and (shift := scheduler_shift(scheduler_of(request.teacher), tokens)):
        return shift
    own = denoiser.sampler()
    solver = sampler["solver"] if sampler else vars(own.solver) if own else {}
    dynamic = solver.get("dynamic")
    return dynamic_shift(dynamic, tokens) if dynamic else float(solver.get("shift", 1.0))


def scheduler_of(teacher: str) -> dict[str, Any]:
    """The configuration of the scheduler beside a published transformer; empty where there is none."""
    beside = find(teacher, weights=False).parent / "scheduler" / "scheduler_config.json"
    if beside.is_file():
        return manifest.read(beside)
    if is_hub_id(teacher):
        from diffusers import SchedulerMixin

        try:
            return SchedulerMixin.load_config(teacher, subfolder="scheduler")
        except OSError:
            return {}
    return {}


def scheduler_shift(config: dict[str, Any], tokens: int) -> float | None:
    """The shift of a flow-matching scheduler at this many image tokens; None for another scheduler.

    A dynamic shift is exp(mu) or mu itself, mu being linear in the tokens through (base_image_seq_len, base_shift) and
    (max_image_seq_len, max_shift). Other options (shift_terminal, Karras sigmas) are ignored.
    """
    if not str(config.get("_class_name")).startswith("FlowMatch"):
        return None
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift") or 1.0)
    ends = (("base_shift", 0.5), ("max_shift", 1.15), ("base_image_seq_len", 256), ("max_image_seq_len", 4096))
    low, high, few, many = (config.get(key, default) for key, default in ends)
    mu = log_shift((low, high, few, many), tokens)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def description_of(teacher: str) -> dict[str, Any]:
    """The description of an artifact, edits.json; empty for a published folder."""
    path = find(teacher) / "edits.json"
    return manifest.read(path) if path.exists() else {}


def condition_of(
    request: Request, denoiser: Denoiser, encoders: PromptEncoders, rows: Sequence[dict[str, Tensor]]
) -> tuple[Condition, Condition]:
    """The teacher's conditions for some prompts, and for as many empty prompts, from embeddings as stored.

    Args:
        request: with the guidance scale
        denoiser: the teacher; a guidance-distilled one is given the scale
        encoders: of the embeddings
        rows: `text` l c and `pooled` c of each prompt
    """
    b, samples = len(rows), []
    for number, row in enumerate([*rows, encoders.embed([""])[0]]):
        sample: dict[str, Any] = {"draw": number}
        if encoders.text is not None:
            sample |= padded(row["text"].float(), encoders.text.description)
        if "pooled" in row:
            sample["pooled"] = row["pooled"].float()
        samples.append(sample)
    joined = collate(samples)  # together, so that both have the same length
    del joined["draw"]
    told = torch.full((b,), request.guidance) if denoiser.facts.told else None
    condition = Condition(**{k: v[:b] for k, v in joined.items()}, guidance=told)
    return condition, Condition(**{k: v[b:].expand(b, *v.shape[1:]) for k, v in joined.items()})
