"""Cost and decisions of a model whose work depends on the image, or whose edits tell decisions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.report.experts_map import Loading, draw_loads, idle_experts, load_numbers, loaded, together
from recipes.report.grids import save_png, strip
from recipes.report.routing_map import SHOWN, Decisions, draw, drawn, groups, numbers
from recipes.report.samples import Subject

if TYPE_CHECKING:
    from torch import Tensor

    from edit.denoiser import Denoiser
    from edit.measuring.cost import Cost, Count

ROUTED = 60  # images whose MACs are counted and whose decisions are drawn; classes are balanced


def tells(denoiser: Denoiser) -> bool:
    """Whether its work depends on the image, or its edits tell decisions or loads of experts."""
    return bool(drawn(denoiser) or loaded(denoiser)) or any(e.adaptive for e in denoiser.applied.values())


def measure_decisions(subject: Subject, sampler: Any, counted: Cost, out: Path, stem: str) -> dict[str, Any]:
    """Generate the first images once more; count what runs, draw what the edits decide, print experts without tokens.

    Args:
        subject: the artifact
        sampler: `adjusted` for it
        counted: its cost at one image, whose times and memory are kept
        out: folder of the report; pictures go to `out`/grids
        stem: part of the pictures' file names

    Returns:
        cost: as `counted`; with adaptive edits, MACs are means over these images; `share`: of the MACs that the same
            model needs without these edits; `counted`: number of images. `activated` and `forward` are None: parameters
            that run and the time of a forward differ between images
        routing: numbers by edit and quantity; of experts' loads by edit and "load"
        routing_maps: file of each edit's picture, below `out`
    """
    import torch

    from edit.data_set import captions, null_condition
    from edit.measuring.cost import count_generation, twin

    artifact, space, chosen = subject.artifact, subject.space, subject.chosen
    data, count = space.data, min(chosen.n, chosen.batch, ROUTED)
    first = torch.arange(count)
    condition, negative = subject.condition(first), null_condition(data)
    seen, loading, samples = Decisions(artifact.denoiser), Loading(artifact.denoiser), []

    def generate(*what: Any) -> Tensor:
        x = sampler(*what, seed=chosen.seed[0], negative=negative, shape=space.shape, watch=together(seen, loading))
        samples.append(x[:SHOWN])
        return x

    costs = counted.as_dict()
    if any(e.adaptive for e in artifact.denoiser.applied.values()):
        run = count_generation(artifact.denoiser, generate, artifact.objective, condition, count)  # type: ignore[arg-type]
        dense = partial(sampler, negative=negative, shape=space.shape)
        whole = count_generation(twin(artifact.denoiser, adaptive=False), dense, artifact.objective, condition, count)
        costs = means(counted, run, whole, count)
    else:
        generate(artifact.denoiser, artifact.objective, condition, first)

    labels = first % data.num_classes if data.num_classes else None
    whom = groups(labels, captions(space.checked or data, count), data.classes)
    pictures, maps = {}, seen.maps()
    for name, found in maps.items():
        pictures[name] = f"grids/routing_{stem}_{name.replace('/', '_')}.png"
        decides = artifact.denoiser.applied[name].decides
        picture = draw(found, whom, lambda k: strip(data.to_frames(samples[0][k : k + 1]))[0].cpu().numpy(), decides)
        save_png(picture, out / pictures[name])
    told: dict[str, Any] = {name: numbers(found) for name, found in maps.items()}
    for name, loads in loading.found().items():
        entry = name if name not in told else f"{name} experts"
        pictures[entry] = f"grids/experts_{stem}_{name.replace('/', '_')}.png"
        save_png(draw_loads(loads), out / pictures[entry])
        told[entry] = {"load": load_numbers(loads)}
        if idle := idle_experts(told[entry]["load"]):
            print(f"warning: {name}: in {count} images {idle}: raise its balance loss, or have fewer", flush=True)
    return {"cost": costs, "routing": told, "routing_maps": pictures}


def means(counted: Cost, run: Count, whole: Count, count: int) -> dict[str, Any]:
    """The cost of images whose work differs.

    Args:
        counted: at one image
        run: a generation of `count` images
        whole: the same, where all parts run
    """
    macs, missed = run.macs / count, tuple(sorted({*run.uncounted, *whole.uncounted}))
    counted = replace(counted, macs=round(macs / run.forwards), macs_per_image=round(macs), uncounted=missed)
    costs = replace(counted, forward=None).as_dict()
    costs |= {"activated": None, "share": run.macs / whole.macs, "counted": count}
    costs["training_flops"] = round(6 * whole.macs / whole.forwards / count)  # in training every part runs
    return costs
