"""The work behind `python -m data.generate`: the teacher samples each prompt once, in shards that a restart keeps.

Image number k is prompt k // images, with the noise that `edit.noise` gives number k of the seed: what a shard holds
does not depend on who writes it, or on how often the work was interrupted. The teacher is told the text embeddings as
they are stored, so what is trained on is what it saw. States of the solve can be stored too (`points`); the noise that
it began with is drawn again where it is needed (`data.sets.latents`).
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import edit
from data import manifest
from data.generate import Order
from data.loader import collate
from data.making.encoders import VAE
from data.making.latent_folder import (
    Writer,
    begin,
    check_place,
    finish,
    finished,
    in_processes,
    progress,
    readable,
    room,
    write_null,
)
from data.making.latent_writer import DTYPES, Words, device_of, npy, store
from data.making.pipelines import complete
from data.making.prompts import Prompt, read_prompts
from data.pixels import to_uint8
from data.sets.latents import data_set, padded, text_length
from edit.artifacts.checkpoint import default_objective, skeleton
from edit.artifacts.location import find, is_hub_id
from edit.backbones.stock import StockDenoiser
from edit.denoiser import Denoiser
from edit.measuring.devices import find_device
from edit.objectives import Objective
from edit.sampling import Sampler
from edit.solvers import (
    DDIMSolver,
    DDPMSolver,
    DPMSolver,
    Draw,
    Euler,
    Heun,
    Predict,
    Solver,
    dynamic_shift,
    log_shift,
    times,
)
from edit.stream import Condition

SHEET = 24  # images on samples.png
PASSING = ("out", "batch", "processes", "device", "rank", "world")  # of an order, what its samples do not depend on


def generate(order: Order, say: Callable[[str], None] = print) -> Path | None:
    """Generate what is still missing.

    Returns:
        The manifest; None if other ranks have yet to finish their shards.

    Raises:
        FileNotFoundError, ValueError: in one sentence, for what cannot be used
        RuntimeError: if a process died
    """
    order = complete(on_devices(order))
    specs = (order.text_encoder, order.tokenizer, order.pooled_encoder, order.pooled_tokenizer, order.vae)
    out = Path(order.out)
    check_place(out, [find(order.teacher, weights=False), *(spec for spec in specs if spec)], "out=")
    prompts = read_prompts(order.prompts)
    if is_made(out, stamp(order, prompts)):
        say(f"{out}: all {len(prompts) * order.images:,} images are there")
        return out / manifest.MANIFEST
    words = Words(order, "cpu")
    refuse_long(order, words, prompts)
    settings = describe(order, words, prompts)
    begin(out, settings, "out=")
    write_null(out, words)
    count = len(prompts) * order.images
    total = math.ceil(count / order.shard_size)
    pending = [k for k in range(order.rank, total, order.world) if not finished(out, k)]
    images = sum(len(span(order, count, k)) for k in pending)
    say(forecast(order, out, settings, images, count, len(pending), total))
    del words
    gc.collect()
    if pending:
        with progress(images) as advance:
            if order.processes == 1:
                write = writer(order, 0)
                for k in pending:
                    write(k, advance)
            else:
                in_processes(writer, order, order.processes, pending, advance)
    return finish(out, settings, {"num_classes": None, "classes": None}, total)


def on_devices(order: Order) -> Order:
    """The order with its device and processes as this machine has them.

    Raises:
        ValueError: if it has no such device
    """
    device = {"auto": "cuda" if torch.cuda.is_available() else "cpu", "gpu": "cuda"}.get(order.device, order.device)
    find_device(device)
    each = torch.cuda.device_count() if device == "cuda" else 1
    return replace(order, device=device, processes=order.processes or max(each, 1))


def is_made(out: Path, stamped: str) -> bool:
    """Whether the folder is whole, and was made by an order of this stamp."""
    try:
        made = manifest.verify(out)
    except (FileNotFoundError, ValueError):
        return False  # it is written anew, from records and settings
    if made["sources"].get("stamp") != stamped:
        return False
    return all(manifest.check_shard(out, shard, full=False) is None for shard in made["shards"])


def stamp(order: Order, prompts: Sequence[Prompt]) -> str:
    """Changes with all that decides what is written: settings, prompts, name, size and time of each file that is read.

    Milliseconds, where `describe` reads all weights. Equal stamps mean the same work; of others `describe` knows. What
    is on the hub goes by its name.
    """
    settings = {name: value for name, value in asdict(order).items() if name not in PASSING}
    teacher = find(order.teacher)
    specs = (order.text_encoder, order.tokenizer, order.pooled_encoder, order.pooled_tokenizer, order.vae)
    folders = [teacher, teacher.parent / "scheduler", *(Path(spec) for spec in specs if spec)]
    files = [(file.name, file.stat()) for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
    facts = [(name, about.st_size, about.st_mtime_ns) for name, about in files]
    return hashlib.sha256(json.dumps([manifest.FORMAT, settings, prompts, facts]).encode()).hexdigest()


# ---- what is asked for ----------------------------------------------------------------------------------------------


def refuse_long(order: Order, words: Words, prompts: Sequence[Prompt]) -> None:
    """Raises ValueError if prompts are longer than the encoder takes, and are not to be cut."""
    encoder = words.text or words.pooled
    if order.long == "cut" or encoder is None:
        return
    lengths = encoder.lengths([p.text for p in prompts], cut=False)
    if long := [(n, p) for n, p in zip(lengths, prompts, strict=True) if n > encoder.max_tokens]:
        raise ValueError(
            f"{len(long)} of {len(prompts)} prompts have more than {encoder.max_tokens} tokens (prompt {long[0][1].id} "
            f"has {long[0][0]}): shorten them, raise max_tokens if the encoder allows it, or set long=cut"
        )


def solver_of(order: Order, shift: float) -> Solver:
    if order.solver in ("euler", "heun", "dpm"):
        return {"euler": Euler, "heun": Heun, "dpm": DPMSolver}[order.solver](steps=order.steps, shift=shift)
    return {"ddim": DDIMSolver, "ddpm": DDPMSolver}[order.solver](steps=order.steps)


class Recorded(Solver):
    """A solver whose states at some times are kept: `states` by time, b c y x, of the last batch.

    A state is what the model is asked at; Heun's method asks at its guess first, and then at the state, which stays.

    Args:
        solver: what integrates
        times: of the states, among those it asks at
    """

    def __init__(self, solver: Euler | Heun, times: Sequence[float]):
        self.solver, self.steps, self.times = solver, solver.steps, tuple(times)
        self.states: dict[float, Tensor] = {}

    @property
    def evaluations(self) -> int:
        return self.solver.evaluations

    def check(self, objective: Objective) -> None:
        self.solver.check(objective)

    def integrate(self, predict: Predict, x: Tensor, objective: Objective, draw: Draw) -> Tensor:
        def watched(x: Tensor, t: float, end: float | None = None) -> Tensor:
            if t in self.times:
                self.states[t] = x
            return predict(x, t, end)

        return self.solver.integrate(watched, x, objective, draw)


def describe(order: Order, words: Words, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Everything that decides what is written, as JSON; `sources` says where things were, and may change.

    Raises:
        FileNotFoundError: if there is no teacher or no VAE
        ValueError: if the teacher does not fit prompts, encoders, VAE, size or solver
    """
    denoiser = skeleton(order.teacher)
    c, y, x = denoiser.sample_shape
    y, x = (y, x) if order.size is None else (order.size, order.size)
    if not denoiser.accepts((c, y, x)):
        raise ValueError(f"{order.teacher} makes no latents of {c}x{y}x{x}: choose another size")
    vae = None
    if order.vae is not None:
        encoder = VAE(order.vae)
        channels = encoder.moments(torch.zeros(1, 3, 64, 64)).shape[1] // 2
        if channels != c:
            raise ValueError(
                f"{order.teacher} makes latents of {c} channels, the VAE {order.vae} has {channels}: give the VAE that "
                "the teacher was trained with"
            )
        shift, scale = encoder.shift_and_scale
        vae = {"name": encoder.name, "sha256": encoder.sha256, "shift": shift, "scale": scale}
    described = words.describe()
    check_text(order, denoiser, words, (c, y, x))
    shift = default_shift(order, denoiser, y * x // 4) if order.shift is None else order.shift
    solver_of(order, shift).check(default_objective(denoiser))
    texts = "\n".join(f"{p.id} {p.text}" for p in prompts)
    return {
        "format": manifest.FORMAT,
        "vae": vae,
        **described,
        "latent_shape": [c, y, x],
        "flips": False,
        "dtype": order.dtype,
        "precision": order.precision,
        "shard_size": order.shard_size,
        "generated": {
            "teacher": manifest.teacher_hash(order.teacher),
            "family": denoiser.name,
            "guidance": order.guidance,
            "steps": order.steps,
            "solver": order.solver,
            "shift": shift,
            "seed": order.seed,
            "images": order.images,
            **({"points": order.points, "times": stored_times(order, shift)} if order.points else {}),
            "prompts": {"count": len(prompts), "sha256": hashlib.sha256(texts.encode()).hexdigest()},
        },
        "sources": {
            "stamp": stamp(order, prompts),
            "data": _recorded(order.teacher).get("data") or None,
            **{
                name: os.path.abspath(spec) if spec and os.path.exists(spec) else spec
                for name, spec in (
                    ("teacher", order.teacher),
                    ("prompts", order.prompts),
                    ("vae", order.vae),
                    ("text", order.text_encoder),
                    ("pooled", order.pooled_encoder),
                )
            },
        },
    }


def stored_times(order: Order, shift: float) -> list[float]:
    """Times of the states to store, from noise to data without either: every so many of the solver's own."""
    return times(order.steps, shift)[:: order.steps // (order.points + 1)][1:-1]


def check_text(order: Order, denoiser: Denoiser, words: Words, shape: tuple[int, int, int]) -> None:
    """Raises ValueError if the teacher takes no text, or not the text of these encoders."""
    condition = condition_of(order, denoiser, words, words.words([""]))[0]
    try:
        denoiser.pack(torch.zeros(1, *shape), torch.ones(1), condition)
        if words.text is not None and isinstance(denoiser, StockDenoiser):
            denoiser.need_length(text_length(words.text.description))
    except ValueError as error:
        raise ValueError(f"{order.teacher} cannot be given prompts with these encoders: {error}") from error


def default_shift(order: Order, denoiser: Denoiser, tokens: int) -> float:
    """What the artifact was sampled with; what its pipeline's scheduler says; FLUX.1-dev's own rule; else 1."""
    sampler = _recorded(order.teacher).get("sampler")
    if sampler:
        dynamic = sampler["solver"].get("dynamic")
        return dynamic_shift(dynamic, tokens) if dynamic else float(sampler["solver"].get("shift", 1.0))
    if shift := scheduler_shift(scheduler_of(order.teacher), tokens):
        return shift
    if denoiser.config.get("guidance_embeds"):
        from edit.backbones.flux import flux_shift

        return flux_shift(tokens)
    return 1.0


def scheduler_of(teacher: str) -> dict[str, Any]:
    """The configuration of the scheduler beside a published transformer; empty where there is none."""
    beside = find(teacher, weights=False).parent / "scheduler" / "scheduler_config.json"
    if beside.is_file():
        return manifest.read(beside)
    if is_hub_id(teacher):
        from diffusers import SchedulerMixin

        try:
            return SchedulerMixin.load_config(teacher, subfolder="scheduler")
        except OSError:
            return {}
    return {}


def scheduler_shift(config: dict[str, Any], tokens: int) -> float | None:
    """The shift of a flow-matching scheduler at this many image tokens; None for another scheduler.

    A dynamic shift is exp(mu) or mu itself, mu being linear in the tokens through (base_image_seq_len, base_shift) and
    (max_image_seq_len, max_shift). What a scheduler may have besides (shift_terminal, Karras sigmas) is no shift.
    """
    if not str(config.get("_class_name")).startswith("FlowMatch"):
        return None
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift") or 1.0)
    ends = (("base_shift", 0.5), ("max_shift", 1.15), ("base_image_seq_len", 256), ("max_image_seq_len", 4096))
    low, high, few, many = (config.get(key, default) for key, default in ends)
    mu = log_shift((low, high, few, many), tokens)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def _recorded(teacher: str) -> dict[str, Any]:
    """What an artifact says of itself; empty for a published folder."""
    path = find(teacher) / "edits.json"
    return manifest.read(path) if path.exists() else {}


def forecast(
    order: Order, out: Path, settings: dict[str, Any], images: int, count: int, pending: int, total: int
) -> str:
    """How much is to be made. Raises ValueError if the disk has no room for it."""
    if not pending:
        return f"{out}: all of this command's shards are there ({total} in all, {count:,} images)"
    width = DTYPES[order.dtype].itemsize
    members = [math.prod(settings["latent_shape"]) * width, 200]  # the last is the json
    members += [order.points * members[0]] if order.points else []
    if text := settings["text"]:
        members.append(text["max_tokens"] * text["width"] * width)  # at most, where the padding is not stored
    if pooled := settings["pooled"]:
        members.append(pooled["width"] * width)
    # with headers of tar and npy, and padding
    needed = images * sum(512 + 128 + math.ceil((m + 1) / 512) * 512 for m in members)
    made = settings["generated"]
    latent = "x".join(map(str, settings["latent_shape"]))
    return (
        f"{images:,} of {count:,} images of {made['family']} -> latents {latent} {order.dtype}, {order.solver} "
        f"{order.steps} steps, guidance {order.guidance:g}, shift {made['shift']:.4g}: {pending} of {total} shards, at "
        f"most {readable(needed)} ({readable(room(out, needed, 'out='))} free)"
    )


# ---- the work -------------------------------------------------------------------------------------------------------


def span(order: Order, count: int, shard: int) -> range:
    """Numbers of a shard's images."""
    return range(shard * order.shard_size, min((shard + 1) * order.shard_size, count))


def condition_of(
    order: Order, denoiser: Denoiser, words: Words, rows: Sequence[dict[str, Tensor]]
) -> tuple[Condition, Condition]:
    """What the teacher is told of some prompts, and the same number of empty prompts, from embeddings as stored.

    Args:
        order: says guidance and padding
        denoiser: the teacher; a guidance-distilled one is told the scale
        words: made the embeddings
        rows: `text` l c and `pooled` c of each prompt
    """
    b, samples = len(rows), []
    for number, row in enumerate([*rows, words.words([""])[0]]):
        sample: dict[str, Any] = {"draw": number}
        if words.text is not None:
            sample |= padded(row["text"].float(), words.text.description)
        if "pooled" in row:
            sample["pooled"] = row["pooled"].float()
        samples.append(sample)
    joined = collate(samples)  # together, so that both have the same length
    del joined["draw"]
    told = torch.full((b,), order.guidance) if denoiser.config.get("guidance_embeds") else None
    condition = Condition(**{k: v[:b] for k, v in joined.items()}, guidance=told)
    return condition, Condition(**{k: v[b:].expand(b, *v.shape[1:]) for k, v in joined.items()})


def writer(order: Order, process: int) -> Writer:
    """What writes shards in one of several processes."""
    if order.device == "cpu" and order.processes > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // order.processes))
    device = device_of(order, process)
    starter = multiprocessing.parent_process()  # of this one, if there are several
    words, artifact = Words(order, device), edit.load(order.teacher)
    denoiser = artifact.denoiser.to(device, DTYPES[order.precision]).requires_grad_(False)
    settings = manifest.read(Path(order.out) / manifest.SETTINGS)
    prompts = read_prompts(order.prompts)
    c, y, x = settings["latent_shape"]
    told = denoiser.config.get("guidance_embeds")
    generated = settings["generated"]
    solver = solver_of(order, generated["shift"])
    recorded = Recorded(solver, generated["times"]) if order.points else None
    sampler = Sampler(recorded or solver, 1.0 if told else order.guidance)

    first: list[Tensor] = []

    def samples(shard: int, advance: Callable[[float], None]) -> Iterator[tuple[str, dict[str, bytes]]]:
        numbers = span(order, len(prompts) * order.images, shard)
        for start in range(0, len(numbers), order.batch):
            part = numbers[start : start + order.batch]
            asked = [prompts[n // order.images] for n in part]
            rows = words.words([p.text for p in asked])
            condition, negative = condition_of(order, denoiser, words, rows)

            def count(done: int, total: int, b: int = len(part)) -> None:
                if starter is not None and not starter.is_alive():
                    raise KeyboardInterrupt  # killed: the same command, given again, must not find this one at work
                advance(b * done // total - b * (done - 1) // total)  # whole images, which add up

            made = sampler(
                denoiser, artifact.objective, condition, torch.tensor(part), order.seed, negative, count, (c, y, x)
            )
            if not made.isfinite().all():
                bad = int((~made.flatten(1).isfinite().all(1)).sum())
                raise ValueError(
                    f"{bad} of {len(made)} generated images are not finite: this guidance, shift or number of steps is "
                    "too much for the teacher, or precision is too low"
                )
            made = words.fit(made)
            states = [words.fit(recorded.states[t]) for t in recorded.times] if recorded else []
            if shard == 0 and len(first) < SHEET:
                first.extend(made.float())
            for n, prompt, latent, row, *path in zip(part, asked, made, rows, *states, strict=True):
                facts = {"caption": prompt.text, "prompt": prompt.id, "number": n, "seed": order.seed}
                arrays = {"latent": latent, **({"trajectory": torch.stack(path)} if path else {}), **row}
                members = {f"{name}.npy": npy(array) for name, array in arrays.items()}
                yield f"{n:09d}", {**members, "json": json.dumps(facts).encode()}

    def write(shard: int, advance: Callable[[float], None]) -> Any:
        stored = store(Path(order.out), shard, samples(shard, advance), lambda: {"skipped": []})
        if first:  # the shard is in place, whatever becomes of the picture
            try:
                contact_sheet(order, settings, torch.stack(first[:SHEET]), device)
            except (ValueError, OSError, RuntimeError) as error:
                warnings.warn(f"{order.out} has no samples.png: {error}", RuntimeWarning, stacklevel=2)
            first.clear()
        return stored

    return write


def contact_sheet(order: Order, settings: dict[str, Any], x: Tensor, device: str) -> None:
    """The first images as samples.png, where there is a VAE or a data set that decodes them."""
    if order.vae is not None:
        shift, scale = (torch.tensor(settings["vae"][k]).view(-1, 1, 1) for k in ("shift", "scale"))
        images = to_uint8(VAE(order.vae, device).decode(x / scale + shift)).cpu()
    elif settings["sources"]["data"]:
        images = data_set(settings["sources"]["data"], "for samples.png").to_images(x).cpu()
    else:
        return
    from PIL import Image

    b, y, x_ = images.shape[:3]
    columns = math.ceil(math.sqrt(b))
    canvas = torch.full((math.ceil(b / columns) * (y + 2), columns * (x_ + 2), 3), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (y + 2), i % columns * (x_ + 2)
        canvas[top : top + y, left : left + x_] = image
    path = Path(order.out) / "samples.png"
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    Image.fromarray(canvas.numpy()).save(temporary, "png")
    os.replace(temporary, path)
