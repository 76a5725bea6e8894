"""The code on a model card: lines that load an export and generate with it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from edit.artifacts.checkpoint import Artifact
from edit.artifacts.steps import Steps
from edit.denoiser import Denoiser
from edit.solvers import FLOW_SCHEDULER as FLOW

Usage = Callable[[str, str | None], str]  # (name of the export, hub id of its base model) -> code


def dtype_name(denoiser: Denoiser, dtype: torch.dtype | None) -> str:
    return str(dtype or next(denoiser.parameters()).dtype)


def imports(steps: Steps) -> list[str]:
    return [FLOW] if steps.scheduler else []


def scheduling(steps: Steps) -> list[str]:
    """The line that gives another's pipeline the scheduler it needs."""
    if steps.scheduler is None:
        return []
    arguments = (f"{k}={v:.8g}" if isinstance(v, float) else f"{k}={v}" for k, v in steps.scheduler.items())
    return [f"pipe.scheduler = {FLOW}({', '.join(arguments)})"]


def calling(artifact: Artifact, steps: Steps) -> list[str]:
    """Lines that generate, with the artifact's own sampler settings."""
    facts, sampler = artifact.denoiser.facts, artifact.sampler
    settings = [f"num_inference_steps={sampler.solver.steps}"]
    if steps.sigmas:
        settings.append(f"sigmas=[{', '.join(f'{t:.8g}' for t in steps.sigmas)}]")
    if facts.scale is not None:
        settings.append(f"guidance_scale={facts.scale if sampler.told is None else sampler.told:g}")
    if facts.guided_by == "guidance_scale":
        settings.append(f"guidance_scale={sampler.guidance:g}")
    elif sampler.guidance != 1:  # such pipelines guide only where they are given a negative prompt
        settings += ['negative_prompt=""', f"{facts.guided_by}={sampler.guidance:g}"]
    what = '"a photo of a cat"' if facts.text else "class_labels=[0]"
    call = f"pipe({', '.join([what, *settings])})"
    video = len(artifact.denoiser.sample_shape) == 4
    return [*steps.remarks, f"video = {call}.frames[0]" if video else f"image = {call}.images[0]"]
