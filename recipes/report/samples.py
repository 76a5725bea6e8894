"""An artifact that is being evaluated: its samples from numbered noise, and one number per sample and measure.

Torch is imported inside: settings are checked before anything heavy is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.config.errors import UserError
from recipes.config.schema import Evaluation
from recipes.data_set import build_data, check_told, conditions, null_condition
from recipes.report.yardstick import GRID, Yardstick

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from edit.artifacts.checkpoint import Artifact
    from edit.stream import Condition


@dataclass(frozen=True)
class Subject:
    """An artifact with everything that its evaluation needs."""

    name: str
    artifact: Artifact
    condition: Callable[[Tensor], Condition]  # of sample numbers
    space: Yardstick
    world: str | None  # class of the data set that the samples are measured as, where it is not the artifact's own
    chosen: Evaluation
    device: torch.device

    @classmethod
    def of(cls, path: Path, name: str, chosen: Evaluation, device: torch.device) -> Subject:
        """Load an artifact, its data set and the yardstick.

        Raises:
            UserError, ValueError, OSError: if one of them cannot be opened, or they do not fit together
        """
        import edit

        artifact = edit.load(path, device, tuple(chosen.trusted))
        data = build_data(artifact, chosen.trusted)
        # samples that a teacher made of an embedded world are measured as that world, which has a checker and
        # held-out captions
        world = getattr(data, "world", None)
        data = world or data
        check_told(artifact.denoiser, data)
        space = Yardstick.of(data, artifact.data, chosen, device)
        return cls(name, artifact, conditions(data), space, world and type(world).__name__, chosen, device)

    @property
    def stem(self) -> str:
        """The name as a part of file names."""
        return self.name.replace("/", "_")


class Reference:
    """The artifact that others are compared with. Its pictures are kept for all of them where memory allows."""

    KEPT = 2**30  # bytes

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, list[Tensor]] = {}

    def pictures(self, guidance: float, subject: Subject, common: Sequence[Any]) -> Iterator[Tensor]:
        """uint8 b f y x 3 for each batch.

        Args:
            guidance: weight at which the reference is sampled
            subject: the artifact compared with it
            common: the arguments of `edit.measuring.quality.generate` that both share
        """
        import edit
        from edit.measuring.quality import generate

        chosen, space = subject.chosen, subject.space
        key = f"{guidance} {common[2]} {sorted(subject.artifact.data.items())!r}"  # common[2]: the seed
        if key in self.known:
            yield from self.known[key]
            return
        artifact = edit.load(self.path, subject.device, tuple(chosen.trusted))
        # its own solver and steps: the same noise is what makes a pair
        own = sized(adjusted(artifact, guidance, None, space.shape), space.shape)
        kept: list[Tensor] = []
        for x in generate(artifact.denoiser, artifact.objective, own, *common):
            kept.append(space.data.to_frames(x).cpu())
            if sum(map(len, kept)) == chosen.n and chosen.n * kept[0][0].numel() <= self.KEPT:
                self.known[key] = kept
            yield kept[-1]


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
    told = artifact.denoiser.facts.told
    weight = {"guidance": 1.0, "told": float(guidance)} if told else {"guidance": float(guidance)}
    sampler = replace(artifact.sampler, **weight)
    if steps not in (None, sampler.solver.steps):
        if "steps" not in {f.name for f in fields(sampler.solver)}:
            raise UserError(
                f"steps={steps}, but this model is sampled at times of its own, {sampler.solver}: leave it out"
            )
        sampler = replace(sampler, solver=replace(sampler.solver, steps=steps))
    sampler.check(artifact.denoiser, artifact.objective, shape)
    return sampler


def sized(sampler: Any, shape: tuple[int, ...]) -> Any:
    """The sampler for samples of this shape in place of the denoiser's default."""
    return partial(sampler, shape=shape)


def sample_and_measure(
    subject: Subject, sampler: Any, seed: int, reference: Reference | None, done: Callable[[float], None]
) -> tuple[dict[str, Tensor], Tensor, float]:
    """Sample `n` images of one seed and measure each.

    Args:
        subject: the artifact
        sampler: `adjusted` for it
        seed: of the noise
        reference: artifact to compare with, image by image
        done: called with the number of images in each finished batch

    Returns:
        Measures by name, each with one number per sample and one vector per frame; the first samples for a grid, uint8
        b f y x 3; the seconds that sampling took.
    """
    import torch

    from edit.measuring.quality import generate, joined

    artifact, space, chosen = subject.artifact, subject.space, subject.chosen
    numbers, null = torch.arange(chosen.n), null_condition(space.data)
    asked = (subject.condition, numbers, seed, chosen.batch)
    samples = generate(artifact.denoiser, artifact.objective, sized(sampler, space.shape), *asked, done, null)
    others = None
    if reference is not None:
        own = sampler.guidance if sampler.told is None else sampler.told
        weight = own if chosen.reference_guidance is None else chosen.reference_guidance
        others = reference.pictures(weight, subject, (*asked, lambda images: None, null))
    measured, first, seconds = [], [], 0.0
    for start in range(0, chosen.n, chosen.batch):
        begin = time.perf_counter()
        x = next(samples)
        frames = space.data.to_frames(x).cpu()  # waits for the device, so the clock is right
        seconds += time.perf_counter() - begin
        other = None if others is None else next(others)
        measured.append(space.measure(x.cpu(), frames, numbers[start : start + chosen.batch], other))
        if sum(map(len, first)) < GRID:
            first.append(frames[: GRID - sum(map(len, first))])
    return joined(measured), torch.cat(first), seconds
