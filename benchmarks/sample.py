"""Sampling with our DiT and Sampler against the same Euler loop around a plain DiT and that of diffusers.

    python -m benchmarks.sample --sizes tiny,s_4 --steps 10 --guidance 1.5
    python -m benchmarks.sample --device cuda --sizes xl_2 --steps 50 --precision bf16

The loops of the others are what researchers write: with guidance, both branches in one batch of twice the size. A ratio
above 1 says that ours is faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.common import Predict, arguments, cast, contests, prepare, race, show, write
from edit.objectives import FlowMatching
from edit.sampling import Sampler
from edit.solvers import Euler
from edit.stream import Condition


@torch.no_grad()
def plain_loop(f: Predict, x: Tensor, y: Tensor, null: int, steps: int, guidance: float) -> Tensor:
    ts = torch.linspace(1, 0, steps + 1, device="cpu").tolist()
    if guidance != 1:
        y = torch.cat((y, torch.full_like(y, null)))
    for t, t_next in zip(ts, ts[1:], strict=False):
        both = x if guidance == 1 else torch.cat((x, x))
        v = f(both, torch.full((len(both),), t, device=x.device), y).float()
        if guidance != 1:
            cond, uncond = v.chunk(2)
            v = uncond + guidance * (cond - uncond)
        x = x + (t_next - t) * v
    return x


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=10, help="Euler steps (10)")
    parser.add_argument("--guidance", default="1.0,1.5", help="guidance scales (1.0,1.5)")
    args = parser.parse_args()
    device = prepare(args)
    rows = []
    for contest in contests(args, device):
        x, _, y = contest.batch
        for guidance in map(float, args.guidance.split(",")):
            sampler = Sampler(Euler(args.steps), guidance)
            samples = torch.arange(args.batch)

            def ours(sampler=sampler, samples=samples, y=y, model=contest.models["edit"]) -> Tensor:
                with cast(args.precision, device):
                    return sampler(model, FlowMatching(), Condition(label=y), samples)

            def theirs(f: Predict, x=x, y=y, guidance=guidance, null=contest.config.num_classes) -> Tensor:
                with cast(args.precision, device):
                    return plain_loop(f, torch.randn_like(x), y, null, args.steps, guidance)

            runs = {"edit": ours} | {n: lambda f=f, go=theirs: go(f) for n, f in contest.predict.items() if n != "edit"}
            seconds, ratios = race(runs, device, args.rounds, args.warmup)
            rows.append(show(f"{contest.size} batch {args.batch} guidance {guidance:g}", seconds, ratios))
            write(args, device, rows)


if __name__ == "__main__":
    main()
