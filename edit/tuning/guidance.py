"""The guidance input of a model: fixed at one scale and folded into a bias, or added and trained.

Both edits are structural: the artifact is a plain model of its family. The fold is ours. The family does the work:
`Denoiser.fix_guidance` and `add_guidance`, which FLUX has.
Specification: methods/distillation.md D2 and D3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from edit.denoiser import Denoiser, Edit
from edit.inputs.limits import NotNegative, check_numbers


@dataclass
class FixedGuidance(Edit):
    """A guidance-distilled FLUX with one fixed scale and no guidance input: exact.

    The guidance embedder's output at that scale is added to the bias of the timestep MLP's last layer, and the embedder
    is dropped. What is left is a model without guidance input, as FLUX.1-schnell is.

    Args:
        guidance: the scale, 3.5 by default in FLUX.1-dev
    """

    guidance: NotNegative = 3.5

    def __post_init__(self):
        check_numbers(self)

    def apply(self, denoiser: Denoiser) -> None:
        denoiser.fix_guidance("FixedGuidance", self.guidance)

    def fold(self, denoiser: Denoiser) -> None:
        """Nothing to do: the bias has it already."""


@dataclass
class GuidanceInput(Edit):
    """The inverse: a FLUX that gets a guidance input, to be taught by a teacher asked at many scales (D3.2).

    The new embedder's last layer is zero, so nothing changes at first.
    """

    def apply(self, denoiser: Denoiser) -> None:
        try:
            denoiser.add_guidance("GuidanceInput")
        except ValueError as error:
            raise ValueError(f"{error}: leave the edit out, or start from a FLUX without one") from error

    def owns(self, name: str) -> bool:
        return ".guidance_embedder." in name

    def fold(self, denoiser: Denoiser) -> None:
        """Nothing to do: the model has its input."""
