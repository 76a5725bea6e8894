"""Whether decisions save the time that their multiply-accumulates promise: latency against executed MACs.

    python -m benchmarks.routing
    python -m benchmarks.routing --families dit --batches 1,16 --budgets 0.5
    python -m benchmarks.routing --families flux1 --device cuda --precision bf16 --batches 1

A random model of each family, dense, and with decisions that make up a budget. E-DiT: units closed and MLPs narrowed at
random, for each sample on its own. DyDiT: heads, groups of channels and tokens left out at random; `td_lora` is DyDiT
over TD-LoRA's additions. They run in turns.
`time` is the latency of a step over the dense model's, round by round, with DyDiT's slices made already; `macs` the
same of what both execute on these inputs, routers included; a method is as fast as it says where time is no more than
macs + 0.10. At a budget of 1 all is run: what routing itself costs. `flux1` are three true blocks of FLUX.1 at 1024 px,
for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

import edit
from benchmarks.common import arguments, cast, prepare, race, show, stirred, write
from benchmarks.pruned import FAMILIES
from edit.backbones.dit import DiTConfig
from edit.denoiser import Denoiser, Edit
from edit.measuring.flops import Flops
from edit.routing.dydit import DyDiT
from edit.routing.elastic import Elastic
from edit.routing.elastic_routers import forced
from edit.stream import Step
from edit.tuning.td_lora import TDLoRA

ELASTIC = {1.0: (1.0, (4,)), 0.75: (0.82, (3, 4)), 0.5: (0.6, (2, 3, 4))}  # open units, widths in quarters
DYDIT = {1.0: (1.0, 1.0, 1.0), 0.75: (0.65, 0.75, 0.8), 0.5: (0.35, 0.55, 0.6)}  # heads, groups, tokens
BELOW: dict[str, dict[str, Edit]] = {"dydit": {}, "td_lora": {"td_lora": TDLoRA()}}  # what DyDiT lies on


def flux1() -> Denoiser:
    """One double and two single blocks of FLUX.1-dev, a nineteenth of its depth, for latents of 128 x 128."""
    from edit.backbones.flux import FluxConfig

    return FluxConfig(num_layers=1, num_single_layers=2).build()


def dit_tiny() -> Denoiser:
    """One that shows on a CPU that all of this runs, for a test."""
    return DiTConfig(16, 4, 2, 64, 3, 8, num_classes=10).build()


def elastic(dense: Denoiser, budget: float) -> tuple[Denoiser, Callable[[int, Tensor, Any], Tensor]]:
    """With routers, and a rule that decides for them: the same at every call."""
    denoiser = edit.apply(deepcopy(dense), {"elastic": Elastic()}).eval()
    share, widths = ELASTIC[budget]

    def rule(unit: int, p: Tensor, q: Tensor | None) -> Tensor:
        generator = torch.Generator().manual_seed(unit)
        opened = torch.rand(len(p), generator=generator) < share
        width = torch.tensor(widths)[torch.randint(len(widths), (len(p),), generator=generator)]
        return (opened * width).to(p.device)

    return denoiser, rule


def dydit(dense: Denoiser, budget: float, inputs: tuple, below: Mapping[str, Edit]) -> Denoiser:
    """With routers that leave out as much on these inputs, on edits that come before them."""
    denoiser = edit.apply(deepcopy(dense), {**below, "dydit": DyDiT()}).eval()
    if budget == 1:
        return denoiser
    own: Any = denoiser.edits["dydit"]
    heads, groups, tokens = DYDIT[budget]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(own.width.units, 2, own.heads - 1, generator=generator)
    logits = torch.where(drawn < torch.tensor([heads, groups])[:, None], 1.0, -1.0)
    own.width.weight.data.zero_()
    own.width.bias.data.copy_(logits.flatten())
    for router in own.tokens:
        torch.nn.init.normal_(router.out.weight)
        seen: list[Tensor] = []
        hook = router.out.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out.detach().float()))
        denoiser(*inputs)
        hook.remove()
        router.out.bias.data.sub_(torch.cat(seen).flatten().quantile(1 - tokens).to(router.out.bias.dtype))
    return denoiser


def executed(run: Callable[[], Any]) -> int:
    with Flops() as flops:
        run()
    return flops.total // 2


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--families", default="dit,flux", help="of dit, flux, sd3, pixart, flux1, dit_tiny (dit,flux)")
    parser.add_argument(
        "--methods",
        default="elastic,dydit",
        help="of elastic, dydit, td_lora; the last two know dit and flux (elastic,dydit)",
    )
    parser.add_argument("--budgets", default="1.0,0.75,0.5", help="(1.0,0.75,0.5)")
    parser.add_argument("--batches", default="1,16", help="samples at a time (1,16)")
    args = parser.parse_args()
    if unknown := set(args.methods.split(",")) - {"elastic", *BELOW}:
        parser.error(f"--methods are elastic, {', '.join(BELOW)}, got {', '.join(sorted(unknown))}")
    device = prepare(args)
    rows, known = [], FAMILIES | {"flux1": flux1, "dit_tiny": dit_tiny}
    for name in args.families.split(","):
        dense = stirred(known[name], args, device)
        for batch in map(int, args.batches.split(",")):
            x = torch.randn(batch, *dense.sample_shape, device=device)
            t = torch.full((batch,), 0.5, device=device)
            condition = dense.example(batch, 512 if name == "flux1" else 128).map(lambda v: v.to(device))

            def run(model: Denoiser, step: Step, x=x, t=t, condition=condition) -> Tensor:
                with cast(args.precision, device):
                    return model(x, t, condition, step=step).sample

            def ruled(model: Denoiser, step: Step, rule: Callable, run=run) -> Tensor:
                with forced(model, rule):
                    return run(model, step)

            whole = executed(lambda run=run, dense=dense: run(dense, Step(0, 1, 0.5)))
            for method in args.methods.split(","):
                for budget in map(float, args.budgets.split(",")):
                    step = Step(0, 1, 0.5)  # one of a generation, where what is prepared once stays
                    if method == "elastic":
                        model, rule = elastic(dense, budget)
                        routed = partial(ruled, model, step, rule)
                    else:
                        routed = partial(run, dydit(dense, budget, (x, t, condition), BELOW[method]), step)
                    routed()
                    macs = executed(routed) / whole
                    runs = {"dense": partial(run, dense, Step(0, 1, 0.5)), "routed": routed}
                    seconds, ratios = race(runs, device, args.rounds, args.warmup)
                    row = show(f"{name} {method} {budget:g} batch {batch}", seconds, ratios)
                    time = ratios["routed"].median
                    print(f"{'':28s} time {time:.3f}  macs {macs:.3f}  over {time - macs:+.3f}", flush=True)
                    rows.append(row | {"macs": macs, "over": time - macs})
                    write(args, device, rows)


if __name__ == "__main__":
    main()
