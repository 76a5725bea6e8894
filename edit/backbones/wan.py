"""Wan 2.1 over `diffusers.WanTransformer3DModel`: video tokens that read a text.

Self-attention runs over the tokens of all frames, with rotary positions along frames, rows and columns; queries and
keys are normalised across all heads. One modulation is computed per sample and moved by a small learned table in each
block; the text, a T5 embedding, enters by cross-attention between self-attention and MLP. Norms and gates are in fp32.
Source: Wan (arXiv 2503.20314) as `diffusers` has it; no text mask: padding, which is zeros, is attended to.

Not supported: images as a condition (image-to-video: `image_dim`, `added_kv_proj_dim`, `pos_embed_seq_len`, more input
than output channels), a time per token (Wan 2.2's `expand_timesteps`), fused projections, attention_kwargs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

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
    turn,
    zero_init,
)
from edit.facts import Facts
from edit.inputs.limits import Count, check_numbers
from edit.sampling import Sampler
from edit.solvers import StockEuler
from edit.stream import Branch, Condition, Layout, Output, Step, Stream
from edit.unit import Anatomy, Features
from edit.widths import Scale


@dataclass(frozen=True)
class WanConfig:
    """Everything that defines a Wan transformer; the defaults are Wan 2.1's of 1.3 B."""

    in_channels: Count = 16
    num_layers: int = 30
    num_attention_heads: Count = 12
    attention_head_dim: Count = 128
    ffn_dim: Count = 8960  # hidden channels of the MLP
    text_dim: Count = 4096  # width of the text embedding
    freq_dim: Count = 256  # of the sinusoid of the time
    cross_attn_norm: bool = True  # a norm in front of the cross-attention
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)  # frames, rows, columns
    rope_max_seq_len: Count = 1024  # tokens along frames, rows or columns at most
    sample_size: tuple[int, int, int] = (21, 60, 104)  # default frames, rows and columns of a latent
    path: str | None = None  # folder or hub id of the weights, for `init` and `teacher.path` to refer to

    def __post_init__(self):
        check_numbers(self)

    def build(self) -> Wan:
        config = asdict(self)
        del config["path"]
        return Wan.from_config({**config, "out_channels": self.in_channels}).initialise()


class WanUnit(StockUnit):
    """x + g1 * attention(norm(x) (1 + k1) + s1), x + cross(norm(x), text), x + g2 * mlp(norm(x) (1 + k2) + s2).

    The slots `attention` and `mixer` are those of the self-attention. The cross-attention is the branch "cross", which
    has no gate. `Stream.cond` is the shared modulation, b 6 d; `Stream.text` is the same in all units.
    """

    network = "ffn"
    attn1: Any
    attn2: Any
    scale_shift_table: nn.Parameter  # 1 6 d

    @property
    def anatomy(self) -> Anatomy:
        own, cross = (normed_heads(name, getattr(self, name)) for name in ("attn1", "attn2"))
        return Anatomy(self.attn1.heads, own, feed_forward(self, "ffn"), cross=cross, text="aside")

    def modulate(self, stream: Stream) -> Modulation:
        """In fp32, as norms and gates are."""
        return Modulation(*map(Branch, (self.scale_shift_table + stream.cond.float()).chunk(6, dim=1)))  # b 1 d

    def enter(self, stream: Stream, modulation: Modulation) -> Branch:
        return Branch(modulated(self.norm1, stream.image, modulation.shift.image, modulation.scale.image))

    def own_mixer(self, stream: Stream, tokens: Tensor) -> Tensor:
        """b n d -> b n d."""
        a = self.attn1
        q, k, v = heads(a.norm_q(a.to_q(tokens)), a), heads(a.norm_k(a.to_k(tokens)), a), heads(a.to_v(tokens), a)
        q, k = turn(q, stream.layout), turn(k, stream.layout)
        return a.to_out[1](a.to_out[0](self.attended(q, k, v, stream)))

    def read(self, stream: Stream) -> Branch:
        """The cross-attention of image tokens to the text, norm included."""
        a, text, image = self.attn2, stream.text, stream.image
        image = self.norm2(image.float()).type_as(image)  # type: ignore[operator]
        q, k, v = heads(a.norm_q(a.to_q(image)), a), heads(a.norm_k(a.to_k(text)), a), heads(a.to_v(text), a)
        o = self.part("cross")(q, k, v, stream.layout, stream.step)
        return Branch(a.to_out[1](a.to_out[0](o.transpose(1, 2).flatten(2))))

    def own_cross(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, step: Step | None) -> Tensor:
        """Softmax attention to the text: b h n e, b h l e twice -> b h n e."""
        return F.scaled_dot_product_attention(q, k, v)

    def feed(self, stream: Stream, modulation: Modulation) -> Branch:
        shift, scale = modulation.feed_shift.image, modulation.feed_scale.image
        return Branch(self.part("ffn")(modulated(self.norm3, stream.image, shift, scale), stream.layout))

    def compute(self, stream: Stream) -> Stream:
        m, dtype = self.modulate(stream), stream.image.dtype
        stream = self.residual(stream, "attention", lambda s: self.attend(s, m), m.attention_gate)
        stream = rounded(stream, dtype)
        stream = self.residual(stream, "cross", self.read, None)
        return rounded(self.residual(stream, "feed", lambda s: self.feed(s, m), m.feed_gate), dtype)


def normed_heads(name: str, attention: Any) -> Features:
    """The heads of one attention; queries and keys are normalised across all of them."""
    norms = ((f"{name}.to_q", f"{name}.norm_q"), (f"{name}.to_k", f"{name}.norm_k"))
    return replace(heads_between(name, attention), norms=norms)


def modulated(norm: Any, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift in fp32, rounded to the tokens' own type: b n d."""
    return torch.addcmul(shift, norm(tokens.float()), 1 + scale).type_as(tokens)


def rounded(stream: Stream, dtype: torch.dtype) -> Stream:
    """The stream in its own type again, after a sum in fp32."""
    return stream if stream.image.dtype == dtype else replace(stream, image=stream.image.to(dtype))


SCALES = scales_with(  # inferred from the rules, the tables as PixArt's: no source has them
    {
        r"patch_embedding\.weight": Scale("input", "fan_in"),
        r"time_proj\.weight": Scale("hidden", "fan_in"),
        "scale_shift_table": Scale("input", 0.02, 0),
        r"proj_out\.weight": Scale("output", "zero"),
    }
)


class Wan(StockDenoiser):
    """Wan as `embed -> units -> readout`; a sample is a latent c f y x of any size that the patches divide."""

    name = "wan"
    stock = "WanTransformer3DModel"
    reads: ClassVar = {"WanTransformer3DModel": {}}
    lists: ClassVar = {"blocks": ("num_layers", WanUnit)}
    extras: ClassVar = {"sample_size": (21, 60, 104)}
    masks = False

    def __init__(self, model: nn.Module, **extras: Any):
        c: Any = model.config
        for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            if getattr(c, key) is not None:
                raise ValueError(f"wan reads no images here: {key} must be None, got {getattr(c, key)}")
        if c.out_channels not in (None, c.in_channels):
            raise ValueError(
                f"wan reads no images here: out_channels must be in_channels {c.in_channels}, got {c.out_channels}"
            )
        super().__init__(model, **extras)

    def initialise(self) -> Wan:
        """Embedders as in the official Wan; the last layer at zero."""
        e: Any = self.model.condition_embedder
        for embedder in (e.time_embedder, e.text_embedder):
            for layer in (embedder.linear_1, embedder.linear_2):
                nn.init.normal_(layer.weight, std=0.02)
        zero_init(self.model.proj_out)  # type: ignore[arg-type]
        return self

    @property
    def facts(self) -> Facts:
        c: Any = self.model.config
        parts = {"modulation": ("time_proj.", "scale_shift_table"), "scales": SCALES}
        return replace(super().facts, text={"text": c.text_dim}, grows=("num_attention_heads", "ffn_dim"), **parts)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        c: Any = self.model.config
        if len(shape) != 4 or shape[0] != self.channels:
            return False
        return all(s % p == 0 and s // p <= c.rope_max_seq_len for s, p in zip(shape[1:], c.patch_size, strict=True))

    def reset_buffers(self) -> None:
        rope: Any = self.model.rope
        device = next(self.model.parameters()).device
        if device.type == "meta":
            return
        with torch.device("cpu"):
            fresh = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
        rope.freqs_cos, rope.freqs_sin = fresh.freqs_cos.to(device), fresh.freqs_sin.to(device)

    def sampler(self) -> Sampler:
        """The pipeline's steps and guidance, at the shift of 480p; its UniPC is of second order."""
        return Sampler(StockEuler(50, shift=3.0, even=False), guidance=5.0)

    def pack(self, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        """The stock model counts time from 0 to 1000."""
        self.need(condition)
        if condition.guidance is not None:
            raise ValueError("wan was not distilled for guidance: leave condition.guidance out")
        return {"hidden_states": x, "timestep": t * 1000, "encoder_hidden_states": condition.text}

    def embed(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
    ) -> Stream:
        """The stock forward's arguments: b c f y x, b, b l c; the last two are refused."""
        if timestep.ndim != 1:
            raise ValueError(
                f"wan takes one timestep per sample here, got shape {tuple(timestep.shape)}: times per token "
                "(expand_timesteps of Wan 2.2) are not supported"
            )
        if encoder_hidden_states_image is not None:
            raise ValueError("wan reads no images here: leave encoder_hidden_states_image out")
        if attention_kwargs:
            raise ValueError(f"wan takes no attention_kwargs here, got {', '.join(attention_kwargs)}")
        m: Any = self.model
        dtype = m.patch_embedding.weight.dtype
        cos, sin = (table[0, :, 0, ::2] for table in m.rope(hidden_states))  # n e/2; stock has each angle twice
        patches = m.patch_embedding(hidden_states.to(dtype))  # b d f y x
        grid = tuple(patches.shape[2:])
        # the convolution leaves them channels first: a layout that every later sum would inherit
        image = patches.flatten(2).transpose(1, 2).contiguous()
        time, cond, text, _ = m.condition_embedder(timestep, encoder_hidden_states.to(dtype))
        layout = Layout(grid=grid, text_length=text.shape[1], rope=torch.stack((cos, sin)).float())
        return Stream(image=image, text=text, cond=cond.unflatten(1, (6, -1)), time=time, signal=time, layout=layout)

    def embed_times(self, t: Tensor) -> Tensor:
        e, dtype = self.model.condition_embedder, self.model.patch_embedding.weight.dtype
        return e.time_embedder(e.timesteps_proj(t * 1000).to(dtype))

    def last_norm(self, stream: Stream) -> Stream:
        m: Any = self.model
        shift, scale = (m.scale_shift_table + stream.time[:, None]).chunk(2, dim=1)  # type: ignore[index]
        return replace(stream, image=modulated(m.norm_out, stream.image, shift, scale))

    def last_layer(self, stream: Stream) -> Stream:
        return replace(stream, image=self.model.proj_out(stream.image))

    def arranged(self, stream: Stream) -> Tensor:
        """b (f y x) (o p q c) -> b c (f o) (y p) (x q)."""
        tokens, patch = stream.image, tuple(self.model.config.patch_size)  # type: ignore[arg-type]
        x = tokens.view(len(tokens), *stream.layout.grid, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def readout(self, stream: Stream) -> Output:
        stream = self.projected(stream)
        return Output(self.arranged(stream), None, stream.trace)
