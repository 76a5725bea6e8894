"""Encoders at work: images in, patch tokens and attention maps out. `edit.alignment.encoder` says which there are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.pretrained import Normalised, check_layers
from edit.stream import map_rows

# of `transformers`; True: resamples its position table where it is asked to, False: always, or it has none
KINDS = {"dinov2": False, "dinov2_with_registers": False, "dinov3_vit": False, "vit": True, "vit_mae": True}
KINDS |= {"ijepa": True, "clip": True, "clip_vision_model": True, "siglip": True, "siglip_vision_model": True}


class Encoded(NamedTuple):
    """What an encoder makes of b images, in fp32."""

    tokens: Tensor  # b n d, patches row by row behind the encoder's final norm; no class or register tokens
    grid: tuple[int, int]  # rows and columns of the n patches
    maps: Mapping[int, Tensor]  # layer as it was named -> b h n n: logarithms of attention over the patches' keys alone


class Looker(nn.Module):
    """An encoder with its normalisation and resolution; no gradient passes.

    Args:
        path: where it comes from, for messages
        layers: whose attention maps are wanted
        side: pixels of the shorter side that it is given; None: the rule of its patch size
        model: of timm or transformers
        normalised: as its images are
        patch: pixels of a patch's side

    Raises:
        ValueError: if the model has no such layer, or no attention maps to show
    """

    def __init__(
        self, path: str, layers: Sequence[int], side: int | None, model: Any, normalised: Normalised, patch: int
    ):
        super().__init__()
        self.path, self.layers, self.side = path, tuple(layers), side
        self.model, self.normalised, self.patch = model.requires_grad_(False).eval(), normalised, patch
        if self.side is not None and self.side < patch:
            raise ValueError(f"side={self.side} pixels are smaller than a patch of {self.path}, {patch}: raise it")
        if not self.layers:
            return
        depth = len(self.attentions())
        if not depth:
            raise ValueError(f"{self.path} has no plain attention over patches, so it shows no maps: leave out layers")
        check_layers("layers", self.layers, depth, self.path)

    width: int  # of a token
    channels: int  # of the images that the model takes

    @abstractmethod
    def seen(self, x: Tensor) -> Tensor:
        """The model's answer to prepared images: b n d of patches, or b y x d."""

    @abstractmethod
    def attentions(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        """Of each layer the modules that put out queries and keys; none: it has no plain attention."""

    @abstractmethod
    def heads(self, x: Tensor) -> Tensor:
        """Queries or keys as those modules put them out -> b h s e."""

    def size(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of patches of an image with so many pixels.

        Raises:
            ValueError: if it is smaller than a patch
        """
        small = min(rows, columns)
        if self.side is not None:
            of_patch = self.patch * small / self.side
        elif small < self.patch:
            raise ValueError(
                f"images of {rows} x {columns} pixels are smaller than a patch of {self.path}, {self.patch} x "
                f"{self.patch}: take an encoder with smaller patches, or say to what side they are to be enlarged"
            )
        else:
            of_patch = 16 if self.patch == 14 else self.patch
        return max(1, round(rows / of_patch)), max(1, round(columns / of_patch))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Encoded:
        """Images b c y x in [-1, 1], c = 1 or 3."""
        x = images.float().clamp(-1, 1)
        if x.shape[1] != self.channels:
            x = x.mean(1, keepdim=True) if self.channels == 1 else x.expand(-1, self.channels, -1, -1)
        grid = self.size(*x.shape[2:])
        x, pixels = self.normalised(x), (grid[0] * self.patch, grid[1] * self.patch)
        if x.shape[2:] != pixels:
            x = F.interpolate(x, pixels, mode="bicubic")
        attentions = self.attentions() if self.layers else ()
        with recorded([module for i in self.layers for module in attentions[i]]) as found:
            tokens = self.seen(x).float()
        if tokens.ndim == 4:
            grid, tokens = tuple(tokens.shape[1:3]), tokens.flatten(1, 2)
        count = grid[0] * grid[1]  # class and register tokens are in front of the patches
        qk = [self.heads(v)[:, :, -count:].float() for v in found]
        maps = {i: in_fp32(q, k, count) for i, q, k in zip(self.layers, qk[::2], qk[1::2], strict=True)}
        return Encoded(tokens[:, -count:], grid, maps)


class OfTimm(Looker):
    def __init__(self, path: str, layers: Sequence[int], side: int | None, model: Any, preparation: Mapping[str, Any]):
        embed = getattr(model, "patch_embed", None)
        patch = getattr(embed, "patch_size", None) or model.feature_info[-1]["reduction"]
        patch, input_size = patch if isinstance(patch, int) else patch[0], preparation.get("input_size")
        fixed = preparation.get("fixed_input_size") and not getattr(model, "dynamic_img_size", False) and input_size
        channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
        told = (list(preparation.get(name, (0.5,))) for name in ("mean", "std"))
        # some versions tell three values of a model of one channel
        mean, std = (v if len(v) in (1, channels) else [sum(v) / len(v)] for v in told)
        normalised = Normalised(mean, std)
        super().__init__(path, layers, side or (input_size[-1] if fixed else None), model, normalised, patch)
        self.width, self.channels = model.num_features, channels

    def seen(self, x: Tensor) -> Tensor:
        states = self.model.forward_features(x)
        if states.ndim == 4:
            return states if states.shape[-1] == self.width else states.permute(0, 2, 3, 1)
        norm = getattr(self.model, "fc_norm", None)  # the final norm of a model that pools before it
        return states if norm is None else norm(states)

    def attentions(self) -> list[tuple[nn.Module, nn.Module]]:
        from timm.models.vision_transformer import Attention as Plain

        attentions = [getattr(block, "attn", None) for block in getattr(self.model, "blocks", ())]
        return [(a.q_norm, a.k_norm) for a in attentions] if all(type(a) is Plain for a in attentions) else []

    def heads(self, x: Tensor) -> Tensor:
        return x


class OfTransformers(Looker):
    def __init__(self, path: str, layers: Sequence[int], side: int | None, model: Any, preparation: Mapping[str, Any]):
        config = model.config
        super().__init__(path, layers, side, model, Normalised.of(preparation), config.patch_size)
        self.kind, self.width, self.channels = config.model_type, config.hidden_size, config.num_channels
        # CLIP's answer is that of its last layer
        self.last_norm = [m for n, m in model.named_modules() if n.endswith("post_layernorm")] * ("clip_v" in self.kind)

    def seen(self, x: Tensor) -> Tensor:
        told: dict[str, Any] = {"interpolate_pos_encoding": True} if KINDS[self.kind] else {}
        if self.kind == "vit_mae":  # it hides nothing, and orders patches by these numbers
            count = (x.shape[2] // self.patch) * (x.shape[3] // self.patch)
            told["noise"] = torch.arange(count, device=x.device, dtype=x.dtype).expand(len(x), -1)
        states = self.model(pixel_values=x, **told).last_hidden_state
        return self.last_norm[0](states) if self.last_norm else states

    def attentions(self) -> list[tuple[nn.Module, nn.Module]]:
        if self.model.config.model_type == "dinov3_vit":  # it turns queries and keys by their places afterwards
            return []
        named = [(name.rpartition(".")[2], module) for name, module in self.model.named_modules()]
        sides = [[m for name, m in named if name in names] for names in (("q_proj", "query"), ("k_proj", "key"))]
        return list(zip(*sides, strict=True))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.model.config.num_attention_heads, -1)).transpose(1, 2)


def in_fp32(q: Tensor, k: Tensor, rows: int) -> Tensor:
    """Whole maps in fp32, under autocast too."""
    kind = "cpu" if q.is_meta else q.device.type
    with torch.autocast(kind, enabled=False):
        return map_rows(q, k, rows)


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What modules put out in the calls inside, in their order; a module calls once."""
    found: list[Any] = [None] * len(modules)

    def keep(i: int):
        return lambda module, given, out: found.__setitem__(i, out)

    handles = [module.register_forward_hook(keep(i)) for i, module in enumerate(modules)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
