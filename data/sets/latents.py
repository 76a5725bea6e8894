"""Cached latents and text embeddings, as `python -m data.precompute` and `python -m data.generate` write them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import manifest
from data.damage import Damaged, Tolerance
from data.decoder import Decoder
from data.making.encoders import VAE
from data.making.frozen import PromptEncoders
from data.making.stored_text import encoders_of
from data.npy import array_of
from data.pixels import to_uint8
from data.plain_text import LAST_LABEL
from data.split import CheckedSet, Split, flipped
from data.tar_index import ABSENT
from data.tars import Tars
from edit import noise
from edit.data_set import collate, opened
from edit.frames import by_sample, folded

ENCODED = "float16"  # patch tokens are stored as


class Latents:
    """Latents drawn anew from their stored distribution each time, with text embeddings where there are any.

    A folder must be as its manifest says: encoder and scaling, counts, size of each shard. Samples that a teacher
    generated are the same at each draw, and never flipped. With aspect-ratio buckets `shape` is that of the
    square, `buckets` are all shapes, and each sample has its own.

    Args:
        path: folder made by `python -m data.precompute` or `python -m data.generate`
        flip: take the stored latents of the mirrored image in half of the training draws
        heldout: another such folder, made with the same encoders
        verify: `size` compares size and headers of each shard with the manifest; `full` the checksum too
        vae: folder or hub id of the VAE, to look at samples; None: its place when the latents were made
        on_error: damaged shards and samples: refuse or skip
        cache: folder for the index files; None: beside the shards
        seed: of flips and resampling
        generated_by: refuse samples of any other teacher: its folder, or its `manifest.teacher_hash`
        guidance: refuse samples generated at another guidance scale; None expects nothing, as for the next two
        steps: refuse samples generated in another number of steps
        shift: refuse samples generated with another shift of the times
        trajectories: samples have the teacher's path, see `LatentSplit`
        features: samples have the teacher's answers of every evaluation, see `LatentSplit`
        encoded: samples have the patch tokens of their image by a vision encoder, see `LatentSplit`
        encoded_by: refuse patch tokens of any other encoder: its folder or hub id, or its sha256 in the manifest

    Raises:
        FileNotFoundError, ValueError: in one sentence, for a folder that cannot be used
    """

    def __init__(
        self,
        path: str,
        flip: bool = True,
        heldout: str | None = None,
        verify: str = "size",
        vae: str | None = None,
        on_error: str = "refuse",
        cache: str | None = None,
        seed: int = 0,
        generated_by: str | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        shift: float | None = None,
        trajectories: bool = False,
        features: bool = False,
        encoded: bool = False,
        encoded_by: str | None = None,
    ):
        if verify not in ("size", "full"):
            raise ValueError(f"verify is size or full, got {verify!r}")
        self.path, tolerance = Path(path), Tolerance(on_error)
        self.manifest = manifest.verify(self.path)
        manifest.check_teacher(self.path, self.manifest, generated_by, guidance, steps, shift)
        manifest.check_encoder(self.path, self.manifest, encoded_by)
        flip = flip and not self.manifest.get("generated")
        if flip and not self.manifest["flips"]:
            raise ValueError(f"{path} has no flipped latents: set flip=false, or precompute with --flips")
        self.shape: tuple[int, ...] = tuple(self.manifest["latent_shape"])
        self.buckets: list[tuple[int, ...]] | None = None
        if "buckets" in self.manifest:
            self.buckets = [tuple(b["latent_shape"]) for b in self.manifest["buckets"]]
        self.num_classes: int | None = self.manifest["num_classes"]
        self.classes: list[str] | None = self.manifest["classes"]
        self.vae = vae or self.manifest["sources"]["vae"]
        self.text_length = text_length(self.manifest["text"])
        self.null = self._null()
        self._vae: VAE | None = None  # loaded when something is first looked at
        tars = shards(self.path, self.manifest, verify == "full", tolerance, cache)
        self._train = LatentSplit(tars, self.manifest, flip, seed, trajectories, features, encoded)
        # with trajectories or features: at which guidance and times
        self.stored: dict[str, Any] | None = self._train.path or self._train.made
        self.features = features
        # what the manifest says of the vision encoder whose patch tokens samples have: sha256, width, side, grid
        self.encoded: dict[str, Any] | None = self.manifest["features"] if encoded else None
        self._heldout = None
        if heldout is not None:
            other = manifest.verify(Path(heldout))
            if other["identity"] != self.manifest["identity"]:
                raise ValueError(f"{heldout} was made with other encoders or size than {path}: precompute it alike")
            tars = shards(Path(heldout), other, verify == "full", tolerance, cache)
            self._heldout = LatentSplit(tars, other, False, seed, False)

    def train(self) -> Split:
        return self._train

    def heldout(self) -> Split | None:
        """Never flipped."""
        return self._heldout

    def to_frames(self, x: Tensor) -> Tensor:
        """b c *sizes as trained on -> uint8 b f y x 3, through the VAE that made the latents, frame by frame.

        Samples of a teacher without a VAE are decoded by the data set that the teacher was trained on.

        Raises:
            FileNotFoundError: if the VAE is missing
            ValueError: if the VAE is another one, or no decoder is known
        """
        if self.manifest["vae"] is None:
            return self._origin.to_frames(x)
        shift, scale = scaling(self.manifest)
        vae = self._own()
        vae.to(x.device)
        return by_sample(to_uint8(vae.decode(folded(x).float() / scale.to(x.device) + shift.to(x.device))), x)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """New prompts as the stored ones were embedded: text b l c, text_mask b l, pooled b c, as far as there are.

        Raises:
            FileNotFoundError: if the text encoders are not where they were
            ValueError: if the manifest names none, or others lie there
        """
        rows = [{k: v.float() for k, v in row.items()} for row in self._encoders.embed(prompts)]
        text = self.manifest["text"]
        return collate([row | padded(row["text"], text) if text else row for row in rows])

    @cached_property
    def _encoders(self) -> PromptEncoders:
        return encoders_of(self.path, self.manifest)

    def decoder(self) -> nn.Module:
        """The same with a graph: b c *sizes -> pixels b 3 *sizes in about [-1, 1]; raises likewise."""
        if self.manifest["vae"] is None:
            return getattr(self._origin, "decoder", nn.Identity)()
        return Decoder(self._own().model, *scaling(self.manifest))

    def _own(self) -> VAE:
        """The VAE that made these latents."""
        if self._vae is None:
            try:
                vae = VAE(self.vae)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"to look at latents of {self.path}, give their VAE as data.set.vae=<folder>: {error}"
                ) from error
            if vae.sha256 != self.manifest["vae"]["sha256"]:
                raise ValueError(f"{self.vae} is not the VAE that made {self.path}: give that one as data.set.vae")
            self._vae = vae
        return self._vae

    @cached_property
    def _origin(self) -> Any:
        """The data set that the teacher of these samples was trained on."""
        return data_set(self.manifest["sources"]["data"], f"to look at latents of {self.path}")

    @cached_property
    def world(self) -> CheckedSet | None:
        """The embedded world of these samples, which can tell whether a picture follows its caption.

        None if the teacher was not trained on one, or its prompts were encoded or padded otherwise.

        Raises:
            ValueError: if the world cannot be built
        """
        if self.manifest["vae"] is not None or not self.manifest.get("generated") or self.null is None:
            return None
        world = self._origin
        if not isinstance(world, CheckedSet) or tuple(world.shape) != self.shape:
            return None
        known: dict[str, Tensor] = getattr(world, "null", {})
        same = all(
            # stored in float16 perhaps
            name in known
            and known[name].shape == v.shape
            and torch.allclose(known[name].float(), v.float(), 2e-3, 2e-3)
            for name, v in self.null.items()
        )
        return world if same else None

    def _null(self) -> dict[str, Tensor] | None:
        """The empty prompt: text l c, text_mask l, pooled c, as far as the data has them; None without text."""
        if self.manifest["null"] is None:
            return None
        from safetensors.torch import load

        content = (self.path / manifest.NULL).read_bytes()  # safetensors takes no path that is no UTF-8
        null = {name: value.float() for name, value in load(content).items()}
        told = {name: self.manifest[name]["width"] for name in ("text", "pooled") if self.manifest[name]}
        if {name: value.shape[-1] for name, value in null.items()} != told:
            raise ValueError(
                f"{self.path / manifest.NULL} is not of the encoders that the manifest names: make it anew"
            )
        if "text" in null:
            null |= padded(null["text"], self.manifest["text"])
        return null


def data_set(node: dict[str, Any] | None, purpose: str) -> Any:
    """The data set of this package that an artifact was trained on.

    Args:
        node: its configuration, import path as `_target_`
        purpose: for the message

    Raises:
        ValueError: if there is none, or it is of another package
    """
    if not node or not str(node.get("_target_")).startswith("data."):
        raise ValueError(f"{purpose}, a VAE is needed (vae=<folder>): no data set of `data` is known that decodes them")
    try:
        return opened(node, who="the manifest")
    except ValueError as error:
        raise ValueError(f"{purpose}, {node['_target_']} is needed, which cannot be built: {error}") from error


def text_length(described: dict | None) -> int | None:
    """The common length in tokens of an encoder's texts; None if lengths differ, or there are no texts."""
    return described["max_tokens"] if described and described.get("padding", "none") != "none" else None


def padded(text: Tensor, described: dict) -> dict[str, Tensor]:
    """Text l c and its mask, filled up with zeros if the encoder's padding is `zeros`."""
    mask = torch.ones(len(text), dtype=torch.bool)
    if described.get("padding") == "zeros":
        missing = (0, described["max_tokens"] - len(text))
        text, mask = F.pad(text, (0, 0, *missing)), F.pad(mask, missing)
    return {"text": text, "text_mask": mask}


def shards(path: Path, described: dict, full: bool, tolerance: Tolerance, cache: str | None) -> Tars:
    """The shards that are as the manifest describes them.

    Raises:
        Damaged: if one differs, and damage is to be refused
        ValueError: if none is left
    """
    good: list[str] = []
    for record in described["shards"]:
        if wrong := manifest.check_shard(path, record, full):
            tolerance.excuse(Damaged(wrong))
        else:
            good.append(os.fspath(path / record["name"]))
    if not good:
        raise ValueError(f"no samples in {path}: none of its shards is as the manifest says")
    tars = Tars(good, tolerance, cache, {record["name"]: record["count"] for record in described["shards"]})
    for fault in misfits(tars, described):
        tolerance.excuse(fault)
    return tars


def misfits(tars: Tars, described: dict) -> Iterator[Damaged]:
    """Contradictions between the indices of shards and their manifest, the first of each kind; no member is read.

    The number of a sample decides its shard. A sample has all of its members, of the sizes that its shape needs.
    """
    if "shard_size" not in described or "dtype" not in described:
        return
    for i in range(len(tars)):
        number, shard = tars.key(i).rpartition("-")[2], int(tars.path(i).stem.partition("-")[2])
        if not number.isdecimal() or int(number) // described["shard_size"] != shard:
            yield Damaged(f"{tars.path(i)} holds the sample {tars.key(i)}, which does not belong there")
            break
    shapes = np.array([described["latent_shape"]])
    groups = np.zeros(len(tars), dtype=np.int64)
    if "buckets" in described:
        shapes, groups = (
            np.array([b["latent_shape"] for b in described["buckets"]]),
            _groups(tars, described["buckets"]),
        )
    numbers, made = shapes.prod(1)[groups], described.get("generated")
    wanted = {"latent": numbers} if made else {"moments": 2 * numbers}
    if described["flips"]:
        wanted["moments_flip"] = 2 * numbers
    if made and made.get("times"):
        wanted["trajectory"] = len(made["times"]) * numbers
    if made and made.get("taps"):
        count = len(made["evaluations"])
        wanted["predictions"] = count * numbers
        tokens = count * made["branches"] * int(np.prod(made["tokens"]))
        wanted |= {f"tap{k}": np.full(len(tars), tokens) for k in made["taps"]}
    if described["pooled"]:
        wanted["pooled"] = np.full(len(tars), described["pooled"]["width"])
    if seen := described.get("features"):
        grids = [b["grid"] for b in described.get("buckets", ())] or [seen["grid"]]
        wanted["features"] = np.array(grids).prod(1)[groups] * seen["width"]
        if described["flips"]:
            wanted["features_flip"] = wanted["features"]
    for name, count in wanted.items():
        size = tars.size(f"{name}.npy")
        width = np.dtype(ENCODED if name.startswith("features") else described["dtype"]).itemsize
        head = size - count * width  # of an npy file; numpy writes at most 256 bytes for so few numbers
        yield from _first(tars, name, size, (head <= 0) | (head > 256) | (head % 16 != 0))
    if described["text"]:
        size = tars.size("text.npy")
        yield from _first(tars, "text", size, (size <= 0) | (size % 2 != 0))


def _first(tars: Tars, name: str, size: np.ndarray, wrong: np.ndarray) -> Iterator[Damaged]:
    if wrong.any():
        i = int(wrong.argmax())
        said = "is missing" if size[i] == ABSENT else f"has {size[i]} bytes, which is not what its shape needs"
        yield Damaged(f"{tars.name(i)}.{name}.npy {said}")


def scaling(described: dict, sizes: int = 2) -> tuple[Tensor, Tensor]:
    """Shift and scale for latents of so many sizes, c 1 1 or 1 1 1 for two: the model sees (z - shift) * scale."""
    return tuple(torch.tensor(described["vae"][k]).view(-1, *[1] * sizes) for k in ("shift", "scale"))  # type: ignore


class LatentSplit:
    """Samples x = (mean + std * eps - shift) * scale, with eps a pure function of (seed, draw); or as generated.

    With aspect-ratio buckets `groups` is the bucket of each sample, n int64, by the manifest's order; else None.

    With `trajectories` a sample has its teacher's path, too: `z` c *sizes, the noise; `trajectory` k c *sizes, the
    stored states, and their `times` k, from noise to data without both ends; `scale`, the guidance. The noise equals
    the teacher's bit for bit; on another kind of device, to a unit in the last place.

    With `features` it has the teacher's answers of all s evaluations: `number`, of the noise; `predictions` s c *sizes,
    guided; `tap<unit>` s k n d, the tokens behind each tapped unit in k guidance branches, cond's first.

    With `encoded` it has the patch tokens of its image by a frozen vision encoder: `encoded` n d, row-major, of the
    mirrored image where the latents are the mirrored image's.

    Raises:
        ValueError: for trajectories of samples that were not generated, or by a solver that adds noise of its own; for
            features or patch tokens that are not there
    """

    def __init__(
        self,
        tars: Tars,
        described: dict,
        flip: bool,
        seed: int,
        trajectories: bool,
        features: bool = False,
        encoded: bool = False,
    ):
        self.tars, self.flip, self.seed = tars, flip, seed
        self.shape: Sequence[int] = described["latent_shape"]
        self.text, self.pooled = described["text"], described["pooled"] is not None
        self.num_classes: int | None = described["num_classes"]
        self.generated = bool(described.get("generated"))
        self.path = described["generated"] if trajectories and self.generated else None
        self.made = described["generated"] if features and self.generated else None  # with features
        if features and not (self.made and self.made.get("taps")):
            raise ValueError(
                f"{tars.paths[0].parent} has no features, which data.generate stores with taps=...: set features=false"
            )
        self.width, self.grids = None, []  # of patch tokens; those of each bucket, or of all samples
        if encoded:
            if not (seen := described.get("features")):
                raise ValueError(
                    f"{tars.paths[0].parent} has no features of a vision encoder, which data.precompute stores with "
                    "--features: set encoded=false, or make it anew"
                )
            self.width = seen["width"]
            self.grids = [b["grid"] for b in described.get("buckets", ())] or [seen["grid"]]
        if trajectories and not self.generated:
            raise ValueError(
                f"{tars.paths[0].parent} holds no generated data, which alone has trajectories: set "
                "trajectories=false, or run data.generate"
            )
        if self.path and self.path["solver"] == "ddpm":
            raise ValueError(
                f"{tars.paths[0].parent} was generated by ddpm, which adds noise on the way, so its samples do not "
                "follow from theirs: set trajectories=false, or generate with another solver"
            )
        if not self.generated:
            self.shift, self.scale = scaling(described, len(self.shape) - 1)
        self.groups = None
        if "buckets" in described:
            self.shapes = [b["latent_shape"] for b in described["buckets"]]
            self.groups = _groups(tars, described["buckets"])
            self._order = np.argsort(self.groups, kind="stable")  # samples of a bucket stand together
            self._place = np.argsort(self._order)
            self._first = np.searchsorted(self.groups[self._order], np.arange(len(self.shapes) + 1))
        if self.num_classes is not None and (beyond := tars.labels >= self.num_classes).any():
            try:
                self._label(int(beyond.argmax()), self.num_classes)
            except Damaged as error:
                tars.tolerance.excuse(error)

    def __len__(self) -> int:
        return len(self.tars)

    def sample(self, index: int, draw: int) -> dict[str, Tensor]:
        first_good = self.tars.tolerance.first_good
        if self.groups is None:
            return first_good(lambda i: self._sample(i, draw, self.shape, 0), index, len(self))
        group = self.groups[index]  # the substitute of a damaged sample has its shape
        first, end = self._first[group], self._first[group + 1]
        shape = self.shapes[group]
        return first_good(
            lambda i: self._sample(int(self._order[first + i]), draw, shape, group),
            self._place[index] - first,
            end - first,
        )

    def _sample(self, index: int, draw: int, shape: Sequence[int], group: int) -> dict[str, Tensor]:
        view = "_flip" if self.flip and flipped(self.seed, draw) else ""
        sample = {"x": self._latent(index, draw, shape, view)}
        if self.width is not None:
            rows, columns = self.grids[group]
            sample["encoded"] = self._array(index, f"features{view}.npy", (rows * columns, self.width))
        if self.num_classes is not None:
            sample["label"] = torch.tensor(self._label(index, self.num_classes))
        if self.text:
            sample |= padded(self._array(index, "text.npy", (None, None)), self.text)
        if self.pooled:
            sample["pooled"] = self._array(index, "pooled.npy", (None,))
        if self.path:
            sample |= self._path(index, self.path, shape)
        if self.made:
            sample |= self._features(index, self.made, shape)
        return sample

    def _label(self, index: int, num_classes: int) -> int:
        """Raises Damaged if the label is missing or beyond the classes."""
        label, name = int(self.tars.labels[index]), self.tars.name(index)
        if label == ABSENT:
            raise Damaged(f"{name} has no label")
        if label >= num_classes:
            raise Damaged(f"{name} has the label {label}, and the manifest has {num_classes} classes")
        return label

    def _path(self, index: int, made: dict, shape: Sequence[int]) -> dict[str, Tensor]:
        number, times = self._number(index), torch.tensor(made.get("times", []))
        z = noise.gaussian(made["seed"], torch.tensor([number]), noise.NOISE, tuple(shape))[0]
        states = self._array(index, "trajectory.npy", (len(times), *shape)) if len(times) else z.new_empty(0, *shape)
        return {"z": z, "trajectory": states, "times": times, "scale": torch.tensor(float(made["guidance"]))}

    def _number(self, index: int) -> int:
        """Of the noise. Raises Damaged if it is none."""
        number = self.tars.json(index).get("number")
        if type(number) is not int or not 0 <= number <= LAST_LABEL:  # true is an int to Python
            raise Damaged(f"{self.tars.name(index)}.json does not say which noise it was generated from")
        return number

    def _features(self, index: int, made: dict, shape: Sequence[int]) -> dict[str, Tensor]:
        count, tokens = len(made["evaluations"]), (made["branches"], *made["tokens"])
        found = {"number": torch.tensor(self._number(index))}
        found["predictions"] = self._array(index, "predictions.npy", (count, *shape))
        return found | {f"tap{k}": self._array(index, f"tap{k}.npy", (count, *tokens)) for k in made["taps"]}

    def _latent(self, index: int, draw: int, shape: Sequence[int], view: str) -> Tensor:
        c, *sizes = shape
        if self.generated:
            return self._array(index, "latent.npy", (c, *sizes))
        mean, std = self._array(index, f"moments{view}.npy", (2 * c, *sizes)).chunk(2)
        eps = noise.gaussian(self.seed, torch.tensor([draw]), noise.RESAMPLE, (c, *sizes))[0]
        return (mean + std * eps - self.shift) * self.scale

    def _array(self, index: int, member: str, shape: tuple[int | None, ...]) -> Tensor:
        """A member as float32. Raises Damaged if it is missing, no array, not finite, or of another shape."""
        content = self.tars.read(index, member)
        name = f"{self.tars.name(index)}.{member}"
        if content is None:
            raise Damaged(f"{name} is missing")
        return torch.from_numpy(array_of(content, name, shape)).float()


def _groups(tars: Tars, buckets: list[dict]) -> np.ndarray:
    """The bucket of each sample, n int64, from the size at the start of its key.

    Raises:
        ValueError: if a sample is of none of the buckets
    """
    numbers = {"x".join(map(str, b["size"])): i for i, b in enumerate(buckets)}
    sizes = [tars.key(i).partition("-")[0] for i in range(len(tars))]
    if unknown := next((s for s in sizes if s not in numbers), None):
        raise ValueError(f"{tars.paths[0].parent} has a sample of {unknown}, which is none of its manifest's buckets")
    return np.array([numbers[s] for s in sizes])
