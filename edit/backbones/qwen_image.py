"""Qwen-Image (arXiv 2508.02324) over `diffusers.QwenImageTransformer2DModel`: a two-stream DiT of equal units.

Text and image tokens have their own weights and attend to each other in every unit, text first. Image positions
count from the picture's centre (scaled RoPE on frames, rows, columns); text follows on the diagonal, behind the larger
half. Padding is masked where the condition has a text mask, and attended to where it has none.
Source: the Qwen-Image release as `diffusers` has it.

Not supported, and refused in one sentence: guidance embeddings (no such model is published and the stock forward cannot
run them), patches other than 2 x 2 (the pipeline packs no others), the additions of the layered and editing models
(`zero_cond_t`, `use_additional_t_cond`, `use_layer3d_rope`, several pictures per sample), ControlNet residuals and
attention keyword arguments. Fused projections are not supported either.
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
from edit.stream import Branch, Condition, Layout, Output, Step, Stream
from edit.unit import Anatomy
from edit.widths import Scale


@dataclass(frozen=True)
class QwenImageConfig:
    """Everything that defines a Qwen-Image transformer; the defaults are the published model's."""

    in_channels: Count = 64  # of a token: 4 x the latent's channels
    num_layers: int = 60
    attention_head_dim: Count = 128
    num_attention_heads: Count = 24
    joint_attention_dim: Count = 3584  # width of the text embedding
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)  # frames, rows, columns; they add up to a head's width
    sample_size: tuple[int, int] = (128, 128)  # default rows and columns of a latent
    path: str | None = None  # folder or hub id of the weights, for `init` and `teacher.path` to refer to

    def __post_init__(self):
        check_numbers(self)

    def build(self) -> QwenImage:
        config = asdict(self)
        del config["path"]
        return QwenImage.from_config({**config, "out_channels": self.in_channels // 4}).initialise()


class QwenImageUnit(StockUnit):
    """Two streams with one joint attention, each with its own modulation and feed-forward."""

    attn: Any
    network = "img_mlp"
    txt_mlp: nn.Module

    @property
    def anatomy(self) -> Anatomy:
        joint = heads_between("attn", self.attn, "written")
        return Anatomy(
            self.attn.heads, joint, feed_forward(self, "img_mlp"), feed_forward(self, "txt_mlp"), text="along"
        )

    def modulate(self, stream: Stream) -> Modulation:
        image, text = (layer(stream.cond)[:, None].chunk(6, -1) for layer in (self.img_mod, self.txt_mod))
        shift, scale, gate, *feed = (Branch(*both) for both in zip(image, text, strict=True))
        return Modulation(shift, scale, gate, *feed)

    def enter(self, stream: Stream, modulation: Modulation) -> Branch:
        shift, scale = modulation.shift, modulation.scale
        image = torch.addcmul(shift.image, self.img_norm1(stream.image), 1 + scale.image)
        return Branch(image, torch.addcmul(shift.text, self.txt_norm1(stream.text), 1 + scale.text))

    def attend(self, stream: Stream, modulation: Modulation) -> Branch:
        image, text = self.enter(stream, modulation)
        if "mixer" not in self.filled:  # the unit's own needs no joint tensor: two copies less
            return self.mix(stream, image, text)
        return stream.layout.split(self.filled["mixer"](stream, stream.layout.joined(text, image)))

    def own_mixer(self, stream: Stream, tokens: Tensor) -> Tensor:
        """Joint attention: b (l + n) d, text first -> the same."""
        mixed = self.mix(stream, *stream.layout.split(tokens))
        return stream.layout.joined(mixed.text, mixed.image)

    def mix(self, stream: Stream, image: Tensor, text: Tensor) -> Branch:
        """Joint attention of b n d image and b l d text tokens."""
        a, layout = self.attn, stream.layout
        parts = (
            (a.norm_added_q, a.add_q_proj(text), a.norm_q, a.to_q(image)),
            (a.norm_added_k, a.add_k_proj(text), a.norm_k, a.to_k(image)),
        )
        q, k = (
            turn(torch.cat((text_norm(heads(t, a)), norm(heads(i, a))), 2), layout) for text_norm, t, norm, i in parts
        )
        v = torch.cat((heads(a.add_v_proj(text), a), heads(a.to_v(image), a)), 2)
        attended = layout.split(self.attended(q, k, v, stream))
        return Branch(a.to_out[1](a.to_out[0](attended.image)), a.to_add_out(attended.text))

    def own_attention(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, step: Step | None) -> Tensor:
        """Softmax attention over all tokens but masked text: b h s e each, text first -> b h s e."""
        mask = layout.joint_mask(k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])

    def own_text_ffn(self, tokens: Tensor, layout: Layout) -> Tensor:
        return self.txt_mlp(tokens)

    def feed(self, stream: Stream, modulation: Modulation) -> Branch:
        shift, scale, layout = modulation.feed_shift, modulation.feed_scale, stream.layout
        image = torch.addcmul(shift.image, self.img_norm2(stream.image), 1 + scale.image)
        text = torch.addcmul(shift.text, self.txt_norm2(stream.text), 1 + scale.text)
        return Branch(self.part("ffn")(image, layout), self.part("text_ffn")(text, layout))

    def compute(self, stream: Stream) -> Stream:
        stream = super().compute(stream)
        if stream.image.dtype is torch.float16:  # the published weights overflow here; clipping is part of the model
            stream = replace(stream, image=finite(stream.image), text=finite(stream.text))
        return stream


def position_angles(grid: Sequence[int], length: int, axes: Sequence[int], device: torch.device) -> Tensor:
    """Cosines, then sines, of the angles of `length` text tokens and a grid of image tokens: 2 (l + n) e/2.

    Rows and columns count from the centre, so that a picture of another size shares the positions it has in common;
    text starts where the larger half of the picture ends, at the same position on all three axes.

    Args:
        grid: frames, rows, columns
        length: text tokens
        axes: channels of a head that turn with frames, rows and columns; even
    """
    frames, rows, columns = grid
    place = torch.empty(frames, rows, columns, 3, device=device)
    place[..., 0] = torch.arange(frames, device=device)[:, None, None]
    place[..., 1] = torch.arange(rows // 2 - rows, rows // 2, device=device)[:, None]
    place[..., 2] = torch.arange(columns // 2 - columns, columns // 2, device=device)
    start = max(rows // 2, columns // 2)
    text = torch.arange(start, start + length, device=device, dtype=place.dtype)[:, None].expand(-1, 3)
    places = torch.cat((text, place.view(-1, 3)))
    speeds = (10000.0 ** -(torch.arange(0, e, 2, device=device, dtype=place.dtype) / e) for e in axes)
    angles = torch.cat([places[:, i, None] * speed for i, speed in enumerate(speeds)], 1)
    return torch.stack((angles.cos(), angles.sin()))


SCALES = scales_with(  # inferred from the rules: no source has them
    {
        r"(img|txt)_in\.weight": Scale("input", "fan_in"),
        r"(img|txt)_mod\.1\.weight": Scale("hidden", "fan_in"),
        r"proj_out\.weight": Scale("output", "zero"),
    }
)


class QwenImage(StockDenoiser):
    """Qwen-Image as `embed -> units -> readout`; a sample is a latent of in_channels / 4 channels of any even size.

    Raises:
        ValueError: if the stock model has an option that is not supported, or does not fit together
    """

    name = "qwen_image"
    stock = "QwenImageTransformer2DModel"
    reads: ClassVar = {"QwenImageTransformer2DModel": {}}
    lists: ClassVar = {"transformer_blocks": ("num_layers", QwenImageUnit)}

    def __init__(self, model: nn.Module, **extras: Any):
        c: Any = model.config
        for option in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if c[option]:
                raise ValueError(f"{self.name} is the text-to-image model: {option} must be False, got {c[option]}")
        if c.patch_size != 2:
            raise ValueError(f"{self.name} has tokens of 2 x 2 latent pixels: patch_size must be 2, got {c.patch_size}")
        if 4 * (c.out_channels or c.in_channels) != c.in_channels:
            raise ValueError(
                f"{self.name} predicts as many channels as it takes: out_channels must be {c.in_channels // 4}, a "
                f"quarter of in_channels={c.in_channels}, got {c.out_channels}"
            )
        if sum(c.axes_dims_rope) != c.attention_head_dim or any(e % 2 for e in c.axes_dims_rope):
            raise ValueError(
                f"{self.name}: axes_dims_rope must be even and add up to attention_head_dim={c.attention_head_dim}, "
                f"got {list(c.axes_dims_rope)}"
            )
        super().__init__(model, **extras)

    @property
    def channels(self) -> int:
        model: Any = self.model
        return model.config.in_channels // 4

    def initialise(self) -> QwenImage:
        m: Any = self.model
        modulations = (layer[1] for u in m.transformer_blocks for layer in (u.img_mod, u.txt_mod))
        zero_init(*modulations, m.norm_out.linear, m.proj_out)
        return self

    @property
    def facts(self) -> Facts:
        c: Any = self.model.config
        parts = {"modulation": ("img_mod.", "txt_mod.", "norm_out.linear."), "lora": JOINT}
        parts["scales"] = SCALES
        return replace(super().facts, text={"text": c.joint_attention_dim}, guided_by="true_cfg_scale", **parts)

    def sampler(self) -> Sampler:
        steps = StockEuler(50, dynamic=(0.5, 0.9, 256, 8192), terminal=0.02)
        return Sampler(steps, guidance=4.0, norm_patch=2)

    def pack(self, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        """2 x 2 latent pixels to a token; the stock forward's time is ours."""
        self.need(condition)
        if condition.guidance is not None:
            raise ValueError(f"this {self.name} was not distilled for guidance: leave condition.guidance out")
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        return {
            "hidden_states": tokens_of(x),
            "encoder_hidden_states": condition.text,
            "encoder_hidden_states_mask": condition.text_mask,
            "timestep": t,
            "img_shapes": [[(1, rows, columns)]] * len(x),
        }

    def embed(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_shapes: Sequence[Sequence[tuple[int, int, int]]],
        encoder_hidden_states_mask: Tensor | None = None,
        guidance: Tensor | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        controlnet_block_samples: Any = None,
        additional_t_cond: Tensor | None = None,
    ) -> Stream:
        """The stock forward's arguments.

        Raises:
            ValueError: if one of them is not supported, or grid or mask do not fit the tokens
        """
        extra = {"guidance": guidance, "controlnet_block_samples": controlnet_block_samples}
        extra["additional_t_cond"] = additional_t_cond
        if given := [name for name, value in extra.items() if value is not None]:
            raise ValueError(f"{self.name} takes no {given[0]} here: leave it out, or use the stock transformer")
        if attention_kwargs:
            raise ValueError(f"{self.name} takes no attention_kwargs here, got {', '.join(attention_kwargs)}")
        grids = {tuple(grid) for sample in img_shapes for grid in sample}
        if len(grids) != 1 or any(len(sample) != 1 for sample in img_shapes):
            raise ValueError(
                f"{self.name} takes one picture per sample, all of one size, got img_shapes {img_shapes}: editing and "
                "layered pipelines need the stock transformer"
            )
        (grid,), m = grids, self.model
        frames, rows, columns = grid
        if hidden_states.shape[1] != frames * rows * columns:
            raise ValueError(
                f"img_shapes say {frames} x {rows} x {columns} = {frames * rows * columns} image tokens, "
                f"got {hidden_states.shape[1]}"
            )
        mask, length = encoder_hidden_states_mask, encoder_hidden_states.shape[1]
        if mask is not None and mask.shape != encoder_hidden_states.shape[:2]:
            wanted = tuple(encoder_hidden_states.shape[:2])
            raise ValueError(f"a text mask must have the shape of the text, {wanted}, got {tuple(mask.shape)}")
        dtype = m.img_in.weight.dtype
        image, text = m.img_in(hidden_states.to(dtype)), m.txt_in(m.txt_norm(encoder_hidden_states.to(dtype)))
        time = m.time_text_embed(timestep.float(), image)
        layout = Layout(
            grid=grid,
            text_length=length,
            text_mask=None if mask is None else mask.bool(),
            rope=position_angles(grid, length, m.config.axes_dims_rope, image.device),
        )
        return Stream(image=image, text=text, cond=time, time=time, signal=time, layout=layout)

    def embed_times(self, t: Tensor) -> Tensor:
        return self.model.time_text_embed(t.float(), self.model.img_in.weight)

    def last_norm(self, stream: Stream) -> Stream:
        return replace(stream, image=self.model.norm_out(stream.image, stream.cond))

    def last_layer(self, stream: Stream) -> Stream:
        return replace(stream, image=self.model.proj_out(stream.image))

    def readout(self, stream: Stream) -> Output:
        stream = self.projected(stream)
        return Output(latent_of(stream.image, stream.layout.grid), None, stream.trace)

    def packed(self, sample: Tensor) -> Tensor:
        return tokens_of(sample)
