"""Measuring generated images: class accuracy, Frechet distance, coverage, copies, distance to another run.

Every measure sees what a viewer sees, uint8 b y x 3, through one `FeatureSpace` that says who it is: numbers of two
extractors, two resizing rules or two reference sets are not comparable (clean-fid, arXiv 2104.11222). For tiny labelled
images the space is a `Judge`, trained here in seconds; for larger ones a local `transformers` image model.

Sources: FID (arXiv 1706.08500), precision and recall by nearest neighbours (1904.06991), LPIPS (1801.03924).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edit.denoiser import Denoiser
from edit.objectives import Objective
from edit.sampling import Sampler
from edit.stream import Condition

# ---- feature spaces -------------------------------------------------------------------------------------------------


class FeatureSpace(Protocol):
    """Where images are compared. `hash` identifies the weights, `rule` says how pixels reach them."""

    name: str
    rule: str

    @property
    def hash(self) -> str: ...

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 b y x 3 -> b d, float32 on the space's device."""
        ...

    def layers(self, images: Tensor) -> list[Tensor]:
        """uint8 b y x 3 -> activations of several depths, b n c each."""
        ...


class Judge(nn.Module):
    """A classifier of 3 convolutions for images of at most `LARGEST` pixels; its last 64 activations are the space.

    Images of more than 16 pixels are halved by the first convolution, which would take most of the time on them.
    """

    LARGEST = 64
    name = "judge"
    rule = "uint8 / 127.5 - 1, no resizing"

    def __init__(self, classes: int, side: int):
        super().__init__()
        first = nn.Conv2d(3, 32, 3, stride=2 if side > 16 else 1, padding=1)
        self.convolutions = nn.ModuleList(
            (first, nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.Conv2d(64, 64, 3, padding=1))
        )
        self.embed = nn.Linear(4 * 64, 64)
        self.head = nn.Linear(64, classes)

    @property
    def hash(self) -> str:
        return digest(*(v for _, v in sorted(self.state_dict().items())))

    def _maps(self, x: Tensor) -> list[Tensor]:
        maps = []
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
            maps.append(x)
        return maps

    def features(self, x: Tensor) -> Tensor:
        """Pixels in [-1, 1], b 3 y x -> b 64."""
        return F.relu(self.embed(F.adaptive_max_pool2d(self._maps(x)[-1], 2).flatten(1)))

    def _pixels(self, images: Tensor) -> Tensor:
        return pixels(images.to(self.head.weight.device))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.features(self._pixels(images))

    @torch.no_grad()
    def layers(self, images: Tensor) -> list[Tensor]:
        return [m.flatten(2).mT for m in self._maps(self._pixels(images))]

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """b 64 -> b int64."""
        return self.head(features).argmax(1)


def pixels(images: Tensor) -> Tensor:
    """uint8 b y x 3 -> b 3 y x in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_judge(
    images: Tensor, labels: Tensor, cache: Path, seed: int = 0, steps: int = 600, batch: int = 128
) -> Judge:
    """The judge of a labelled set, from the cache if it was trained before.

    Always on the CPU and from its own random numbers, so that the same data gives the same judge.

    Args:
        images: uint8 b y x 3
        labels: b int64, from 0
        cache: folder for `judge-<hash of data and settings>.safetensors`
        seed: of weights and batches
        steps: optimiser steps
        batch: images per step

    Raises:
        ValueError: if the images are larger than a judge can see
    """
    side = max(images.shape[1:3])
    if side > Judge.LARGEST:
        raise ValueError(
            f"the judge is for images of at most {Judge.LARGEST} pixels, got {side}: set features=<folder of a "
            "transformers image model>"
        )
    classes = int(labels.max()) + 1
    key = digest(images, labels, {"version": 1, "seed": seed, "steps": steps, "batch": batch})
    file = cache / f"judge-{key}.safetensors"
    with torch.device("meta"):
        judge = Judge(classes, side)
    judge.load_state_dict(cached(file, lambda: _fit(images, labels, classes, seed, steps, batch)), assign=True)
    return judge.requires_grad_(False).eval()


def _fit(images: Tensor, labels: Tensor, classes: int, seed: int, steps: int, batch: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        judge, x = Judge(classes, max(images.shape[1:3])), F.pad(pixels(images.cpu()), (1, 1, 1, 1), value=-1)
        height, width = images.shape[1:3]
        optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
        for _ in range(steps):
            chosen = torch.randint(len(x), (batch,))
            top, left = torch.randint(3, (2,)).tolist()  # a shift by a pixel: two classes differ by more than that
            crop = x[chosen, :, top : top + height, left : left + width]
            loss = F.cross_entropy(judge.head(judge.features(crop)), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return {k: v.detach() for k, v in judge.state_dict().items()}


class Pretrained:
    """A local `transformers` image model (DINOv2, CLIP, ViT) as a feature space: its pooled output.

    Args:
        folder: with config.json, safetensors weights and, if it has one, preprocessor_config.json
        device: to run on

    Raises:
        FileNotFoundError: if the folder or its weights are missing
        ValueError: if it is no image model
    """

    def __init__(self, folder: Path, device: torch.device):
        weights = sorted(folder.glob("*.safetensors"))
        if not (folder / "config.json").is_file() or not weights:
            raise FileNotFoundError(
                f"no feature extractor at {folder}: give a transformers folder with config.json and safetensors weights"
            )
        from transformers import AutoModel

        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        model = getattr(model, "vision_model", model)  # of CLIP, half
        if getattr(model, "main_input_name", "") != "pixel_values":
            raise ValueError(f"{folder} holds a {type(model).__name__}, expected an image model such as DINOv2 or CLIP")
        self.model, self.device = model.requires_grad_(False).eval().to(device), device
        file = folder / "preprocessor_config.json"
        preparation = json.loads(file.read_text()) if file.is_file() else {}
        size = preparation.get("crop_size") or preparation.get("size") or {}
        self.size = int(size.get("height") or size.get("shortest_edge") or model.config.image_size)
        self.mean = torch.tensor(preparation.get("image_mean", [0.5] * 3), device=device).view(3, 1, 1)
        self.std = torch.tensor(preparation.get("image_std", [0.5] * 3), device=device).view(3, 1, 1)
        self.name = f"{type(model).__name__} ({folder.name})"
        self._hash = digest(*weights)
        self.rule = f"uint8 / 255, bicubic with antialiasing to {self.size} x {self.size} in float, normalised"

    @property
    def hash(self) -> str:
        return self._hash

    @torch.no_grad()
    def _run(self, images: Tensor) -> Any:
        x = images.to(self.device).permute(0, 3, 1, 2).float() / 255
        x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        return self.model(pixel_values=(x - self.mean) / self.std, output_hidden_states=True)

    def __call__(self, images: Tensor) -> Tensor:
        out = self._run(images)
        pooled = getattr(out, "pooler_output", None)
        return (out.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1).float()

    def layers(self, images: Tensor) -> list[Tensor]:
        states = self._run(images).hidden_states
        chosen = [states[round(i * (len(states) - 1) / 4)] for i in range(1, 5)]
        return [(s.flatten(2).mT if s.ndim == 4 else s).float() for s in chosen]


# ---- identity and cache ---------------------------------------------------------------------------------------------


def digest(*parts: Tensor | Path | Any) -> str:
    """12 hex digits of a hash of tensors (bytes and shape), files (content) and JSON values."""
    h = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            h.update(f"{part.dtype}{tuple(part.shape)}".encode())
            h.update(part.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(part, Path):
            with open(part, "rb") as f:
                h.update(hashlib.file_digest(f, "sha256").digest())
        else:
            h.update(json.dumps(part, sort_keys=True, default=str).encode())
    return h.hexdigest()[:12]


def cached(file: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in `file`; if it is not there or damaged they are made, and written whole or not at all."""
    try:
        return load_file(file)
    except (FileNotFoundError, SafetensorError):
        tensors = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    save_file(tensors, temporary)
    os.replace(temporary, file)
    return tensors


# ---- generation -----------------------------------------------------------------------------------------------------


def generate(
    denoiser: Denoiser,
    objective: Objective,
    sampler: Sampler,
    condition: Callable[[Tensor], Condition],
    numbers: Tensor,
    seed: int,
    batch: int,
    progress: Callable[[float], None] = lambda images: None,
    negative: Condition | None = None,
) -> Iterator[Tensor]:
    """Samples of the given numbers, `batch` at a time.

    Args:
        denoiser: in eval mode
        objective: of the denoiser
        sampler: how to generate
        condition: of some sample numbers [b]
        numbers: int64, which samples; with the seed they decide noise and images
        seed: of the set
        batch: samples at a time; the result does not depend on it
        progress: called with the (fractional) number of images done since the last call
        negative: one unconditional counterpart for all samples; None: the denoiser's own

    Yields:
        b c *sizes float32, in the order of `numbers`

    Raises:
        ValueError: if an image has values that are no numbers
    """
    for part in numbers.split(batch):

        def advance(done: int, total: int, size: int = len(part)) -> None:
            progress(size / total)

        x = sampler(denoiser, objective, condition(part), part, seed, negative, advance)
        if not x.isfinite().all():
            bad = int((~x.flatten(1).isfinite().all(1)).sum())
            raise ValueError(
                f"{bad} of {len(x)} generated images are not finite: the model has diverged, or this guidance or "
                "number of steps is too much for it"
            )
        yield x


# ---- distances between sets -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gaussian:
    """First two moments of a feature set, float64."""

    mean: Tensor  # d
    cov: Tensor  # d d

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """b d -> moments.

        Raises:
            ValueError: if there are fewer than two features
        """
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {len(features)}")
        features = features.double()
        return cls(features.mean(0), torch.cov(features.T).view(features.shape[1], -1))


def frechet(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2); the eigenvalues of A B are those of A^1/2 B A^1/2."""
    values, vectors = torch.linalg.eigh(a.cov)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.cov @ root).clamp_min(0).sqrt().sum()
    shift = a.mean - b.mean
    return max(0.0, (shift @ shift + a.cov.trace() + b.cov.trace() - 2 * cross).item())


def inside(points: Tensor, manifold: Tensor, k: int = 3, chunk: int = 1024) -> Tensor:
    """Which points lie within the distance of a manifold point to its k-th neighbour: b d, m d -> b bool.

    Generated points in the real manifold are precision; real points in the generated one are recall.

    Raises:
        ValueError: if the manifold has no more than k points
    """
    if len(manifold) <= k:
        raise ValueError(f"the manifold needs more than k = {k} points, got {len(manifold)}")
    # the k-th neighbour besides itself; exact distances, as the fast ones are off where points are close
    exact = "donot_use_mm_for_euclid_dist"
    parts = manifold.split(chunk)
    radius = torch.cat([torch.cdist(p, manifold, compute_mode=exact).kthvalue(k + 1, dim=1).values for p in parts])
    return torch.cat([(torch.cdist(p, manifold, compute_mode=exact) <= radius).any(1) for p in points.split(chunk)])


def nearest(x: Tensor, others: Tensor, chunk: int = 1024) -> Tensor:
    """Euclidean distance of each sample to the nearest of others, in the space that the model was trained in: b."""
    others = others.flatten(1)
    parts = x.flatten(1).split(chunk)
    return torch.cat([torch.cdist(p, others, compute_mode="donot_use_mm_for_euclid_dist").amin(1) for p in parts])


# ---- distances between pairs ----------------------------------------------------------------------------------------


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair of uint8 images, b y x 3 -> b; 100 where they are equal."""
    error = (a.float() - b.float()).square().flatten(1).mean(1)
    return (10 * torch.log10(255**2 / error)).clamp_max(100)


def ssim_window(side: int) -> float:
    """Width (sigma, pixels) of the Gaussian window: 1.5 as published, less where it would not fit in the image."""
    return 1.5 if side >= 20 else max(side // 4, 1) / 3.5


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair of uint8 images, b y x 3 -> b."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    first, second = (v.permute(0, 3, 1, 2).float() for v in (a, b))
    sigma = ssim_window(min(a.shape[1:3]))
    values = structural_similarity_index_measure(first, second, sigma=sigma, data_range=255.0, reduction="none")
    assert isinstance(values, Tensor)
    return values


def perceptual(space: FeatureSpace, a: Tensor, b: Tensor) -> Tensor:
    """Distance of each pair in a feature net, b y x 3 -> b: LPIPS without its learned channel weights.

    Squared differences of channel-normalised activations, summed over channels, averaged over places and depths.
    """
    pairs = zip(space.layers(a), space.layers(b), strict=True)
    distances = [(F.normalize(p, dim=-1) - F.normalize(q, dim=-1)).square().sum(-1).mean(1) for p, q in pairs]
    return torch.stack(distances).mean(0)


# ---- numbers with their spread --------------------------------------------------------------------------------------


def mean_measure(sets: Iterable[Tensor]) -> dict[str, Any]:
    """Mean of a number per image. The spread is that between seeds, or with one seed the standard error."""
    sets = [s.double() for s in sets]
    values = [s.mean().item() for s in sets]
    if len(sets) > 1:
        return _between(values)
    error = sets[0].std().item() / len(sets[0]) ** 0.5 if len(sets[0]) > 1 else None
    return {"value": values[0], "spread": error, "over": f"standard error of {len(sets[0])} images"}


def frechet_measure(sets: Iterable[Tensor], reference: Gaussian, rounds: int = 20) -> dict[str, Any]:
    """Frechet distance of feature sets b d, one per seed. With one seed the spread is that of `rounds` resamplings."""
    sets = list(sets)
    values = [frechet(reference, Gaussian.of(s)) for s in sets]
    if len(sets) > 1:
        return _between(values)
    features, generator = sets[0], torch.Generator().manual_seed(0)
    draws = [torch.randint(len(features), (len(features),), generator=generator) for _ in range(rounds)]
    resampled = torch.tensor([frechet(reference, Gaussian.of(features[d])) for d in draws])
    return {"value": values[0], "spread": resampled.std().item(), "over": f"standard deviation of {rounds} resamplings"}


def _between(values: list[float]) -> dict[str, Any]:
    v = torch.tensor(values, dtype=torch.float64)
    over = f"standard deviation of {len(values)} seeds"
    return {"value": v.mean().item(), "spread": v.std().item(), "over": over, "values": values}


def joined(rows: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Batches of named tensors, end to end."""
    rows = list(rows)
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
