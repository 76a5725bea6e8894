"""Forward + backward of our DiT against a plain DiT and that of diffusers; a recipe's step against the bare loop.

    python -m benchmarks.train_step --sizes tiny,s_4 --threads 2
    python -m benchmarks.train_step --device cuda --sizes s_2,b_2,xl_2 --batch 32 --precision bf16 --compile
    python -m benchmarks.train_step --recipe --sizes digits --batch 128

A ratio above 1 says that ours is faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import (
    Predict,
    arguments,
    cast,
    check_equal,
    config_of,
    inputs,
    predictors,
    prepare,
    race,
    show,
    trio,
    write,
)


def main() -> None:
    parser = arguments(__doc__)
    args = parser.parse_args()
    device = prepare(args)
    rows = []
    for size in args.sizes.split(","):
        config = config_of(size)
        models = trio(config, device, args.compile)
        predict = predictors(models)
        x, t, y = inputs(config, args.batch, device)
        target = torch.randn_like(x)
        with cast(args.precision, device):
            check_equal(predict, x, t, y, tolerance=1e-3 if args.precision == "fp32" else 0.1)

        def step(f: Predict, model: nn.Module, x=x, t=t, y=y, target=target) -> None:
            model.zero_grad(set_to_none=True)
            with cast(args.precision, device):
                loss = F.mse_loss(f(x, t, y).float(), target)
            loss.backward()

        runs = {name: lambda f=f, m=models[name], go=step: go(f, m) for name, f in predict.items()}
        seconds, ratios = race(runs, device, args.rounds, args.warmup)
        rows.append(show(f"{size} batch {args.batch}", seconds, ratios))
    write(args, device, rows)


if __name__ == "__main__":
    main()
