"""DiT over `diffusers.DiTTransformer2DModel`, with every weight of that class under its own name.

`edit.backbones.dit` reads such folders by default: it is the leaner model. This family is for what it cannot hold: a
copy of the time and label embedders in every block, free to differ, and the class's other activations, norms and
biases. Source: DiT (arXiv 2212.09748) as `diffusers` has it.

Labels are never dropped here, in training mode either: an objective drops them, once for all blocks. Not supported:
cross_attention_kwargs, samples that are not square, and numbers of output channels other than c or 2c.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.backbones.stock import (
    Modulation,
    StockDenoiser,
    StockUnit,
    feed_forward,
    heads,
    heads_between,
    scales_with,
    zero_init,
)
from edit.facts import Facts
from edit.inputs.limits import Count, check_numbers, check_table
from edit.sampling import Sampler
from edit.solvers import DDIMSolver
from edit.stream import Branch, Condition, Layout, Output, Stream
from edit.unit import Anatomy
from edit.widths import Scale

STEPS = 1000  # of the DDPM the published weights were trained on


@dataclass(frozen=True)
class DiTDiffusersConfig:
    """Everything that defines the class's DiT; the defaults are DiT-XL/2's at 256 px."""

    in_channels: Count = 4
    out_channels: int | None = 8  # twice in_channels: the second half is the variance
    num_layers: int = 28
    num_attention_heads: Count = 16
    attention_head_dim: Count = 72
    sample_size: int = 32  # rows = columns of a latent; others are reached by interpolated positions
    patch_size: Count = 2
    num_embeds_ada_norm: Count = 1000  # classes; the embedding tables have one more row: the null class
    dropout: float = 0.0
    attention_bias: bool = True
    activation_fn: str = "gelu-approximate"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5
    path: str | None = None  # folder or hub id of the weights, for `init` and `teacher.path` to refer to

    def __post_init__(self):
        check_numbers(self)

    def build(self) -> DiTDiffusers:
        config = asdict(self)
        del config["path"]
        return DiTDiffusers.from_config(config).initialise()


# ---- shared by the families over `BasicTransformerBlock` ------------------------------------------------------------


class BasicUnit(StockUnit):
    """Self-attention `attn1` and MLP `ff` on image tokens."""

    attn1: Any

    @property
    def anatomy(self) -> Anatomy:
        return Anatomy(self.attn1.heads, heads_between("attn1", self.attn1), feed_forward(self, "ff"))

    def own_mixer(self, stream: Stream, tokens: Tensor) -> Tensor:
        """b n d -> b n d."""
        a = self.attn1
        q, k, v = (heads(to(tokens), a) for to in (a.to_q, a.to_k, a.to_v))
        return a.to_out[1](a.to_out[0](self.attended(q, k, v, stream)))

    def enter(self, stream: Stream, modulation: Modulation) -> Branch:
        return Branch(torch.addcmul(modulation.shift.image, self.own_norm(stream.image), 1 + modulation.scale.image))

    @abstractmethod
    def own_norm(self, tokens: Tensor) -> Tensor:
        """The norm before the self-attention."""


class PatchDenoiser(StockDenoiser):
    """A noise predictor on patches of a latent, with the stock `PatchEmbed`; learned variances are its second half."""

    model: Any
    lists: ClassVar[Mapping[str, tuple[str, type[StockUnit]]]]
    extras: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, model: nn.Module, **extras: Any):
        c: Any = model.config
        if c.out_channels not in (None, c.in_channels, 2 * c.in_channels):
            raise ValueError(
                f"{self.name}: out_channels must be in_channels {c.in_channels}, or twice that for a learned variance, "
                f"got {c.out_channels}"
            )
        super().__init__(model, **extras)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> StockDenoiser:
        c = cls.filled(config)
        check_table(cls.name, c["num_attention_heads"] * c["attention_head_dim"], c["sample_size"] // c["patch_size"])
        return super().from_config(config)

    @classmethod
    def of(cls, model: nn.Module, **extras: Any) -> StockDenoiser:
        denoiser = super().of(model, **extras)
        denoiser.model.pos_embed.pos_embed = model.pos_embed.pos_embed  # no state dict holds it
        return denoiser

    @property
    def prediction(self) -> Literal["velocity", "noise"]:
        return "noise"

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        size = self.model.config.sample_size
        return self.channels, size, size

    def accepts(self, shape: tuple[int, ...]) -> bool:
        patch = self.model.config.patch_size
        return len(shape) == 3 and shape[0] == self.channels and not any(s % patch for s in shape[1:])

    def reset_buffers(self) -> None:
        from diffusers.models.embeddings import get_2d_sincos_pos_embed

        embed = self.model.pos_embed
        weight = embed.proj.weight
        if weight.is_meta:
            return
        table = get_2d_sincos_pos_embed(
            embed.pos_embed.shape[-1],
            embed.height,
            base_size=embed.base_size,
            interpolation_scale=embed.interpolation_scale,
            device=torch.device("cpu"),
            output_type="pt",
        )
        embed.pos_embed = table.float()[None].to(weight.device, weight.dtype)

    def times(self, t: Tensor) -> Tensor:
        """The index 1000 t - 1 in 0..999; t = 0 is clean data, before index 0."""
        return torch.round(t.float() * STEPS - 1)

    def patches(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Embedded with their positions, b n d, and their grid."""
        embed = self.model.pos_embed
        # the convolution leaves them channels first: a layout that every later sum would inherit
        tokens = embed(x.to(embed.proj.weight.dtype)).contiguous()
        return tokens, (1, x.shape[2] // embed.patch_size, x.shape[3] // embed.patch_size)

    def arranged(self, stream: Stream) -> Tensor:
        """b (y x) (p q c) -> b c (y p) (x q)."""
        tokens, (_, rows, columns) = stream.image, stream.layout.grid
        patch = self.model.config.patch_size
        x = tokens.view(len(tokens), rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), -1, rows * patch, columns * patch)

    def readout(self, stream: Stream) -> Output:
        stream = self.projected(stream)
        x = self.arranged(stream)
        sample, variance = x.chunk(2, dim=1) if x.shape[1] == 2 * self.channels else (x, None)
        return Output(sample, variance, stream.trace)


# ---- DiT ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Told(Layout):
    """The layout, with what the blocks embed: the label, b int64, and the sinusoid of the timestep, b 256."""

    label: Tensor
    sinusoid: Tensor

    def map(self, f: Callable[[Tensor], Tensor]) -> Told:
        layout = super().map(f)
        assert isinstance(layout, Told)
        return replace(layout, label=f(self.label), sinusoid=f(self.sinusoid))


class ClassUnit(BasicUnit):
    """x + g1 * attention(norm(x) (1 + k1) + s1), then x + g2 * mlp(norm(x) (1 + k2) + s2).

    Shifts, scales and gates come from the block's own embedding of time and label. The first block's is also the
    stream's `time` and `signal`, and the readout's.
    """

    apart = ("tell_all",)

    def tell(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Time embedding and label embedding: b d each."""
        assert isinstance(layout, Told)
        emb: Any = self.norm1.emb
        return emb.timestep_embedder(layout.sinusoid), emb.class_embedder.embedding_table(layout.label)

    def tell_all(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """`tell`, for the denoiser: a sharded unit gathers its weights for this call, and frees them after it."""
        return self.tell(layout)

    def modulate(self, stream: Stream) -> Modulation:
        time, label = self.tell(stream.layout)
        norm: Any = self.norm1
        return Modulation(*map(Branch, norm.linear(norm.silu(time + label))[:, None].chunk(6, dim=2)))

    def own_norm(self, tokens: Tensor) -> Tensor:
        return self.norm1.norm(tokens)

    def feed(self, stream: Stream, modulation: Modulation) -> Branch:
        shift, scale = modulation.feed_shift, modulation.feed_scale
        x = torch.addcmul(shift.image, self.norm3(stream.image), 1 + scale.image)
        return Branch(self.part("ffn")(x, stream.layout))


SCALES = scales_with(
    {
        r"pos_embed\.proj\.weight": Scale("input", "fan_in"),
        r"embedding_table\.weight": Scale("input", "label", 0),
        r"proj_out_1\.weight": Scale("hidden", "fan_in"),
        r"proj_out_2\.weight": Scale("output", "zero"),
    }
)


class DiTDiffusers(PatchDenoiser):
    """The class's DiT as `embed -> units -> readout`; a sample is a square latent of any size the patches divide."""

    name = "dit_diffusers"
    stock = "DiTTransformer2DModel"
    lists: ClassVar = {"transformer_blocks": ("num_layers", ClassUnit)}

    @property
    def facts(self) -> Facts:
        c: Any = self.model.config
        parts = {"modulation": ("norm1.linear.",), "scales": SCALES}
        return replace(super().facts, classes=c.num_embeds_ada_norm, **parts)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return super().accepts(shape) and shape[1] == shape[2]

    def initialise(self) -> DiTDiffusers:
        """Embedders as in the official DiT; modulations and the last layer at zero."""
        m = self.model
        for unit in m.transformer_blocks:
            emb = unit.norm1.emb
            for layer in (emb.timestep_embedder.linear_1, emb.timestep_embedder.linear_2):
                nn.init.normal_(layer.weight, std=0.02)
            nn.init.normal_(emb.class_embedder.embedding_table.weight, std=0.02)
            zero_init(unit.norm1.linear)
        zero_init(m.proj_out_1, m.proj_out_2)
        return self

    def sampler(self) -> Sampler:
        return Sampler(DDIMSolver(50), guidance=4.0)

    def pack(self, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        if condition.label is None:
            raise ValueError(
                f"{self.name} is class-conditional: condition.label is missing; use a data set with labels"
            )
        if condition.guidance is not None:
            raise ValueError(f"{self.name} was not distilled for guidance: leave condition.guidance out")
        return {"hidden_states": x, "timestep": self.times(t), "class_labels": condition.label}

    def embed(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
    ) -> Stream:
        """The stock forward's arguments: b c y x, b, b."""
        if cross_attention_kwargs:
            raise ValueError(f"{self.name} takes no cross_attention_kwargs, got {', '.join(cross_attention_kwargs)}")
        if timestep is None or class_labels is None:
            missing = "timestep" if timestep is None else "class_labels"
            raise ValueError(f"{self.name} needs {missing}, one per sample")
        image, grid = self.patches(hidden_states)
        layout = self.told(grid, class_labels, timestep, image.dtype)
        time, label = self.model.transformer_blocks[0].tell_all(layout)
        return Stream(image=image, cond=time + label, time=time, signal=time + label, layout=layout)

    def told(self, grid: tuple[int, int, int], label: Tensor, timestep: Tensor, dtype: torch.dtype) -> Told:
        """What all units are told, for their own embeddings: stock times b, classes b."""
        sinusoid = self.model.transformer_blocks[0].norm1.emb.time_proj(timestep).to(dtype)
        return Told(grid=grid, label=label, sinusoid=sinusoid)

    def embed_times(self, t: Tensor) -> Tensor:
        label = torch.zeros(len(t), dtype=torch.int64, device=t.device)
        layout = self.told((1, 1, 1), label, self.times(t), self.model.pos_embed.proj.weight.dtype)
        return self.model.transformer_blocks[0].tell_all(layout)[0]

    def last_norm(self, stream: Stream) -> Stream:
        m = self.model
        shift, scale = m.proj_out_1(F.silu(stream.cond))[:, None].chunk(2, dim=2)
        return replace(stream, image=torch.addcmul(shift, m.norm_out(stream.image), 1 + scale))

    def last_layer(self, stream: Stream) -> Stream:
        return replace(stream, image=self.model.proj_out_2(stream.image))

    def null(self, condition: Condition) -> Condition:
        assert condition.label is not None
        return Condition(label=torch.full_like(condition.label, self.model.config.num_embeds_ada_norm))
