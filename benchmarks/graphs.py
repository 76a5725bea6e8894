"""Generations with static caches as graphs: what Python between kernels costs, and that the images are the same.

    python -m benchmarks.graphs --device cuda --sizes s_2,xl_2 --precision bf16 --steps 50
    python -m benchmarks.graphs --sizes tiny --steps 12 --rounds 2

A guided generation of a random DiT, dense and with each cache: as ever, and with each kind of evaluations recorded
once (`edit.caching.graphs`), in turns. A ratio is a time over that of the recorded one, so above 1 graphs are faster;
`dense` is the dense model as ever. `macs` is what the cache executes over the dense model's, `time` the same of
recorded generations. On a CPU a tape stands in for CUDA graphs: it shows that all of this runs, and is no faster.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import edit
from benchmarks.common import arguments, config_of, prepare, race, show, stir, write
from edit.caching.engine import Cached
from edit.caching.graphs import Graphed
from edit.caching.pab import PAB
from edit.caching.reuse import Reuse
from edit.caching.span_reuse import SpanReuse
from edit.caching.taylorseer import TaylorSeer
from edit.measuring.cost import cost
from edit.predictions import default_objective
from edit.sampling import Sampler
from edit.solvers import Euler

CACHES: dict[str, Cached | None] = {
    "dense": None,
    "reuse": Reuse(3),
    "span_reuse": SpanReuse(3),
    "pab": PAB(),
    "taylorseer_module": TaylorSeer(4, 2, first=3),
    "taylorseer_last": TaylorSeer(4, 2, first=3, site="last"),
}
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}  # of images, relative to their largest number: the same kernels run


def checked(images: dict[str, Tensor], tolerance: float) -> float:
    """The largest difference between images. Raises ValueError if it is above the tolerance: nothing is timed then."""
    wanted, found = images.values()
    worst = float((found - wanted).abs().max() / wanted.abs().max())
    if not worst <= tolerance:
        raise ValueError(f"recorded evaluations make other images, by {worst:.1e}, more than {tolerance:.0e}")
    return worst


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(batch=1, sizes="s_2", rounds=5)
    parser.add_argument("--steps", type=int, default=50, help="evaluations of a generation (50)")
    parser.add_argument("--caches", default=",".join(CACHES), help=f"({','.join(CACHES)})")
    args = parser.parse_args()
    if unknown := set(args.caches.split(",")) - set(CACHES):
        parser.error(f"--caches are {', '.join(CACHES)}, got {', '.join(sorted(unknown))}")
    device, rows = prepare(args), list[dict[str, Any]]()
    for size in args.sizes.split(","):
        torch.manual_seed(0)
        plain = config_of(size).build().eval().to(device)
        stir(plain)
        sampler, samples = Sampler(Euler(args.steps), guidance=3.0), torch.arange(args.batch)
        objective, told = default_objective(plain), plain.example(args.batch)

        def run(model: Any, sampler=sampler, objective=objective, told=told, samples=samples) -> Tensor:
            # a cast that is kept would be of one recording's memory
            with torch.autocast(device.type, torch.bfloat16, args.precision == "bf16", cache_enabled=False):
                return sampler(model, objective, told, samples)

        dense = cost(plain, sampler, objective, told, args.batch).macs_per_image
        for name in args.caches.split(","):
            cache = CACHES[name]
            edits = {} if cache is None else {"cache": replace(cache)}
            model = edit.apply(deepcopy(plain), edits)
            graphed = Graphed(model)
            for _ in range(2):  # the first generation meets the kinds, the second records those that it met once
                run(graphed)
            worst = checked({"eager": run(model), "graphs": run(graphed)}, TOLERANCE[args.precision])
            runs = {"graphs": partial(run, graphed), "eager": partial(run, model), "dense": partial(run, plain)}
            seconds, ratios = race(runs, device, args.rounds, args.warmup)
            counted = cost(model, sampler, objective, told, args.batch)
            more = {"macs": counted.macs_per_image / dense, "time": 1 / ratios["dense"].median}
            more |= {"kinds": len(graphed.kinds), "worst": worst, "held": counted.held or 0}
            rows.append(show(f"{size} {name} batch {args.batch}", seconds, ratios) | more)
            write(args, device, rows)


if __name__ == "__main__":
    main()
