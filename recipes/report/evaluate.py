"""From artifacts to a report: what eval.py does, and what train.py does when a run ends.

Every artifact is sampled with the same noise and labels, and measured against held-out images of its own data set.
Torch is imported inside: settings are checked before anything heavy is loaded.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.names import legible
from edit.inputs.limits import LAST_SEED
from recipes.config.check import describe, rule, suggest
from recipes.config.schema import UserError, check
from recipes.report.yardstick import GRID, Yardstick, progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from data.split import DataSet
    from edit.artifacts.checkpoint import Artifact
    from edit.denoiser import Condition, Denoiser
    from edit.measuring.cost import Cost

ROUTED = 60  # images whose MACs are counted, and whose decisions are drawn, where an edit decides: of all classes alike
DEFAULTS = Path(__file__).parents[2] / "configs" / "eval.yaml"
FORMAT = 1  # of report.json


@dataclass
class Settings:
    """What is measured and how; the defaults and their meaning are in configs/eval.yaml."""

    n: int = rule(MISSING, low=8, high=1_000_000)
    guidance: list[float] = rule(MISSING, low=0)
    steps: int | None = rule(MISSING, low=1, high=10_000)
    reference_guidance: float | None = rule(MISSING, low=0)
    seed: list[int] = rule(MISSING, low=0, high=LAST_SEED)
    batch: int = rule(MISSING, low=1, high=100_000)
    device: str = MISSING
    features: str = MISSING
    references: int = rule(MISSING, low=8, high=10_000_000)
    rounds: int = rule(MISSING, low=0, high=10_000)
    cache: str | None = MISSING
    trusted: list[str] = MISSING


def accepts_text(hint: Any) -> bool:
    """Whether an annotation names text, alone or among others."""
    return hint is str or any(map(accepts_text, get_args(hint)))


def settings(overrides: Mapping[str, Any]) -> Settings:
    """configs/eval.yaml with some keys changed; one value may stand for a list.

    Raises:
        UserError: for an unknown key, a wrong type or a value out of range
    """
    cfg: DictConfig = OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.load(DEFAULTS))  # type: ignore
    hints = get_type_hints(Settings)
    for key, value in overrides.items():
        if key not in hints:
            raise UserError(f"unknown key '{key}'{suggest(key, hints)}")
        if isinstance(value, ListConfig):
            value = OmegaConf.to_container(value, resolve=True)  # a list that refers to its run's world, for example
        if str(hints[key]).startswith("list") and not isinstance(value, list | tuple):
            value = [value]
        values = value if isinstance(value, list | tuple) else [value]
        text = any(isinstance(v, str) and "${" not in v for v in values)
        if text and not accepts_text(hints[key]):  # OmegaConf would convert "4"
            raise UserError(f"{key}: expected {describe(hints[key])}, got {value!r}")
        try:
            cfg[key] = value
        except OmegaConfBaseException as error:
            raise UserError(f"{key}: expected {describe(hints[key])}, got {value!r}") from error
    if errors := check(cfg):
        raise UserError(errors[0])
    for key in ("guidance", "seed"):
        if not cfg[key]:
            raise UserError(f"{key}: expected at least one value, got an empty list")
    chosen = OmegaConf.to_object(cfg)
    assert isinstance(chosen, Settings)
    return chosen


# ---- several artifacts ----------------------------------------------------------------------------------------------


def run(
    paths: Sequence[Path], chosen: Settings, out: Path, reference: Path | None = None, debug: bool = False
) -> dict[str, Any]:
    """Measure artifacts, print the comparison, write report.json, report.html and the grids into `out`.

    Of several artifacts, one that cannot be measured becomes a row that says why.

    Args:
        paths: artifact or run folders
        chosen: what to measure
        out: folder, made if need be
        reference: artifact whose images, from the same noise, the others are compared with
        debug: let the first error through

    Returns:
        The report, as in report.json.

    Raises:
        UserError: if no artifact could be measured
    """
    from recipes.report.page import show, write_report

    device = pick_device(chosen.device)
    names = short_names(paths)
    report: dict[str, Any] = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(device),
        "settings": asdict(chosen) | {"reference": None if reference is None else os.fspath(reference)},
        "artifacts": [],
    }
    original = None if reference is None else Reference(reference)
    for path, name in zip(paths, names, strict=True):
        try:
            report["artifacts"].append(evaluate(path, name, chosen, out, device, original))
        except Exception as error:  # whatever a damaged artifact raises: the numbers of the others are not lost
            if debug:
                raise
            sentence = " ".join(str(error).split())
            if not isinstance(error, UserError | ValueError | OSError):
                sentence = f"{type(error).__name__}: {sentence}; debug=true shows the traceback"
            if len(paths) == 1:
                raise UserError(f"{path} cannot be evaluated: {sentence}") from error
            report["artifacts"].append({"name": name, "path": os.fspath(path), "error": sentence})
    if all("error" in a for a in report["artifacts"]):
        first = report["artifacts"][0]
        raise UserError(f"none of the {len(paths)} artifacts can be evaluated; {first['path']}: {first['error']}")
    files = write_report(report, out)
    show(report)
    print("report    " + "\n          ".join(map(str, files)), flush=True)
    return report


def run_folder(artifact: Path) -> Path:
    """The folder of the run that made an artifact, or the artifact's own."""
    return artifact.parent if artifact.name == "artifact" else artifact


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the run folders' paths that tell them apart."""
    folders = [run_folder(p.resolve()) for p in paths]
    depth = 1
    while len({f.parts[-depth:] for f in folders}) < len(set(folders)):
        depth += 1
    return [legible("/".join(f.parts[-depth:])) for f in folders]


def pick_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda`, `cuda:1`, ... means here.

    Raises:
        UserError: if there is no such device
    """
    import torch

    from edit.measuring.cost import find_device

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return find_device(name)
    except ValueError as error:
        raise UserError(str(error)) from error


def environment(device: torch.device) -> dict[str, Any]:
    """What a number depends on besides artifact and settings."""
    import torch

    import edit

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    def git(*words: str) -> str:
        try:
            here = Path(__file__).parent
            return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    cpu = platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({cpu})",
        "threads": torch.get_num_threads(),
        "revision": git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
        "edit": edit.__version__,
        "torch": torch.__version__,
        "diffusers": installed("diffusers"),
        "transformers": installed("transformers"),
        "torchmetrics": installed("torchmetrics"),
        "python": platform.python_version(),
    }


# ---- one artifact ---------------------------------------------------------------------------------------------------


class Reference:
    """The artifact that others are compared with. Its pictures are made once for all of them, where memory allows."""

    KEPT = 2**30  # bytes

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, list[Tensor]] = {}

    def pictures(
        self, guidance: float, chosen: Settings, device: torch.device, space: Yardstick, who: str, common: Sequence[Any]
    ) -> Iterator[Tensor]:
        """uint8 b y x 3 for each batch of `edit.measuring.quality.generate`; `who`: the data set."""
        import edit
        from edit.measuring.quality import generate

        key = f"{guidance} {common[2]} {who}"
        if key in self.known:
            yield from self.known[key]
            return
        artifact = edit.load(self.path, device, tuple(chosen.trusted))
        # its own solver and steps: the same noise is what makes a pair
        own = sized(adjusted(artifact, guidance, None), space.shape)
        kept: list[Tensor] = []
        for x in generate(artifact.denoiser, artifact.objective, own, *common):
            kept.append(space.data.to_images(x).cpu())
            if sum(map(len, kept)) == chosen.n and chosen.n * kept[0][0].numel() <= self.KEPT:
                self.known[key] = kept
            yield kept[-1]


def evaluate(
    path: Path, name: str, chosen: Settings, out: Path, device: torch.device, reference: Reference | None
) -> dict[str, Any]:
    """Sample one artifact at every guidance weight and measure quality and cost; grids go to `out`/grids.

    Returns:
        JSON values: who it is, how it was measured, and one entry of `results` per guidance weight.

    Raises:
        UserError, ValueError, OSError: if it cannot be measured
    """
    import torch

    import edit
    from edit.edits import describe as described
    from edit.measuring.cost import cost
    from recipes.report.page import save_grid
    from recipes.report.routing_map import decides

    artifact = edit.load(path, device, tuple(chosen.trusted))
    data = build_data(artifact, chosen.trusted)
    # what a teacher made of an embedded world is measured as that world: it has a checker, and held-out captions
    world = getattr(data, "world", None)
    data = world or data
    check_told(artifact.denoiser, data)
    space = Yardstick.of(data, artifact.data, chosen, device)
    condition = conditions(data)
    columns = data.num_classes if data.num_classes and data.num_classes <= 12 else 8
    file = f"grids/{name.replace('/', '_')}"
    save_grid(space.some_real, out / f"{file}_real.png", columns)

    results = []
    for guidance in chosen.guidance:
        sampler = adjusted(artifact, guidance, chosen.steps)
        sets, seconds = [], 0.0
        for seed in chosen.seed:
            with progress(f"{name} w={guidance:g} seed {seed}", chosen.n) as done:
                measured, images, took = sample_and_measure(
                    artifact, sampler, reference, condition, space, seed, chosen, done
                )
            sets.append(measured)
            seconds += took
            if seed == chosen.seed[0]:
                save_grid(images, out / f"{file}_w{guidance:g}.png", columns)
        counted = cost(
            artifact.denoiser,
            sampler,
            artifact.objective,
            condition(torch.zeros(1, dtype=torch.int64)),
            real=bool(artifact.denoiser.applied),  # an edit may decide by what it sees
            rounds=chosen.rounds,
        )
        parts = {"cost": counted.as_dict(), "routing": {}, "routing_maps": {}}
        if decides(artifact.denoiser):
            stem = f"{name.replace('/', '_')}_w{guidance:g}"
            parts = decided(counted, artifact, sampler, condition, space, chosen, out, stem)
        results.append(
            {
                "guidance": guidance,
                "sampler": described(sampler),
                "n": chosen.n,
                "seed": chosen.seed,
                "quality": space.quality(sets),
                "compared": space.compared(sets),
                **parts,
                "cost": parts["cost"] | {"images_per_second": chosen.n * len(chosen.seed) / seconds},
                "grid": f"{file}_w{guidance:g}.png",
            }
        )
    denoiser = artifact.denoiser
    return {
        "name": name,
        "path": os.fspath(path),
        "backbone": denoiser.name,
        "config": denoiser.config,
        "dtype": str(next(denoiser.parameters()).dtype).removeprefix("torch."),
        "edits": {k: described(e) for k, e in denoiser.applied.items()},
        "folded": denoiser.folded,
        "data": artifact.data,
        "run": artifact.run,
        "labels": "balanced: sample k has class k modulo the number of classes" if data.num_classes else "of the data",
        "extractor": space.identity(),
        "reference": space.description | {"grid": f"{file}_real.png", "world": world and type(world).__name__},
        "results": results,
    }


def decided(
    counted: Cost,
    artifact: Artifact,
    sampler: Any,
    condition: Callable[[Tensor], Condition],
    space: Yardstick,
    chosen: Settings,
    out: Path,
    stem: str,
) -> dict[str, Any]:
    """Where edits decide: one more generation of the first images, of which all is counted, told and drawn.

    Returns:
        cost: as `counted`, with MACs that are means over these images; `share`: of what the same model needs without
            the edits that decide; `counted`: how many images. There is no one number of activated parameters or of the
            time of a forward
        routing: numbers by edit and quantity
        routing_maps: each edit's picture in `out`
    """
    import torch

    from edit.measuring.cost import count_generation, twin
    from recipes.report.page import save_png
    from recipes.report.routing_map import SHOWN, Decisions, draw, groups, numbers

    data, count = space.data, min(chosen.n, chosen.batch, ROUTED)
    first = torch.arange(count)
    told, negative = condition(first), null_condition(data)
    seen, samples = Decisions(artifact.denoiser), []

    def generate(*what: Any) -> Tensor:
        x = sampler(*what, seed=chosen.seed[0], negative=negative, shape=space.shape, watch=seen)
        samples.append(x[:SHOWN])
        return x

    run = count_generation(artifact.denoiser, generate, artifact.objective, told, count)  # type: ignore[arg-type]
    dense = partial(sampler, negative=negative, shape=space.shape)
    whole = count_generation(twin(artifact.denoiser, decided=False), dense, artifact.objective, told, count)
    macs, share = run.macs / count, run.macs / whole.macs
    missed = tuple(sorted({*run.uncounted, *whole.uncounted}))
    counted = replace(counted, macs=round(macs / run.forwards), macs_per_image=round(macs), uncounted=missed)
    costs = replace(counted, forward=None).as_dict()
    costs |= {"activated": None, "share": share, "counted": count}
    costs["training_flops"] = round(6 * whole.macs / whole.forwards / count)  # while training all is run

    labels = first % data.num_classes if data.num_classes else None
    whom = groups(labels, captions(space.checked or data, count), data.classes)
    pictures, maps = {}, seen.maps()
    for name, found in maps.items():
        pictures[name] = f"grids/routing_{stem}_{name.replace('/', '_')}.png"
        picture = draw(found, whom, lambda k: data.to_images(samples[0][k : k + 1])[0].cpu().numpy())
        save_png(picture, out / pictures[name])
    return {"cost": costs, "routing": {n: numbers(m) for n, m in maps.items()}, "routing_maps": pictures}


def build_data(artifact: Artifact, trusted: Sequence[str] = ()) -> DataSet:
    """The data set that an artifact was trained on, from its own description.

    Raises:
        UserError: if it does not say, or names something outside of `data` and the trusted packages
    """
    from data.split import opened

    if "_target_" not in artifact.data:
        raise UserError(f"{artifact.path} does not say which data it was trained on: it was not made by train.py")
    try:
        return opened(artifact.data, trusted)
    except (ValueError, OSError) as error:
        raise UserError(f"the data set of {artifact.path} cannot be opened: {error}") from error


def conditions(data: DataSet) -> Callable[[Tensor], Condition]:
    """The condition of sample numbers: balanced classes, or the texts of the real samples in order."""
    from edit.denoiser import Condition

    if data.num_classes:
        return lambda numbers: Condition(label=numbers % data.num_classes)
    split = data.heldout() or data.train()
    names = [f.name for f in fields(Condition)]

    def of(numbers: Tensor) -> Condition:
        from data.loader import collate

        samples = [split.sample(int(k) % len(split), int(k)) for k in numbers]
        batch = collate([{key: s[key] for key in names if key in s} for s in samples])
        return Condition(**batch)

    return of


def captions(data: DataSet, count: int) -> list[str]:
    """What the conditions of the first samples say, in words where the data has them."""
    told = getattr(data.heldout() or data.train(), "captions", None)
    return [told[k % len(told)] if told else f"sample {k}" for k in range(count)]


def check_told(denoiser: Denoiser, data: DataSet) -> None:
    """Raises ValueError if the denoiser cannot be told what this data tells."""
    import torch

    from edit.backbones.stock import StockDenoiser

    told = conditions(data)(torch.arange(1))
    device = next(denoiser.parameters()).device
    told = told.map(lambda v: v.to(device))
    denoiser.pack(torch.zeros(1, *data.shape, device=device), torch.ones(1, device=device), told)
    if isinstance(denoiser, StockDenoiser) and hasattr(data, "text_length"):
        denoiser.need_length(data.text_length)


def null_condition(data: DataSet) -> Condition | None:
    """The data set's own condition of no text, one for all samples; None where it has none."""
    from edit.denoiser import Condition

    null = getattr(data, "null", None)
    return None if null is None else Condition(**{name: value[None] for name, value in null.items()})


def adjusted(artifact: Artifact, guidance: float, steps: int | None) -> Any:
    """The artifact's sampler with another guidance weight, which a model with an input for it is told, and other steps.

    Raises:
        UserError: if other steps are asked of a solver that has its own
    """
    told = artifact.denoiser.config.get("guidance_embeds")
    weight = {"guidance": 1.0, "told": float(guidance)} if told else {"guidance": float(guidance)}
    sampler = replace(artifact.sampler, **weight)
    if steps is None or steps == sampler.solver.steps:
        return sampler
    if "steps" not in {f.name for f in fields(sampler.solver)}:
        raise UserError(f"steps={steps}, but this model is sampled at times of its own, {sampler.solver}: leave it out")
    return replace(sampler, solver=replace(sampler.solver, steps=steps))


def sized(sampler: Any, shape: tuple[int, ...]) -> Any:
    """The sampler, making samples of this shape whatever the denoiser's default is."""
    return partial(sampler, shape=shape)


def sample_and_measure(
    artifact: Artifact,
    sampler: Any,
    reference: Reference | None,
    condition: Callable[[Tensor], Condition],
    space: Yardstick,
    seed: int,
    chosen: Settings,
    done: Callable[[float], None],
) -> tuple[dict[str, Tensor], Tensor, float]:
    """Numbers for each of n images, the first images, and the seconds that sampling took."""
    import torch

    from edit.measuring.quality import generate, joined

    numbers = torch.arange(chosen.n)
    null = null_condition(space.data)
    samples = generate(
        artifact.denoiser,
        artifact.objective,
        sized(sampler, space.shape),
        condition,
        numbers,
        seed,
        chosen.batch,
        done,
        null,
    )
    others = None
    if reference is not None:
        own = sampler.guidance if sampler.told is None else sampler.told
        weight = own if chosen.reference_guidance is None else chosen.reference_guidance
        common = (condition, numbers, seed, chosen.batch, lambda images: None, null)
        device = next(artifact.denoiser.parameters()).device
        others = reference.pictures(weight, chosen, device, space, repr(sorted(artifact.data.items())), common)
    measured, first, seconds = [], [], 0.0
    for start in range(0, chosen.n, chosen.batch):
        begin = time.perf_counter()
        x = next(samples)
        images = space.data.to_images(x).cpu()  # waits for the device, so the clock is right
        seconds += time.perf_counter() - begin
        other = None if others is None else next(others)
        measured.append(space.measure(x.cpu(), images, numbers[start : start + chosen.batch], other))
        if sum(map(len, first)) < GRID:
            first.append(images[: GRID - sum(map(len, first))])
    return joined(measured), torch.cat(first), seconds
