"""The yardstick of one data set: the feature space, the judge and the real images that samples are compared with.

A video is measured by its frames. Distances between sets are over the frames of all samples; the judge learns from all
frames and says the class of the first; distances between pairs are means over frames; a checker sees whole samples.

Torch is imported inside: settings are checked before anything heavy is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.config.errors import UserError
from recipes.config.schema import Evaluation

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from data.split import CheckedSet, DataSet, Split
    from edit.measuring.quality import FeatureSpace, Gaussian, Judge

GRID = 60  # images in a grid
NEAREST_NUMBERS = 2**28  # float32 numbers of training images kept for the search of copies: 1 GiB
ROUNDING = "the data set's to_images: clamp, uint8, before any resizing"  # by an older name, as reports have it


@dataclass
class Yardstick:
    """Feature space, judge, real features and training samples of one data set."""

    data: DataSet
    shape: tuple[int, ...]  # (c, *sizes) of the compared samples; with aspect-ratio buckets, of the largest
    space: FeatureSpace | None
    judge: Judge | None
    real: Tensor | None  # n d, features of real images, or of all frames of real videos
    moments: Gaussian | None  # of `real`
    train_x: Tensor  # n c *sizes, for the search of copies
    some_real: Tensor  # uint8 n f y x 3, for a grid
    some_told: list[str]  # their classes or captions; empty where these are not known
    checked: CheckedSet | None  # the data set, if it can check its captions
    description: dict[str, Any]

    @classmethod
    def of(cls, data: DataSet, node: Mapping[str, Any], chosen: Evaluation, device: torch.device) -> Yardstick:
        """Read real images, make or load the feature space, and measure the real images themselves."""
        from data.one_size import OneSize
        from data.split import CheckedSet
        from edit.data_set import class_name
        from edit.measuring.quality import Gaussian, digest, frechet, nearest

        heldout = data.heldout()
        real = OneSize(heldout or data.train())
        train = OneSize(data.train(), real.shape) if heldout else real
        checked = data if isinstance(data, CheckedSet) else None
        labelled = bool(data.num_classes or checked) and chosen.features != "none"
        cache = (
            Path(chosen.cache)
            if chosen.cache
            else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edit"
        )
        judge = make_judge(data, train, chosen, cache, device) if labelled else None
        space = choose_space(chosen.features, judge, device)

        x, labels = stack(real, spread(len(real), fitting(real, chosen.references)))
        train_x, _ = stack(train, spread(len(train), fitting(train, chosen.references)))
        if checked:  # in the order of the generated grid: image k has caption k
            some = data.to_frames(stack(real, range(min(GRID, len(real))))[0]).cpu()
            told = checked.heldout().captions[: len(some)]
        else:
            chosen_ones = for_grid(labels, data.num_classes, len(x))
            some = data.to_frames(x[chosen_ones]).cpu()
            known = labels is not None and data.num_classes
            told = [class_name(data, int(labels[i])) for i in chosen_ones] if known else []
        description: dict[str, Any] = {
            "split": ("held-out" if heldout else "training set") + real.part,
            "n": min(len(real), chosen.references),
            "hash": digest(x, labels if labels is not None else []),
            "floor": None,
            "nearest": nearest(x, train_x).mean().item() if heldout else None,
            "judge": None,
            "prompts": checked and prompts(checked),
        }
        if judge is not None and labels is not None:
            guessed = judge.classify(judge(data.to_frames(x)[:, 0])).cpu()
            right = (guessed == labels).double().mean().item()
            description["judge"] = {"hash": judge.hash, "accuracy": right, "n": len(labels)}
        features, moments = None, None
        if space is not None:
            features = real_features(data, real, "heldout" if heldout else "train", space, node, chosen, cache)
            moments = Gaussian.of(features)
            description["hash"] = digest(features, space.hash)
            if heldout:
                others = real_features(data, train, "train", space, node, chosen, cache)
                description["floor"] = frechet(moments, Gaussian.of(others))
        return cls(data, real.shape, space, judge, features, moments, train_x, some, told, checked, description)

    @property
    def columns(self) -> int:
        """Columns of a grid: one per class where these fit."""
        classes = self.data.num_classes
        return classes if classes and classes <= 12 else 8

    def identity(self) -> dict[str, Any] | None:
        """The feature extractor, and how pixels are prepared for it."""
        if self.space is None or self.real is None:
            return None
        s = self.space
        return {"name": s.name, "hash": s.hash, "width": self.real.shape[1], "rule": s.rule, "rounding": ROUNDING}

    def measure(self, x: Tensor, frames: Tensor, numbers: Tensor, other: Tensor | None) -> dict[str, Tensor]:
        """One number per sample, and one feature vector per frame, on the CPU.

        Args:
            x: b c *sizes, samples
            frames: uint8 b f y x 3, the same as seen
            numbers: b, sample numbers, which determine classes or captions
            other: uint8 b f y x 3, the reference's from the same noise
        """
        from edit.frames import by_sample
        from edit.measuring.quality import nearest, perceptual, psnr, ssim

        measured = {"nearest": nearest(x, self.train_x)}
        if self.space is not None:
            measured["features"] = self.space(frames.flatten(0, 1)).cpu()
        if self.checked is not None:
            captions = self.checked.heldout().captions
            told = [captions[int(k) % len(captions)] for k in numbers]
            measured["prompt_accuracy"] = self.checked.follows(frames, told).float()
            measured |= {f"prompt_{part}": score for part, score in self.checked.scores(frames, told).items()}
        elif self.judge is not None:
            guessed = self.judge.classify(self.judge(frames[:, 0])).cpu()
            measured["right"] = (guessed == numbers % self.data.num_classes).float()
        if other is not None:
            pairs = frames.flatten(0, 1), other.flatten(0, 1)
            apart = {"psnr": psnr(*pairs), "ssim": ssim(*pairs)}
            if self.space is not None:
                apart["perceptual"] = perceptual(self.space, *pairs).cpu()
            measured |= {name: by_sample(value, x).mean(1) for name, value in apart.items()}
        return measured

    def quality(self, sets: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """Measures of whole sets, one set per seed."""
        from edit.measuring.quality import frechet_measure, inside, mean_measure

        out = {"nearest_train": mean_measure(s["nearest"] for s in sets)}
        if "right" in sets[0]:
            out["accuracy"] = mean_measure(s["right"] for s in sets)
        for name in (k for k in sets[0] if k.startswith("prompt_")):
            said = [s[name][~s[name].isnan()] for s in sets]  # over the captions that mention this part
            if all(map(len, said)):
                out[name] = mean_measure(said)
        if self.real is not None and self.moments is not None:
            out["frechet"] = frechet_measure((s["features"] for s in sets), self.moments)
            out["precision"] = mean_measure(inside(s["features"], self.real).float() for s in sets)
            out["recall"] = mean_measure(inside(self.real, s["features"]).float() for s in sets)
        return out

    def compared(self, sets: Sequence[Mapping[str, Tensor]]) -> dict[str, Any] | None:
        """Distances to the reference's images; None without a reference."""
        from edit.measuring.quality import mean_measure

        names = [k for k in ("psnr", "ssim", "perceptual") if k in sets[0]]
        return {k: mean_measure(s[k] for s in sets) for k in names} or None


def prompts(data: CheckedSet, rounds: int = 4) -> dict[str, Any]:
    """The held-out captions, and how often real images follow their own captions and those of others.

    Args:
        data: the data set that checks
        rounds: random permutations of the captions, for the level of chance
    """
    import torch

    split = data.heldout()
    indices = spread(len(split), 1000)
    frames, told = data.to_frames(stack(split, indices)[0]), [split.captions[i] for i in indices]
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(told), generator=generator).tolist() for _ in range(rounds)]
    chance = [data.follows(frames, [told[i] for i in order]).double().mean() for order in orders]
    return {
        "count": len(set(split.captions)),
        "real": data.follows(frames, told).double().mean().item(),
        "chance": torch.stack(chance).mean().item(),
        "shown": split.captions[:GRID],
    }


def choose_space(features: str, judge: Judge | None, device: torch.device) -> FeatureSpace | None:
    """The extractor that the setting `features` names; raises a UserError if the data has no such one."""
    from edit.measuring.quality import Pretrained

    if features == "none":
        return None
    if features not in ("auto", "judge"):
        return Pretrained(Path(features), device)
    if judge is None and features == "judge":
        raise UserError(
            "features=judge needs labelled images of at most 64 pixels: set features=<folder of a transformers image "
            "model>, or none"
        )
    return judge


def make_judge(data: DataSet, train: Split, chosen: Evaluation, cache: Path, device: torch.device) -> Judge | None:
    """The judge of a labelled data set; None if its images are too large for one."""
    from edit.measuring.quality import Judge, train_judge

    first = data.to_frames(stack(train, [0])[0])
    if max(first.shape[2:4]) > Judge.LARGEST:
        return None
    x, labels = stack(train, spread(len(train), fitting(train, 50_000 // first.shape[1])))
    assert labels is not None
    frames = data.to_frames(x).cpu()
    return train_judge(frames.flatten(0, 1), labels.repeat_interleave(frames.shape[1]), cache).to(device)


def real_features(
    data: DataSet,
    split: Split,
    name: str,
    space: FeatureSpace,
    node: Mapping[str, Any],
    chosen: Evaluation,
    cache: Path,
) -> Tensor:
    """Features n d of all frames of evenly spaced samples; the cache's key is some of these, config and extractor."""
    import torch

    from edit.measuring.quality import cached, digest

    indices = spread(len(split), chosen.references)
    probe, _ = stack(split, spread(len(split), 16))
    key = digest(probe, {**node, "split": name, "length": len(split), "n": len(indices), "extractor": space.hash})

    def extract() -> dict[str, Tensor]:
        parts = [indices[i : i + chosen.batch] for i in range(0, len(indices), chosen.batch)]
        with progress(f"features of real images ({name})", len(indices)) as done:
            out = []
            for part in parts:
                out.append(space(data.to_frames(stack(split, part)[0]).flatten(0, 1)).cpu())
                done(len(part))
        return {"features": torch.cat(out)}

    return cached(cache / f"features-{key}.safetensors", extract)["features"]


def stack(split: Split, indices: Iterable[int]) -> tuple[Tensor, Tensor | None]:
    """Samples b c *sizes and, where there are labels or kinds, b int64."""
    import torch

    samples = [split.sample(i, i) for i in indices]
    x = torch.stack([s["x"] for s in samples])
    key = next((k for k in ("label", "kind") if k in samples[0]), None)
    return x, None if key is None else torch.stack([torch.as_tensor(s[key]) for s in samples])


def spread(length: int, most: int) -> list[int]:
    """At most `most` evenly spaced indices."""
    count = min(length, most)
    return [i * length // count for i in range(count)]


def fitting(split: Split, most: int) -> int:
    """The number of samples, at most `most`, that may be held in memory."""
    return max(1, min(most, NEAREST_NUMBERS // split.sample(0, 0)["x"].numel()))


def for_grid(labels: Tensor | None, classes: int | None, length: int) -> list[int]:
    """Indices of real images in the order of the generated grid: image k has class k modulo the number of classes."""
    if labels is None or not classes:
        return list(range(min(GRID, length)))
    places = [(labels == c).nonzero().flatten().tolist() for c in range(classes)]
    found = [places[k % classes][k // classes :][:1] for k in range(GRID)]
    return [i for at in found for i in at] or [0]


@contextmanager
def progress(title: str, total: int, of: str = "images") -> Iterator[Callable[[float], None]]:
    """Show a progress bar with the time left on a terminal, until the block ends; elsewhere print one line."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    if not console.is_terminal:
        print(f"{title}: {total} {of}", flush=True)
    words = TextColumn("{task.description}", markup=False)  # names may contain markup or format braces
    columns = (words, BarColumn(), MofNCompleteColumn(), TextColumn(f"{of}, left"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)
