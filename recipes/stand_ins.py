"""Stand-ins for a data set and models that are not here yet, so that a run can be planned: they have shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from omegaconf import DictConfig, OmegaConf

from edit.artifacts.checkpoint import skeleton
from edit.data_set import conditions
from edit.denoiser import Denoiser
from edit.measuring.probe import refuse_shape
from recipes.config.errors import one_line
from recipes.config.staged import stages_of
from recipes.models import Sources, is_official, made, sizes
from recipes.roles import Origin


class StandIns(Sources):
    """The files of a run as far as they are here; structures and samples of the right shapes in place of the others.

    Args:
        cfg: of the run
        image: rows and columns in pixels, in place of the data set's; None: not given
        frames: of a sample as the model sees it, likewise
        text: tokens of a prompt, if neither data set nor `before` tells
        notes: each stand-in appends a sentence
    """

    def __init__(
        self, cfg: DictConfig, image: tuple[int, int] | None, text: int, notes: list[str], frames: int | None = None
    ):
        self.cfg, self.image, self.text, self.notes, self.frames = cfg, image, text, notes, frames

    def start(self, spec: Any) -> Origin:
        return self._read_model(self.cfg.init, "init", spec)

    def teacher(self, spec: Any, needy: Sequence[str]) -> Origin | None:
        path = OmegaConf.select(self.cfg, "teacher.path")  # None, too, while it has no value
        if path:
            return self._read_model(path, "teacher.path", spec)
        if needy:
            self.notes.append("teacher.path is not given, so the backbone group's structure stands in")
            return Origin(spec.build, spec.build)
        return None

    def data(self, spec: Any, start: Origin) -> Any:
        with torch.device("meta"):
            denoiser = start.structure()
        told = self.image is not None or self.frames is not None
        data = self._of_size(denoiser) if told else self._read_data(denoiser)
        denoiser.settle(data.shape, spec)
        if told:  # a data set of another shape is refused by `models_of`, with what to set
            refuse_shape(denoiser, tuple(data.shape))
        return data

    def _read_data(self, denoiser: Denoiser) -> Any:
        try:
            data = made(self.cfg.data.set)
            conditions(data)(torch.arange(1))
            return data
        except Exception as error:  # an absent data set raises anything, and is not needed
            return self._as_told(error, denoiser)

    def _read_model(self, path: str | None, key: str, spec: Any) -> Origin:
        """The model at a path, or the backbone group's."""
        if path and not is_official(path):
            trusted = tuple(self.cfg.trusted)
            try:
                skeleton(path, trusted)
                return Origin(spec.build, lambda: skeleton(path, trusted))
            except (OSError, ValueError) as error:
                self.notes.append(
                    f"{key}={path} cannot be read here ({error}), so the backbone group's structure stands in"
                )
        return Origin(spec.build, spec.build)

    def _of_size(self, denoiser: Denoiser) -> Sample:
        """A sample of the image's size and of so many frames; where one is not told, it is the backbone's own."""
        channels, *sides = denoiser.sample_shape
        if self.image is not None:
            shrink = 8 if channels > 3 else 1
            if any(side % shrink for side in self.image):
                raise ValueError(f"image must be a multiple of {shrink} pixels, which its latents shrink it by")
            sides[-2:] = (side // shrink for side in self.image)
        if self.frames is not None:
            sides[:-2] = [self.frames]
        return Sample((channels, *sides), denoiser, self.text)

    def _as_told(self, error: Exception, denoiser: Denoiser) -> Sample:
        """A sample as `before` makes the data set, or as the backbone takes it."""
        told = told_before(self.cfg)
        shape = denoiser.sample_shape
        if told.get("size"):
            shape = (*shape[:-2], told["size"], told["size"])
        text = told.get("max_tokens", self.text)
        whose = "as data.generate is told in before" if told else "the backbone's own"
        self.notes.append(
            f"the data set cannot be read here ({one_line(error)}), so samples are {whose}, {sizes(shape)}, and "
            f"prompts have {text} tokens; image= and text= change that"
        )
        return Sample(shape, denoiser, text)


class Sample:
    """A data set of one sample without meaning: it has the shapes that a model takes."""

    def __init__(self, shape: tuple[int, ...], denoiser: Denoiser, text: int):
        self.shape, self.num_classes = shape, denoiser.facts.classes
        self.told = {k: v[0] for k, v in vars(denoiser.example(text=text)).items() if v is not None}

    def train(self) -> Sample:
        return self

    def heldout(self) -> None:
        return None

    def decoder(self) -> NoReturn:
        raise FileNotFoundError("the data set that has it is not")

    def __len__(self) -> int:
        return 1

    def sample(self, index: int, draw: int) -> dict[str, torch.Tensor]:
        return self.told


def told_before(cfg: DictConfig) -> dict[str, Any]:
    """Settings of the data.generate in `before` that makes the data set; empty: no stage makes it.

    Raises:
        ValueError: for a setting that data.generate does not have
    """
    from data.generate import parse

    orders = [parse(stage.all[1:]) for stage in stages_of(cfg) if stage.module == "data.generate"]
    return next((order for order in orders if order["out"] == cfg.data.set.get("path")), {})
