"""FLUX.1 (dev, schnell) over `diffusers.FluxTransformer2DModel`: double-stream units, then single-stream ones.

Text and image tokens attend to each other in every unit, text first. A double unit has its own weights for each of
the two; a single unit treats them as one sequence and runs attention and MLP in parallel from the same tokens.
Source: the FLUX.1 release as `diffusers` has it; no text mask: padding is attended to.

Not supported: fused projections, IP-adapters and ControlNet residuals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from edit.backbones.stock import (
    JOINT,
    MODULATION,
    Modulation,
    StockDenoiser,
    StockUnit,
    feed_forward,
    finite,
    heads,
    heads_between,
    latent_of,
    scales_with,
    tokens_of,
    turn,
    zero_init,
)
from edit.facts import Facts
from edit.inputs.limits import Count, check_numbers
from edit.sampling import Sampler
from edit.solvers import StockEuler
from edit.stream import Branch, Condition, Layout, Output, Stream
from edit.unit import Anatomy, Features, masked
from edit.widths import Scale

SHIFT = (0.5, 1.15, 256, 4096)  # of FLUX.1-dev's scheduler, see StockEuler.dynamic


@dataclass(frozen=True)
class FluxConfig:
    """Everything that defines a FLUX.1 transformer; the defaults are FLUX.1-dev's."""

    in_channels: Count = 64  # of a token: 4 x the latent's channels
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: Count = 128
    num_attention_heads: Count = 24
    joint_attention_dim: Count = 4096  # width of the text embedding
    pooled_projection_dim: Count = 768
    guidance_embeds: bool = True  # schnell: False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    sample_size: tuple[int, int] = (128, 128)  # default rows and columns of a latent
    guidance: float = 3.5  # scale of a guidance-distilled model if the condition has none
    path: str | None = None  # folder or hub id of the weights, for `init` and `teacher.path` to refer to

    def __post_init__(self):
        check_numbers(self)
        if self.guidance != 3.5 and not self.guidance_embeds:
            raise ValueError(
                f"FluxConfig: guidance={self.guidance:g} is for models with guidance_embeds=true, this one has none: "
                "guide it with sampler.guidance"
            )

    def build(self) -> Flux:
        config = asdict(self)
        del config["path"]
        return Flux.from_config(config).initialise()


class DoubleUnit(StockUnit):
    """Two streams with one joint attention."""

    attn: Any
    ff_context: nn.Module

    @property
    def anatomy(self) -> Anatomy:
        joint = heads_between("attn", self.attn, "written")
        feed, text = feed_forward(self, "ff"), feed_forward(self, "ff_context")
        return Anatomy(self.attn.heads, joint, feed, text, text="along")

    def modulate(self, stream: Stream) -> Modulation:
        image, text = (vectors(norm, stream.cond, 6) for norm in (self.norm1, self.norm1_context))
        return Modulation(*(Branch(*both) for both in zip(image, text, strict=True)))

    def enter(self, stream: Stream, modulation: Modulation) -> Branch:
        shift, scale = modulation.shift, modulation.scale
        image = self.norm1.norm(stream.image) * (1 + scale.image) + shift.image
        return Branch(image, self.norm1_context.norm(stream.text) * (1 + scale.text) + shift.text)

    def attend(self, stream: Stream, modulation: Modulation) -> Branch:
        image, text = self.enter(stream, modulation)
        layout = stream.layout
        return layout.split(self.part("mixer")(stream, layout.joined(text, image)))

    def own_mixer(self, stream: Stream, tokens: Tensor) -> Tensor:
        """Joint attention: b (l + n) d, text first -> the same."""
        a, layout = self.attn, stream.layout
        image, text = layout.split(tokens)
        parts = (
            (a.to_q(image), a.to_k(image), a.to_v(image), a.norm_q, a.norm_k),
            (a.add_q_proj(text), a.add_k_proj(text), a.add_v_proj(text), a.norm_added_q, a.norm_added_k),
        )
        (q, k, v), (tq, tk, tv) = (
            (norm_q(heads(q, a)), norm_k(heads(k, a)), heads(v, a)) for q, k, v, norm_q, norm_k in parts
        )
        q, k = (turn(torch.cat(both, 2), layout) for both in ((tq, q), (tk, k)))
        image, text = layout.split(self.attended(q, k, torch.cat((tv, v), 2), stream))
        return layout.joined(a.to_add_out(text), a.to_out[1](a.to_out[0](image)))

    def own_text_ffn(self, tokens: Tensor, layout: Layout) -> Tensor:
        return self.ff_context(tokens)

    def feed(self, stream: Stream, modulation: Modulation) -> Branch:
        shift, scale = modulation.feed_shift, modulation.feed_scale
        image = self.norm2(stream.image) * (1 + scale.image) + shift.image
        text = self.norm2_context(stream.text) * (1 + scale.text) + shift.text
        return Branch(self.part("ffn")(image, stream.layout), self.part("text_ffn")(text, stream.layout))

    def compute(self, stream: Stream) -> Stream:
        stream = super().compute(stream)
        return replace(stream, text=finite(stream.text)) if stream.text.dtype == torch.float16 else stream


class SingleModulation(NamedTuple):
    """Of the joint sequence, b 1 d each."""

    shift: Tensor
    scale: Tensor
    gate: Branch


class SingleUnit(StockUnit):
    """One joint sequence; attention and MLP read the same tokens and share one output layer.

    `proj_out` maps the concatenated [attention, MLP] of width d + 4d in one branch, "fused". Where the two are wanted
    or replaced apart, they are the branches "attention" and "feed", and each uses its columns of it. The bias belongs
    to the attention branch.
    """

    attn: Any
    proj_out: nn.Linear

    @property
    def anatomy(self) -> Anatomy:
        width, columns = self.attn.inner_dim, self.proj_out.in_features
        writers = tuple((f"attn.{part}", 1) for part in ("to_q", "to_k", "to_v"))
        joint = Features(width, writers, (("proj_out", 0),), ("attn", "heads"))
        feed = Features(columns - width, (("proj_mlp", 1),), (("proj_out", width),), None, self.act_mlp)
        return Anatomy(self.attn.heads, joint, feed, text="along", fused=True)

    def modulate(self, stream: Stream) -> SingleModulation:
        shift, scale, gate = vectors(self.norm, stream.cond, 3)
        return SingleModulation(shift, scale, Branch(gate, gate))

    def tokens(self, stream: Stream, modulation: SingleModulation) -> Tensor:
        """The joint sequence, normalised and modulated: b s d."""
        joint = stream.layout.joined(stream.text, stream.image)
        return self.norm.norm(joint) * (1 + modulation.scale) + modulation.shift

    def heads_of(self, stream: Stream, tokens: Tensor) -> Tensor:
        """Attention before the output layer: b s d -> the same."""
        a = self.attn
        q, k = (
            turn(norm(heads(to(tokens), a)), stream.layout) for to, norm in ((a.to_q, a.norm_q), (a.to_k, a.norm_k))
        )
        return self.attended(q, k, heads(a.to_v(tokens), a), stream)

    def own_mixer(self, stream: Stream, tokens: Tensor) -> Tensor:
        return self._project(self.heads_of(stream, tokens), 0)

    def expand(self, tokens: Tensor) -> Tensor:
        return self.act_mlp(self.proj_mlp(tokens))

    def contract(self, features: Tensor) -> Tensor:
        return self._project(features, self.attn.inner_dim)

    def own_fused(self, attended: Tensor, tokens: Tensor, layout: Layout) -> Tensor:
        """Output layer and MLP: b s d each -> b s d."""
        return self.proj_out(torch.cat((attended, masked(self.expand(tokens), layout.routing)), 2))

    def _project(self, part: Tensor, first: int) -> Tensor:
        """The columns of `proj_out` from `first` on, with the bias where they are the first."""
        layer = self.proj_out
        if type(layer) is nn.Linear and layer.weight.device == part.device:
            columns = layer.weight[:, first : first + part.shape[-1]]
            return nn.functional.linear(part, columns, None if first else layer.bias)
        # wrapped by LoRA, quantised, or elsewhere until it is called: an affine map all the same
        whole = part.new_zeros(*part.shape[:-1], layer.in_features)
        whole[..., first : first + part.shape[-1]] = part
        return layer(whole) - (layer(whole.new_zeros(1, layer.in_features)) if first else 0)

    def enter(self, stream: Stream, modulation: SingleModulation) -> Branch:
        return stream.layout.split(self.tokens(stream, modulation))

    def attend(self, stream: Stream, modulation: SingleModulation) -> Branch:
        return stream.layout.split(self.part("mixer")(stream, self.tokens(stream, modulation)))

    def feed(self, stream: Stream, modulation: SingleModulation) -> Branch:
        return stream.layout.split(self.part("ffn")(self.tokens(stream, modulation), stream.layout))

    def fuse(self, stream: Stream, modulation: SingleModulation) -> Branch:
        """Both branches before their gate."""
        tokens = self.tokens(stream, modulation)
        return stream.layout.split(self.part("fused")(self.heads_of(stream, tokens), tokens, stream.layout))

    def compute(self, stream: Stream) -> Stream:
        m, given = self.modulate(stream), {"image": stream.image, "text": stream.text}
        if self.divided(stream):
            stream = self.residual(stream, "attention", lambda s: self.attend(s, m), m.gate)
            stream = self.residual(stream, "feed", lambda s: self.feed(s, m), m.gate, replace(stream, **given))
        else:
            stream = self.residual(stream, "fused", lambda s: self.fuse(s, m), m.gate)
        if stream.image.dtype == torch.float16:
            stream = replace(stream, image=finite(stream.image), text=finite(stream.text))
        return stream


def vectors(norm: Any, cond: Tensor, count: int) -> tuple[Tensor, ...]:
    """Shifts, scales and gates that a modulated norm makes of the conditioning: `count` of b 1 d."""
    return norm.linear(norm.silu(cond))[:, None].chunk(count, -1)


SCALES = scales_with(  # inferred from the rules: no source has them
    {
        r"(x|context)_embedder\.weight": Scale("input", "fan_in"),
        r"(proj_mlp|single_transformer_blocks\.\d+\.proj_out)\.weight": Scale("hidden", "fan_in"),
        r"proj_out\.weight": Scale("output", "zero"),
    }
)


class Flux(StockDenoiser):
    """FLUX.1 as `embed -> units -> readout`; a sample is a latent of in_channels / 4 channels of any even size."""

    name = "flux"
    stock = "FluxTransformer2DModel"
    reads: ClassVar = {"FluxTransformer2DModel": {}}
    lists: ClassVar = {
        "transformer_blocks": ("num_layers", DoubleUnit),
        "single_transformer_blocks": ("num_single_layers", SingleUnit),
    }
    extras: ClassVar = {"sample_size": (128, 128), "guidance": 3.5}
    masks = False
    guidance: float

    @property
    def channels(self) -> int:
        c: Any = self.model.config
        return c.in_channels // 4

    @property
    def facts(self) -> Facts:
        c: Any = self.model.config
        text = {"text": c.joint_attention_dim, "pooled": c.pooled_projection_dim}
        scale = self.guidance if c.guidance_embeds else None
        parts = {"modulation": (*MODULATION, "norm.linear."), "lora": JOINT, "scales": SCALES}
        return replace(super().facts, text=text, scale=scale, guided_by="true_cfg_scale", **parts)

    @property
    def axes(self) -> list[int]:
        """Channels of a head that turn with frames, rows and columns."""
        c: Any = self.model.config
        return list(c.axes_dims_rope)

    def initialise(self) -> Flux:
        m: Any = self.model
        norms = [norm for u in m.transformer_blocks for norm in (u.norm1, u.norm1_context)]
        norms += [u.norm for u in m.single_transformer_blocks]
        zero_init(*(norm.linear for norm in norms), m.norm_out.linear, m.proj_out)
        return self

    def sampler(self) -> Sampler:
        """FLUX.1-dev's for a model with a guidance input, else FLUX.1-schnell's."""
        if self.model.config.guidance_embeds:  # type: ignore[union-attr]
            return Sampler(StockEuler(28, dynamic=SHIFT))
        return Sampler(StockEuler(4))

    def pack(self, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        """2 x 2 latent pixels to a token; positions are (0, row, column) for the image and 0 for the text."""
        self.need(condition)
        guidance, told = condition.guidance, self.model.config.guidance_embeds  # type: ignore[union-attr]
        if told and guidance is None:
            guidance = torch.full_like(t, self.guidance)
        if guidance is not None and not told:
            raise ValueError("this flux was not distilled for guidance: leave condition.guidance out")
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        places = torch.zeros(rows, columns, 3, device=x.device)
        places[..., 1] = torch.arange(rows, device=x.device)[:, None]
        places[..., 2] = torch.arange(columns, device=x.device)
        return {
            "hidden_states": tokens_of(x),
            "encoder_hidden_states": condition.text,
            "pooled_projections": condition.pooled,
            "timestep": t,
            "img_ids": places.view(-1, 3),
            "txt_ids": places.new_zeros(condition.text.shape[1], 3),
            "guidance": guidance,
            "grid": (1, rows, columns),
        }

    def embed(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        grid: tuple[int, int, int] | None = None,
    ) -> Stream:
        """The stock forward's arguments; `grid` spares reading it from the positions on the device."""
        if joint_attention_kwargs:
            raise ValueError(f"flux takes no joint_attention_kwargs here, got {', '.join(joint_attention_kwargs)}")
        m = self.model
        dtype = m.x_embedder.weight.dtype
        image, text = m.x_embedder(hidden_states.to(dtype)), m.context_embedder(encoder_hidden_states.to(dtype))
        e, pooled = m.time_text_embed, pooled_projections.to(dtype)
        cond = time = self.embed_times(timestep)
        if guidance is not None:
            cond = cond + e.guidance_embedder(e.time_proj(guidance.float() * 1000).to(dtype))
        cond = cond + e.text_embedder(pooled)
        img_ids, txt_ids = (ids[0] if ids.ndim == 3 else ids for ids in (img_ids, txt_ids))
        cos, sin = m.pos_embed(torch.cat((txt_ids, img_ids)))  # s e, each angle twice
        if grid is None:
            last = img_ids.amax(0).long().tolist()
            grid = (last[0] + 1, last[1] + 1, last[2] + 1)
        layout = Layout(grid=grid, text_length=text.shape[1], rope=torch.stack((cos[:, ::2], sin[:, ::2])))
        return Stream(image=image, text=text, cond=cond, time=time, signal=cond, layout=layout)

    def embed_times(self, t: Tensor) -> Tensor:
        """Times stay in fp32, where stock rounds them: a bf16 teacher must be asked at the student's time."""
        e, dtype = self.model.time_text_embed, self.model.x_embedder.weight.dtype
        return e.timestep_embedder(e.time_proj(t.float() * 1000).to(dtype))

    def last_norm(self, stream: Stream) -> Stream:
        return replace(stream, image=self.model.norm_out(stream.image, stream.cond))

    def last_layer(self, stream: Stream) -> Stream:
        return replace(stream, image=self.model.proj_out(stream.image))

    def readout(self, stream: Stream) -> Output:
        stream = self.projected(stream)
        return Output(latent_of(stream.image, stream.layout.grid), None, stream.trace)

    def packed(self, sample: Tensor) -> Tensor:
        return tokens_of(sample)

    # ---- the guidance input ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fix_guidance(self, who: str, scale: float) -> None:
        """The guidance embedder's output at the scale is added to the bias of the timestep MLP's last layer."""
        from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings

        if not self.facts.told:
            super().fix_guidance(who, scale)  # refuses
        old, last = self._embedders(who)
        told = torch.tensor([scale], dtype=last.bias.dtype, device=last.bias.device)
        last.bias += old.guidance_embedder(old.time_proj(told * 1000).to(last.bias.dtype))[0]
        with torch.device("meta"):  # stock calls a module without guidance with other arguments
            new = CombinedTimestepTextProjEmbeddings(len(last.bias), self.facts.text["pooled"])
        self._replace_embedders(new, told=False)

    def add_guidance(self, who: str) -> None:
        """The new embedder's last layer is zero."""
        from diffusers.models.embeddings import CombinedTimestepGuidanceTextProjEmbeddings

        if self.facts.told:
            super().add_guidance(who)  # refuses
        weight = self._embedders(who)[1].weight
        with weight.device:
            new = CombinedTimestepGuidanceTextProjEmbeddings(len(weight), self.facts.text["pooled"])
        new.guidance_embedder.to(weight.dtype)
        zero_init(new.guidance_embedder.linear_2)
        self._replace_embedders(new, told=True)

    def _embedders(self, who: str) -> tuple[Any, Any]:
        """The embedder of time, guidance and pooled text, and the last layer of its timestep MLP.

        Raises:
            ValueError: if another edit has replaced them
        """
        old: Any = self.model.time_text_embed
        last = getattr(getattr(old, "timestep_embedder", None), "linear_2", None)
        if last is None:
            raise ValueError(f"{who}: another edit has replaced the embedder of the time: apply {who} before it")
        return old, last

    def _replace_embedders(self, new: nn.Module, told: bool) -> None:
        """Put a module with the weights of the present one in its place; `told`: it embeds the guidance."""
        model: Any = self.model
        for name in ("time_proj", "timestep_embedder", "text_embedder"):
            setattr(new, name, getattr(model.time_text_embed, name))
        model.time_text_embed = new
        model.register_to_config(guidance_embeds=told)
