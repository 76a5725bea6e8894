"""The code on a model card: lines that load an export and generate with it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from edit.artifacts.card import takes_text
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
    denoiser, sampler = artifact.denoiser, artifact.sampler
    settings = [f"num_inference_steps={sampler.solver.steps}"]
    if steps.sigmas:
        settings.append(f"sigmas=[{', '.join(f'{t:.8g}' for t in steps.sigmas)}]")
    told = sampler.told if sampler.told is not None else getattr(denoiser, "guidance", None)
    if "guidance_embeds" not in denoiser.config:
        settings.append(f"guidance_scale={sampler.guidance:g}")
    elif denoiser.config["guidance_embeds"] and told is not None:
        settings.append(f"guidance_scale={told:g}")
    if "guidance_embeds" in denoiser.config and sampler.guidance != 1:  # the pipelines' name for two evaluations
        settings += ['negative_prompt=""', f"true_cfg_scale={sampler.guidance:g}"]
    what = '"a photo of a cat"' if takes_text(artifact) else "class_labels=[0]"
    return [*steps.remarks, f"image = pipe({', '.join([what, *settings])}).images[0]"]
