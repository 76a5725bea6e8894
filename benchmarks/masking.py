"""A training step that sees some of the tokens (MicroDiT) against one that sees all: seconds and counted work.

    python -m benchmarks.masking
    python -m benchmarks.masking --sizes s_2 --batch 4 --rounds 5
    python -m benchmarks.masking --device cuda --sizes b_2,xl_2 --batch 32 --precision bf16

A step is drawing masks, forward, loss over kept tokens, backward and AdamW. `dense` sees all tokens, `naive 0.75` drops
three quarters of them at the input, `mixer 0.75` behind a patch mixer that sees all, `mixer 0` none behind it. Ratios
are over the time of `dense`, round by round: below 1 a step is cheaper. Below them are the same ratios of the
multiply-accumulates that a step executes, counted without a device. The mixer of `pixels` is that of
`experiment=dit_pixels/micro_dit`, those of other sizes have `--depth` blocks of `--width`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import edit
from benchmarks.common import arguments, cast, config_of, inputs, prepare, race, show, stir, write
from edit.backbones.dit import DiTConfig
from edit.denoiser import Denoiser
from edit.losses import Draws, Seen
from edit.measuring.flops import Flops
from edit.objectives import FlowMatching
from edit.stream import Condition
from edit.tokens.micro_dit import DeferredMasking, PatchMixer

RATIOS = (0.5, 0.75)
OBJECTIVE = FlowMatching()


def models(config: DiTConfig, mixer: PatchMixer) -> dict[str, Denoiser]:
    """The model without and with a mixer, away from the zeros that it starts from."""
    found = {"naive": config.build(), "mixer": edit.apply(config.build(), {"mixer": mixer})}
    for denoiser in found.values():
        denoiser.train()
        stir(denoiser)
    return found


def arms(found: dict[str, Denoiser]) -> dict[str, tuple[Denoiser, float]]:
    """Model and ratio by name, the one that others are compared with first."""
    named = {f"{name} {ratio:g}": (m, ratio) for name, m in found.items() for ratio in (0, *RATIOS)}
    return {"dense": named.pop("naive 0"), **named}


class Step:
    """A training step; each call has masks of its own.

    Args:
        denoiser: that is trained
        ratio: of its tokens that are dropped
        batch: data, times, labels
        optimizer: None: gradients alone
        precision: fp32, or bf16 under autocast
    """

    def __init__(
        self,
        denoiser: Denoiser,
        ratio: float,
        batch: tuple[Tensor, Tensor, Tensor],
        optimizer: torch.optim.Optimizer | None = None,
        precision: str = "fp32",
    ):
        self.denoiser, self.batch, self.optimizer, self.precision = denoiser, batch, optimizer, precision
        self.term, self.calls = DeferredMasking(ratio, unmasked=0), 0
        self.own = self.term.build(denoiser)

    def __call__(self) -> None:
        x, t, label = self.batch
        noise, ones = torch.randn_like(x), torch.ones_like(t)
        samples = torch.arange(len(x), device=x.device) + self.calls * len(x)
        draws = Draws(0, samples, self.calls, tuple(x.shape[1:]))
        self.calls += 1
        condition = Condition(label=label)
        seen = Seen(condition, condition, ones, draws, x=x, x_t=OBJECTIVE.corrupt(x, noise, t), t=t, own=self.own)
        x_t, condition = self.term.mixed(seen)
        with cast(self.precision, x.device):
            out = self.denoiser(x_t, t, condition)
        OBJECTIVE.losses(out, x, noise, x_t, t)["flow"].mean().backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.denoiser.zero_grad(set_to_none=True)


def counted(config: DiTConfig, mixer: PatchMixer) -> dict[str, float]:
    """Multiply-accumulates of a step of one sample over those of `dense`, by the names of `arms`."""
    work = {}
    with torch.device("meta"):
        shape = (1, config.in_channels, config.input_size, config.input_size)
        batch = torch.empty(shape), torch.empty(1), torch.empty(1, dtype=torch.int64)
        for name, (denoiser, ratio) in arms(models(config, replace(mixer))).items():
            with Flops() as flops:
                Step(denoiser, ratio, batch)()
            work[name] = flops.total / 2
    return {name: w / work["dense"] for name, w in work.items()}


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(sizes="pixels", batch=64)
    parser.add_argument("--depth", type=int, default=4, help="blocks of a mixer (4)")
    parser.add_argument("--width", type=int, default=0, help="of a mixer; 0: three quarters of the model's (0)")
    args = parser.parse_args()
    device, rows = prepare(args), []
    for size in args.sizes.split(","):
        config = config_of(size)
        small = {"depth": 2, "width": None, "head": 32, "multiple": 32}
        mixer = PatchMixer(**small) if size == "pixels" else PatchMixer(args.depth, args.width or None)
        torch.manual_seed(0)
        found = {name: denoiser.to(device) for name, denoiser in models(config, mixer).items()}
        batch = inputs(config, args.batch, device)
        optimizers = {id(d): torch.optim.AdamW(d.parameters(), lr=1e-6, fused=True) for d in found.values()}
        if args.compile:
            for denoiser in found.values():
                for unit in denoiser.units:
                    unit.compile()  # type: ignore[attr-defined]
        runs = {
            name: Step(denoiser, ratio, batch, optimizers[id(denoiser)], args.precision)
            for name, (denoiser, ratio) in arms(found).items()
        }
        seconds, ratios = race(runs, device, args.rounds, args.warmup)
        row = show(f"{size} batch {args.batch}", seconds, ratios)
        work = counted(config, mixer)
        print(f"{'':28s} work: " + "  ".join(f"{n} {w:.3f}" for n, w in work.items()), flush=True)
        rows.append(row | {"counted": work})
        write(args, device, rows)


if __name__ == "__main__":
    main()
