"""The procedure that a configuration chooses, made from its `recipe`.

Nothing heavy is imported before it is made: `--help` and most mistakes are answered without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hydra.utils import instantiate
from omegaconf import DictConfig

if TYPE_CHECKING:
    from recipes.procedure import Procedure

DIFFUSION, FEW_STEPS = "recipes.diffusion.Denoising", "recipes.few_step.FewSteps"


def procedure_of(cfg: DictConfig) -> Procedure:
    """The procedure of a `Root`. Without a `recipe`: few steps if the run has a method for it, else diffusion.

    Raises:
        hydra.errors.InstantiationException: if it cannot be made
    """
    node = cfg.recipe
    if node is None:
        node = {"_target_": DIFFUSION if cfg.matching is None else FEW_STEPS}
    return instantiate(node, _convert_="all")
