"""The data set of an artifact or a run: how it is opened, and whether a model takes what it tells.

Torch is imported inside: settings are checked before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from recipes.config.errors import UserError

if TYPE_CHECKING:
    from data.split import DataSet
    from edit.artifacts.checkpoint import Artifact
    from edit.denoiser import Denoiser


def build_data(artifact: Artifact, trusted: Sequence[str] = ()) -> DataSet:
    """Open the data set that an artifact was trained on, as the artifact describes it.

    Raises:
        UserError: if the artifact names no data set, or one outside of `data` and the trusted packages
    """
    from edit.data_set import opened

    if "_target_" not in artifact.data:
        raise UserError(f"{artifact.path} does not say which data it was trained on: it was not made by train.py")
    try:
        return opened(artifact.data, trusted)
    except (ValueError, OSError) as error:
        raise UserError(f"the data set of {artifact.path} cannot be opened: {error}") from error


def check_told(denoiser: Denoiser, data: DataSet) -> None:
    """Raise a ValueError if the denoiser does not accept the conditions of this data set."""
    import torch

    from edit.data_set import conditions

    one = conditions(data)(torch.arange(1))
    device = next(denoiser.parameters()).device
    one = one.map(lambda v: v.to(device))
    denoiser.pack(torch.zeros(1, *data.shape, device=device), torch.ones(1, device=device), one)
    if hasattr(data, "text_length"):
        denoiser.need_length(data.text_length)
