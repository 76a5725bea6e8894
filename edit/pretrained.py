"""Vision models of `transformers` from a folder or the hub: found, described, loaded from safetensors, shown pixels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def described(path: str, kinds: Collection[str], wanted: str) -> tuple[Any, dict[str, Any]]:
    """The configurations of a model, and of the preprocessor beside it.

    Args:
        path: folder or hub id
        kinds: model types that are accepted
        wanted: of which model the folder or hub id is to be, in words

    Raises:
        FileNotFoundError: if it cannot be found
        ValueError: if it is of another kind
    """
    from transformers import AutoConfig, ImageProcessingMixin

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        preparation, _ = ImageProcessingMixin.get_image_processor_dict(path)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no vision model with its preprocessor in {path}: give the folder or hub id of {wanted}: {flat(error)}"
        ) from error
    if config.model_type not in kinds:
        raise ValueError(f"{path} holds a {config.model_type}, expected one of {', '.join(kinds)}")
    return config, preparation


def loaded(path: str, config: Any, called: str, spared: str | None = None) -> Any:
    """The model of this configuration with its weights, in fp32.

    Args:
        path: folder or hub id
        config: as of `described`, or its part for images
        called: the model in words
        spared: beginning of the names of weights that may be missing, as nobody reads them

    Raises:
        FileNotFoundError: if there are no safetensors
        ValueError: if weights are missing
    """
    from transformers import AutoModel

    try:
        model, report = AutoModel.from_pretrained(
            path, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except OSError as error:
        raise FileNotFoundError(f"{path} gave no weights in safetensors: {flat(error)}") from error
    missing = sorted(k for k in report["missing_keys"] if spared is None or not k.startswith(spared))
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weights of its {called}, such as {missing[0]}")
    return model


def skeleton(config: Any) -> Any:
    """The model of a configuration without weights, on the meta device."""
    from transformers import AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(config)


def check_layers(setting: str, layers: Sequence[int], depth: int, of: str) -> None:
    """Refuse a layer that a vision model does not have; negative ones count from its end.

    Args:
        setting: that names the layers
        layers: that it names
        depth: layers of the model
        of: the model, in words

    Raises:
        ValueError: naming the first that does not exist
    """
    if bad := [i for i in layers if not -depth <= i < depth]:
        raise ValueError(f"{setting}: {bad[0]} is none of the {depth} of {of}: choose 0 to {depth - 1}")


class Normalised(nn.Module):
    """Pixels in [-1, 1] with the mean and deviation that a model was trained with, told for pixels in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    @classmethod
    def of(cls, preparation: Mapping[str, Any]) -> Normalised:
        """As a preprocessor of `transformers` says."""
        if not preparation.get("do_normalize", True):
            return cls([0.0] * 3, [1.0] * 3)
        return cls(preparation["image_mean"], preparation["image_std"])

    def forward(self, x: Tensor) -> Tensor:
        return ((x + 1) / 2 - self.mean) / self.std


def flat(error: BaseException) -> str:
    """An error's words in one line."""
    return " ".join(str(error).split())
