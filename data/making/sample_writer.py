"""Write one shard of a teacher's samples, and their contact sheet."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import edit
from data import manifest
from data.making.encoders import VAE
from data.making.frozen import DTYPES, PromptEncoders
from data.making.latent_folder import images_of, npy, store
from data.making.processes import device_of
from data.making.prompts import Prompt, read_prompts
from data.making.request import Request
from data.making.teacher import condition_of, solver_of
from data.pixels import to_uint8
from data.sets.latents import data_set, scaling
from edit.frames import folded
from edit.sampling import Sampler
from edit.stream import Output
from edit.walk import Walk

SHEET = 24  # images on samples.png


class SampleWriter:
    """Writes shards in one process; called with the number of a shard and a function that counts images."""

    def __init__(self, request: Request, process: int):
        if request.device == "cpu" and request.processes > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // request.processes))
        self.request, self.device = request, device_of(request, process)
        self.starter = multiprocessing.parent_process()  # of this process, if there are several
        self.encoders, artifact = PromptEncoders(request, self.device), edit.load(request.teacher)
        self.objective = artifact.objective
        self.denoiser = artifact.denoiser.to(self.device, DTYPES[request.precision]).requires_grad_(False)
        self.settings = manifest.read(Path(request.out) / manifest.SETTINGS)
        self.prompts = read_prompts(request.prompts)
        generated = self.settings["generated"]
        distilled = self.denoiser.facts.told  # it has the scale as an input
        self.sampler = Sampler(solver_of(request, generated["shift"]), 1.0 if distilled else request.guidance)
        self.first: list[Tensor] = []  # c *sizes each, for the contact sheet

    def __call__(self, shard: int, advance: Callable[[float], None]) -> None:
        out = Path(self.request.out)
        store(out, shard, self.samples(shard, advance), lambda: {"skipped": []})
        if self.first:  # the shard is in place, with or without the picture
            try:
                contact_sheet(self.request, self.settings, torch.stack(self.first[:SHEET]), self.device)
            except (ValueError, OSError, RuntimeError) as error:
                warnings.warn(f"{self.request.out} has no samples.png: {error}", RuntimeWarning, stacklevel=2)
            self.first.clear()

    def samples(self, shard: int, advance: Callable[[float], None]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Key and members of each sample of a shard, generated in batches."""
        numbers = images_of(shard, self.request.shard_size, len(self.prompts) * self.request.images)
        for start in range(0, len(numbers), self.request.batch):
            part = numbers[start : start + self.request.batch]
            prompts = [self.prompts[n // self.request.images] for n in part]
            rows = self.encoders.embed([p.text for p in prompts])
            made, features, states = self.sampled(part, rows, partial(self.count, len(part), advance))
            if shard == 0 and len(self.first) < SHEET:
                self.first.extend(made.float())
            for i, (n, prompt, latent, row, *path) in enumerate(zip(part, prompts, made, rows, *states, strict=True)):
                arrays = {"latent": latent, **({"trajectory": torch.stack(path)} if path else {}), **row}
                yield f"{n:09d}", self.members(n, prompt, arrays | {name: v[i] for name, v in features.items()})

    def sampled(
        self, numbers: range, rows: Sequence[dict[str, Tensor]], count: Callable[[int, int], None]
    ) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """Generate the samples of these numbers.

        Returns:
            Samples b c *sizes in the stored type; their features by the names of members, none without taps:
            predictions, b s c *sizes, and tokens of each tap, b s k n d; their states at the stored times, b c *sizes

        Raises:
            ValueError: if one is not finite, or does not fit the stored type
        """
        condition, negative = condition_of(self.request, self.denoiser, self.encoders, rows)
        shape = tuple(self.settings["latent_shape"])
        told = (condition, torch.tensor(numbers), self.request.seed, negative, count, shape)
        features: dict[str, list[Tensor]] = {}
        states: dict[float, Tensor] = {}
        with torch.inference_mode():
            made = self.walked(self.sampler.walk(self.denoiser, self.objective, *told), features, states)
        if not made.isfinite().all():
            bad = int((~made.flatten(1).isfinite().all(1)).sum())
            raise ValueError(
                f"{bad} of {len(made)} generated images are not finite: this guidance, shift or number of steps is "
                "too much for the teacher, or precision is too low"
            )
        stacked = {name: torch.stack(parts, 1) for name, parts in features.items()}
        return self.encoders.fit(made), stacked, [self.encoders.fit(state) for state in states.values()]

    def walked(self, walk: Walk, features: dict[str, list[Tensor]], states: dict[float, Tensor]) -> Tensor:
        """The end of a generation, as the sampler makes it.

        The features of each evaluation are appended by name, states are kept by time. Heun's method evaluates its guess
        first and then the state at a time, which is kept.
        """
        generated = self.settings["generated"]
        taps, times = generated.get("taps", ()), generated["times"] if self.request.points else ()
        for moment in walk:
            outputs: dict[str, Output] = {}
            if moment.step.sigma in times:
                states[moment.step.sigma] = moment.x
            prediction = moment.ask(taps=taps, look=outputs.__setitem__)
            if taps:
                kept = {"predictions": prediction[:, : walk.x.shape[1]]}
                for unit in taps:
                    kept[f"tap{unit}"] = by_branch([o.trace[f"unit.{unit}"] for o in outputs.values()], len(walk.x))
                for name, value in kept.items():
                    features.setdefault(name, []).append(self.encoders.fit(value))
            moment.give(prediction)
            walk.given.clear()  # nobody continues this one elsewhere
        return walk.x

    def count(self, b: int, advance: Callable[[float], None], done: int, total: int) -> None:
        """After `done` of `total` steps of a batch of b: advance by whole images, which add up to b.

        Raises:
            KeyboardInterrupt: if the command was killed: a restart must not meet this process
        """
        if self.starter is not None and not self.starter.is_alive():
            raise KeyboardInterrupt
        advance(b * done // total - b * (done - 1) // total)

    def members(self, number: int, prompt: Prompt, arrays: dict[str, Tensor]) -> dict[str, bytes]:
        facts = {"caption": prompt.text, "prompt": prompt.id, "number": number, "seed": self.request.seed}
        return {**{f"{name}.npy": npy(array) for name, array in arrays.items()}, "json": json.dumps(facts).encode()}


def by_branch(records: Sequence[Tensor], count: int) -> Tensor:
    """Records of guidance branches, which may share a batch of some of them: b k n d, cond's first."""
    return torch.stack([part for record in records for part in record.split(count)], 1)


def contact_sheet(request: Request, settings: dict[str, Any], x: Tensor, device: str) -> None:
    """The first images, or first frames of videos, as samples.png, where a VAE or a data set decodes them."""
    if request.vae is not None:
        shift, scale = scaling(settings)
        first = folded(x)[:: math.prod(x.shape[2:-2])]
        images = to_uint8(VAE(request.vae, device).decode(first / scale + shift)).cpu()
    elif settings["sources"]["data"]:
        images = data_set(settings["sources"]["data"], "for samples.png").to_frames(x)[:, 0].cpu()
    else:
        return
    from PIL import Image

    b, y, x_ = images.shape[:3]
    columns = math.ceil(math.sqrt(b))
    canvas = torch.full((math.ceil(b / columns) * (y + 2), columns * (x_ + 2), 3), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (y + 2), i % columns * (x_ + 2)
        canvas[top : top + y, left : left + x_] = image
    path = Path(request.out) / "samples.png"
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    Image.fromarray(canvas.numpy()).save(temporary, "png")
    os.replace(temporary, path)
