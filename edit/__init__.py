"""`edit`: a research training framework for efficient Diffusion Transformers.

A DiT is a list of units. A method is an edit of that list. A recipe trains what the edit left open.

    import edit
    denoiser = edit.load("runs/digits/artifact").denoiser
    edit.apply(denoiser, {"shallow": DepthPruning(ratio=0.5)})
    edit.save(denoiser, "shallow")

Names are resolved on first use, so `import edit` costs nothing beyond the interpreter.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edit.artifacts.artifact import Artifact as Artifact
    from edit.artifacts.checkpoint import load as load
    from edit.artifacts.checkpoint import save as save
    from edit.backbones.attached import attach as attach
    from edit.backbones.attached import detach as detach
    from edit.catalogue import methods as methods
    from edit.denoiser import Denoiser as Denoiser
    from edit.denoiser import Edit as Edit
    from edit.edits import apply as apply
    from edit.edits import fold as fold
    from edit.sampling import Sampler as Sampler
    from edit.stream import Condition as Condition
    from edit.stream import Step as Step
    from edit.stream import Stream as Stream
    from edit.unit import Unit as Unit

_HOMES = {
    "apply": "edit.edits",
    "attach": "edit.backbones.attached",
    "detach": "edit.backbones.attached",
    "fold": "edit.edits",
    "Edit": "edit.denoiser",
    "save": "edit.artifacts.checkpoint",
    "load": "edit.artifacts.checkpoint",
    "Artifact": "edit.artifacts.artifact",
    "Denoiser": "edit.denoiser",
    "Condition": "edit.stream",
    "Stream": "edit.stream",
    "Step": "edit.stream",
    "Unit": "edit.unit",
    "Sampler": "edit.sampling",
    "methods": "edit.catalogue",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'edit' has no attribute {name!r}; it offers {', '.join(sorted(_HOMES))}")
    return getattr(import_module(_HOMES[name]), name)
