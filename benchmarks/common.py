"""What the benchmarks share: the competitors, interleaved timing, the command line.

`PlainDiT` is a DiT as a researcher writes it: the official structure with fused attention, no framework around it.
Its weights carry the official names, so all three models run the same weights, and their outputs are compared before
anything is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.backbones.dit import DiTConfig
from edit.backbones.dit_conversion import to_diffusers
from edit.denoiser import Denoiser
from edit.measuring.devices import device_name
from edit.measuring.timing import Spread, stopwatch
from edit.stream import Condition

CONFIGS = Path(__file__).parents[1] / "configs"
PUBLISHED = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}  # width, depth, heads
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x b c y x, t b, label b) -> prediction b c y x


# ---- the plain competitor -------------------------------------------------------------------------------------------


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int, frequency_shift: float):
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        exponent = torch.arange(128, dtype=torch.float32, device=t.device) / (128 - self.frequency_shift)
        args = t[:, None].float() * torch.exp(-math.log(10000) * exponent)
        return self.mlp(torch.cat([torch.cos(args), torch.sin(args)], dim=-1))


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, c: DiTConfig):
        super().__init__()
        d = c.hidden_size
        self.norm1 = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(d, c.num_heads)
        self.norm2 = nn.LayerNorm(d, elementwise_affine=False, eps=c.mlp_norm_eps)
        self.mlp = Mlp(d, int(d * c.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, c: DiTConfig):
        super().__init__()
        self.norm_final = nn.LayerNorm(c.hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(c.hidden_size, c.patch_size**2 * c.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.hidden_size, 2 * c.hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PlainDiT(nn.Module):
    def __init__(self, c: DiTConfig):
        super().__init__()
        self.patch, self.out_channels = c.patch_size, c.out_channels
        self.x_embedder = PatchEmbed(c.in_channels, c.hidden_size, c.patch_size)
        self.t_embedder = TimestepEmbedder(c.hidden_size, c.frequency_shift)
        self.y_embedder = LabelEmbedder(c.num_classes, c.hidden_size)
        self.register_buffer("pos_embed", torch.zeros(1, c.grid**2, c.hidden_size))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.final_layer = FinalLayer(c)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)
        side, p = int(x.shape[1] ** 0.5), self.patch
        x = torch.einsum("nhwpqc->nchpwq", x.reshape(len(x), side, side, p, p, self.out_channels))
        return x.reshape(len(x), self.out_channels, side * p, side * p)


# ---- the three models -----------------------------------------------------------------------------------------------


def from_file(group: str, name: str) -> Any:
    """What a configuration describes. It is read with OmegaConf, which timings of DiT's own sizes do without."""
    from recipes.cost import from_file

    return from_file(CONFIGS, group, name)


def config_of(size: str) -> DiTConfig:
    """A preset by the end of its name ("tiny", "s_2"), with the sinusoid of diffusers and one time for all."""
    name, _, patch = size.partition("_")
    if name in PUBLISHED:
        width, depth, heads = PUBLISHED[name]
        config = DiTConfig(patch_size=int(patch), hidden_size=width, depth=depth, num_heads=heads)
    else:
        config = from_file("backbone", f"dit_{size}")
    return replace(config, frequency_shift=1.0, time="flow", learn_sigma=False)


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Move all weights: a fresh model is the identity with zero output, and its tokens are all alike."""
    for p in model.parameters():
        p.add_(0.02 * torch.randn_like(p))


def stirred(build: Callable[[], Denoiser], args: argparse.Namespace, device: torch.device) -> Denoiser:
    """A model in eval mode, in the precision of the command line; the same weights each time."""
    torch.manual_seed(0)
    model = build().eval().to(device)
    stir(model)
    return model.bfloat16() if args.precision == "bf16" else model


def rivals(config: DiTConfig, device: torch.device, compile: bool, others: Collection[str]) -> dict[str, nn.Module]:
    """Ours, and of "plain" and "diffusers" those that are named, with the same random weights.

    All are in eval mode: that of diffusers would draw its label drop in training mode, which the others do outside.
    """
    torch.manual_seed(0)
    ours = config.build()
    stir(ours)
    models: dict[str, nn.Module] = {"edit": ours}
    if "plain" in others:
        models["plain"] = PlainDiT(config)
        models["plain"].load_state_dict(ours.model.state_dict())
    if "diffusers" in others:
        from diffusers import DiTTransformer2DModel

        stock_config, stock_state = to_diffusers(ours.config, ours.model.state_dict())
        models["diffusers"] = DiTTransformer2DModel.from_config(stock_config)
        models["diffusers"].load_state_dict(stock_state, strict=False)  # its position table is a buffer of its own
    for model in models.values():
        model.eval().to(device)
        if compile:
            model.compile()
    return models


def predictors(models: Mapping[str, nn.Module]) -> dict[str, Predict]:
    """The models behind one signature."""
    calls: dict[str, Predict] = {
        "edit": lambda x, t, y: models["edit"](x, t, Condition(label=y)).sample,
        "plain": lambda x, t, y: models["plain"](x, t, y),
        "diffusers": lambda x, t, y: models["diffusers"](x, timestep=t, class_labels=y, return_dict=False)[0],
    }
    return {name: calls[name] for name in models}


def check_equal(predict: Mapping[str, Predict], x: Tensor, t: Tensor, y: Tensor, tolerance: float) -> float:
    """Largest difference of the outputs, relative to the largest output.

    Raises:
        ValueError: if it is above `tolerance`: then the models are not the same, and their times say nothing
    """
    with torch.no_grad():
        outputs = [f(x, t, y).float() for f in predict.values()]
    worst = max((float((o - outputs[0]).abs().max() / outputs[0].abs().max()) for o in outputs[1:]), default=0.0)
    if not worst <= tolerance:
        raise ValueError(f"the models disagree by {worst:.2e}, more than {tolerance:.0e}: nothing was timed")
    return worst


def inputs(config: DiTConfig, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy samples, times and labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, generator=generator)
    t = torch.rand(batch, generator=generator)
    y = torch.randint(config.num_classes, (batch,), generator=generator)
    return x.to(device), t.to(device), y.to(device)


# ---- timing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contest:
    """Models of one size with the same weights, whose predictions agree, and a batch for them."""

    size: str
    config: DiTConfig
    models: dict[str, nn.Module]  # ours is "edit", and first
    predict: dict[str, Predict]
    batch: tuple[Tensor, Tensor, Tensor]  # x b c y x, t b, label b


def contests(args: argparse.Namespace, device: torch.device) -> Iterator[Contest]:
    """One for each size that the command line asks for."""
    for size in args.sizes.split(","):
        config = config_of(size)
        models = rivals(config, device, args.compile, args.rivals.split(","))
        predict, batch = predictors(models), inputs(config, args.batch, device)
        with cast(args.precision, device):
            check_equal(predict, *batch, tolerance=1e-3 if args.precision == "fp32" else 0.1)
        yield Contest(size, config, models, predict, batch)


def race(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, warmup: int
) -> tuple[dict[str, Spread], dict[str, Spread]]:
    """Run all in turns, each round beginning with another.

    Returns:
        Seconds of each run; and for each but the first, its time over the first's, round by round (above 1: the first
        is faster), with "fastest" for the fastest of the others in that round.
    """
    names = list(runs)
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            seconds[name].append(stopwatch(runs[name], device))
    ratios = {name: [a / b for a, b in zip(seconds[name], seconds[names[0]], strict=True)] for name in names[1:]}
    if len(names) > 2:
        ratios["fastest"] = [min(row) for row in zip(*ratios.values(), strict=True)]
    return {n: Spread.of(v) for n, v in seconds.items()}, {n: Spread.of(v) for n, v in ratios.items()}


def cast(precision: str, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


# ---- command line and report ----------------------------------------------------------------------------------------


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--sizes", default="digits,tiny,s_4", help="presets without dit_ (digits,tiny,s_4)")
    parser.add_argument("--batch", type=int, default=16, help="samples (16)")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (20)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds that are thrown away (3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile all models, each as a whole")
    parser.add_argument("--rivals", default="plain,diffusers", help="of plain, diffusers (both)")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    return parser


def prepare(args: argparse.Namespace) -> torch.device:
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = True
    return torch.device(args.device)


def show(label: str, seconds: Mapping[str, Spread], ratios: Mapping[str, Spread]) -> dict[str, Any]:
    """Print one race, and return it as JSON values."""
    times = "  ".join(f"{n} {1e3 * s.median:.2f} ms" for n, s in seconds.items())
    ours = next(iter(seconds))
    quotients = "  ".join(f"{n}/{ours} {s.median:.3f} [{s.low:.3f}, {s.high:.3f}]" for n, s in ratios.items())
    print(f"{label:28s} {times}  |  {quotients}  n={next(iter(seconds.values())).count}", flush=True)
    return {
        "label": label,
        "seconds": {n: asdict(s) for n, s in seconds.items()},
        "ratios": {n: asdict(s) for n, s in ratios.items()},
    }


def write(args: argparse.Namespace, device: torch.device, rows: list[dict[str, Any]]) -> None:
    """The results so far with what they depend on, written whole or not at all; called after each row."""
    if args.json is None:
        return
    about = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    about |= {"hardware": device_name(device), "machine": platform.processor() or platform.machine()}
    about |= {"torch": torch.__version__, "python": platform.python_version()}
    temporary = args.json.with_name(f"{args.json.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")
    os.replace(temporary, args.json)
