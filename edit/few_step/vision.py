"""Losses on images: samples are decoded, and a frozen DINOv2 gives hidden states of them.

On its hidden states stand the heads of a discriminator, which ADD (arXiv 2311.17042) trains a student by alone and
SenseFlow (2506.00523) beside distribution matching. Decoding 1024 px with a graph takes 8 to 10 GB: a random crop of
the latents can stand for them, at the same place in a real sample and in the fake of the same number. Specification:
methods/distillation.md, D3.7, D3.8.

Inferred: which seven of DINOv2-L's 24 layers SenseFlow looks at; images become squares of the side that the
preprocessor crops to, whatever their aspect, so that no part is left out; heads are those of LADD, told the student's
pooled text, and time 0, as nothing is noised here. The frames of a video are looked at each by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.denoiser import Denoiser
from edit.few_step.discriminator import Heads
from edit.frames import by_sample, folded
from edit.inputs.limits import Count, check_numbers
from edit.losses import Frozen, Seen
from edit.paths import mean
from edit.pretrained import Normalised, check_layers, described, loaded, skeleton

KINDS = ("dinov2", "dinov2_with_registers")
ROW, COLUMN = 90, 91  # streams of `Draws`: where the crop lies
VISION = "vision"  # the name of the model in `Seen.frozen`


@dataclass(frozen=True)
class Vision(Frozen):
    """A frozen vision model, and the heads on it where a method has some.

    Args:
        path: folder or hub id of a DINOv2 of `transformers`, in safetensors, with its preprocessor
        layers: whose hidden states are looked at, counted from 0, negative ones from the end
        crop: rows and columns of the samples that are decoded; None: all
        told: heads take the pooled text, if the student has one
        hidden: channels inside a head
        kernel: of the heads, in patches
    """

    path: str
    layers: tuple[int, ...] = (2, 5, 8, 12, 16, 20, 23)
    crop: Count | None = None
    told: bool = True
    hidden: Count = 256
    kernel: Count = 3

    def __post_init__(self):
        check_numbers(self)
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError("Vision: there must be at least one layer to look at, got none")

    def load(self) -> Eye:
        """The model with its weights, frozen, in fp32.

        Raises:
            FileNotFoundError: if it cannot be found
            ValueError: if it is no DINOv2, lacks weights, or has no such layer
        """
        config, preparation = described(self.path, KINDS, "a DINOv2")
        return Eye(loaded(self.path, config, "DINOv2"), self.layers, preparation)

    def structure(self) -> Eye:
        """The same without weights, on the meta device; raises likewise."""
        config, preparation = described(self.path, KINDS, "a DINOv2")
        with torch.device("meta"):
            return Eye(skeleton(config), self.layers, preparation)

    def check(self, shapes: Sequence[tuple[int, ...]]) -> None:
        for shape in shapes:
            check_crop(self.crop, *shape[-2:])

    def heads(self, student: Denoiser) -> Heads:
        """New heads on the chosen layers."""
        eye, pooled = self.structure(), student.example(text=1).pooled if self.told else None
        return Heads(eye.layers, eye.width, 0 if pooled is None else pooled.shape[1], self.hidden, self.kernel)

    def see(self, seen: Seen, x: Tensor) -> Mapping[str, Tensor]:
        """Hidden states for samples b c *sizes, "unit.<layer>": b f n d; gradients reach the samples."""
        if self.crop is not None:
            x = cropped(x, seen.draws.uniform(ROW), seen.draws.uniform(COLUMN), self.crop)
        pixels = seen.decode(x)
        return {name: by_sample(states, pixels) for name, states in seen.frozen[VISION](folded(pixels)).items()}

    def score(self, seen: Seen, states: Mapping[str, Tensor]) -> Tensor:
        """Logits b k of hidden states, by the heads in `Seen.own`; positive for real."""
        assert seen.own is not None
        _, frames, patches, _ = next(iter(states.values())).shape
        side = math.isqrt(patches)  # the eye makes squares of all images
        tokens = {name: v.flatten(1, 2) for name, v in states.items()}
        return seen.own(tokens, torch.zeros_like(seen.scale), seen.condition.pooled, (frames, side, side))

    def judge(self, seen: Seen, x: Tensor) -> Tensor:
        """Logits of samples b c *sizes -> b k."""
        return self.score(seen, self.see(seen, x))


class Eye(nn.Module):
    """Pixels b 3 y x, or b 1 y x, in [-1, 1] to the hidden states of a frozen model, patches alone in row-major order.

    Raises:
        ValueError: if the model has no such layer
    """

    def __init__(self, model: Any, layers: Sequence[int], preparation: Mapping[str, Any]):
        super().__init__()
        depth = model.config.num_hidden_layers
        check_layers("vision.layers", layers, depth, "the model")
        size = preparation.get("crop_size") or preparation["size"]
        self.model = model.requires_grad_(False).eval()
        self.layers, self.width = sorted({i % depth for i in layers}), model.config.hidden_size
        self.side = int(size.get("height") or size["shortest_edge"])
        self.tokens = (self.side // model.config.patch_size) ** 2
        self.normalised = Normalised.of(preparation)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.interpolate(x.float(), (self.side, self.side), mode="bicubic", antialias=True).expand(-1, 3, -1, -1)
        states = self.model(pixel_values=self.normalised(x), output_hidden_states=True).hidden_states
        return {f"unit.{i}": states[i + 1][:, -self.tokens :] for i in self.layers}  # patches come last


def check_crop(size: int | None, height: int, width: int) -> None:
    if size is not None and size > min(height, width):
        raise ValueError(
            f"vision.crop={size} is more than the {height} x {width} of a sample: lower it, or leave it out"
        )


def cropped(x: Tensor, row: Tensor, column: Tensor, size: int) -> Tensor:
    """A square of each sample, at one place in all of its frames given by numbers in (0, 1): b c *sizes -> the same
    with `size` rows and columns.

    Raises:
        ValueError: if the samples are smaller
    """
    height, width = x.shape[-2:]
    check_crop(size, height, width)
    steps = torch.arange(size, device=x.device)
    rows = (row * (height - size + 1)).long()[:, None] + steps
    columns = (column * (width - size + 1)).long()[:, None] + steps
    ones = [1] * (x.ndim - 3)
    return x.take_along_dim(rows.view(-1, *ones, size, 1), -2).take_along_dim(columns.view(-1, *ones, 1, size), -1)


def late(t: Tensor) -> Tensor:
    """SenseFlow's weight of the generator's loss, 2 (1 - t)^2: zero for samples from pure noise."""
    return 2 * (1 - t).square()


def feature_distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """|a / |a| - b / |b||^2 of hidden states, in the mean over patches and layers: [b], 0 to 4.

    The form of LPIPS (arXiv 1801.03924) without its learned weights.
    """
    layers = [(F.normalize(a[k].float(), dim=-1) - F.normalize(b[k].float(), dim=-1)).square().sum(-1) for k in a]
    return torch.stack([mean(layer) for layer in layers]).mean(0)
