"""Forward + backward of our DiT against a plain DiT and that of diffusers; a recipe's step against the bare loop.

    python -m benchmarks.train_step --sizes tiny,s_4 --threads 2
    python -m benchmarks.train_step --device cuda --sizes s_2,b_2,xl_2 --batch 32 --precision bf16 --compile
    python -m benchmarks.train_step --recipe --batch 128 --rounds 200

A ratio above 1 says that ours is faster.
"""

from __future__ import annotations

import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import Predict, arguments, cast, contests, from_file, prepare, race, show, write
from edit.denoiser import Denoiser
from edit.measuring.timing import Spread
from edit.stream import Condition


def recipe_step(device: torch.device, batch: int, rounds: int, warmup: int, precision: str) -> dict[str, Any]:
    """Training steps of `recipes.steps.diffusion.Diffusion` under Lightning against the same step as a bare loop.

    On the digits, with the default run's model, optimiser and log; both read through their own `EndlessLoader`. After
    each step of the trainer one bare step is run and timed, so that both see the same machine. The recipe's time is all
    that lies between: hooks, loader, noise, logging.
    """
    import lightning.pytorch as pl

    from data.loader import EndlessLoader
    from data.sets.digits import Digits
    from edit.objectives import FlowMatching, LogitNormal
    from recipes.config.schema import OptimizerConfig, TrainerConfig
    from recipes.runtime.callbacks import Metrics
    from recipes.runtime.loggers import CSVLogger
    from recipes.runtime.trainer import make_trainer
    from recipes.settings import Training
    from recipes.steps.diffusion import Diffusion
    from recipes.training import quiet

    quiet()
    steps, split = warmup + rounds, Digits().train()
    spec = from_file("backbone", "dit_digits")
    settings = OptimizerConfig(lr=2e-3, betas=[0.9, 0.99], warmup=100, schedule="cosine")
    objective = FlowMatching(LogitNormal())
    torch.manual_seed(0)
    bare = BareLoop(spec.build().to(device), iter(EndlessLoader(split, batch, steps, seed=1)), steps, precision)
    seconds: dict[str, list[float]] = {"recipe": [], "bare": []}

    class Turns(pl.Callback):
        mark = 0.0

        def on_train_batch_end(self, *_: Any) -> None:
            now = clock(device)
            if self.mark:
                seconds["recipe"].append(now - self.mark)
            bare.step()
            self.mark = clock(device)
            seconds["bare"].append(self.mark - now)

    module = Diffusion(spec.build, spec.build, objective, Training(settings, steps, ema_decay=0.995, ema_ramp=True))
    kind = "gpu" if device.type == "cuda" else "cpu"
    kinds = {"fp32": "32-true", "bf16": "bf16-mixed"}
    with tempfile.TemporaryDirectory() as folder:
        config = TrainerConfig(max_steps=steps, accelerator=kind, precision=kinds[precision])
        trainer = make_trainer(
            config, Path(folder), [CSVLogger(Path(folder) / "metrics.csv")], [Metrics(10, batch), Turns()]
        )
        trainer.fit(module, EndlessLoader(split, batch, steps))
    recipe, plain = seconds["recipe"][-rounds:], seconds["bare"][-rounds:]
    ratio = Spread.of(b / a for a, b in zip(recipe, plain, strict=True))
    times = {"recipe": Spread.of(recipe), "bare": Spread.of(plain)}
    return show(f"recipe digits batch {batch}", times, {"bare": ratio})


class BareLoop:
    """The default run's training step with nothing around it."""

    def __init__(self, denoiser: Denoiser, batches: Any, steps: int, precision: str):
        self.denoiser, self.ema, self.batches = denoiser.train(), deepcopy(denoiser), batches
        self.ema.requires_grad_(False)
        self.device, self.precision = next(denoiser.parameters()).device, precision
        self.optimizer = torch.optim.AdamW(
            denoiser.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def step(self) -> None:
        batch = next(self.batches)
        x, label = batch["x"].to(self.device), batch["label"].to(self.device)
        label = torch.where(torch.rand(len(x), device=x.device) < 0.1, self.denoiser.config["num_classes"], label)
        t = torch.randn(len(x), device=x.device).sigmoid()
        noise = torch.randn_like(x)
        at = t[:, None, None, None]
        with cast(self.precision, self.device):
            out = self.denoiser((1 - at) * x + at * noise, t, Condition(label=label)).sample
        F.mse_loss(out.float(), noise - x).backward()
        nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.denoiser.parameters()), 0.005)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--recipe", action="store_true", help="time the recipe's step on the digits instead")
    args = parser.parse_args()
    device = prepare(args)
    if args.recipe:
        write(args, device, [recipe_step(device, args.batch, args.rounds, max(1, args.warmup), args.precision)])
        return
    rows = []
    for contest in contests(args, device):
        x, t, y = contest.batch
        target = torch.randn_like(x)

        def step(f: Predict, model: nn.Module, x=x, t=t, y=y, target=target) -> None:
            model.zero_grad(set_to_none=True)
            with cast(args.precision, device):
                loss = F.mse_loss(f(x, t, y).float(), target)
            loss.backward()

        runs = {name: lambda f=f, m=contest.models[name], go=step: go(f, m) for name, f in contest.predict.items()}
        seconds, ratios = race(runs, device, args.rounds, args.warmup)
        rows.append(show(f"{contest.size} batch {args.batch}", seconds, ratios))
        write(args, device, rows)


if __name__ == "__main__":
    main()
