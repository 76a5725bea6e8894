"""From an artifact to what others load: a `diffusers` folder or pipeline, an original FLUX.1 file, a LoRA.

Live edits are folded into the weights; one that cannot be is named, and nothing is written. In a pipeline the scheduler
takes the times that the artifact is sampled at. The folder appears whole or not at all, with a model card that
says where the weights come from. Nothing is sent anywhere without `push=`.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import edit
from edit import edits as editing
from edit.artifacts.card import (
    Card,
    Licence,
    Origin,
    base_of,
    common,
    few_steps,
    licence_files,
    origin,
    origins,
    takes_text,
)
from edit.artifacts.checkpoint import Artifact, check_weights, default_objective, edits_of, load, save, split_state
from edit.backbones.stock import StockDenoiser
from edit.denoiser import Denoiser
from edit.inputs import trust
from edit.sampling import Sampler, default_sampler
from edit.solvers import FLOW_SCHEDULER as FLOW
from edit.solvers import Euler, StockEuler, times
from edit.tuning.lora import ADAPTER, LoRA

FORMAT = 1
MARK = "export.json"  # tells a former export, which may be replaced, from any other folder
LAYOUTS = ("diffusers", "single_file", "lora")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # the names that `diffusers` looks for
LORA_METADATA = "lora_adapter_metadata"
LINKED = 2**20  # bytes from which a component's file is linked rather than copied: weights, not settings


@dataclass(frozen=True)
class Settings:
    """What to export, and how.

    Args:
        artifact: artifact, run or `diffusers` folder, hub id, or an original FLUX.1 .safetensors file
        out: folder to write; it must not exist, be empty or hold a former export
        format: "diffusers", "single_file" (the original FLUX.1 layout) or "lora"
        dtype: of the weights, "bf16", "fp16" or "fp32"; None keeps them
        max_shard_size: of one weight file in a `diffusers` folder, such as 5GB or 500MB
        pipeline: folder of a stock pipeline whose other components are taken over
        teacher: folder or hub id of the model that this one was made from; None: what the run says
        license: of the weights; None: that of the teacher, where it is known
        push: hub id to upload to, into a private repository if it is new
        trusted: further packages, with commas between, whose edits may be imported
    """

    artifact: str
    out: str
    format: str = "diffusers"
    dtype: str | None = None
    max_shard_size: str = "5GB"
    pipeline: str | None = None
    teacher: str | None = None
    license: str | None = None
    push: str | None = None
    trusted: str = ""

    def __post_init__(self):
        if self.format not in LAYOUTS:
            raise ValueError(f"format is one of {', '.join(LAYOUTS)}, got {self.format}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype is one of {', '.join(DTYPES)}, got {self.dtype}; leave it out to keep the weights")
        if not re.fullmatch(r"[1-9]\d*[KMGT]B", self.max_shard_size):
            raise ValueError(f"max_shard_size is a size such as 5GB or 500MB, got {self.max_shard_size}")
        if self.pipeline and self.format != "diffusers":
            raise ValueError(f"pipeline= makes a diffusers folder: leave it out, or leave out format={self.format}")
        if self.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push):
            raise ValueError(f"push is a repository on the hub, owner/name, got {self.push}")


def export(settings: Settings, say: Callable[[str], None] = lambda stage: None) -> Path:
    """Write the export; with `push`, upload it too.

    Args:
        settings: what to write
        say: called with one line before each stage

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if the artifact or something of the pipeline is missing
        FileExistsError: if `out` holds something else than a former export
        ValueError: if an edit cannot be folded, or the model cannot be expressed in the format
        ConnectionError: if the upload failed; the folder is there
    """
    s, out = settings, Path(os.path.abspath(settings.out))
    refuse_foreign(out)
    index = pipeline_index(Path(s.pipeline)) if s.pipeline else {}
    say(f"reading {s.artifact}")
    artifact = read(s.artifact, tuple(filter(None, s.trusted.split(","))))
    found = origins(artifact.path, s.teacher)
    around = origin(s.pipeline) if s.pipeline else None
    all_parts = [*found, around] if found and around else found  # weights from nowhere we know of stay unknown
    licence = Licence.of(s.license) if s.license else common(all_parts)
    dtype = DTYPES[s.dtype] if s.dtype else None
    name = s.push or out.name
    bases = found  # an adapter stands on what it was trained on, not on what that was made from
    if s.format == "lora" and (start := origin(s.teacher) if s.teacher else base_of(artifact.path)):
        bases = [start]
    with replacing(out) as folder:
        say(f"writing {out}")
        if s.format == "lora":
            usage = write_lora(artifact, folder, dtype, bases[0] if bases else None)
        else:
            fold(artifact)
            if s.format == "single_file":
                usage = write_single_file(artifact.denoiser, folder / f"{out.name}.safetensors", dtype)
            elif s.pipeline:
                usage = write_pipeline(artifact, Path(s.pipeline), index, folder, dtype)
                write_model(artifact, folder / "transformer", dtype, s.max_shard_size)
            else:
                usage = write_model(artifact, folder, dtype, s.max_shard_size)
        base = next((o.hub for o in bases if o.hub), None)
        for file in licence_files([*found, around] if around else found):
            shutil.copyfile(file, folder / file.name)
        relation = "adapter" if s.format == "lora" else "finetune"
        tags = ("edit", "diffusion-transformer", *(("lora",) if s.format == "lora" else ()))
        card = Card(out.name, artifact, usage(name, base), relation, bases, found, around, licence, tags)
        (folder / "README.md").write_text(str(card), encoding="utf-8")
        mark = {"format": FORMAT, "layout": s.format, "edit": edit.__version__}
        (folder / MARK).write_text(json.dumps(mark, indent=2) + "\n")
        for file in folder.rglob("*.safetensors"):  # written for the owner alone; a link is not ours to change
            if file.stat().st_nlink == 1:
                shutil.copymode(folder / MARK, file)
    if licence.id == "unknown":
        say("the licence is unknown, the model card says so: give it with license=..., or the teacher with teacher=...")
    if s.push:
        say(f"uploading to {s.push}")
        upload(out, s.push)
    return out


# ---- what to export --------------------------------------------------------------------------------------------------


def read(path: str, trusted: tuple[str, ...] = ()) -> Artifact:
    """An artifact; an original FLUX.1 file, too."""
    if not path.endswith(".safetensors"):
        return load(path, trusted=trusted)
    from edit.artifacts.flux_single_file import read_original

    denoiser = read_original(path)
    return Artifact(Path(path), denoiser, default_objective(denoiser), default_sampler(denoiser))


def fold(artifact: Artifact) -> None:
    """Make all live edits part of the weights.

    Raises:
        ValueError: naming the edit that cannot be
    """
    denoiser = artifact.denoiser
    for name in reversed(list(denoiser.applied)):
        try:
            editing.fold(denoiser, name)
        except ValueError as error:
            raise ValueError(f"{artifact.path} cannot be exported, its edit {name!r} stays live: {error}") from error


# ---- formats: each writes weights and returns the code that loads them -----------------------------------------------

Usage = Callable[[str, str | None], str]  # (what the export is called, hub id of its base model) -> code


def write_model(artifact: Artifact, folder: Path, dtype: torch.dtype | None, max_shard_size: str) -> Usage:
    """A folder of the stock transformer class, and `edits.json` for `edit.load`.

    Raises:
        ValueError: if stock `diffusers` has no class for the model
    """
    a, denoiser = artifact, artifact.denoiser
    config, steps = stock_config(denoiser), steps_of(a)
    save(denoiser, folder, a.objective, a.sampler, a.data, a.run, dtype=dtype, max_shard_size=max_shard_size)
    name = config["_class_name"]

    def usage(export: str, base: str | None) -> str:
        lines = ["import torch", f"from diffusers import {', '.join(['DiffusionPipeline', name, *_needs(steps)])}", ""]
        lines += [f'transformer = {name}.from_pretrained("{export}", torch_dtype={_dtype(denoiser, dtype)})']
        around = base or "<the pipeline it was made from>"
        lines += [f'pipe = DiffusionPipeline.from_pretrained("{around}", transformer=transformer)']
        return "\n".join([*lines, *_schedule(steps), *_call(a, steps)])

    return usage


def write_pipeline(
    artifact: Artifact, source: Path, index: Mapping[str, Any], folder: Path, dtype: torch.dtype | None
) -> Usage:
    """Everything of a stock pipeline but its transformer. Large files are hard links where the disk allows.

    Where the artifact is sampled at other times than the pipeline's, its flow-matching scheduler is written anew.

    Raises:
        ValueError: if the pipeline has a transformer of another class
    """
    mine, other = stock_config(artifact.denoiser)["_class_name"], index["transformer"][1]
    if mine != other:
        raise ValueError(f"the pipeline {source} has a {other} as its transformer, the artifact is a {mine}")
    scheduler = read_scheduler(source, index)
    steps = steps_of(artifact, scheduler)
    own = ("transformer", "scheduler") if steps.scheduler else ("transformer",)
    for name in components(index):
        if name not in own:
            shutil.copytree(source / name, folder / name, copy_function=_take)
    if steps.scheduler:
        write_scheduler(steps.scheduler, source / "scheduler", folder / "scheduler")
    kept = {k: v for k, v in index.items() if k != "_name_or_path"}  # a folder of this machine
    (folder / "model_index.json").write_text(json.dumps(kept, indent=2) + "\n")
    of = _dtype(artifact.denoiser, dtype)

    def usage(export: str, base: str | None) -> str:
        lines = ["import torch", "from diffusers import DiffusionPipeline", ""]
        lines += [f'pipe = DiffusionPipeline.from_pretrained("{export}", torch_dtype={of})']
        return "\n".join([*lines, *_call(artifact, steps)])

    return usage


def read_scheduler(source: Path, index: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of a pipeline's scheduler, with its class; None: it has none.

    Raises:
        ValueError: if it cannot be read
    """
    if "scheduler" not in components(index):
        return None
    file = source / "scheduler" / "scheduler_config.json"
    try:
        return {**trust.read_json(file), "_class_name": index["scheduler"][1]}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.parent} is not the folder of a scheduler: {error}") from error


def write_scheduler(settings: Mapping[str, Any], source: Path, folder: Path) -> None:
    """A stock flow-matching scheduler of these settings; of the old one it has the unit of time.

    Raises:
        ValueError: if the old one's configuration cannot be read
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    try:
        unit = FlowMatchEulerDiscreteScheduler.from_pretrained(source).config["num_train_timesteps"]
    except OSError as error:
        raise ValueError(f"{source} is not the folder of a {FLOW}: {error}") from error
    FlowMatchEulerDiscreteScheduler(unit, **settings).save_pretrained(folder)


def write_single_file(denoiser: Denoiser, file: Path, dtype: torch.dtype | None) -> Usage:
    """One file in the original FLUX.1 layout.

    Raises:
        ValueError: if the model is not a FLUX.1
    """
    from edit.artifacts.flux_single_file import AXES, to_original

    if denoiser.name != "flux":
        raise ValueError(f"format=single_file is the original layout of FLUX.1, this is {denoiser.name}: leave it out")
    config, stock = denoiser.to_stock(denoiser.config, denoiser.model.state_dict())
    metadata = {"format": "pt", AXES: json.dumps(config["axes_dims_rope"])}
    save_file(_cast(to_original(stock), dtype), file, metadata)

    def usage(export: str, base: str | None) -> str:
        lines = ["# place it where your tool keeps diffusion models, for instance ComfyUI/models/diffusion_models", ""]
        lines += ["import torch", "from diffusers import FluxTransformer2DModel", ""]
        around = f', config="{base}", subfolder="transformer"' if base else ""
        of = _dtype(denoiser, dtype)
        lines += [f'transformer = FluxTransformer2DModel.from_single_file("{file.name}"{around}, torch_dtype={of})']
        return "\n".join(lines)

    return usage


def write_lora(artifact: Artifact, folder: Path, dtype: torch.dtype | None, base: Origin | None) -> Usage:
    """The factors of a LoRA as `diffusers` and `peft` name them.

    alpha / rank is multiplied into B and alpha = rank written down: readers that do not know the metadata take just
    that for granted, so that all agree.

    Args:
        artifact: with the LoRA live
        folder: to write into
        dtype: of the factors
        base: the model that the LoRA was trained on, which may have edits of its own

    Raises:
        ValueError: if the artifact's only edit beyond those of its base is not a LoRA, or its layers are not those of
            stock `diffusers`
    """
    from peft.tuners.lora import LoraLayer

    denoiser = artifact.denoiser
    lora = next((e for e in denoiser.applied.values() if isinstance(e, LoRA)), None)
    inherited = edits_of(base.path) if base and base.ours else []
    live = {name: e for name, e in denoiser.applied.items() if {"name": name, **editing.describe(e)} not in inherited}
    if changed := [e for e in denoiser.folded if e not in inherited]:
        raise ValueError(
            f"format=lora: {changed[0]['name']} has changed the weights that this LoRA stands on, which nobody else "
            "has: leave format=lora out to export the whole model"
        )
    if lora is None or len(live) > 1:
        there = ", ".join(f"{name} ({type(e).__name__})" for name, e in live.items()) or "none"
        raise ValueError(
            f"format=lora takes an artifact with a LoRA as its only live edit, this one has {there}: leave format=lora "
            "out to export the whole model"
        )
    if not isinstance(denoiser, StockDenoiser):
        raise ValueError(f"stock diffusers has other layers than our {denoiser.name}: leave format=lora out to fold it")
    own = split_state(denoiser, denoiser.state_dict())[1]
    state = {}
    for key, value in own.items():
        layer, _, factor = key.removeprefix("model.").partition(".lora_")  # factor: "A.default.weight"
        module = denoiser.model.get_submodule(layer)
        assert isinstance(module, LoraLayer)
        scaled = value if factor.startswith("A") else value * module.scaling[ADAPTER]
        state[f"transformer.{layer}.lora_{factor.replace(f'.{ADAPTER}', '')}"] = scaled
    layers = sorted({k.removeprefix("transformer.").partition(".lora_")[0] for k in state})
    settings = {"r": lora.rank, "lora_alpha": lora.rank, "bias": "none", "target_modules": layers}
    settings |= {"rank_pattern": {}, "alpha_pattern": {}}  # which diffusers 0.39 looks for
    packed = json.dumps({f"transformer.{k}": v for k, v in settings.items()})
    save_file(_cast(state, dtype), folder / LORA_WEIGHTS, {"format": "pt", LORA_METADATA: packed})

    stock, steps = stock_config(denoiser)["_class_name"], steps_of(artifact)

    def usage(export: str, hub: str | None) -> str:
        names, own, around = "DiffusionPipeline", [], f'"{hub or "<the pipeline it was trained on>"}"'
        if base and base.ours:
            names, around = f"{names}, {stock}", '"<the pipeline around it>", transformer=transformer'
            own = [f'transformer = {stock}.from_pretrained("<export of {base.name}>", torch_dtype=torch.bfloat16)']
        lines = ["import torch", f"from diffusers import {', '.join([names, *_needs(steps)])}", "", *own]
        lines += [f"pipe = DiffusionPipeline.from_pretrained({around}, torch_dtype=torch.bfloat16)"]
        lines += [f'pipe.load_lora_weights("{export}", weight_name="{LORA_WEIGHTS}")']
        return "\n".join([*lines, *_schedule(steps), *_call(artifact, steps)])

    return usage


def stock_config(denoiser: Denoiser) -> dict[str, Any]:
    """What `config.json` will say.

    Raises:
        ValueError: if stock `diffusers` has no class for the model, with the reason
    """
    import diffusers

    with torch.device("meta"):
        state = {k: v.to("meta") for k, v in denoiser.model.state_dict().items()}
    config = denoiser.to_stock(denoiser.config, state)[0]
    if not hasattr(diffusers, config["_class_name"]):
        reason = config.get("_not_diffusers_because", f"it has no {config['_class_name']}")
        raise ValueError(f"stock diffusers cannot express this {denoiser.name}: {reason}")
    return config


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Raises ValueError for weights that are not finite, or that the type cannot hold."""
    check_weights(state, dtype)
    return {k: v.detach().to(dtype if v.is_floating_point() else None).contiguous() for k, v in state.items()}


def _dtype(denoiser: Denoiser, dtype: torch.dtype | None) -> str:
    return str(dtype or next(denoiser.parameters()).dtype)


def _needs(steps: Steps) -> list[str]:
    return [FLOW] if steps.scheduler else []


def _schedule(steps: Steps) -> list[str]:
    """The line that gives another's pipeline the scheduler it needs."""
    if steps.scheduler is None:
        return []
    arguments = (f"{k}={v:.8g}" if isinstance(v, float) else f"{k}={v}" for k, v in steps.scheduler.items())
    return [f"pipe.scheduler = {FLOW}({', '.join(arguments)})"]


def _call(artifact: Artifact, steps: Steps) -> list[str]:
    """Lines that generate, with the artifact's own sampler settings."""
    denoiser, sampler = artifact.denoiser, artifact.sampler
    settings = [f"num_inference_steps={sampler.solver.steps}"]
    if steps.sigmas:
        settings.append(f"sigmas=[{', '.join(f'{t:.8g}' for t in steps.sigmas)}]")
    told = sampler.told if sampler.told is not None else getattr(denoiser, "guidance", None)
    if "guidance_embeds" not in denoiser.config:
        settings.append(f"guidance_scale={sampler.guidance:g}")
    elif denoiser.config["guidance_embeds"] and told is not None:
        settings.append(f"guidance_scale={told:g}")
    if "guidance_embeds" in denoiser.config and sampler.guidance != 1:  # the pipelines' name for two evaluations
        settings += ['negative_prompt=""', f"true_cfg_scale={sampler.guidance:g}"]
    what = '"a photo of a cat"' if takes_text(artifact) else "class_labels=[0]"
    return [*steps.remarks, f"image = pipe({', '.join([what, *settings])}).images[0]"]


# ---- the steps of a stock pipeline -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """What makes a stock pipeline step as an artifact's sampler does."""

    scheduler: dict[str, Any] | None = None  # arguments of the FlowMatchEulerDiscreteScheduler to put in
    sigmas: tuple[float, ...] = ()  # times to ask it for, before its shift; none: those the pipeline asks for itself
    remarks: tuple[str, ...] = ()  # comments: what the pipeline cannot be told


def steps_of(artifact: Artifact, scheduler: Mapping[str, Any] | None = None) -> Steps:
    """How the pipeline around an artifact must be told to step; nothing where it does so by itself.

    Args:
        artifact: with its sampler
        scheduler: the configuration of the pipeline's scheduler; None: the one that the family is published with
    """
    solver, grid, velocity = artifact.sampler.solver, few_steps(artifact), artifact.objective.prediction == "velocity"
    family, remarks = artifact.denoiser.sampler(), _foreign_guidance(artifact)
    even = family is not None and isinstance(family.solver, StockEuler) and family.solver.even
    named = scheduler["_class_name"] if scheduler else FLOW if velocity else "scheduler of the pipeline"
    if named != FLOW:
        if grid:
            asked = ", ".join(f"{t:.4g}" for t in grid.grid[:-1])
            return Steps(remarks=(*remarks, f"# trained for the times {asked} (1 is noise): the {named} makes its own"))
        if scheduler or family is None or type(family.solver) is not type(solver):
            remarks = (*remarks, f"# evaluated with {solver}: the {named} may step otherwise")
        return Steps(remarks=remarks)
    if grid:
        if grid.renoise:
            seed = "torch.manual_seed(0)  # decides the fresh noise of each step: a generator does not reach it"
            remarks = (*remarks, seed)
        unasked = even and _are_even(grid.times)
        settings = {"shift": grid.shift, "stochastic_sampling": grid.renoise}
        return Steps(settings, () if unasked else grid.times, remarks)
    if not isinstance(solver, Euler | StockEuler):
        return Steps(remarks=(*remarks, f"# evaluated with {solver}: the {named} steps otherwise"))
    stock = _stock_steps(artifact, scheduler, even)
    shape = artifact.denoiser.sample_shape
    wanted = solver.times(shape) if isinstance(solver, StockEuler) else times(solver.steps, solver.shift)
    if stock and _close(stock.times(shape), wanted):
        return Steps(remarks=remarks)
    if isinstance(solver, StockEuler):
        return Steps(solver.scheduler, () if solver.even == even else solver.asked, remarks)
    asked = tuple(times(solver.steps, 1)[:-1])
    return Steps({"shift": solver.shift}, () if even else asked, remarks)


def _stock_steps(artifact: Artifact, scheduler: Mapping[str, Any] | None, even: bool) -> StockEuler | None:
    """The pipeline's own steps, as many as the artifact's; None: not known."""
    count, family = artifact.sampler.solver.steps, artifact.denoiser.sampler()
    if scheduler:
        return StockEuler.of(scheduler, count, even)
    return replace(family.solver, steps=count) if family and isinstance(family.solver, StockEuler) else None


def _foreign_guidance(artifact: Artifact) -> tuple[str, ...]:
    """A remark on settings of the sampler that a stock pipeline does not have."""
    sampler, family = artifact.sampler, artifact.denoiser.sampler() or Sampler()
    names = ("interval", "channels", "perturbation", *(() if sampler.guidance == 1 else ("norm_patch",)))
    found = [f"{n}={getattr(sampler, n)}" for n in names if getattr(sampler, n) != getattr(family, n)]
    return (f"# evaluated with {', '.join(found)}, which the pipeline does otherwise",) if found else ()


def _are_even(asked: tuple[float, ...]) -> bool:
    return _close(asked, [1 - k / len(asked) for k in range(len(asked))], 1e-6)


def _close(a: Iterable[float], b: Iterable[float], within: float = 1e-4) -> bool:
    """Whether times agree: a difference of 1e-4 is that of one training step's tenth."""
    return all(math.isclose(x, y, abs_tol=within) for x, y in zip(a, b, strict=True))


# ---- stock pipelines -------------------------------------------------------------------------------------------------


def pipeline_index(folder: Path) -> dict[str, Any]:
    """A stock pipeline's `model_index.json`, once all that it names is found to be there.

    Raises:
        FileNotFoundError: if the folder is no pipeline, or a component is missing
        ValueError: if it has no transformer, or names a component outside its folder
    """
    file = folder / "model_index.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a diffusers pipeline: it has no model_index.json")
    try:
        index = trust.read_json(file)
        names = components(index)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if "transformer" not in names:
        raise ValueError(f"the pipeline {folder} has no transformer, but {', '.join(names) or 'nothing'}")
    if outside := [n for n in names if not re.fullmatch(r"\w+", n)]:
        raise ValueError(f"{file} names a component outside its folder: {outside[0]}")
    if missing := [n for n in names if n != "transformer" and not (folder / n).is_dir()]:
        raise FileNotFoundError(f"the pipeline {folder} is not whole: its {missing[0]} is missing")
    return index


def components(index: Mapping[str, Any]) -> list[str]:
    """Names of the parts that a pipeline has."""
    return [k for k, v in index.items() if not k.startswith("_") and isinstance(v, list) and v and v[0] is not None]


def _take(source: str, target: str) -> str:
    """Link a large file, copy a small one, that somebody may want to edit."""
    source = os.path.realpath(source)  # the hub's cache has symbolic links
    if os.path.getsize(source) >= LINKED:
        try:
            os.link(source, target)
            return target
        except OSError:  # another disk, or one that has no links
            pass
    return shutil.copy2(source, target)


# ---- the folder ------------------------------------------------------------------------------------------------------


def refuse_foreign(out: Path) -> None:
    """Raises FileExistsError if there is something at `out` that no export has written."""
    if out.is_dir() and (not any(out.iterdir()) or (out / MARK).is_file()):
        return
    if out.exists():
        raise FileExistsError(f"{out} is there and is not a former export: give another out=, or remove it")


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when it is whole; after an error there is what was there before."""
    temporary, old = (out.with_name(f"{out.name}.{end}") for end in (f"tmp-{os.getpid()}", "old"))
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out, old)
    os.replace(temporary, out)
    shutil.rmtree(old, ignore_errors=True)


def upload(folder: Path, repository: str) -> None:
    """Send an export to the hub; never asks anything. `edits.json` stays, it may name folders of this machine.

    Raises:
        ConnectionError: in one sentence, whatever went wrong
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=["edits.json", "*/edits.json"])
    except Exception as error:  # whatever networks, servers and two HTTP libraries raise: the folder is not at fault
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ConnectionError(
            f"{folder} is written but was not uploaded to {repository} ({type(error).__name__}: {reason}): log in with "
            "`hf auth login` or set HF_TOKEN, then give the same command again"
        ) from error
