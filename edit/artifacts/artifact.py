"""A loaded artifact: what it is, its samples, and how a notebook shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from edit.artifacts import shown
from edit.artifacts.sampled import Asked, Samples, bar, generated
from edit.data_set import opened
from edit.denoiser import Denoiser
from edit.objectives import Objective
from edit.sampling import Sampler, at_guidance, at_steps


@dataclass(repr=False)
class Artifact:
    """A loaded artifact: the denoiser in eval mode, and the settings to sample from it and to evaluate it."""

    path: Path
    denoiser: Denoiser
    objective: Objective
    sampler: Sampler
    data: dict[str, Any] = field(default_factory=dict)  # the data set's configuration node, `_target_` included
    run: dict[str, Any] = field(default_factory=dict)  # name, step, seed, revision, versions, metrics
    home: Path | None = None  # folder that the weights were read from: `path`, or the one that it refers to
    identity: str = ""  # the same for artifacts of the same stock files; "": they were not verified
    trusted: tuple[str, ...] = ()  # packages besides `data` whose data sets may be opened

    def sample(
        self,
        labels: int | Sequence[int] | None = None,
        prompts: str | Sequence[str] | None = None,
        n: int | None = None,
        seed: int = 0,
        guidance: float | None = None,
        steps: int | None = None,
        batch: int = 32,
        progress: bool = True,
    ) -> Samples:
        """Generate images, or videos, on the denoiser's device.

        Image k depends on the seed, k and what it is told alone. Without labels and prompts it is image k of an
        evaluation by eval.py: classes in turn, or the held-out captions of the data.

        Args:
            labels: classes, numbers from 0; one or several, which are repeated until there are n
            prompts: texts, likewise, for models that read text: encoded as those of the training data were
            n: how many; None: one for each label or prompt, without them 8
            seed: of the noise
            guidance: weight of classifier-free guidance, or the value of a guidance input; None: as the artifact says
            steps: of the solver; None: as the artifact says
            batch: images at a time; it changes speed and memory, not the images
            progress: show a bar on a terminal and in a notebook

        Returns:
            A list of PIL images, or for videos a list of lists of frames; tensors are its `frames` and `x`.

        Raises:
            ValueError: for labels or prompts that the model is not told, numbers that make no sense, another number of
                steps than a few-step model has; if the data set, which turns samples into pictures, cannot be opened
            OSError: if files of the data set, or the text encoders that it was made with, are missing
        """
        data = self.data_set
        asked = Asked.of(str(self.path), self.denoiser, data, labels, prompts, n)
        sampler = self.sampler if guidance is None else at_guidance(self.sampler, self.denoiser, guidance)
        with bar(len(asked.told), progress) as done:
            parts = (self.denoiser, self.objective, at_steps(sampler, steps))
            return generated(*parts, data, asked, seed, batch, done)

    @cached_property
    def data_set(self) -> Any:
        """The data set that the model was trained on, opened once; of samples that a teacher made of one of the
        embedded worlds, that world.

        Raises:
            ValueError: if the artifact names none, or it cannot be opened
            OSError: if its files are missing
        """
        if "_target_" not in self.data:
            raise ValueError(
                f"{self.path} does not say which data it was trained on, which turn samples into pictures: put a "
                "published model's denoiser into its pipeline (edit.backbones.attached), or set artifact.data"
            )
        data = opened(self.data, self.trusted, who=str(self.path))
        return getattr(data, "world", None) or data

    def __repr__(self) -> str:
        """Five lines: name, backbone, edits, how it is sampled, data and provenance."""
        return shown.text(shown.told(self.path, self.denoiser, self.objective, self.sampler, self.data, self.run))

    def _repr_html_(self) -> str:
        """The same in a notebook, with the last samples of its run and what was measured, where they lie beside it."""
        told = shown.told(self.path, self.denoiser, self.objective, self.sampler, self.data, self.run)
        return shown.html(told, self.path)
