"""MicroDiT (arXiv 2407.15811): a text-to-image DiT that is trained from scratch on a small budget.

    x = conv(c_in x_sigma) + positions,  y = block(MLP(caption)),  c = MLP(sinusoid(c_noise)) + MLP(mean_l y_l)
    F = W mod(LN x_N),  (shift, scale) = Linear(GELU(c)),  c_noise = ln(sigma) / 4

The network predicts F of `edit.objectives.EDM`, and `edit.edm.EDMHeun` samples from it. There t = sigma / (1 + sigma),
so that ln(sigma) is the logit of t. The caption is CLIP's states, padding included, and zeros where there is none.
Positions are fixed sin-cos ones on a grid divided by `pos_interp_scale`: 1 at 256 px, 2 at 512 px.

The paper's layer-wise widths and experts are edits on this uniform model (`edit.scaling.layer_wise`,
`edit.moe.expert_choice`), its deferred masking another (`edit.tokens.micro_dit`).

Specification: methods/micro-dit.md ("Definition"). Inferred: all GELUs are tanh ones; the pooled MLP is built as the
caption's, with a LayerNorm between; LayerNorms have a gain and no bias; hidden layers of the time and text embeddings
are as wide as a token; the text block's feed-forward has the ratio 4. `diffusers` has no such class, so weights are
stored under our names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.backbones.dit import PatchEmbed, c_noise, position_table, sinusoid
from edit.backbones.micro_dit_block import STD, Attention, GatedFeed, MicroDiTBlock, gain_norm, modulation
from edit.backbones.patches import PatchDenoiser, with_tables, without_tables
from edit.edm import EDMHeun
from edit.facts import Facts, Prediction
from edit.inputs.limits import Count, Positive, Side, Units, check_numbers, check_table
from edit.sampling import Sampler
from edit.scaling.layer_wise import gated_width
from edit.stream import Condition, Layout, Output, Stream
from edit.widths import Scale

FREQUENCIES = 512  # channels of the sinusoid of c_noise
SCALES = {  # inferred from muP's rules (arXiv 2505.15270): no source has them
    r"x_embedder\.proj\.weight": Scale("input", "xavier"),
    r"(t_embedder\.mlp|y_embedder)\.0\.weight": Scale("input", STD),
    r"(mlp\.2|y_embedder\.3|pooled_embedder\.[03])\.weight": Scale("hidden", STD),
    r"text_block\.(attn\.to_out|mlp\.w2)\.weight|adaLN_modulation\.1\.weight": Scale("hidden", "zero"),
    r"(to_q|to_k|to_v|to_out|w13|w2)\.weight": Scale("hidden", "constant"),
    r"linear\.weight": Scale("output", "zero"),
    r"(norm\w*|\w+_embedder\.2)\.weight": Scale("vector"),
    "bias": Scale("vector", "zero"),
}


@dataclass(frozen=True)
class MicroDiTConfig:
    """Everything that defines a MicroDiT; the defaults are XL/2's at 256 px, uniform in depth and dense.

    Args:
        input_size: rows = columns of a latent
        in_channels: of a latent
        patch_size: p, rows = columns of a patch
        width: D, of a token
        depth: N, of the backbone
        head: width of a head
        text_width: of a caption's states; 1024 of CLIP-H
        mlp_ratio: of feed-forwards, whose hidden channels are 2/3 of it times D
        multiple: hidden channels are rounded up to multiples of it
        pos_interp_scale: positions are divided by it
    """

    input_size: Side = 32
    in_channels: Count = 4
    patch_size: Count = 2
    width: Count = 1024
    depth: Units = 28
    head: Count = 64
    text_width: Count = 1024
    mlp_ratio: Positive = 4.0
    multiple: Count = 256
    pos_interp_scale: Positive = 1.0

    def __post_init__(self):
        check_numbers(self)
        if self.input_size % self.patch_size:
            raise ValueError(f"MicroDiT: patch_size {self.patch_size} does not divide input_size {self.input_size}")
        if self.width % self.head:
            raise ValueError(f"MicroDiT: heads of {self.head} channels do not divide the width {self.width}")
        if self.width % 4:
            raise ValueError(f"MicroDiT: width must be a multiple of 4 for 2-D positions, got {self.width}")
        check_table("MicroDiT", self.width, self.grid)

    @property
    def grid(self) -> int:
        """Rows = columns of tokens."""
        return self.input_size // self.patch_size

    @property
    def hidden(self) -> int:
        """Channels of a feed-forward."""
        return gated_width(self.width, self.mlp_ratio, self.multiple)

    def tables(self) -> dict[str, Tensor]:
        """Positions of the tokens: 1 n d."""
        return {"pos_embed": position_table(self.width, self.grid, self.pos_interp_scale)[None]}

    def build(self) -> MicroDiT:
        return MicroDiT(self)


# ---- pieces ---------------------------------------------------------------------------------------------------------


def embedder(read: int, width: int) -> nn.Sequential:
    """MLP of a caption's states or of their mean: ... c -> ... d."""
    layers = (nn.Linear(read, width), nn.GELU(approximate="tanh"), gain_norm(width), nn.Linear(width, width))
    return nn.Sequential(*layers)


class TimeEmbed(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        layers = (nn.Linear(FREQUENCIES, width), nn.GELU(approximate="tanh"), nn.Linear(width, width))
        self.mlp = nn.Sequential(*layers)

    def forward(self, c_noise: Tensor) -> Tensor:  # b -> b d
        return self.mlp(sinusoid(c_noise, FREQUENCIES).to(self.mlp[0].weight.dtype))


class TextBlock(nn.Module):
    """y + SA(LN y), then y + SwiGLU(LN y), without modulation; the identity at first: b l d -> b l d."""

    def __init__(self, c: MicroDiTConfig):
        super().__init__()
        self.norm1, self.attn = gain_norm(c.width), Attention(c.width, c.width, c.head, c.width)
        self.norm2, self.mlp = gain_norm(c.width), GatedFeed(c.width, gated_width(c.width, 4.0, c.multiple))

    def forward(self, y: Tensor) -> Tensor:
        u = self.norm1(y)
        y = y + self.attn.to_out(F.scaled_dot_product_attention(*self.attn.project(u, u)).transpose(1, 2).flatten(2))
        return y + self.mlp.contract(self.mlp.expand(self.norm2(y)))

    def initialise(self) -> None:
        for part, out in ((self.attn, self.attn.to_out), (self.mlp, self.mlp.w2)):
            part.initialise(STD)
            nn.init.zeros_(out.weight)


class FinalLayer(nn.Module):
    def __init__(self, c: MicroDiTConfig):
        super().__init__()
        self.norm_final = gain_norm(c.width)
        self.adaLN_modulation = modulation(c.width, c.width, 2)
        self.linear = nn.Linear(c.width, c.patch_size**2 * c.in_channels)

    def normed(self, x: Tensor, cond: Tensor) -> Tensor:  # b n d, b d -> b n d
        shift, scale = self.adaLN_modulation(cond)[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm_final(x), 1 + scale)


class MicroDiTWeights(nn.Module):
    """The weights. `MicroDiT` runs them."""

    def __init__(self, c: MicroDiTConfig):
        super().__init__()
        self.x_embedder = PatchEmbed(c.in_channels, c.width, c.patch_size)
        self.t_embedder = TimeEmbed(c.width)
        self.y_embedder = embedder(c.text_width, c.width)
        self.text_block = TextBlock(c)
        self.pooled_embedder = embedder(c.width, c.width)
        self.register_buffer("pos_embed", torch.empty(1, c.grid**2, c.width))
        block = {"head": c.head, "attention": c.width, "hidden": c.hidden, "cond": c.width, "text": c.width}
        self.blocks = nn.ModuleList(MicroDiTBlock(c.width, **block) for _ in range(c.depth))
        self.final_layer = FinalLayer(c)

    @torch.no_grad()
    def initialise(self) -> None:
        """The paper's initialisation; torch's truncation, at 2, is 100 standard deviations away."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.out_channels, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for embed in (self.t_embedder.mlp, self.y_embedder, self.pooled_embedder):
            for layer in (embed[0], embed[-1]):
                nn.init.normal_(layer.weight, std=STD)
        self.text_block.initialise()
        for i, block in enumerate(self.blocks):
            block.initialise(STD / (2 * (i + 1)) ** 0.5)
        for layer in (self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(layer.weight)


# ---- the denoiser ---------------------------------------------------------------------------------------------------


class MicroDiT(PatchDenoiser):
    """MicroDiT over latents b c y x that read a caption."""

    name = "micro_dit"
    masks = False

    spec: MicroDiTConfig
    spec_class = MicroDiTConfig
    resized = ("input_size", "pos_interp_scale")

    def __init__(self, config: MicroDiTConfig):
        model = MicroDiTWeights(config)
        model.initialise()
        super().__init__(config, model)

    @property
    def facts(self) -> Facts:
        c, parts = self.spec, ("to_q", "to_k", "to_v", "to_out")
        told, modulated = {"text": c.text_width}, ("adaLN_modulation.",)
        widths = {"grows": ("width",), "scales": SCALES}
        return Facts(c.width, c.width // c.head, text=told, modulation=modulated, lora=parts, **widths)

    @property
    def prediction(self) -> Prediction:
        return "mixture"

    def sampler(self) -> Sampler:
        return Sampler(EDMHeun(), guidance=5.0)

    def need_length(self, length: int | None) -> None:
        """Raises ValueError for texts of no fixed length (None): padding is attended to, and is in their mean."""
        if length is None:
            raise ValueError(
                "micro_dit attends to the padding of its text, and these texts are of no fixed length (padding=none): "
                "encode them with padding=states, as published models were trained, or padding=zeros"
            )

    def example(self, batch: int = 1, text: int = 77) -> Condition:
        return Condition(text=torch.zeros(batch, text, self.spec.text_width, device="cpu"))

    def pack(self, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Tensor]:
        """`x` is c_in x_sigma, as the objective makes it."""
        if condition.text is None:
            raise ValueError("micro_dit needs condition.text, which is missing: use data with text embeddings")
        if condition.text.shape[-1] != self.spec.text_width:
            raise ValueError(
                f"micro_dit takes text embeddings of width {self.spec.text_width}, got {condition.text.shape[-1]}: "
                "they were made by another text encoder"
            )
        return {"sample": x, "c_noise": self.times(t), "caption": condition.text}

    def times(self, t: Tensor) -> Tensor:
        """c_noise of times, b."""
        return c_noise(t)

    def embed(self, sample: Tensor, c_noise: Tensor, caption: Tensor) -> Stream:
        """b c y x, b, b l c."""
        m, c = self.model, self.spec
        x = self.placed(sample)
        y = m.text_block(m.y_embedder(caption.to(m.x_embedder.proj.weight.dtype)))
        time = m.t_embedder(c_noise)
        cond = time + m.pooled_embedder(y.mean(1))
        layout = Layout(grid=(1, c.grid, c.grid), text_length=y.shape[1])
        return Stream(image=x, text=y, cond=cond, time=time, signal=cond, layout=layout)

    def last_norm(self, stream: Stream) -> Stream:
        return replace(stream, image=self.model.final_layer.normed(stream.image, stream.cond))

    def readout(self, stream: Stream) -> Output:
        stream = self.projected(stream)
        return Output(self.pixels(stream), None, stream.trace)

    def null(self, condition: Condition) -> Condition:
        """Zeros in place of the text embedding."""
        assert condition.text is not None
        return replace(condition, text=torch.zeros_like(condition.text))

    @classmethod
    def to_stock(cls, config: Mapping, state: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
        reason = "diffusers has no such model"
        return {"_class_name": "edit.MicroDiT", "_not_diffusers_because": reason, **config}, without_tables(state)

    @classmethod
    def from_stock(cls, config: Mapping, state: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
        c = MicroDiTConfig(**{k: v for k, v in config.items() if not k.startswith("_")})
        return asdict(c), with_tables(state, c)
