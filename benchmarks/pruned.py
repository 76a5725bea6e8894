"""Whether a shallower model is as much faster as it is cheaper: latency against executed multiply-accumulates.

    python -m benchmarks.pruned
    python -m benchmarks.pruned --families dit,flux --batch 4 --threads 2

A random model of each family, and the same with part of its units dropped by an N:M pattern, run in turns. `time` is
the pruned model's over the dense one's, round by round, `macs` the same of what they execute; `gap` is time / macs - 1,
which a real saving keeps within 5 %.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import edit
from benchmarks.common import arguments, cast, config_of, prepare, race, show, write
from edit.denoiser import Denoiser
from edit.measuring.cost import macs
from edit.pruning.depth import DepthPruning
from edit.pruning.importance import even
from edit.pruning.patterns import groups_of, runs_of_one_kind

WIDTH = {"num_attention_heads": 8, "attention_head_dim": 64}
TEXT = {"joint_attention_dim": 256, "pooled_projection_dim": 128}


def dit() -> Denoiser:
    return config_of("s_2").build()


def flux() -> Denoiser:
    from edit.backbones.flux import FluxConfig

    return FluxConfig(
        num_layers=4, num_single_layers=8, sample_size=(32, 32), axes_dims_rope=(16, 24, 24), **WIDTH, **TEXT
    ).build()


def sd3() -> Denoiser:
    from edit.backbones.sd3 import SD3Config

    return SD3Config(num_layers=9, sample_size=32, pos_embed_max_size=32, **WIDTH, **TEXT).build()


def pixart() -> Denoiser:
    from edit.backbones.pixart import PixArtConfig

    return PixArtConfig(num_layers=12, sample_size=32, cross_attention_dim=512, caption_channels=256, **WIDTH).build()


# Models wide enough for arithmetic, not Python, to take the time; latents of 32 x 32. All but the first need diffusers.
FAMILIES: dict[str, Callable[[], Denoiser]] = {"dit": dit, "flux": flux, "sd3": sd3, "pixart": pixart}


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(batch=1)
    parser.add_argument("--families", default="dit,flux,sd3,pixart", help="(dit,flux,sd3,pixart)")
    parser.add_argument("--patterns", default="1:2,1:4", help="N:M, what stays (1:2,1:4)")
    args = parser.parse_args()
    device = prepare(args)
    torch.manual_seed(0)
    rows = []
    for name in args.families.split(","):
        dense = FAMILIES[name]()
        for pattern in args.patterns.split(","):
            pruned = type(dense).from_config(dense.config)
            kept = even(groups_of(pattern, runs_of_one_kind(dense)))
            edit.apply(pruned, {"depth": DepthPruning(pattern="listed", units=tuple(kept))})
            x = torch.randn(args.batch, *dense.sample_shape, device=device)
            t = torch.full((args.batch,), 0.5, device=device)
            condition = dense.example(args.batch, 128).map(lambda v: v.to(device))
            runs = {}
            for who, model in (("dense", dense), ("pruned", pruned)):
                model.eval().to(device)

                def run(model=model, x=x, t=t, condition=condition) -> torch.Tensor:
                    with cast(args.precision, device):
                        return model(x, t, condition).sample

                runs[who] = run
            seconds, ratios = race(runs, device, args.rounds, args.warmup)
            share = macs(pruned, dense.example(1, 128)) / macs(dense, dense.example(1, 128))
            row = show(f"{name} {pattern} batch {args.batch}", seconds, ratios)
            time = ratios["pruned"].median
            print(f"{'':28s} time {time:.3f}  macs {share:.3f}  gap {100 * (time / share - 1):+.1f} %", flush=True)
            rows.append(row | {"macs": share, "gap": time / share - 1})
            write(args, device, rows)


if __name__ == "__main__":
    main()
