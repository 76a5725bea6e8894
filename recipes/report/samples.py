"""An artifact that is being evaluated: its samples from numbered noise, and one number per sample and measure.

Torch is imported inside: settings are checked before anything heavy is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.config.errors import UserError
from recipes.config.schema import Evaluation
from recipes.data_set import build_data, check_told
from recipes.report.yardstick import GRID, Yardstick

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from edit.artifacts.checkpoint import Artifact
    from edit.stream import Condition
    from recipes.variants import Variant


@dataclass(frozen=True)
class Subject:
    """An artifact, or a variant of one, with everything that its evaluation needs."""

    name: str
    artifact: Artifact
    condition: Callable[[Tensor], Condition]  # of sample numbers
    space: Yardstick
    world: str | None  # class of the data set that the samples are measured as, where it is not the artifact's own
    chosen: Evaluation
    device: torch.device
    steps: int | None  # of the solver; None: the artifact's own
    variant: Variant | None = None  # that it was made by

    @classmethod
    def of(
        cls, path: Path, name: str, chosen: Evaluation, device: torch.device, beside: Sequence[Artifact] = ()
    ) -> Subject:
        """Load an artifact, its data set and the yardstick.

        Args:
            path: of the artifact
            name: in the report
            chosen: what to measure, and how
            device: to measure on
            beside: loaded artifacts, which share their weights where the files are the same

        Raises:
            UserError, ValueError, OSError: if one of them cannot be opened, or they do not fit together
        """
        import edit
        from edit.data_set import conditions

        artifact = edit.load(path, device, tuple(chosen.trusted), beside=beside)
        data = build_data(artifact, chosen.trusted)
        # samples that a teacher made of an embedded world are measured as that world, which has a checker and
        # held-out captions
        world = getattr(data, "world", None)
        data = world or data
        check_told(artifact.denoiser, data)
        space = Yardstick.of(data, artifact.data, chosen, device)
        world = world and type(world).__name__
        return cls(name, artifact, conditions(data), space, world, chosen, device, chosen.steps)

    def changed(self, variant: Variant) -> Subject:
        """A variant of this one, with the same tensors as weights.

        Raises:
            UserError, ValueError: if it needs training, or does not fit this artifact
        """
        from edit.artifacts.variant import variant as made

        artifact = made(self.artifact, variant.edits(self.chosen.trusted))
        steps = self.steps if variant.steps is None else variant.steps
        name = f"{self.name} + {variant.name}"
        return replace(self, name=name, artifact=artifact, steps=steps, variant=variant)

    def sampler(self, guidance: float) -> Any:
        """How it is sampled at a guidance weight. Raises a UserError if its solver does not take other steps."""
        return adjusted(self.artifact, guidance, self.steps, self.space.shape)

    @property
    def stem(self) -> str:
        """The name as a part of file names."""
        return self.name.replace("/", "_").replace(" ", "")

    @property
    def plain_stem(self) -> str:
        """That of the artifact which a variant is made from."""
        return self.stem if self.variant is None else self.stem.removesuffix(f"+{self.variant.name}")


class Reference:
    """The artifact that others are compared with, image by image. Its pictures are kept where memory allows.

    Args:
        artifact: on the device of the others
        name: in the report
        steps: of its solver; None: its own
        guidance: weight at which it is sampled; None: that of the row
    """

    KEPT = 2**30  # bytes

    def __init__(self, artifact: Artifact, name: str, steps: int | None = None, guidance: float | None = None):
        self.artifact, self.name, self.steps, self.guidance = artifact, name, steps, guidance
        self.known: dict[str, list[Tensor]] = {}  # whole sets
        self.begun: dict[str, list[Tensor]] = {}
        self.sizes: dict[str, int] = {}  # bytes that a set takes, or will take

    def sampler(self, guidance: float) -> Any:
        """How it is sampled beside a row of this guidance weight: the solver and steps are its own."""
        return adjusted(self.artifact, guidance if self.guidance is None else self.guidance, self.steps)

    def pictures(self, guidance: float, subject: Subject, common: Sequence[Any]) -> Iterator[Tensor]:
        """uint8 b f y x 3 for each batch.

        Args:
            guidance: weight of the row
            subject: the artifact compared with it
            common: the arguments of `edit.measuring.quality.generate` that both share; their noise makes a pair
        """
        from edit.measuring.quality import generate

        weight = guidance if self.guidance is None else self.guidance
        if (key := picture_key(weight, common[2], subject.artifact.data)) in self.known:
            yield from self.known[key]
            return
        own = sized(self.sampler(guidance), subject.space.shape)
        self.begun.pop(key, None)  # of an artifact that failed half-way
        for x in generate(self.artifact.denoiser, self.artifact.objective, own, *common):
            frames = subject.space.data.to_frames(x).cpu()
            self.keep(key, frames, subject.chosen.n)
            yield frames

    def keep(self, key: str, frames: Tensor, n: int) -> None:
        """Keep a batch of a set of n pictures, unless the set is too large; it is known when it is whole."""
        size = n * frames[0].numel()
        if key not in self.sizes and sum(self.sizes.values()) + size > self.KEPT:
            return
        self.sizes[key] = size
        self.begun.setdefault(key, []).append(frames)
        if sum(map(len, self.begun[key])) == n:
            self.known[key] = self.begun.pop(key)


def picture_key(guidance: float, seed: int, data: Mapping[str, Any]) -> str:
    """Tells a `Reference`'s sets of pictures apart: by guidance weight, seed of the noise, and data of the labels."""
    return f"{float(guidance)} {seed} {sorted(data.items())!r}"


def adjusted(artifact: Artifact, guidance: float, steps: int | None, shape: tuple[int, ...] | None = None) -> Any:
    """The artifact's sampler at another guidance weight and number of steps; a guidance input receives the weight.

    Args:
        artifact: that is to be sampled
        guidance: the weight
        steps: None: the sampler's own
        shape: of one sample; None: the denoiser's own

    Raises:
        UserError: if the solver has times of its own, and other steps are given
        ValueError: if an edit was not made for this sampler
    """
    from edit.sampling import at_guidance, at_steps

    try:
        sampler = at_steps(at_guidance(artifact.sampler, artifact.denoiser, guidance), steps)
    except ValueError as error:
        raise UserError(str(error)) from error
    sampler.check(artifact.denoiser, artifact.objective, shape)
    return sampler


def sized(sampler: Any, shape: tuple[int, ...]) -> Any:
    """The sampler for samples of this shape in place of the denoiser's default."""
    return partial(sampler, shape=shape)


def sample_and_measure(
    subject: Subject,
    sampler: Any,
    seed: int,
    reference: Reference | None,
    done: Callable[[float], None],
    seen: Callable[[Tensor], None] = lambda frames: None,
) -> tuple[dict[str, Tensor], Tensor, float]:
    """Sample `n` images of one seed and measure each.

    Args:
        subject: the artifact
        sampler: `adjusted` for it
        seed: of the noise
        reference: artifact to compare with, image by image
        done: called with the number of images in each finished batch
        seen: called with the frames of each batch, uint8 b f y x 3

    Returns:
        Measures by name, each with one number per sample and one vector per frame; the first samples for a grid, uint8
        b f y x 3; the seconds that sampling took.
    """
    import torch

    from edit.data_set import null_condition
    from edit.measuring.quality import generate, joined

    artifact, space, chosen = subject.artifact, subject.space, subject.chosen
    numbers, null = torch.arange(chosen.n), null_condition(space.data)
    asked = (subject.condition, numbers, seed, chosen.batch)
    samples = generate(artifact.denoiser, artifact.objective, sized(sampler, space.shape), *asked, done, null)
    others = None
    if reference is not None:
        weight = sampler.guidance if sampler.told is None else sampler.told
        others = reference.pictures(weight, subject, (*asked, lambda images: None, null))
    measured, first, seconds = [], [], 0.0
    for start in range(0, chosen.n, chosen.batch):
        begin = time.perf_counter()
        x = next(samples)
        frames = space.data.to_frames(x).cpu()  # waits for the device, so the clock is right
        seconds += time.perf_counter() - begin
        seen(frames)
        other = None if others is None else next(others)
        measured.append(space.measure(x.cpu(), frames, numbers[start : start + chosen.batch], other))
        if sum(map(len, first)) < GRID:
            first.append(frames[: GRID - sum(map(len, first))])
    return joined(measured), torch.cat(first), seconds
