"""Stable Diffusion 3 and 3.5 over `diffusers.SD3Transformer2DModel`: double-stream units (MMDiT) over patches.

Text and image tokens have their own weights and attend to each other in every unit. The last unit reads the text and
leaves nothing of it behind. In some units of SD3.5-medium (MMDiT-X) the image tokens attend once more, to themselves.
Source: Stable Diffusion 3 (arXiv 2403.03206) as `diffusers` has it; no text mask: padding is attended to.

Positions are a fixed table of pos_embed_max_size rows and columns, of which a sample gets the centre.

The joint order is text first, as in the other families here; the stock class puts the image first, which changes no
output. Not supported: fused projections, chunked feed-forward, IP-adapters, ControlNet residuals, skip_layers, position
tables without pos_embed_max_size, other QK-norms than rms_norm, and another number of output than of input channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.backbones.stock import (
    JOINT,
    MODULATION,
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
from edit.solvers import StockEuler
from edit.stream import Branch, Condition, Layout, Output, Stream
from edit.unit import Anatomy
from edit.widths import Scale


@dataclass(frozen=True)
class SD3Config:
    """Everything that defines a Stable Diffusion 3 transformer; the defaults are SD3-medium's."""

    in_channels: Count = 16
    num_layers: int = 24
    num_attention_heads: Count = 24
    attention_head_dim: Count = 64
    joint_attention_dim: Count = 4096  # width of the text embedding
    pooled_projection_dim: Count = 2048
    sample_size: int = 128  # rows = columns of a latent; the position table spans as many, finer or coarser
    patch_size: Count = 2
    pos_embed_max_size: Count = 192  # rows = columns of the position table, in patches
    dual_attention_layers: tuple[int, ...] = ()  # units with a second attention; SD3.5-medium: 0 to 12
    qk_norm: str | None = None  # SD3.5: "rms_norm"
    latent_size: tuple[int, int] | None = None  # default rows and columns of a latent; None: sample_size
    path: str | None = None  # folder or hub id of the weights, for `init` and `teacher.path` to refer to

    def __post_init__(self):
        check_numbers(self)

    def build(self) -> SD3:
        config = asdict(self)
        del config["path"]
        width = self.num_attention_heads * self.attention_head_dim
        follows = {"out_channels": self.in_channels, "caption_projection_dim": width}
        return SD3.from_config({**config, **follows}).initialise()


@dataclass(frozen=True)
class DualModulation(Modulation):
    """With those of the second attention; all of them b 1 d, of the text None where it is read for the last time."""

    second_shift: Tensor | None = None
    second_scale: Tensor | None = None
    second_gate: Tensor | None = None


class JointUnit(StockUnit):
    """Two streams with one joint attention.

    x + g1 * attention(norm(x) (1 + k1) + s1), then, where `dual`, x + g3 * attention(norm(x) (1 + k3) + s3) among image
    tokens, then x + g2 * mlp(norm(x) (1 + k2) + s2). Both attentions read the tokens the unit was given. The second is
    the branch "second"; the slots `attention` and `mixer` are the joint one's.
    """

    attn: Any
    attn2: Any
    ff_context: nn.Module

    def __init__(self, block: Any):
        super().__init__(block)
        self.dual: bool = block.use_dual_attention
        self.last: bool = block.context_pre_only  # the text is read, not written

    @property
    def anatomy(self) -> Anatomy:
        joint = heads_between("attn", self.attn, "read" if self.last else "written")
        second = heads_between("attn2", self.attn2) if self.dual else None
        text = None if self.last else feed_forward(self, "ff_context")
        ends = "ends" if self.last else "along"
        return Anatomy(self.attn.heads, joint, feed_forward(self, "ff"), text, second=second, text=ends)

    def modulate(self, stream: Stream) -> DualModulation:
        first, text = self.norm1, self.norm1_context
        image = first.linear(first.silu(stream.cond))[:, None].chunk(9 if self.dual else 6, -1)
        told: Any = text.linear(text.silu(stream.cond))[:, None]
        if self.last:
            scale, shift = told.chunk(2, -1)
            told = (shift, scale, None, None, None, None)
        else:
            told = told.chunk(6, -1)
        both = (Branch(*pair) for pair in zip(image[:6], told, strict=True))
        return DualModulation(*both, *image[6:])

    def enter(self, stream: Stream, modulation: Modulation) -> Branch:
        shift, scale = modulation.shift, modulation.scale
        image = self.norm1.norm(stream.image) * (1 + scale.image) + shift.image
        return Branch(image, self.norm1_context.norm(stream.text) * (1 + scale.text) + shift.text)

    def attend(self, stream: Stream, modulation: Modulation) -> Branch:
        image, text = self.enter(stream, modulation)
        if "mixer" not in self.filled:
            return self.attend_jointly(stream, image, text)  # spares joining the tokens and splitting them again
        joint = self.filled["mixer"](stream, stream.layout.joined(text, image))
        return Branch(joint[:, -image.shape[1] :]) if self.last else stream.layout.split(joint)

    def own_mixer(self, stream: Stream, tokens: Tensor) -> Tensor:
        """Joint attention: b (l + n) d, text first -> the same; of the last unit b n d."""
        image, text = stream.layout.split(tokens)
        image, text = self.attend_jointly(stream, image, text)
        return image if text is None else stream.layout.joined(text, image)

    def attend_jointly(self, stream: Stream, image: Tensor, text: Tensor) -> Branch:
        a = self.attn
        q = torch.cat((normed(a.add_q_proj(text), a.norm_added_q, a), normed(a.to_q(image), a.norm_q, a)), 2)
        k = torch.cat((normed(a.add_k_proj(text), a.norm_added_k, a), normed(a.to_k(image), a.norm_k, a)), 2)
        v = torch.cat((heads(a.add_v_proj(text), a), heads(a.to_v(image), a)), 2)
        attended = stream.layout.split(self.attended(q, k, v, stream))
        read = None if self.last else a.to_add_out(attended.text)
        return Branch(a.to_out[1](a.to_out[0](attended.image)), read)

    def attend_again(self, image: Tensor, modulation: DualModulation) -> Branch:
        """The second attention, among image tokens: b n d, before the norm."""
        a, m = self.attn2, modulation
        tokens = self.norm1.norm(image) * (1 + m.second_scale) + m.second_shift
        q, k = normed(a.to_q(tokens), a.norm_q, a), normed(a.to_k(tokens), a.norm_k, a)
        o = F.scaled_dot_product_attention(q, k, heads(a.to_v(tokens), a))
        return Branch(a.to_out[1](a.to_out[0](o.transpose(1, 2).flatten(2))))

    def own_text_ffn(self, tokens: Tensor, layout: Layout) -> Tensor:
        return self.ff_context(tokens)

    def feed(self, stream: Stream, modulation: Modulation) -> Branch:
        shift, scale, layout = modulation.feed_shift, modulation.feed_scale, stream.layout
        image = torch.addcmul(shift.image, self.norm2(stream.image), 1 + scale.image)
        image = self.part("ffn")(image, layout)
        if self.last:
            return Branch(image)
        text = torch.addcmul(shift.text, self.norm2_context(stream.text), 1 + scale.text)
        return Branch(image, self.part("text_ffn")(text, layout))

    def compute(self, stream: Stream) -> Stream:
        m, given = self.modulate(stream), stream.image
        stream = self.residual(stream, "attention", lambda s: self.attend(s, m), m.attention_gate)
        if self.dual:
            stream = self.residual(stream, "second", lambda _: self.attend_again(given, m), Branch(m.second_gate))
        stream = self.residual(stream, "feed", lambda s: self.feed(s, m), m.feed_gate)
        return replace(stream, text=None) if self.last else stream

    def end(self) -> None:
        """Become the last unit of a model: what only the text's way onwards needs is dropped, the image stays as it is.

        Raises:
            ValueError: if the text's modulation is no plain linear layer
        """
        from diffusers.models.normalization import AdaLayerNormContinuous

        old = self.norm1_context.linear
        if type(old) is not nn.Linear:
            raise ValueError(
                f"sd3: the last unit kept needs another text modulation, but its norm1_context.linear is a "
                f"{type(old).__name__}: prune before such edits, or fold them first"
            )
        width = old.in_features
        with torch.device("meta"):
            norm = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6)
        for name, p in old.named_parameters():  # rows: shift, scale, gates, ... -> scale, shift
            rows = torch.cat((p.detach()[width : 2 * width], p.detach()[:width]))
            norm.linear.register_parameter(name, nn.Parameter(rows, p.requires_grad))
        self.norm1_context = norm.train(self.training)
        self.attn.to_add_out = self.ff_context = self.norm2_context = None
        self.last = True


def normed(tokens: Tensor, norm: nn.Module | None, attention: Any) -> Tensor:
    """Queries or keys, with QK-norm where the model has it: b s (h e) -> b h s e."""
    x = heads(tokens, attention)
    return x if norm is None else norm(x)


SCALES = scales_with(  # inferred from the rules: no source has them
    {
        r"(pos_embed\.proj|context_embedder)\.weight": Scale("input", "fan_in"),
        r"proj_out\.weight": Scale("output", "zero"),
    }
)


class SD3(StockDenoiser):
    """Stable Diffusion 3 as `embed -> units -> readout`; a sample is a latent of any size up to the position table's.

    After the last unit `Stream.text` is None.
    """

    name = "sd3"
    stock = "SD3Transformer2DModel"
    reads: ClassVar = {"SD3Transformer2DModel": {}}
    lists: ClassVar = {"transformer_blocks": ("num_layers", JointUnit)}
    extras: ClassVar = {"latent_size": None}
    masks = False
    latent_size: tuple[int, int] | None

    def __init__(self, model: nn.Module, **extras: Any):
        c: Any = model.config
        width = c.num_attention_heads * c.attention_head_dim
        if c.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"sd3: qk_norm must be None or rms_norm, got {c.qk_norm}")
        if c.out_channels not in (None, c.in_channels):
            raise ValueError(f"sd3: out_channels must be in_channels {c.in_channels}, got {c.out_channels}")
        if c.caption_projection_dim != width:
            raise ValueError(f"sd3: caption_projection_dim must be the width {width}, got {c.caption_projection_dim}")
        if not c.pos_embed_max_size:
            raise ValueError("sd3 crops a position table: pos_embed_max_size must be its size in patches, got none")
        super().__init__(model, **extras)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> StockDenoiser:
        c = cls.filled(config)
        check_table(cls.name, c["num_attention_heads"] * c["attention_head_dim"], c["pos_embed_max_size"] or 0)
        return super().from_config(config)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        c: Any = self.model.config
        rows, columns = self.latent_size or (c.sample_size, c.sample_size)
        return self.channels, rows, columns

    def accepts(self, shape: tuple[int, ...]) -> bool:
        c = self.model.config
        if len(shape) != 3 or shape[0] != self.channels:
            return False
        return all(s % c.patch_size == 0 and s // c.patch_size <= c.pos_embed_max_size for s in shape[1:])

    def settle(self, shape: tuple[int, ...], spec: Any) -> None:
        """The data's rows and columns become the default; sample_size belongs to the position table and stays."""
        self.latent_size = tuple(shape[-2:])
        self.base = {**self.base, "latent_size": list(self.latent_size)}

    def initialise(self) -> SD3:
        m = self.model
        modulations = [norm.linear for u in self.units for norm in (u.norm1, u.norm1_context)]
        zero_init(*modulations, m.norm_out.linear, m.proj_out)
        return self

    def keep(self, indices: Sequence[int]) -> None:
        """The last unit kept becomes one that only reads the text; the image it makes is the same.

        Raises:
            ValueError: if the indices are none of these units, or an edit sits where the last unit changes
        """
        dual = [unit.dual for unit in self.units]
        super().keep(indices)
        self.model.register_to_config(dual_attention_layers=tuple(k for k, i in enumerate(indices) if dual[i]))
        if not self.units[-1].last:
            self.units[-1].end()

    @property
    def facts(self) -> Facts:
        c: Any = self.model.config
        text = {"text": c.joint_attention_dim, "pooled": c.pooled_projection_dim}
        widths = {"grows": ("num_attention_heads", "caption_projection_dim"), "scales": SCALES}
        return replace(super().facts, text=text, modulation=MODULATION, lora=JOINT, **widths)

    def sampler(self) -> Sampler:
        return Sampler(StockEuler(28, shift=3.0, even=False), guidance=7.0)

    def pack(self, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        """The stock model counts time from 0 to 1000."""
        self.need(condition)
        if condition.guidance is not None:
            raise ValueError("sd3 was not distilled for guidance: leave condition.guidance out")
        return {
            "hidden_states": x,
            "encoder_hidden_states": condition.text,
            "pooled_projections": condition.pooled,
            "timestep": t * 1000,
        }

    def embed(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        block_controlnet_hidden_states: Sequence[Tensor] | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        skip_layers: Sequence[int] | None = None,
    ) -> Stream:
        """The stock forward's arguments: b c y x, b l c, b c, b; the last three are refused."""
        if joint_attention_kwargs:
            raise ValueError(f"sd3 takes no joint_attention_kwargs here, got {', '.join(joint_attention_kwargs)}")
        if block_controlnet_hidden_states is not None:
            raise ValueError("sd3 takes no ControlNet residuals here: leave block_controlnet_hidden_states out")
        if skip_layers is not None:
            raise ValueError(f"sd3 skips no layers here, got skip_layers={list(skip_layers)}: leave layer guidance out")
        m = self.model
        e, patch, dtype = m.time_text_embed, m.config.patch_size, m.pos_embed.proj.weight.dtype
        # the convolution leaves them channels first: a layout that every later sum would inherit
        image = m.pos_embed(hidden_states.to(dtype)).contiguous()
        text = m.context_embedder(encoder_hidden_states.to(dtype))
        time = self._embedded(timestep)
        cond = time + e.text_embedder(pooled_projections.to(dtype))
        rows, columns = (s // patch for s in hidden_states.shape[2:])
        layout = Layout(grid=(1, rows, columns), text_length=text.shape[1])
        return Stream(image=image, text=text, cond=cond, time=time, signal=cond, layout=layout)

    def _embedded(self, timestep: Tensor) -> Tensor:
        """Stock times, b in [0, 1000] -> b d."""
        e = self.model.time_text_embed
        return e.timestep_embedder(e.time_proj(timestep).to(self.model.pos_embed.proj.weight.dtype))

    def embed_times(self, t: Tensor) -> Tensor:
        return self._embedded(t * 1000)

    def last_norm(self, stream: Stream) -> Stream:
        return replace(stream, image=self.model.norm_out(stream.image, stream.cond))

    def last_layer(self, stream: Stream) -> Stream:
        return replace(stream, image=self.model.proj_out(stream.image))

    def arranged(self, stream: Stream) -> Tensor:
        """b (y x) (p q c) -> b c (y p) (x q)."""
        tokens, (_, rows, columns), patch = stream.image, stream.layout.grid, self.model.config.patch_size
        x = tokens.view(len(tokens), rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), -1, rows * patch, columns * patch)

    def readout(self, stream: Stream) -> Output:
        stream = self.projected(stream)
        return Output(self.arranged(stream), None, stream.trace)
