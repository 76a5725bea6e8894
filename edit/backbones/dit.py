"""DiT and SiT: the class-conditional adaLN-zero transformer that efficiency methods are measured against.

Sources: DiT (arXiv 2212.09748), SiT (arXiv 2401.08740); the optional modern parts (RMSNorm, SwiGLU, RoPE, QK-norm) as
in LightningDiT (arXiv 2501.01423). Weights carry the names of the official checkpoints.

Which of them stock `diffusers` can run is said in `dit_conversion.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.backbones.dit_conversion import config_from_diffusers, from_diffusers, to_diffusers, why_not_diffusers
from edit.backbones.patches import PatchDenoiser, with_tables, without_tables
from edit.facts import Facts, Prediction
from edit.inputs.limits import Count, Limits, Units, check_numbers, check_table
from edit.stream import Branch, Condition, Layout, Output, Stream
from edit.unit import Anatomy, Features, Unit
from edit.widths import Scale

NORM_EPS = 1e-6
FREQUENCIES = 256  # channels of the time sinusoid
PREDICTIONS: dict[str, Prediction] = {"ddpm": "noise", "edm": "mixture"}  # others predict a velocity
CHOICES = {"time": ("flow", "sit", "ddpm", "edm")}
SCALES = {  # as muP's authors published them for DiT (arXiv 2505.15270)
    r"x_embedder\.proj\.weight|mlp\.0\.weight": Scale("input", "fan_in"),
    r"embedding_table\.weight": Scale("input", "label", 0),
    "registers": Scale("input", 0.02, 0),
    r"linear\.weight": Scale("output", "zero"),
    r"(qkv|proj|fc1|fc2|w12|w3|mlp\.2|adaLN_modulation\.1)\.weight": Scale("hidden", "fan_in"),
    r"\w*norm\w*\.weight": Scale("vector"),
    "bias": Scale("vector", "zero"),
}


@dataclass(frozen=True)
class DiTConfig:
    """Everything that defines a DiT. `build()` makes the denoiser; on `torch.device("meta")` it allocates nothing."""

    input_size: Count = 32  # rows = columns of x: latents at 1/8 of the image, or pixels
    in_channels: Count = 4
    patch_size: Count = 2
    hidden_size: Count = 1152
    depth: Units = 28
    num_heads: Count = 16
    mlp_ratio: float = 4.0
    num_classes: Count = 1000  # the embedding table has one more row: the null class
    learn_sigma: bool = False  # twice the output channels; "ddpm" reads the second half as variance, others drop it
    time: Literal["flow", "sit", "ddpm", "edm"] = "flow"  # convention of input time and prediction, see `pack`
    frequency_shift: float = 0.0  # 0: official sinusoid; 1: that of diffusers
    mlp_norm_eps: float = NORM_EPS  # 1e-5 in folders written by diffusers
    qk_norm: bool = False
    rope: bool = False  # 2-D rotary positions on q and k, in addition to the sin-cos table
    swiglu: bool = False
    rms_norm: bool = False
    qk_rms: bool = False  # QK-norms alone are RMSNorms
    registers: Annotated[int, Limits(0, 1024)] = 0  # learned tokens in front of the image tokens, dropped at the end

    def __post_init__(self):
        check_numbers(self)
        if self.time not in CHOICES["time"]:
            raise ValueError(f"DiT: time must be one of {', '.join(CHOICES['time'])}, got {self.time!r}")
        if self.input_size % self.patch_size:
            raise ValueError(f"DiT: patch_size {self.patch_size} does not divide input_size {self.input_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"DiT: num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}")
        if self.hidden_size % 4:
            raise ValueError(f"DiT: hidden_size must be a multiple of 4 for 2-D positions, got {self.hidden_size}")
        if self.qk_rms and not self.qk_norm:
            raise ValueError("DiT: qk_rms says of which kind QK-norms are, and there are none: set qk_norm too")
        if self.rope and (self.hidden_size // self.num_heads) % 4:
            raise ValueError(
                f"DiT: 2-D RoPE needs a head width divisible by 4, got {self.hidden_size // self.num_heads}"
            )
        check_table("DiT", self.hidden_size, self.grid)

    @property
    def grid(self) -> int:
        """Rows = columns of tokens."""
        return self.input_size // self.patch_size

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    def tables(self) -> dict[str, Tensor]:
        """Positions of the tokens: those that are added, 1 n d, and of RoPE, n e, registers first."""
        found = {"pos_embed": position_table(self.hidden_size, self.grid)[None]}
        if self.rope:
            found["rope"] = rope_table(self.hidden_size // self.num_heads, self.grid, self.registers)
        return found

    def build(self) -> DiT:
        return DiT(self)


# ---- pieces ---------------------------------------------------------------------------------------------------------


def position_table(width: int, grid: int, scale: float = 1.0) -> Tensor:
    """2-D sin-cos positions, row-major: (grid * grid) d. The first half of the channels encodes the column.

    Args:
        width: d
        grid: rows = columns of tokens
        scale: positions are divided by it
    """
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64, device="cpu")[:, None] / scale * omega
    half = torch.cat((angle.sin(), angle.cos()), dim=1)  # grid d/2
    column, row = half.repeat(grid, 1), half.repeat_interleave(grid, dim=0)
    return torch.cat((column, row), dim=1).float()


def rope_table(head_width: int, grid: int, registers: int) -> Tensor:
    """2-D rotary angles: (registers + grid * grid) e, cosines then sines; rows in the first half of the pairs.

    Registers sit at angle zero: they have no place in the image.
    """
    omega = 10000.0 ** -(torch.arange(head_width // 4, dtype=torch.float64, device="cpu") / (head_width // 4))
    angle = torch.arange(grid, dtype=torch.float64, device="cpu")[:, None] * omega  # grid e/4
    angles = torch.cat((angle.repeat_interleave(grid, dim=0), angle.repeat(grid, 1)), dim=1)  # n e/2
    angles = torch.cat((angles.new_zeros(registers, head_width // 2), angles))
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn neighbouring channel pairs by their position's angles: b h s e, s e -> b h s e."""
    cos, sin = table.to(x.dtype).chunk(2, dim=-1)  # s e/2
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:  # b c y x -> b n d
        return self.proj(x).flatten(2).transpose(1, 2)


def sinusoid(t: Tensor, channels: int, shift: float = 0.0) -> Tensor:
    """Cosines and sines of times, in fp32: b -> b c; `shift` 0 is the official one, 1 that of diffusers."""
    half = channels // 2
    # multiplied, then divided, as both originals do: times up to 999 turn the last bit of a frequency into 1e-4
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(exponent / (half - shift))
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def c_noise(t: Tensor) -> Tensor:
    """EDM's ln(sigma) / 4 of times t = sigma / (1 + sigma), b; sigma ends at 1e-5 and 1e5, far outside of its use."""
    return torch.logit(t.float(), eps=1e-5) / 4


class TimeEmbed(nn.Module):
    def __init__(self, width: int, frequency_shift: float):
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:  # b -> b d
        return self.mlp(sinusoid(t, FREQUENCIES, self.frequency_shift).to(self.mlp[0].weight.dtype))


class LabelEmbed(nn.Module):
    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)  # the last row is the null class

    def forward(self, label: Tensor) -> Tensor:  # b -> b d
        return self.embedding_table(label)


class Attention(nn.Module):
    """Weights of multi-head self-attention; `DiTBlock.own_mixer` runs them."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        head = c.hidden_size // c.num_heads
        self.num_heads = c.num_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size)
        norm = nn.RMSNorm if c.rms_norm or c.qk_rms else nn.LayerNorm
        self.q_norm = norm(head, eps=NORM_EPS) if c.qk_norm else None
        self.k_norm = norm(head, eps=NORM_EPS) if c.qk_norm else None


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def expand(self, x: Tensor) -> Tensor:
        return gelu(self.fc1(x))

    def contract(self, features: Tensor) -> Tensor:
        return self.fc2(features)


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def expand(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return F.silu(gate) * value

    def contract(self, features: Tensor) -> Tensor:
        return self.w3(features)


def make_norm(c: DiTConfig, eps: float = NORM_EPS) -> nn.Module:
    if c.rms_norm:
        return nn.RMSNorm(c.hidden_size, eps=eps)
    return nn.LayerNorm(c.hidden_size, elementwise_affine=False, eps=eps)


def make_modulation(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))


class DiTModulation(NamedTuple):
    """adaLN of one unit, each b 1 d, or b n d of groups of tokens; scales already carry the 1 of (1 + scale)."""

    attention_shift: Tensor
    attention_scale: Tensor
    attention_gate: Branch
    feed_shift: Tensor
    feed_scale: Tensor
    feed_gate: Branch


class DiTBlock(Unit):
    """x + g1 * attention(norm(x) (1 + k1) + s1), then x + g2 * mlp(norm(x) (1 + k2) + s2)."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        self.norm1 = make_norm(c)
        self.attn = Attention(c)
        self.norm2 = make_norm(c, c.mlp_norm_eps)
        hidden = int(c.hidden_size * c.mlp_ratio)
        self.mlp = SwiGLU(c.hidden_size, int(2 / 3 * hidden)) if c.swiglu else Mlp(c.hidden_size, hidden)
        self.adaLN_modulation = make_modulation(c.hidden_size, 6)

    def modulate(self, stream: Stream) -> DiTModulation:
        s1, k1, g1, s2, k2, g2 = stream.layout.spread(self.adaLN_modulation(stream.cond)).chunk(6, dim=-1)
        return DiTModulation(s1, 1 + k1, Branch(g1), s2, 1 + k2, Branch(g2))

    @property
    def anatomy(self) -> Anatomy:
        a, m = self.attn, self.mlp
        if isinstance(m, SwiGLU):
            feed = Features(m.w3.in_features, (("mlp.w12", 2),), (("mlp.w3", 0),), gate=F.silu)
        else:
            feed = Features(m.fc2.in_features, (("mlp.fc1", 1),), (("mlp.fc2", 0),), None, gelu)
        size = a.proj.in_features
        heads = Features(size, (("attn.qkv", 3),), (("attn.proj", 0),), ("attn", "num_heads"))
        return Anatomy(a.num_heads, heads, feed)

    def enter(self, stream: Stream, modulation: DiTModulation) -> Branch:
        return Branch(torch.addcmul(modulation.attention_shift, self.norm1(stream.image), modulation.attention_scale))

    def feed(self, stream: Stream, modulation: DiTModulation) -> Branch:
        x = torch.addcmul(modulation.feed_shift, self.norm2(stream.image), modulation.feed_scale)
        return Branch(self.part("ffn")(x, stream.layout))

    def own_mixer(self, stream: Stream, tokens: Tensor) -> Tensor:  # b n d -> b n d
        a, rope = self.attn, stream.layout.rope
        # chunks, not a permuted stack: the backward pass joins them without a further copy
        heads = a.qkv(tokens).unflatten(-1, (3 * a.num_heads, -1))  # b n 3h e
        q, k, v = (part.transpose(1, 2) for part in heads.chunk(3, dim=2))
        if a.q_norm is not None:
            q, k = a.q_norm(q), a.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return a.proj(self.attended(q, k, v, stream))

    def expand(self, tokens: Tensor) -> Tensor:
        return self.mlp.expand(tokens)

    def contract(self, features: Tensor) -> Tensor:
        return self.mlp.contract(features)


class FinalLayer(nn.Module):
    def __init__(self, c: DiTConfig):
        super().__init__()
        self.norm_final = make_norm(c)
        self.linear = nn.Linear(c.hidden_size, c.patch_size**2 * c.out_channels)
        self.adaLN_modulation = make_modulation(c.hidden_size, 2)

    def normed(self, x: Tensor, cond: Tensor, layout: Layout | None = None) -> Tensor:  # b n d, b d -> b n d
        values = self.adaLN_modulation(cond)
        values = values[:, None] if layout is None else layout.spread(values, image=True)
        shift, scale = values.chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm_final(x), 1 + scale)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:  # b n d, b d -> b n (p p c)
        return self.linear(self.normed(x, cond))


class DiTWeights(nn.Module):
    """The weights under the names of the official checkpoints. `DiT` runs them."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        self.x_embedder = PatchEmbed(c.in_channels, c.hidden_size, c.patch_size)
        self.t_embedder = TimeEmbed(c.hidden_size, c.frequency_shift)
        self.y_embedder = LabelEmbed(c.num_classes, c.hidden_size)
        self.register_buffer("pos_embed", torch.empty(1, c.grid**2, c.hidden_size))
        head = c.hidden_size // c.num_heads
        self.register_buffer("rope", torch.empty(c.registers + c.grid**2, head) if c.rope else None)
        self.registers = nn.Parameter(torch.zeros(1, c.registers, c.hidden_size)) if c.registers else None
        self.blocks = nn.ModuleList(DiTBlock(c) for _ in range(c.depth))
        self.final_layer = FinalLayer(c)

    def initialise(self) -> None:
        """The official initialisation. At its end every block is the identity and the output is exactly zero."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.out_channels, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        if self.registers is not None:
            nn.init.normal_(self.registers, std=0.02)
        for m in (*self.blocks, self.final_layer):
            nn.init.zeros_(m.adaLN_modulation[1].weight)
            nn.init.zeros_(m.adaLN_modulation[1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)


# ---- the denoiser ---------------------------------------------------------------------------------------------------


class DiT(PatchDenoiser):
    """Class-conditional DiT over latents or pixels b c y x."""

    name = "dit"
    reads: ClassVar = {"DiTTransformer2DModel": {}, "Transformer2DModel": {"norm_type": "ada_norm_zero"}}

    spec: DiTConfig
    spec_class = DiTConfig

    def __init__(self, config: DiTConfig):
        model = DiTWeights(config)
        model.initialise()
        super().__init__(config, model)

    @property
    def facts(self) -> Facts:
        c = self.spec
        parts = {"modulation": ("adaLN_modulation.",), "lora": ("attn.qkv", "attn.proj")}
        widths = {"grows": ("hidden_size", "num_heads"), "scales": SCALES}
        return Facts(c.hidden_size, c.num_heads, classes=c.num_classes, tokenwise=True, **parts, **widths)

    @property
    def prediction(self) -> Prediction:
        return PREDICTIONS.get(self.spec.time, "velocity")

    def pack(self, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Tensor]:
        if condition.label is None:
            raise ValueError("dit is class-conditional: condition.label is missing; use a data set with labels")
        return {"sample": x, "timestep": self.times(t), "label": condition.label}

    def times(self, t: Tensor) -> Tensor:
        """Times as the network was trained on them.

        "flow": t itself, 1 = noise. "sit": 1 - t, since the official SiT runs from noise at 0 to data at 1 (`readout`
        turns the sign of its velocity). "ddpm": the index 1000 t - 1 in 0..999; t = 0 is clean data, before index 0.
        "edm": ln(sigma) / 4 (`c_noise`).
        """
        c = self.spec
        if c.time == "edm":
            return c_noise(t)
        return t if c.time == "flow" else 1 - t if c.time == "sit" else torch.round(t.float() * 1000 - 1)

    def embed(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Stream:
        m, c = self.model, self.spec
        x = self.placed(sample)
        if m.registers is not None:
            x = torch.cat((m.registers.expand(len(x), -1, -1), x), dim=1)
        time = m.t_embedder(timestep)
        cond = time + m.y_embedder(label)
        layout = Layout(grid=(1, c.grid, c.grid), registers=c.registers, rope=m.rope)
        return Stream(image=x, cond=cond, time=time, signal=cond, layout=layout)

    def last_norm(self, stream: Stream) -> Stream:
        image = stream.image[:, self.spec.registers :]
        return replace(stream, image=self.model.final_layer.normed(image, stream.cond, stream.layout))

    def readout(self, stream: Stream) -> Output:
        c, stream = self.spec, self.projected(stream)
        x = self.pixels(stream)
        sample, variance = x.chunk(2, dim=1) if c.learn_sigma else (x, None)
        if c.time == "sit":
            sample = -sample
        return Output(sample, variance if c.time == "ddpm" else None, stream.trace)

    def null(self, condition: Condition) -> Condition:
        assert condition.label is not None
        return Condition(label=torch.full_like(condition.label, self.spec.num_classes))

    @classmethod
    def to_stock(cls, config: Mapping, state: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
        c = DiTConfig(**config)
        if (reason := why_not_diffusers(asdict(c))) is None:
            return to_diffusers(asdict(c), state)
        return {"_class_name": "edit.DiT", "_not_diffusers_because": reason, **asdict(c)}, without_tables(state)

    @classmethod
    def from_stock(cls, config: Mapping, state: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
        if config.get("_class_name") in cls.reads:
            c = DiTConfig(**config_from_diffusers(config))
            state = from_diffusers(c.depth, state) if state else {}
        else:
            c, state = DiTConfig(**{k: v for k, v in config.items() if not k.startswith("_")}), dict(state)
        return asdict(c), with_tables(state, c)
