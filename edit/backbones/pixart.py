"""PixArt-alpha and PixArt-Sigma over `diffusers.PixArtTransformer2DModel`: image tokens that read a caption.

One modulation is computed per sample and moved by a small learned table in each block (adaLN-single); the caption, a
T5 embedding, enters by cross-attention between self-attention and MLP. The weights predict the noise of a DDPM.
Sources: PixArt-alpha (arXiv 2310.00426), PixArt-Sigma (arXiv 2403.04692), as `diffusers` has them.

Not supported: fused projections, models without cross-attention or with gated (GLIGEN) attention, a mask over image
tokens, a caption mask given as a bias, cross_attention_kwargs, and numbers of output channels other than c or 2c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.backbones.dit_diffusers import BasicUnit, PatchDenoiser
from edit.backbones.stock import Modulation, heads, heads_between, scales_with, zero_init
from edit.facts import Facts
from edit.inputs.limits import Count, check_numbers
from edit.sampling import Sampler
from edit.solvers import DPMSolver
from edit.stream import Branch, Condition, Layout, Step, Stream
from edit.unit import Anatomy
from edit.widths import Scale


@dataclass(frozen=True)
class PixArtConfig:
    """Everything that defines a PixArt transformer; the defaults are PixArt-alpha's at 1024 px."""

    in_channels: Count = 4
    out_channels: int | None = 8  # twice in_channels: the second half is the variance
    num_layers: int = 28
    num_attention_heads: Count = 16
    attention_head_dim: Count = 72
    cross_attention_dim: Count = 1152  # heads x head width, unless caption_channels is None
    caption_channels: int | None = 4096  # width of the text embedding; None: cross-attention reads it as it is
    sample_size: int = 128  # rows = columns of a latent; other sizes are reached by interpolated positions
    patch_size: Count = 2
    interpolation_scale: float | None = None  # positions are divided by it; None: sample_size // 64, at least 1
    use_additional_conditions: bool | None = None  # image size and aspect ratio; None: where sample_size is 128
    dropout: float = 0.0
    attention_bias: bool = True
    activation_fn: str = "gelu-approximate"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    pixels: Count = 8  # rows of the image per row of the latent, for the size input
    path: str | None = None  # folder or hub id of the weights, for `init` and `teacher.path` to refer to

    def __post_init__(self):
        check_numbers(self)

    def build(self) -> PixArt:
        config = asdict(self)
        del config["path"]
        return PixArt.from_config(config).initialise()


class PixArtUnit(BasicUnit):
    """x + g1 * attention(norm(x) (1 + k1) + s1), then x + cross(x, caption), then x + g2 * mlp(norm(x) (1 + k2) + s2).

    The slots `attention` and `mixer` are those of the self-attention. The cross-attention reads what it has written and
    is the branch "cross", without norm and gate. `Stream.text` is the projected caption, the same in all units.
    """

    attn2: Any
    scale_shift_table: nn.Parameter  # 6 d

    @property
    def anatomy(self) -> Anatomy:
        return replace(super().anatomy, cross=heads_between("attn2", self.attn2), text="aside")

    def modulate(self, stream: Stream) -> Modulation:
        rows = (self.scale_shift_table + stream.cond.unflatten(1, (6, -1))).chunk(6, dim=1)  # b 1 d
        return Modulation(*map(Branch, rows))

    def own_norm(self, tokens: Tensor) -> Tensor:
        return self.norm1(tokens)

    def read(self, stream: Stream) -> Branch:
        """The cross-attention of image tokens to the caption."""
        a, image, text = self.attn2, stream.image, stream.text
        q, k, v = heads(a.to_q(image), a), heads(a.to_k(text), a), heads(a.to_v(text), a)
        o = self.part("cross")(q, k, v, stream.layout, stream.step)
        return Branch(a.to_out[1](a.to_out[0](o.transpose(1, 2).flatten(2))))

    def own_cross(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, step: Step | None) -> Tensor:
        """Softmax attention to the caption: b h n e, b h l e twice -> b h n e."""
        mask = layout.text_mask
        # the bias of the original, not -inf: a caption without any real token stays defined
        bias = None if mask is None else (1 - mask[:, None, None].to(q.dtype)) * -10000.0
        return F.scaled_dot_product_attention(q, k, v, bias)

    def feed(self, stream: Stream, modulation: Modulation) -> Branch:
        shift, scale = modulation.feed_shift, modulation.feed_scale
        x = torch.addcmul(shift.image, self.norm2(stream.image), 1 + scale.image)
        return Branch(self.part("ffn")(x, stream.layout))

    def compute(self, stream: Stream) -> Stream:
        m = self.modulate(stream)
        stream = self.residual(stream, "attention", lambda s: self.attend(s, m), m.attention_gate)
        stream = self.residual(stream, "cross", self.read, None)
        return self.residual(stream, "feed", lambda s: self.feed(s, m), m.feed_gate)


# As muP's authors published them for PixArt-alpha (arXiv 2505.15270), except that queries, keys and values of the
# self-attention are three layers here. Embedders of the image size, of which they tell nothing, are as of time
SCALES = scales_with(
    {
        r"pos_embed\.proj\.weight": Scale("input", "xavier"),
        r"linear_1\.weight": Scale("input", 0.02),
        r"(linear_2|adaln_single\.linear)\.weight": Scale("hidden", 0.02),
        "scale_shift_table": Scale("input", 0.02, 0),
        r"attn2\.to_out\.0\.weight": Scale("hidden", "zero"),
        r"(to_(q|k|v|out\.0)|net\.0\.proj|net\.2)\.weight": Scale("hidden", "xavier"),
        r"proj_out\.weight": Scale("output", "zero"),
    }
)
UNPROJECTED = {r"attn2\.to_[kv]\.weight": Scale("input", "xavier")}  # where units read the caption as it is


class PixArt(PatchDenoiser):
    """PixArt as `embed -> units -> readout`; a sample is a latent of any size the patches divide.

    `Stream.cond` is adaLN-single's shared modulation, b 6d; `Stream.time` the embedded time, b d, with the image size
    in it where the model is told one.
    """

    name = "pixart"
    stock = "PixArtTransformer2DModel"
    reads: ClassVar = {"PixArtTransformer2DModel": {}, "Transformer2DModel": {"norm_type": "ada_norm_single"}}
    lists: ClassVar = {"transformer_blocks": ("num_layers", PixArtUnit)}
    extras: ClassVar = {"pixels": 8}

    def __init__(self, model: nn.Module, **extras: Any):
        c: Any = model.config
        if c.cross_attention_dim is None:
            raise ValueError("pixart reads its caption by cross-attention: cross_attention_dim is None, give a width")
        if c.attention_type != "default":
            raise ValueError(f"pixart has plain attention only: attention_type must be default, got {c.attention_type}")
        super().__init__(model, **extras)

    def initialise(self) -> PixArt:
        """Embedders as in the official PixArt; cross-attention and the last layer at zero."""
        m = self.model
        time, caption = m.adaln_single.emb.timestep_embedder, m.caption_projection
        for layer in (time.linear_1, time.linear_2, m.adaln_single.linear):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in () if caption is None else (caption.linear_1, caption.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        zero_init(*(u.attn2.to_out[0] for u in m.transformer_blocks), m.proj_out)
        return self

    @property
    def facts(self) -> Facts:
        c: Any = self.model.config
        parts: dict[str, Any] = {"modulation": ("adaln_single.linear.", "scale_shift_table")}
        if c.caption_channels is None:
            parts |= {"scales": UNPROJECTED | SCALES}
        else:
            grows = ("num_attention_heads", "cross_attention_dim")
            parts |= {"grows": grows, "scales": SCALES}
        return replace(super().facts, text={"text": c.caption_channels or c.cross_attention_dim}, **parts)

    def sampler(self) -> Sampler:
        return Sampler(DPMSolver(20), guidance=4.5)

    def pack(self, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        """A model with a size input gets the size of `x`: rows and columns in pixels, and their ratio."""
        self.need(condition)
        if condition.guidance is not None:
            raise ValueError("pixart was not distilled for guidance: leave condition.guidance out")
        return {
            "hidden_states": x,
            "encoder_hidden_states": condition.text,
            "timestep": self.times(t),
            "added_cond_kwargs": self.told(x, *x.shape[2:]),
            "encoder_attention_mask": condition.text_mask,
        }

    def told(self, like: Tensor, rows: int, columns: int) -> dict[str, Tensor] | None:
        """The size of a latent for as many samples as `like` has, of its precision; None: there is no such input."""
        if not self.model.use_additional_conditions:
            return None
        size = torch.tensor([rows * self.pixels, columns * self.pixels], dtype=like.dtype, device=like.device)
        return {"resolution": size.repeat(len(like), 1), "aspect_ratio": like.new_full((len(like), 1), rows / columns)}

    def embed_times(self, t: Tensor) -> Tensor:
        """With the model's own size in it, where it is told one."""
        told = self.told(t, *self.sample_shape[1:]) or {"resolution": None, "aspect_ratio": None}
        dtype = self.model.pos_embed.proj.weight.dtype
        return self.model.adaln_single.emb(self.times(t), **told, batch_size=len(t), hidden_dtype=dtype)

    def embed(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Stream:
        """The stock forward's arguments: b c y x, b l c, b, {b 2, b 1}, and b l with 1 = a real token."""
        m = self.model
        if cross_attention_kwargs:
            raise ValueError(f"pixart takes no cross_attention_kwargs here, got {', '.join(cross_attention_kwargs)}")
        if attention_mask is not None:
            raise ValueError("pixart takes no attention_mask here: image tokens are never masked")
        if encoder_hidden_states is None or timestep is None:
            missing = "timestep" if timestep is None else "encoder_hidden_states"
            raise ValueError(f"pixart needs {missing}, one per sample")
        if m.use_additional_conditions and added_cond_kwargs is None:
            raise ValueError("this pixart is told the image size: added_cond_kwargs with resolution and aspect_ratio")
        mask = encoder_attention_mask
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"pixart takes a caption mask b l, got shape {tuple(mask.shape)}")
        image, grid = self.patches(hidden_states)
        cond, time = m.adaln_single(timestep, added_cond_kwargs, batch_size=len(image), hidden_dtype=image.dtype)
        text = encoder_hidden_states.to(image.dtype)
        if m.caption_projection is not None:
            text = m.caption_projection(text)
        layout = Layout(grid=grid, text_length=text.shape[1], text_mask=None if mask is None else mask.bool())
        return Stream(image=image, text=text, cond=cond, time=time, signal=time, layout=layout)

    def last_norm(self, stream: Stream) -> Stream:
        m = self.model
        shift, scale = (m.scale_shift_table + stream.time[:, None]).chunk(2, dim=1)  # type: ignore[index]
        return replace(stream, image=torch.addcmul(shift, m.norm_out(stream.image), 1 + scale))

    def last_layer(self, stream: Stream) -> Stream:
        return replace(stream, image=self.model.proj_out(stream.image))
