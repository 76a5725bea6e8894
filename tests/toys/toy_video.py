"""A tiny video transformer for tests: DiT's blocks on patches of 1 x 2 x 2 latent pixels, told a pooled text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from edit.backbones.dit import DiTBlock, DiTConfig, FinalLayer, TimeEmbed
from edit.denoiser import Denoiser
from edit.facts import Facts
from edit.inputs.limits import Count, Side, Units, check_numbers
from edit.stream import Condition, Layout, Output, Stream


@dataclass(frozen=True)
class ToyVideoConfig:
    frames: Count = 4
    side: Side = 8
    channels: Count = 12
    hidden_size: Count = 32
    depth: Units = 2
    num_heads: Count = 2
    pooled: Count = 64

    def __post_init__(self):
        check_numbers(self)

    def build(self) -> "ToyVideo":
        return ToyVideo(self)


class Body(nn.Module):
    def __init__(self, s: ToyVideoConfig):
        super().__init__()
        c = DiTConfig(s.side, s.channels, 2, s.hidden_size, s.depth, s.num_heads)
        self.read = nn.Conv3d(s.channels, s.hidden_size, (1, 2, 2), (1, 2, 2))
        self.place = nn.Parameter(torch.randn(s.frames * c.grid**2, s.hidden_size) * 0.1)
        self.time, self.text = TimeEmbed(s.hidden_size, 0.0), nn.Linear(s.pooled, s.hidden_size)
        self.blocks = nn.ModuleList(DiTBlock(c) for _ in range(s.depth))
        self.last = FinalLayer(c)


class ToyVideo(Denoiser):
    name = "toy_video"

    def __init__(self, settings: ToyVideoConfig):
        self.settings = settings
        model = Body(settings)
        super().__init__(model, list(model.blocks))

    @property
    def config(self) -> dict:
        return asdict(self.settings)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ToyVideo":
        return ToyVideoConfig(**config).build()

    @property
    def facts(self) -> Facts:
        s = self.settings
        return Facts(s.hidden_size, s.num_heads, text={"pooled": s.pooled}, lora=("attn.qkv", "attn.proj"))

    @property
    def sample_shape(self) -> tuple[int, ...]:
        s = self.settings
        return s.channels, s.frames, s.side, s.side

    def pack(self, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        if condition.pooled is None:
            raise ValueError("toy_video needs condition.pooled")
        return {"x": x, "t": t, "pooled": condition.pooled}

    def embed(self, x: Tensor, t: Tensor, pooled: Tensor) -> Stream:
        model, s = self.model, self.settings
        tokens, time = model.place + model.read(x).flatten(2).transpose(1, 2), model.time(t)
        cond = time + model.text(pooled)
        return Stream(tokens, cond, Layout((s.frames, s.side // 2, s.side // 2)), time=time, signal=cond)

    def readout(self, stream: Stream) -> Output:
        f, y, x = stream.layout.grid
        patches = self.model.last(stream.image, stream.cond)
        sample = rearrange(patches, "b (f y x) (p q c) -> b c f (y p) (x q)", f=f, y=y, x=x, p=2, q=2)
        return Output(sample, None, stream.trace)

    def keep(self, indices: Sequence[int]) -> None:
        self.model.blocks = nn.ModuleList(self.model.blocks[i] for i in indices)
        self.units, self.settings = list(self.model.blocks), replace(self.settings, depth=len(indices))

    def null(self, condition: Condition) -> Condition:
        assert condition.pooled is not None
        return Condition(pooled=torch.zeros_like(condition.pooled))

    def example(self, batch: int = 1, text: int = 512) -> Condition:
        return Condition(pooled=torch.zeros(batch, self.settings.pooled, device="cpu"))

    @classmethod
    def to_stock(cls, config: Mapping, state: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
        return dict(config), dict(state)

    @classmethod
    def from_stock(cls, config: Mapping, state: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
        return dict(config), dict(state)
