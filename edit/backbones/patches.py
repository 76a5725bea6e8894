"""Models of our own over square samples: patches are embedded, blocks run, an output layer makes patches again.

A family's configuration has `input_size`, `in_channels`, `patch_size` and `depth`, and makes the tables of fixed
positions; its weights are named `x_embedder`, `t_embedder`, `blocks` and `final_layer`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor, nn

from edit.denoiser import Denoiser
from edit.facts import check_kept
from edit.stream import Stream

TABLES = ("pos_embed", "rope")  # buffers of positions: computed again, never stored


class PatchDenoiser(Denoiser):
    """Square samples b c y x in patches of p x p, in front of a list of equal units.

    Args:
        spec: the configuration, a dataclass whose `tables()` has the values of those of `TABLES` that the model has
        model: its weights
    """

    spec_class: ClassVar[Any]  # of `spec`
    resized: ClassVar[tuple[str, ...]] = ("input_size",)  # settings that `resize` takes over

    def __init__(self, spec: Any, model: nn.Module):
        self.spec: Any = spec
        super().__init__(model, list(model.blocks))  # type: ignore[arg-type]
        self.reset_buffers()

    @abstractmethod
    def times(self, t: Tensor) -> Tensor:
        """Times in [0, 1], 1 = noise, as the network was trained on them: b -> b."""

    @property
    def config(self) -> dict:
        return asdict(self.spec)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PatchDenoiser:
        return cls.spec_class(**config).build()

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.spec.in_channels, self.spec.input_size, self.spec.input_size

    def embed_times(self, t: Tensor) -> Tensor:
        return self.model.t_embedder(self.times(t))  # type: ignore[operator]

    def placed(self, sample: Tensor) -> Tensor:
        """The image tokens with their positions: b c y x -> b n d."""
        m: Any = self.model
        # the table first: the sum then takes its layout, tokens in order, not the channels-first one of the convolution
        return m.pos_embed + m.x_embedder(sample.to(m.x_embedder.proj.weight.dtype))

    def last_layer(self, stream: Stream) -> Stream:
        return replace(stream, image=self.model.final_layer.linear(stream.image))  # type: ignore[union-attr, operator]

    def pixels(self, stream: Stream) -> Tensor:
        """The patches behind the output layer as an image: b n (p p c) -> b c y x."""
        (_, rows, columns), p = stream.layout.grid, self.spec.patch_size
        return rearrange(stream.image, "b (y x) (p q c) -> b c (y p) (x q)", y=rows, x=columns, p=p, q=p)

    def keep(self, indices: Sequence[int]) -> None:
        check_kept(indices, len(self.units), f"this {self.name}")
        blocks: Any = self.model.blocks
        self.units = [self.units[i] for i in indices]
        self.model.blocks = nn.ModuleList(blocks[i] for i in indices)
        self.spec = replace(self.spec, depth=len(indices))

    def resize(self, spec: Any) -> None:
        if not isinstance(spec, self.spec_class) or spec.input_size == self.spec.input_size:
            return
        size = {name: getattr(spec, name) for name in self.resized}
        self.spec, self.base = replace(self.spec, **size), {**self.base, **size}
        for name, table in self.spec.tables().items():
            setattr(self.model, name, self.model.get_buffer(name).new_empty(table.shape))
        self.reset_buffers()

    def reset_buffers(self) -> None:
        if self.model.pos_embed.is_meta:
            return
        for name, table in self.spec.tables().items():
            self.model.get_buffer(name).copy_(table)


def without_tables(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the tables."""
    return {k: v for k, v in state.items() if k not in TABLES}


def with_tables(state: Mapping[str, Tensor], spec: Any) -> dict[str, Tensor]:
    """A stored state dict with the tables of `spec`, in the weights' precision; empty for an empty one."""
    if not state:
        return {}
    dtype = state["x_embedder.proj.weight"].dtype
    return {**state, **{name: table.to(dtype) for name, table in spec.tables().items()}}
