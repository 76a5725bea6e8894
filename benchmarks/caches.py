"""Our caches against those of diffusers and cache-dit: the same policy, model and pipeline, in turns in one process.

    pip install -e ".[bench]"
    python -m benchmarks.caches
    python -m benchmarks.caches --models tiny --policies "taylor last,span" --rounds 20 --json runs/caches.json
    python -m benchmarks.caches --models flux1 --device cuda --precision bf16

A generation by a stock FluxPipeline: dense, with our cache (`edit.attach`), and with what `to_diffusers` and
`to_cache_dit` make of it. `other/edit` is their time over ours in the same round: above 1 ours is faster; never to be
below. Nothing is timed unless the pictures agree. `bound` is the time of our generation over what it should take,
(executed / all multiply-accumulates) x our dense generation + the predictor alone: to be at most 1.10.

`tiny` is the smallest FLUX of the house, 16 image tokens, where Python takes the time; `wide` has 4 + 8 blocks, 512
wide, 144 tokens; `flux1` are three true blocks of FLUX.1 at 1024 px, for a GPU. A library that is not installed, or
that cannot express a policy, is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import edit
from benchmarks.caching import flux_tiny
from benchmarks.common import arguments, prepare, race, show, stirred, write
from benchmarks.routing import flux1
from edit.backbones.flux import Flux, FluxConfig
from edit.caching.branches import BranchCached
from edit.caching.engine import Cached
from edit.caching.first_block_cache import FirstBlockCache
from edit.caching.host_cache_dit import to_cache_dit
from edit.caching.host_diffusers import to_diffusers
from edit.caching.hosts import evaluations
from edit.caching.mag_cache import MagCache
from edit.caching.reuse import Reuse
from edit.caching.span_reuse import SpanReuse
from edit.caching.taylorseer import TaylorSeer
from edit.measuring.cost import count_generation, twin
from edit.measuring.timing import stopwatch
from edit.predictions import default_objective
from edit.sampling import Sampler
from edit.solvers import Euler
from edit.stream import Branch

WORDS = 64
CACHES: dict[str, Cached] = {
    "taylor last": TaylorSeer(4, 1, first=4, schedule="diffusers", site="last"),
    "taylor module": TaylorSeer(4, 1, first=4, schedule="diffusers"),
    "taylor span": TaylorSeer(4, 1, first=4, site="span", spare=(1, 0)),
    "span": SpanReuse(3),
    "reuse": Reuse(2),
    "first block": FirstBlockCache(0.99),
    "mag": MagCache(0.1, most=2, retention=0.2, length=10),
}


def wide() -> Flux:
    size = {"joint_attention_dim": 256, "pooled_projection_dim": 128, "sample_size": (24, 24)}
    return FluxConfig(num_layers=4, num_single_layers=8, num_attention_heads=8, attention_head_dim=64,
                      axes_dims_rope=(16, 24, 24), **size).build()  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {"tiny": flux_tiny, "wide": wide, "flux1": flux1}


def pipeline(model: Any) -> Any:
    """A stock pipeline around a transformer; it makes latents, so that its autoencoder is never run."""
    import diffusers

    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=16)
    made = diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer=model
    )
    made.set_progress_bar_config(disable=True)
    return made


def stock(net: Flux) -> Any:
    """A stock transformer around the very weights."""
    with torch.device("meta"):
        made = net.stock_class()(**{k: v for k, v in net.model.config.items() if not k.startswith("_")})
    made.load_state_dict(net.model.state_dict(keep_vars=True), assign=True)
    return made.eval()


def calls(net: Flux, args: Any, device: torch.device) -> dict[str, Any]:
    """Arguments of a pipeline."""
    g, dtype = torch.Generator().manual_seed(1), next(net.model.parameters()).dtype
    told = net.example(args.batch, WORDS).map(lambda v: torch.randn(v.shape, generator=g).to(device, dtype))
    rows, columns = net.sample_size
    latents = torch.randn(args.batch, rows * columns // 4, net.channels * 4, generator=g).to(device, dtype)
    found = {"prompt_embeds": told.text, "pooled_prompt_embeds": told.pooled, "latents": latents}
    size = {"height": 2 * (rows // 2), "width": 2 * (columns // 2)}
    return found | size | {"num_inference_steps": args.steps, "output_type": "latent", "return_dict": False}


def attached(net: Flux, cache: Cached | None) -> tuple[Any, Any]:
    pipe = pipeline(stock(net))
    denoiser = edit.attach(pipe)
    if cache is not None:
        edit.apply(denoiser, {"cache": replace(cache)})
        if isinstance(cache, MagCache):
            denoiser.edits["cache"].table.fill_(1.03)
    return pipe, denoiser


def hosted(net: Flux, denoiser: Any, steps: int) -> dict[str, Any]:
    """Pipelines with the same cache by the libraries that are there and can express it."""
    found = {}
    try:
        config = to_diffusers(denoiser, steps)
        found["diffusers"] = pipeline(stock(net))
        found["diffusers"].transformer.enable_cache(config)
    except ValueError as error:
        print(f"  {error}")
    if find_spec("cache_dit") is None:
        return found
    import cache_dit

    logging.getLogger("CACHE_DIT").setLevel(logging.WARNING)
    try:
        config, calibrator = to_cache_dit(denoiser, steps)
    except ValueError as error:
        print(f"  {error}")
        return found
    made = pipeline(stock(net))
    made.__class__ = type("FluxPipeline", (type(made),), {})  # of its own: it is the class that cache-dit changes
    cache_dit.enable_cache(made, cache_config=config, calibrator_config=calibrator)
    return found | {"cache-dit": made}


def predictor_seconds(
    denoiser: Any, cache: Cached, shape: tuple[int, int, int], mask: list[bool], device: Any
) -> float:
    """Of a generation: values are taken at computed steps and predicted at the others, one or one for each branch."""
    predictor = getattr(cache, "predictor", None)
    if predictor is None:
        return 0.0
    state: dict = {}
    value = Branch(torch.randn(shape, device=device))
    for s in range(3):
        predictor.observe(state, float(s), value)
    ahead = [stopwatch(lambda: predictor.predict(state, 4.0), device) for _ in range(31)]
    takes = [stopwatch(lambda s=s: predictor.observe(state, float(s), value), device) for s in range(5, 36)]
    one = [sorted(v)[15] for v in (ahead, takes)]
    places = len(cache.covers(denoiser)) if isinstance(cache, BranchCached) and not spanned(cache) else 1
    return places * sum(one[c] for c in mask)


def spanned(cache: Cached) -> bool:
    return isinstance(cache, TaylorSeer) and cache.site != "module"


@torch.no_grad()
def compared(name: str, net: Flux, policy: str, args: Any, device: torch.device) -> dict[str, Any]:
    """One row: dense, ours and the others in turns."""
    cache, words = CACHES[policy], calls(net, args, device)
    (plain, _), (ours, denoiser) = attached(net, None), attached(net, cache)
    pipes = {"edit": ours, **hosted(net, denoiser, args.steps), "dense": plain}
    pictures: dict[str, Tensor] = {n: p(**words)[0].float() for n, p in pipes.items()}
    for other in pictures.keys() - {"edit", "dense"}:
        apart = (pictures[other] - pictures["edit"]).abs().max() / pictures["edit"].abs().max()
        if not apart <= (5e-2 if args.precision == "bf16" else 1e-5):
            raise ValueError(f"{name}, {policy}: pictures of {other} and ours differ by {apart:.1e}: nothing was timed")
    seconds, ratios = race({n: partial(p, **words) for n, p in pipes.items()}, device, args.rounds, args.warmup)
    ratios.pop("fastest", None)
    row = show(f"{name} {policy}", seconds, ratios)
    given = Sampler(Euler(args.steps)), default_objective(net), net.example(args.batch, WORDS)
    if cache.batchwise or isinstance(cache, MagCache):  # decided by what is seen: no count on the meta device
        return row
    cached = edit.apply(deepcopy(net), {"cache": replace(cache)})
    macs = [count_generation(twin(d), *given, args.batch).macs for d in (cached, net)]
    mask = [cache.due(s, *((""),) * (not isinstance(cache, SpanReuse))) for s in evaluations(args.steps)]
    rows, columns = net.sample_size
    shape = (args.batch, rows * columns // 4 + WORDS, net.facts.width)
    extra = predictor_seconds(denoiser, cache, shape, mask, device)
    bound = macs[0] / macs[1] * seconds["dense"].median + extra
    print(f"{'':28s} macs {macs[0] / macs[1]:.3f}  bound {seconds['edit'].median / bound:.3f}")
    return row | {"macs": macs, "bound": bound}


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(batch=1, rounds=8, warmup=1)
    parser.add_argument("--models", default="tiny,wide", help="of tiny, wide, flux1 (tiny,wide)")
    parser.add_argument("--policies", default=",".join(CACHES), help="(all)")
    parser.add_argument("--steps", type=int, default=10, help="of a generation (10)")
    args = parser.parse_args()
    device, rows = prepare(args), []
    for name in args.models.split(","):
        net = stirred(MODELS[name], args, device)
        rows += [compared(name, net, policy, args, device) for policy in args.policies.split(",")]
    write(args, device, rows)


if __name__ == "__main__":
    main()
