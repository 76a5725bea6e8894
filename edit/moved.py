"""Where things were: artifacts, run folders and configurations of older versions name classes by their former paths.

A row is added when a module or class moves, and never removed. No other file of the library knows a former path.
"""

from __future__ import annotations

CLASSES = {  # of modules that were divided
    "edit.caching.harmonica.StepWiseDenoising": "edit.caching.harmonica_training.StepWiseDenoising",
    "edit.distillation.student.FixedGuidance": "edit.tuning.guidance.FixedGuidance",
    "edit.distillation.student.GuidanceInput": "edit.tuning.guidance.GuidanceInput",
    "edit.sampling.DDIMSolver": "edit.solvers.DDIMSolver",
    "edit.sampling.DDPMSolver": "edit.solvers.DDPMSolver",
    "edit.sampling.DPMSolver": "edit.solvers.DPMSolver",
    "edit.sampling.Euler": "edit.solvers.Euler",
    "edit.sampling.EulerMaruyama": "edit.solvers.EulerMaruyama",
    "edit.sampling.Grid": "edit.solvers.Grid",
    "edit.sampling.Heun": "edit.solvers.Heun",
    "edit.sampling.StockEuler": "edit.solvers.StockEuler",
}
COMMANDS = {  # `python -m`, and stages of a run
    "edit.checksums": "recipes.checksums",
    "edit.cost": "recipes.cost",
    "edit.export": "recipes.export",
    "edit.plan": "recipes.plan",
}
MODULES = {
    "data.buckets": "data.order",
    "data.captioned": "data.sets.captioned",
    "data.captioned_digits": "data.sets.captioned_digits",
    "data.digits": "data.sets.digits",
    "data.encoders": "data.making.encoders",
    "data.generator": "data.making.generator",
    "data.image_folder": "data.sets.image_folder",
    "data.image_shards": "data.sets.image_shards",
    "data.latent_folder": "data.making.latent_folder",
    "data.latent_writer": "data.making.latent_writer",
    "data.latents": "data.sets.latents",
    "data.pipelines": "data.making.pipelines",
    "data.prompts": "data.making.prompts",
    "data.shape_reader": "data.sets.shape_reader",
    "data.shapes": "data.sets.shapes",
    "data.toy_text": "data.sets.toy_text",
    "edit.backbones.flux_single_file": "edit.artifacts.flux_single_file",
    "edit.card": "edit.artifacts.card",
    "edit.checkpoint": "edit.artifacts.checkpoint",
    "edit.checksums": "edit.artifacts.checksums",
    "edit.command": "edit.inputs.command",
    "edit.cost": "edit.measuring.cost",
    "edit.distillation.add": "edit.few_step.add",
    "edit.distillation.combined": "edit.few_step.combined",
    "edit.distillation.consistency": "edit.few_step.consistency",
    "edit.distillation.discriminator": "edit.few_step.discriminator",
    "edit.distillation.distribution_matching": "edit.few_step.distribution_matching",
    "edit.distillation.divergence": "edit.few_step.divergence",
    "edit.distillation.endpoint": "edit.few_step.endpoint",
    "edit.distillation.flash": "edit.few_step.flash",
    "edit.distillation.flow_map": "edit.few_step.flow_map",
    "edit.distillation.ladd": "edit.few_step.ladd",
    "edit.distillation.matching": "edit.few_step.method",
    "edit.distillation.mean_flow": "edit.few_step.mean_flow",
    "edit.distillation.modulation": "edit.pruning.modulation",
    "edit.distillation.policy": "edit.few_step.policy",
    "edit.distillation.progressive": "edit.few_step.progressive",
    "edit.distillation.reflow": "edit.few_step.reflow",
    "edit.distillation.shortcut": "edit.few_step.shortcut",
    "edit.distillation.student": "edit.pruning.collapse",
    "edit.distillation.trajectory_matching": "edit.few_step.trajectory_matching",
    "edit.distillation.trig": "edit.few_step.trig",
    "edit.distillation.vision": "edit.few_step.vision",
    "edit.evaluation": "edit.measuring.quality",
    "edit.export": "edit.artifacts.export",
    "edit.flops": "edit.measuring.flops",
    "edit.limits": "edit.inputs.limits",
    "edit.probe": "edit.measuring.probe",
    "edit.trust": "edit.inputs.trust",
    "edit.turns": "edit.measuring.turns",
}


def current(path: str) -> str:
    """The import path of today for one that an older version wrote; any other path is returned as it is."""
    module, _, name = path.rpartition(".")
    return CLASSES.get(path) or f"{MODULES.get(module, module)}.{name}".lstrip(".")
