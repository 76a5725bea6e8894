"""Whether a training run fits on its devices and how long it takes, before anything is launched.

    python -m recipes.plan experiment=dit_xl_2/baseline devices=8 gpu=40
    python -m recipes.plan backbone=flux_dev data=latents trainer=fsdp2 devices=8 image=1024

`edit.measuring.memory` does the arithmetic. This command reads the run's structure from its configuration; `StandIns`
replace a data set or model that is not here yet, and a note says so.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue
from rich.console import Console
from rich.table import Table
from torch import nn

from edit.data_set import conditions
from edit.inputs.command import Parser, guarded
from edit.inputs.limits import Count, Limits, Positive, check_numbers
from edit.inputs.words import explained, keys, read
from edit.losses import Loss
from edit.measuring.devices import peak_flops
from edit.measuring.memory import GB, OPTIMIZERS, STRATEGIES, Draft, changes, stored
from edit.measuring.probe import Probe
from edit.measuring.turns import calls_of
from recipes.config.chosen import procedure_of
from recipes.config.errors import UserError, one_line
from recipes.models import Models, models_of
from recipes.procedure import Probed, Procedure
from recipes.report.amounts import duration, short
from recipes.stand_ins import StandIns

MOST_DEVICES = 1_000_000

# ---- command line ---------------------------------------------------------------------------------------------------

EXAMPLES = """examples:
  python -m recipes.plan                                                     the default run
  python -m recipes.plan experiment=dit_digits/depth init=runs/digits
  python -m recipes.plan experiment=dit_xl_2/baseline devices=8 gpu=40
  python -m recipes.plan backbone=flux_dev trainer=fsdp2 devices=8 image=1024 data.batch_size=1 --json

Settings are those of train.py, in the same words, devices=N, short for trainer.devices=N, and those below. Settings
that are still missing, such as a path, do not matter here unless they decide the structure.

"""


@dataclass(frozen=True)
class Assumptions:
    """The assumptions of a plan about devices, and about data that are not here yet.

    Args:
        gpu: GB of memory of a device
        image: rows and columns of an image in pixels, or ROWSxCOLUMNS; a model of more than 3 channels reads latents
            of an eighth of that. Without it: the data set's, where it can be read here or before tells how it is made,
            or the backbone's own
        frames: of a video as the model sees it: those of a latent, where the VAE has fewer of them (81 are 21 to Wan).
            Without it: like image
        text: tokens of a prompt, where the data set does not tell
        peak: TFLOP/s of a device in bf16; without it: those of the GPU of this machine where it is known, else an
            H100's 989. On a CPU there is no estimate of time without it
        mfu: share of the peak that a step reaches

    Raises:
        ValueError: for a number out of range, or an image that is no size
    """

    gpu: Positive = 80
    image: str | None = None
    frames: Count | None = None
    text: Annotated[int, Limits(1, 100_000)] = 512
    peak: Positive | None = None
    mfu: Annotated[float, Limits(above=0, high=1)] = 0.45

    def __post_init__(self):
        check_numbers(self)
        if self.image is not None and not re.fullmatch("[1-9][0-9]{0,4}(x[1-9][0-9]{0,4})?", self.image):
            raise ValueError(f"image is a number of pixels, or rows x columns as in 1024x768, got {self.image!r}")

    @property
    def shape(self) -> tuple[int, int] | None:
        """Rows and columns of an image; None: not told."""
        if self.image is None:
            return None
        rows, _, columns = self.image.partition("x")
        return int(rows), int(columns or rows)


def parse(words: Sequence[str]) -> tuple[Assumptions, list[str]]:
    """The assumptions and the settings of train.py that the words of a command line give.

    Raises:
        ValueError: for an assumption of the wrong kind or out of range
    """
    known, own, settings = keys(Assumptions), list[str](), list[str]()
    for word in words:
        key, _, text = word.partition("=")
        if key == "devices":
            settings.append(f"trainer.devices={text}")
        else:
            (own if key in known else settings).append(word)
    return read(Assumptions, own), settings


@guarded(mistakes=(UserError, ValueError, TypeError, OSError))
def main(argv: list[str]) -> int:
    """The exit code: 0 if the run fits, 1 if it does not, 2 for a mistake, which is told in one sentence."""
    parser = Parser(
        prog="python -m recipes.plan",
        description="Memory per device and time of a training run, without weights, data or a GPU.",
        epilog=EXAMPLES + explained(Assumptions),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="the run, see below")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    configs = Path(__file__).parents[1] / "configs"
    parser.add_argument("--configs", type=Path, default=configs, help="folder of the configuration groups")
    args = parser.parse_intermixed_args(argv)
    with Console(stderr=True).status("planning"):
        assumed, settings = parse(args.settings)
        cfg = compose(args.configs, settings)
        try:
            report = resolve(assumed, cfg)
        except FileNotFoundError as error:
            raise ValueError(one_line(error) + maker(cfg, args.configs, str(error))) from error
    print(json.dumps(report, indent=2)) if args.json else show(report)
    return 0 if report["fits"] else 1


def compose(configs: Path, overrides: Sequence[str]) -> Any:
    """The configuration that train.py would run; values may be missing, except in the backbone.

    Raises:
        ValueError: for the first mistake in it
    """
    import hydra

    from recipes.config.check import TRUSTED
    from recipes.config.conflicts import unbuilt
    from recipes.config.explain import explain
    from recipes.config.mistakes import mistakes
    from recipes.config.sources import register
    from recipes.config.staged import gathered

    register()
    words = gathered(overrides)
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(configs.resolve())):
            cfg = hydra.compose("train", words)
    except Exception as error:  # what Hydra makes of words that are no settings is of many kinds
        raise ValueError(explain(error, configs, overrides)) from error
    found = mistakes(cfg, "", (*TRUSTED, *cfg.trusted))
    wrong = [m for m in found if " has no value; " not in m or m.startswith("backbone")] or list(unbuilt(cfg))
    if wrong:
        raise ValueError(wrong[0])
    return cfg


def maker(cfg: DictConfig, configs: Path, missing: str) -> str:
    """How the stage before the run is started alone that makes what is missing; "": none does."""
    from data.names import setting, typed
    from recipes.ahead import look_ahead

    for item in look_ahead(cfg, configs):
        for one in (*item.inside(), item):
            if one.out is not None and f"{one.out}/" in missing:
                there = [] if cfg.runs == "runs" else [setting("runs", cfg.runs)]
                words = ("-m", *one.stage.all) if one.cfg is None else ("train.py", *one.stage.all, *there)
                return f"; the stage {one.stage.name} makes it, and can be started alone: {typed('python', *words)}"
    return ""


# ---- from a configuration to a draft --------------------------------------------------------------------------------


def drafted(assumed: Assumptions, cfg: DictConfig, notes: list[str]) -> Draft:
    """The draft of the run that a configuration describes; each assumption is appended to `notes`.

    Raises:
        UserError, ValueError: if its parts do not fit together
    """
    cfg = on_its_machine(cfg)
    planned(cfg)
    try:
        models = models_of(cfg, StandIns(cfg, assumed.shape, assumed.text, notes, assumed.frames))
    except InstantiationException as error:
        raise ValueError(str(error.__cause__ or error).split("\nfull_key")[0]) from error
    except MissingMandatoryValue as error:  # without it the structure is not known
        raise ValueError(f"{error.full_key} has no value; give one with {error.full_key}=...") from error
    known = None if cfg.trainer.accelerator == "cpu" else peak_here() or 989e12
    return draft_of(models, cfg, notes, assumed.peak * 1e12 if assumed.peak else known, assumed.mfu)


def draft_of(models: Models, cfg: DictConfig, notes: list[str], peak: float | None = None, mfu: float = 0.45) -> Draft:
    """The draft of a run whose models are known.

    Args:
        models: data set, models and losses
        cfg: their configuration, with devices and precision decided
        notes: what the draft leaves out is appended
        peak: FLOP/s of a device; None: not known, so time is not estimated
        mfu: share of the peak that a step reaches

    Raises:
        ValueError: if the parts do not fit together
    """
    shape, condition = tuple(models.data.shape), conditions(models.data)(torch.arange(1))
    trainer, procedure = cfg.trainer, planned(cfg)
    mine, theirs = procedure.taps(models)
    student = Probe(models.student.structure, shape, condition, *mine)
    teacher, critic, placement, guided = None, None, None, 1
    if models.teacher is not None:
        placement = models.teacher.placement
        guided = 1 if models.teacher.guidance.low == models.teacher.guidance.high == 1 else 2
        if models.teacher.structure is not None:
            teacher = Probe(models.teacher.structure, shape, condition, *theirs)
    if models.critic is not None:
        critic = Probe(models.critic.structure, shape, condition)
    asked = (teacher or student).denoiser
    if asked.facts.told:
        guided = 1  # the scale is an input
    losses = procedure.losses(models)
    with torch.device("meta"):
        own = {place: loss.build(student.denoiser, asked if placement else None) for place, loss in losses.items()}
    probed = Probed(models, cfg, student, teacher, own, guided, decoder_of(models.data, losses, notes), notes)
    return Draft(
        student=student,
        strategy=STRATEGIES[trainer.strategy],
        devices=trainer.devices * trainer.num_nodes,
        batch=cfg.data.batch_size,
        accumulate=trainer.accumulate,
        half=trainer.precision == "bf16-mixed",
        checkpointing=trainer.gradient_checkpointing,
        teacher=teacher,
        placement=placement,
        teacher_bytes=2 if models.teacher is not None and models.teacher.dtype == torch.bfloat16 else 4,
        calls=guided,
        critic=critic,
        based=cfg.critic.start == "student",
        turns=procedure.kinds(probed),
        remembered=procedure.remembered(probed),
        own=sum(p.numel() for o in own.values() if o is not None for p in o.parameters()),
        optimizer=OPTIMIZERS[cfg.optimizer.kind],
        frozen=frozen_weights(losses, probed.decoder),
        peak=peak,
        mfu=mfu,
    )


def planned(cfg: DictConfig) -> Procedure:
    """The procedure of a run. Raises ValueError if it trains nothing, or cannot be made."""
    try:
        procedure = procedure_of(cfg)
    except InstantiationException as error:
        raise ValueError(f"recipe: {one_line(error.__cause__ or error)}") from error
    if not procedure.optimises:
        raise ValueError(
            f"recipe: {type(procedure).__name__} trains {'nothing' if procedure.makes == 'artifact' else 'no denoiser'}"
            ", so there is no training to plan: recipes.cost tells what its model costs"
        )
    return procedure


def decoder_of(data: Any, losses: Mapping[str, Loss], notes: list[str]) -> nn.Module | None:
    """The data set's decoder, if a loss asks for pixels; where it is not here, a note says so."""
    if not any(loss.decodes for loss in losses.values()):
        return None
    try:
        return getattr(data, "decoder", nn.Identity)()
    except (OSError, ValueError) as error:
        notes.append(
            f"losses decode samples, and the decoder is not here ({one_line(error)}): it is not counted, and models "
            "that look at pixels are counted at the size of samples"
        )
        return None


def frozen_weights(losses: Mapping[str, Loss], decoder: nn.Module | None) -> int:
    """Parameters of the frozen models that losses look with, each model once, and of the decoder."""
    specs = {spec for loss in losses.values() for spec in loss.frozen.values()}
    models = [*(spec.structure() for spec in specs), *([] if decoder is None else [decoder])]
    return sum(p.numel() for model in models for p in model.parameters())


def on_its_machine(cfg: DictConfig) -> DictConfig:
    """A copy with devices and precision decided for the machine of the run, which need not be this one.

    Raises:
        ValueError: if the devices cannot be counted
    """
    cfg = deepcopy(cfg)
    trainer, cpu = cfg.trainer, cfg.trainer.accelerator == "cpu"
    if trainer.precision == "auto":
        trainer.precision = "32-true" if cpu else "bf16-mixed"
    given = trainer.devices
    if given == "auto":
        if cpu or not torch.cuda.device_count():
            raise ValueError("trainer.devices=auto counts the GPUs of a machine, and this one has none: say devices=8")
        trainer.devices = torch.cuda.device_count()
    elif isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= MOST_DEVICES:
        raise ValueError(f"devices is a number from 1 to {MOST_DEVICES}, or auto, got {given!r}")
    return cfg


def peak_here() -> float | None:
    """FLOP/s of this machine's GPU; None: there is none, or it is not known."""
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


# ---- the report -----------------------------------------------------------------------------------------------------


def resolve(assumed: Assumptions, cfg: Any) -> dict[str, Any]:
    """Plan the run that a configuration describes."""
    notes: list[str] = []
    draft = drafted(assumed, cfg, notes)
    plan, capacity = draft.plan(), assumed.gpu * GB
    fits = plan.total <= capacity
    roles = draft.roles()
    condition = draft.student.condition
    both = {c: max((draft.moment(turn, c) for turn in draft.kinds), key=sum)[1] for c in (False, True)}
    return {
        "strategy": draft.strategy.name,
        "devices": draft.devices,
        "batch": draft.batch,
        "accumulate": draft.accumulate,
        "checkpointing": draft.checkpointing,
        "precision": "bf16-mixed" if draft.half else "32-true",
        "sample": draft.student.shape,
        "parameters": roles["student"].params,
        "trained": roles["student"].trained,
        "teacher_parameters": roles["teacher"].params if draft.teacher else 0,
        "critic_parameters": roles["critic"].params if draft.critic else 0,
        "matching": cfg.matching is not None,
        "several": cfg.matching is not None or any(len(turn.calls) > 1 + bool(draft.placement) for turn in draft.kinds),
        "calls": calls_of(draft.kinds),
        "placement": draft.placement,
        "memory": plan.memory(),
        "activations_without_checkpointing": both[False],
        "activations_with_checkpointing": both[True],
        "latent_per_image": stored(draft.student.shape),
        "text_per_prompt": 0 if condition.text is None else stored(condition.text.shape[1:]),
        "total": plan.total,
        "capacity": capacity,
        "fits": fits,
        "changes": [] if fits else [asdict(c) for c in changes(draft, capacity)],
        "macs": draft.student.macs(),
        "seconds_per_step": plan.seconds,
        "steps": cfg.trainer.max_steps,
        "seconds": None if plan.seconds is None else plan.seconds * cfg.trainer.max_steps,
        "peak": draft.peak,
        "mfu": draft.mfu,
        "notes": notes,
    }


def show(r: dict[str, Any]) -> None:
    """Print a report as a table."""
    m, console = r["memory"], Console()
    title = f"{r['devices']} x {r['strategy']}, {r['batch']} samples each, {r['precision']}"
    table = Table("per device", "GB", title=title, title_justify="left")
    trained = "" if r["trained"] == r["parameters"] else f", {short(r['trained'])} trained"
    table.add_row(f"weights ({short(r['parameters'])}{trained})", gigabytes(m["weights"]))
    table.add_row("gradients", gigabytes(m["gradients"]))
    table.add_row("optimiser", gigabytes(m["optimizer"]))
    table.add_row("moving average", gigabytes(m["average"]))
    if r["placement"]:
        size = f", {short(r['teacher_parameters'])}" if r["teacher_parameters"] else ""
        table.add_row(f"teacher ({r['placement']}{size})", gigabytes(m["teacher"]))
    if r["critic_parameters"]:
        table.add_row(f"critic ({short(r['critic_parameters'])}), its optimiser", gigabytes(m["critic"]))
    with_, without = (r[f"activations_{k}_checkpointing"] for k in ("with", "without"))
    state = "with" if r["checkpointing"] else "without"
    table.add_row(f"activations, {state} checkpointing", gigabytes(m["activations"]))
    other = ("without", without) if r["checkpointing"] else ("with", with_)
    table.add_row(f"  {other[0]} it", f"({gigabytes(other[1])})")
    table.add_row("transients: gathered weights, buckets", gigabytes(m["transients"]))
    if m["caches"]:
        table.add_row("memory of edits between evaluations", gigabytes(m["caches"]))
    table.add_row("inputs", gigabytes(m["inputs"]), end_section=True)
    table.add_row("total", gigabytes(r["total"]))
    table.add_row("memory of a device", gigabytes(r["capacity"]), end_section=True)
    if r["seconds"] is not None:
        table.add_row("seconds per step", f"{r['seconds_per_step']:.3g}")
        table.add_row(f"the run of {r['steps']} steps", duration(r["seconds"]))
    console.print(table)
    if r["several"]:
        console.print(f"Forwards of a sample per step: {forwards(r['calls'])}.")
    text = f", {r['text_per_prompt'] / 1e6:.3g} MB of text per prompt" if r["text_per_prompt"] else ""
    console.print(f"To store in bf16: {r['latent_per_image'] / 1e6:.3g} MB per sample{text}.")
    if r["seconds"] is not None:
        speed = f"{r['mfu']:.0%} of {r['peak'] / 1e12:.0f} TFLOP/s"
        console.print(f"Time at {speed}, without waiting for data or other devices.")
    for note in r["notes"]:
        console.print(f"Note: {note}.", markup=False)
    if not r["fits"]:
        console.print("It does not fit. With", style="bold red")
        for c in r["changes"]:
            fits = ", fits" if c["total"] <= r["capacity"] else ""
            console.print(f"  {c['words']}: {gigabytes(c['total'])} GB{fits}")
        if not any(c["total"] <= r["capacity"] for c in r["changes"]):
            console.print("  none of these fits: take a smaller backbone, or more devices that share it")


def forwards(calls: Mapping[str, Mapping[str, float]]) -> str:
    """As in "student 0.2 and 0.5 without gradient, critic 0.8"."""

    def said(reaches: Mapping[str, float]) -> str:
        words = {"weights": "", "input": " to its input", "nothing": " without gradient"}
        return " and ".join(f"{reaches[r]:.3g}{w}" for r, w in words.items() if r in reaches)

    return ", ".join(f"{role} {said(reaches)}" for role, reaches in calls.items())


def gigabytes(bytes: float) -> str:
    return f"{bytes / GB:.2f}" if bytes >= 1e8 else f"{bytes / GB:.4f}"


if __name__ == "__main__":
    raise SystemExit(main())
