"""Frozen image encoders, real ones: what a diffusion transformer's features and attention maps are aligned with.

A folder or hub id holds either a model of `timm` (config.json with "architecture", model.safetensors: as timm saves for
the hub) or a vision model of `transformers` (config.json with "model_type", safetensors, preprocessor_config.json).
Images are normalised as the model was trained. Specification: methods/repa.md, "Encoder input"; methods/haste.md.

Where `side` is None, the sizes are the published ones: patches of 14 see 14 pixels for every 16 of the image (DINOv2,
CLIP-L and I-JEPA: 224 of 256), bicubic without antialias; others see the image as it is (MAE, DINO, MoCo v3: 256), cut
down by interpolation to whole patches where they must. Position tables are resampled from their own size to the grid.

Inferred: pixels beyond [-1, 1], as decoders make them, are clamped first, for no image has them. Published pipelines
normalise before they resize, this one likewise.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.inputs.limits import Side, check_numbers
from edit.losses import Frozen
from edit.pretrained import Normalised, described, flat, loaded, skeleton
from edit.stream import map_rows

# of `transformers`; True: resamples its position table where it is asked to, False: always, or it has none
KINDS = {"dinov2": False, "dinov2_with_registers": False, "dinov3_vit": False, "vit": True, "vit_mae": True}
KINDS |= {"ijepa": True, "clip": True, "clip_vision_model": True, "siglip": True, "siglip_vision_model": True}
ACCEPTED = (
    "a timm model (config.json with its architecture, and model.safetensors) or a transformers vision model "
    f"({', '.join(KINDS)}; safetensors, and preprocessor_config.json)"
)


class Encoded(NamedTuple):
    """What an encoder makes of b images, in fp32."""

    tokens: Tensor  # b n d, patches row by row behind the encoder's final norm; no class or register tokens
    grid: tuple[int, int]  # rows and columns of the n patches
    maps: Mapping[int, Tensor]  # layer as it was named -> b h n n: logarithms of attention over the patches' keys alone


@dataclass(frozen=True)
class Encoder(Frozen):
    """A frozen image encoder.

    Args:
        path: folder, or hub id as owner/name or owner/name@revision
        side: pixels of the shorter side that it is given; None: the published rule of its patch size, see above
        layers: whose attention maps are wanted, counted from 0, negative ones from the end
    """

    path: str
    side: Side | None = None
    layers: tuple[int, ...] = ()

    def __post_init__(self):
        check_numbers(self)
        object.__setattr__(self, "layers", tuple(self.layers))

    def load(self) -> Looker:
        """The encoder with its weights, frozen, in fp32.

        Raises:
            FileNotFoundError: if it cannot be found
            ValueError: if it is of an unknown kind, lacks weights, or has no such layer
        """
        return self._made(found(self.path, weights=True), weights=True)

    def structure(self) -> Looker:
        """The same without weights, on the meta device; raises likewise."""
        with torch.device("meta"):
            return self._made(found(self.path, weights=False), weights=False)

    def identity(self) -> dict[str, Any]:
        """By what cached features know their encoder: its name, the SHA-256 of its weights, its width and side.

        Weights in several files have the SHA-256 over their names and sums.
        """
        from edit.artifacts.checksums import of_file

        folder = found(self.path, weights=True)
        sums = {file.name: of_file(file) for file in sorted(folder.glob("*.safetensors"))}
        several = hashlib.sha256(json.dumps(sums).encode()).hexdigest()
        sha256 = next(iter(sums.values())) if len(sums) == 1 else several
        return {"name": self.path, "sha256": sha256, "width": self.structure().width, "side": self.side}

    def _made(self, folder: Path, weights: bool) -> Looker:
        try:
            config = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"no encoder in {self.path}: expected {ACCEPTED}: {flat(error)}") from error
        if weights and not any(folder.glob("*.safetensors")):
            raise FileNotFoundError(f"no weights in safetensors in {self.path}: expected {ACCEPTED}")
        if isinstance(config, dict) and "architecture" in config:
            return OfTimm(self, *timm_model(folder, config, weights))
        if not isinstance(config, dict) or config.get("model_type") not in KINDS:
            kind = config.get("model_type") if isinstance(config, dict) else None
            raise ValueError(f"{self.path} holds {kind or 'a model of unknown kind'}, expected {ACCEPTED}")
        return OfTransformers(self, *transformers_model(folder, weights))


def found(path: str, weights: bool) -> Path:
    """The folder of an encoder; of a hub id its own, fetched unless it is there.

    Raises:
        FileNotFoundError: if there is none
    """
    if Path(path).is_dir():
        return Path(path)
    name, _, revision = path.partition("@")
    if name.startswith((".", "/")) or name.count("/") != 1:
        raise FileNotFoundError(f"no folder {path}: give the folder or hub id of {ACCEPTED}")
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "preprocessor_config.json", *(["*.safetensors", "*.index.json"] if weights else [])]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"neither a folder nor a model of the hub that can be had: {path}; give the folder or hub id of "
            f"{ACCEPTED}: {flat(error)}"
        ) from error


def timm_model(folder: Path, config: dict[str, Any], weights: bool) -> tuple[Any, dict[str, Any]]:
    """The model of a folder in timm's format, and how its images are prepared."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(f'{folder} holds a timm model, and timm is not here: pip install -e ".[vision]"') from error

    preparation = config.get("pretrained_cfg") or config
    arguments = {"pretrained_cfg": preparation, **config.get("model_args", {}), "num_classes": 0}
    try:
        try:  # transformers resample their position tables
            model = timm.create_model(config["architecture"], **arguments | {"dynamic_img_size": True})
        except TypeError:
            model = timm.create_model(config["architecture"], **arguments)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{folder}: timm makes no {config['architecture']} of it: {flat(error)}") from error
    if weights:
        from safetensors.torch import load_file

        state = load_file(folder / "model.safetensors") if (folder / "model.safetensors").exists() else {}
        convert = getattr(import_module(type(model).__module__), "checkpoint_filter_fn", None)  # of older formats
        try:
            missing = model.load_state_dict(convert(state, model) if convert else state, strict=False).missing_keys
        except RuntimeError as error:
            raise ValueError(f"{folder}: the weights are not those of its config.json: {flat(error)}") from error
        if missing:
            raise ValueError(f"{folder} lacks {len(missing)} weights of its {config['architecture']}: {missing[0]}")
    return model, preparation


def transformers_model(folder: Path, weights: bool) -> tuple[Any, dict[str, Any]]:
    """The vision model of a folder of `transformers`, and its preprocessor's configuration."""
    config, preparation = described(str(folder), KINDS, "a vision model")
    config = getattr(config, "vision_config", config)  # of CLIP and SigLIP the half that sees
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0
    model = loaded(str(folder), config, config.model_type, "pooler") if weights else skeleton(config)
    return model, preparation


# ---- models ---------------------------------------------------------------------------------------------------------


class Looker(nn.Module):
    """An encoder with its normalisation and resolution; no gradient passes.

    Raises:
        ValueError: if the model has no such layer, or no attention maps to show
    """

    def __init__(self, encoder: Encoder, model: Any, normalised: Normalised, patch: int, side: int | None = None):
        super().__init__()
        self.path, self.layers, self.side = encoder.path, encoder.layers, encoder.side or side
        self.model, self.normalised, self.patch = model.requires_grad_(False).eval(), normalised, patch
        if self.side is not None and self.side < patch:
            raise ValueError(f"side={self.side} pixels are smaller than a patch of {self.path}, {patch}: raise it")
        if not self.layers:
            return
        depth = len(self.attentions())
        if not depth:
            raise ValueError(f"{self.path} has no plain attention over patches, so it shows no maps: leave out layers")
        if bad := [i for i in self.layers if not -depth <= i < depth]:
            raise ValueError(f"layers: {bad[0]} is none of the {depth} of {self.path}: choose 0 to {depth - 1}")

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
        read = [self.attentions()[i] for i in self.layers]
        with recorded([module for pair in read for module in pair]) as found:
            tokens = self.seen(x).float()
        if tokens.ndim == 4:
            grid, tokens = tuple(tokens.shape[1:3]), tokens.flatten(1, 2)
        count = grid[0] * grid[1]  # class and register tokens are in front of the patches
        qk = [self.heads(v)[:, :, -count:].float() for v in found]
        maps = {i: in_fp32(q, k, count) for i, q, k in zip(self.layers, qk[::2], qk[1::2], strict=True)}
        return Encoded(tokens[:, -count:], grid, maps)


class OfTimm(Looker):
    def __init__(self, encoder: Encoder, model: Any, preparation: Mapping[str, Any]):
        embed = getattr(model, "patch_embed", None)
        patch = getattr(embed, "patch_size", None) or model.feature_info[-1]["reduction"]
        patch, input_size = patch if isinstance(patch, int) else patch[0], preparation.get("input_size")
        fixed = preparation.get("fixed_input_size") and not getattr(model, "dynamic_img_size", False) and input_size
        normalised = Normalised(preparation.get("mean", (0.5,) * 3), preparation.get("std", (0.5,) * 3))
        super().__init__(encoder, model, normalised, patch, input_size[-1] if fixed else None)
        self.width = model.num_features
        self.channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels

    def seen(self, x: Tensor) -> Tensor:
        states = self.model.forward_features(x)
        if states.ndim == 4:
            return states if states.shape[-1] == self.width else states.permute(0, 2, 3, 1)
        norm = getattr(self.model, "fc_norm", None)  # the final norm of a model that pools before it
        return states if norm is None else norm(states)

    def attentions(self) -> list[tuple[nn.Module, nn.Module]]:
        from timm.models.vision_transformer import Attention

        attentions = [getattr(block, "attn", None) for block in getattr(self.model, "blocks", ())]
        return [(a.q_norm, a.k_norm) for a in attentions] if all(type(a) is Attention for a in attentions) else []

    def heads(self, x: Tensor) -> Tensor:
        return x


class OfTransformers(Looker):
    def __init__(self, encoder: Encoder, model: Any, preparation: Mapping[str, Any]):
        config = model.config
        super().__init__(encoder, model, Normalised.of(preparation), config.patch_size)
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
