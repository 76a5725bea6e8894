"""Samples of a model as users ask for them: by labels or prompts, as images with their tensors beside."""

from __future__ import annotations

import io
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import torch
from torch import Tensor

from edit.artifacts.shown import image
from edit.data_set import captions, class_name, conditions, null_condition, told
from edit.denoiser import Denoiser
from edit.inputs.trust import cut
from edit.measuring.quality import generate
from edit.objectives import Objective
from edit.sampling import Sampler
from edit.stream import Condition

SOME = 8  # images where nobody says how many
MOST = 64  # images that a notebook shows
MOVING = {"save_all": True, "duration": 125, "loop": 0}  # of a GIF: milliseconds per frame, for ever


class Samples(list):
    """PIL images; of videos a list of frames each. A notebook shows them with what they were told.

    Args:
        x: b c *sizes float32, as the model makes them: latents or pixels
        frames: uint8 b f y x 3, as they are seen; f = 1 for images
        told: the class, or the prompt, of each
    """

    def __init__(self, x: Tensor, frames: Tensor, told: Sequence[str]):
        from PIL import Image

        self.x, self.frames, self.told = x, frames, list(told)
        pictures = [[Image.fromarray(f) for f in sample.numpy()] for sample in frames]
        super().__init__(pictures if x.ndim > 4 else [sample[0] for sample in pictures])

    def _repr_html_(self) -> str:
        """The pictures with what they were told below; videos move."""
        shown = list(zip(self, self.told, strict=True))[:MOST]
        more = f"<p>and {len(self) - MOST} more</p>" if len(self) > MOST else ""
        figures = "".join(_figure(sample if isinstance(sample, list) else [sample], told) for sample, told in shown)
        return f"<div style='display:flex;flex-wrap:wrap;gap:.6em'>{figures}</div>{more}"


def _figure(frames: Sequence[Any], told: str) -> str:
    first, *others = frames
    file, kind = io.BytesIO(), "gif" if others else "png"
    first.save(file, kind, **(MOVING | {"append_images": others} if others else {}))
    picture = image(file.getvalue(), f"image/{kind}", told, "min-width:5em;max-width:100%")
    return f"<figure style='margin:0;max-width:20em'>{picture}<figcaption>{escape(told)}</figcaption></figure>"


@dataclass(frozen=True)
class Asked:
    """What a model is told of each sample.

    Args:
        condition: of sample numbers [b]
        told: the same in words, one for each sample
    """

    condition: Callable[[Tensor], Condition]
    told: Sequence[str]

    @classmethod
    def of(
        cls,
        name: str,
        denoiser: Denoiser,
        data: Any,
        labels: int | Sequence[int] | None,
        prompts: str | Sequence[str] | None,
        n: int | None,
    ) -> Asked:
        """Labels or prompts as conditions.

        Args:
            name: of the artifact, for messages
            denoiser: says whether it reads text
            data: its data set, which has the classes or the text encoders
            labels, prompts, n: as of `Artifact.sample`

        Raises:
            ValueError: for what the model is not told, or does not know
        """
        count = SOME if n is None else _number(n, "n")
        if count < 1:
            raise ValueError(f"n={n}: expected a number of samples from 1 on")
        reads, classes = bool(denoiser.facts.text), data.num_classes
        if labels is None and prompts is None:
            return cls(conditions(data), told(data, count) or captions(data, count))
        if labels is not None and (reads or not classes):
            instead = "prompts, not labels: give prompts=" if reads else "no labels: leave them out, and give n="
            raise ValueError(f"{name} is told {instead}")
        if prompts is not None and not reads:
            instead = f"labels, not prompts: give labels= from 0 to {classes - 1}" if classes else "nothing: give n="
            raise ValueError(f"{name} is told {instead}")
        if labels is not None:
            return cls._labelled(name, data, labels, n)
        return cls._prompted(name, data, prompts, n)

    @classmethod
    def _labelled(cls, name: str, data: Any, labels: Any, n: int | None) -> Asked:
        several = hasattr(labels, "__iter__") and getattr(labels, "ndim", 1)
        given = [_number(v, "labels") for v in (labels if several else [labels])]
        classes = data.num_classes
        if wrong := [v for v in given if not 0 <= v < classes]:
            raise ValueError(f"label {wrong[0]} is unknown: {name} has {classes} classes, 0 to {classes - 1}")
        chosen = torch.tensor(_repeated(given, n, "labels"))
        return cls(lambda numbers: Condition(label=chosen[numbers]), [class_name(data, int(k)) for k in chosen])

    @classmethod
    def _prompted(cls, name: str, data: Any, prompts: Any, n: int | None) -> Asked:
        given = list(prompts) if isinstance(prompts, list | tuple) else [prompts]
        if wrong := [p for p in given if not isinstance(p, str)]:
            raise ValueError(f"prompts: expected a text, or a list of texts, got {cut(wrong[0])}")
        if not hasattr(data, "encode"):
            raise ValueError(
                f"{type(data).__name__}, the data set of {name}, has no text encoders for new prompts: leave prompts "
                "out, and give n= for samples of its own captions"
            )
        chosen = _repeated(given, n, "prompts")
        distinct = list(dict.fromkeys(chosen))
        place = torch.tensor([distinct.index(p) for p in chosen])
        known = Condition(**data.encode(distinct))
        return cls(lambda numbers: known.map(lambda v: v[place[numbers]]), chosen)


def _repeated(given: list[Any], n: int | None, what: str) -> list[Any]:
    """The items in turn until there are n; None: each once."""
    if not given:
        raise ValueError(f"{what} is empty: give one at least, or leave it out and give n=")
    return [given[k % len(given)] for k in range(len(given) if n is None else n)]


def _number(value: Any, what: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{what}: expected whole numbers, got {cut(value)}") from None


def generated(
    denoiser: Denoiser,
    objective: Objective,
    sampler: Sampler,
    data: Any,
    asked: Asked,
    seed: int,
    batch: int,
    done: Callable[[float], None],
) -> Samples:
    """One sample for each that is asked for, as an evaluation makes them.

    Args:
        denoiser, objective, sampler: of the artifact
        data: says the samples' shape, the unconditional condition, and how a sample is seen
        asked: the conditions
        seed: of the noise
        batch: samples at a time
        done: called with the (fractional) number of samples done since the last call
    """
    if _number(batch, "batch") < 1:
        raise ValueError(f"batch={batch}: expected a number of samples from 1 on")
    numbers, sized = torch.arange(len(asked.told)), partial(sampler, shape=tuple(data.shape))
    settings = (numbers, seed, batch, done, null_condition(data))
    x, frames = [], []
    for part in generate(denoiser, objective, sized, asked.condition, *settings):
        x.append(part.cpu())
        frames.append(data.to_frames(part).cpu())
    return Samples(torch.cat(x), torch.cat(frames), asked.told)


# ---- progress -------------------------------------------------------------------------------------------------------


@contextmanager
def bar(total: int, wanted: bool) -> Iterator[Callable[[float], None]]:
    """Show a progress bar on a terminal or in a notebook until the block ends; yields what adds to it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if wanted and console.is_jupyter:
        with _notebook(total) as done:
            yield done
        return
    if not (wanted and console.is_terminal):  # older releases of rich end a disabled bar by an empty line
        yield lambda images: None
        return
    with Progress(console=console, transient=True) as shown:
        task = shown.add_task("sampling", total=total)
        yield lambda images: shown.advance(task, images)


@contextmanager
def _notebook(total: int) -> Iterator[Callable[[float], None]]:
    """A bar of HTML, drawn ten times a second at most: that of `rich` needs ipywidgets there."""
    from IPython.display import HTML, display

    count, drawn = 0.0, time.monotonic()
    handle = display(HTML(_bar(0, total)), display_id=True)

    def done(images: float) -> None:
        nonlocal count, drawn
        count += images
        if time.monotonic() - drawn > 0.1:
            drawn = time.monotonic()
            handle.update(HTML(_bar(count, total)))

    try:
        yield done
    finally:
        handle.update(HTML(""))


def _bar(count: float, total: int) -> str:
    return f"sampling <progress value='{count:.3f}' max='{total}'></progress> {count:.0f} of {total}"
