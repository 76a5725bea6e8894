"""Whether interval reuse saves the time that its multiply-accumulates promise, and what the cache itself costs.

    python -m benchmarks.caching
    python -m benchmarks.caching --families dit --intervals 1,2,3 --batch 4 --json runs/caching.json
    python -m benchmarks.caching --families flux1 --device cuda --precision bf16 --batch 1

A guided generation of a random model of each family, plain and with `Reuse(interval)`, in turns; cond and uncond share
a batch in both. `time` is the latency over the plain model's, round by round, with its quartiles; `macs` the same of
what both execute. Interval 1 repeats nothing: its time is what the cache costs, at most 1 / 0.97. `dit` is DiT-S/2,
`flux_tiny` the smallest FLUX of the house; `flux1` are three true blocks of FLUX.1 at 1024 px, for a GPU.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import edit
from benchmarks.common import arguments, cast, from_file, prepare, race, show, stirred, write
from benchmarks.pruned import FAMILIES
from benchmarks.routing import dit_tiny, flux1
from edit.caching.reuse import Reuse
from edit.denoiser import Denoiser
from edit.measuring.cost import count_generation, twin
from edit.predictions import KINDS, default_objective
from edit.sampling import Sampler, at_steps

BAR = 1 / 0.97  # time of interval 1 over the plain model's


def flux_tiny() -> Denoiser:
    """As in the world of its name: 16 image tokens, where Python takes the time."""
    return replace(from_file("backbone", "flux_tiny"), sample_size=(8, 8)).build()


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--families",
        default="dit,flux_tiny",
        help="of dit, flux, flux_tiny, sd3, pixart, flux1, dit_tiny (dit,flux_tiny)",
    )
    parser.add_argument("--intervals", default="1,2,3", help="(1,2,3)")
    parser.add_argument("--steps", type=int, default=6, help="of the solver (6)")
    args = parser.parse_args()
    device = prepare(args)
    rows, known = [], FAMILIES | {"flux_tiny": flux_tiny, "flux1": flux1, "dit_tiny": dit_tiny}
    for name in args.families.split(","):
        plain = stirred(known[name], args, device)
        models = {"plain": plain}
        for interval in map(int, args.intervals.split(",")):
            models[f"reuse {interval}"] = edit.apply(deepcopy(plain), {"reuse": Reuse(interval)})
        usual = Sampler(KINDS[plain.prediction].solver, guidance=3.0)
        sampler, samples = at_steps(usual, args.steps), torch.arange(args.batch)
        objective, condition = default_objective(plain), plain.example(args.batch, 16 if name == "flux_tiny" else 128)

        def run(model: Denoiser, sampler=sampler, objective=objective, told=condition, samples=samples) -> Tensor:
            with cast(args.precision, device):
                return sampler(model, objective, told, samples)

        macs = {n: count_generation(twin(m), sampler, objective, condition, args.batch).macs for n, m in models.items()}
        runs = {n: partial(run, m) for n, m in models.items()}
        seconds, ratios = race(runs, device, args.rounds, args.warmup)
        row = show(f"{name} batch {args.batch}", seconds, ratios)
        for n in list(models)[1:]:
            time, share = ratios[n], macs[n] / macs["plain"]
            bar = f"  bar {BAR:.3f}: {'kept' if time.median <= BAR else 'broken'}" if n == "reuse 1" else ""
            print(f"{'':28s} {n}: time {time.median:.3f} [{time.low:.3f}, {time.high:.3f}]  macs {share:.3f}{bar}")
        rows.append(row | {"macs": macs})
        write(args, device, rows)


if __name__ == "__main__":
    main()
