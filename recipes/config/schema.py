"""The keys of a configuration, their types, limits and defaults: train.py's `Root` and eval.py's `Evaluation`.

Torch is not imported: `--help` and most mistakes are answered without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from edit.inputs.limits import LAST_SEED
from recipes.config.errors import UserError
from recipes.config.mistakes import mistakes
from recipes.config.suggestions import suggest
from recipes.config.values import accepts_text, rule, spell

EVALUATION = Path(__file__).parents[2] / "configs" / "eval.yaml"  # the defaults of `Evaluation`


@dataclass
class TrainerConfig:
    max_steps: int = rule(MISSING, low=1)  # optimiser steps
    accelerator: str = rule("auto", of=("auto", "cpu", "gpu"))
    devices: Any = 1  # per node: a number or "auto"
    num_nodes: int = rule(1, low=1, high=100_000)
    strategy: str = rule("single", of=("single", "ddp", "fsdp2", "zero2", "zero3"))
    precision: str = rule("auto", of=("auto", "32-true", "bf16-mixed"))  # auto: bf16 autocast on a GPU, fp32 on a CPU
    accumulate: int = rule(1, low=1)  # micro-batches per optimiser step
    clip: float | None = rule(1.0, above=0)  # gradient norm; null leaves gradients as they are
    compile: bool = False
    gradient_checkpointing: bool = False
    threads: int | None = rule(None, low=1, high=1024)  # of torch on the CPU; null: torch's choice
    memory: float | None = rule(None, low=0)  # GB per device that the run may use; null: the GPU's own; 0: unchecked


@dataclass
class DataConfig:
    set: Any = MISSING  # node with _target_: the data set
    batch_size: int = rule(MISSING, low=1, high=1_000_000)  # per device and micro-batch
    workers: int = rule(0, low=0, high=1024)  # processes that read ahead; 0: the training process reads


@dataclass
class OptimizerConfig:
    kind: str = rule("adamw", of=("adamw", "adamw8bit"))  # 8bit: moments of one byte (torchao)
    lr: float = rule(MISSING, low=0, high=100)
    betas: list[float] = rule([0.9, 0.999], low=0, below=1, count=2)
    weight_decay: float = rule(0.0, low=0, high=100)
    eps: float = rule(1e-8, above=0, below=1)
    warmup: int = rule(0, low=0)  # optimiser steps
    schedule: str = rule("constant", of=("constant", "cosine"))
    end: float = rule(0.0, low=0, high=1)  # final learning rate of a cosine, as a fraction of lr
    until: float = rule(1.0, above=0, high=1)  # fraction of the run at which a cosine ends; its last rate stays
    # regex searched in parameter names -> {lr_scale, weight_decay, betas}; names begin with denoiser, critic or own
    groups: dict[str, Any] = field(default_factory=dict)


@dataclass
class EmaConfig:
    decay: float = rule(0.9999, low=0, below=1)  # 0: no averaging
    ramp: bool = False  # min(decay, (1 + step) / (10 + step))


@dataclass
class CheckpointConfig:
    every: int = rule(1000, low=1)  # optimiser steps
    keep: int = rule(2, low=1)


@dataclass
class WandbConfig:
    mode: str = rule("offline", of=("online", "offline", "disabled"))
    project: str = "edit"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class LoggerConfig:
    kinds: list[str] = rule([], of=("wandb", "tensorboard"))  # csv is always on
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class PreviewConfig:
    every: int = rule(0, low=0)  # optimiser steps between sample grids; 0: only at the end
    count: int = rule(40, low=1, high=10_000)  # images in a grid


@dataclass
class HeldoutConfig:
    """The loss of the averaged weights on held-out data, where the data set has some."""

    # optimiser steps between two, each in the next row of metrics.csv; null: those of the previews, and without these
    # of the checkpoints; 0: never
    every: int | None = rule(None, low=0)
    count: int = rule(256, low=1, high=1_000_000)  # samples, always the same with the same noise and times


@dataclass
class TeacherConfig:
    """The frozen model that terms compare with. A run has one if `path` is given or the placement is tied."""

    path: str | None = None  # artifact, run or diffusers folder, or hub id; null for a tied one
    placement: str = rule("replicated", of=("replicated", "sharded", "offloaded", "tied"))
    guidance: Any = 1.0  # guidance weight: a number, or [low, high] for a uniform draw per sample
    dtype: str = rule("auto", of=("auto", "fp32", "bf16"))  # of its weights; auto: bf16 if the run uses bf16


@dataclass
class CriticConfig:
    """The model that learns the student's distribution, for few-step methods with one."""

    start: str = rule("teacher", of=("teacher", "student"))  # source of its initial weights and structure
    follow: float = rule(0.0, low=0, high=1)  # fraction it moves to the student after each step; SenseFlow: 0.03


@dataclass
class WorldConfig:
    """A world to try methods on, as a file of configs/world tells it: what the files of configs/method refer to."""

    name: str | None = None  # of its file
    teacher: str = "${world.name}/teacher"  # the experiment that trains its whole model
    path: str = "${runs}/${world.name}_teacher"  # of that run
    guidance: float = rule(1.0, low=0)  # scale at which the whole model is good
    lr: float = rule(1e-3, low=0, high=100)  # rate that a model is trained at from scratch, or after surgery
    tuned: float = rule(2.5e-4, low=0, high=100)  # rate that a trained model is trained on at
    sigma: float = rule(1.0, above=0)  # standard deviation of the data
    sra: list[int] = field(default_factory=list)  # SRA's unit of the student, and the deeper one of its average
    # Self-Transcendence's units: of the warm-up, of the student, of the first model; its omega, its range of times
    transcendence: list[int] = field(default_factory=list)
    omega: float = rule(30.0)
    trange: list[float] | None = field(default_factory=lambda: [0.4, 0.7])
    lengths: list[int] = field(default_factory=list)  # units of each kind, in order
    kept: list[int] = field(default_factory=list)  # every second unit
    pairs: list[Any] = field(default_factory=list)  # of these, each with the last unit of what it stands for
    taps: list[int] = field(default_factory=list)  # a few units, evenly spread
    middle: list[int] = field(default_factory=list)  # the unit half-way
    linear: list[int] = field(default_factory=list)  # every second of the later units
    linear_pairs: list[Any] = field(default_factory=list)  # each of these with itself
    repa: int = rule(0, low=0)  # the unit about a third of the way, whose tokens follow an encoder's
    haste: list[Any] = field(default_factory=list)  # it and those before it, each with a layer of the world's encoder
    tau: int = rule(1, low=1)  # 0.4 of the steps of the whole model: where an encoder has taught enough


@dataclass
class Root:
    """The keys of train.py at the top level."""

    name: Any = MISSING  # text: the run lives in <runs>/<name>; a sweep puts each job in a folder below
    world: WorldConfig = field(default_factory=WorldConfig)
    backbone: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    edits: dict[str, Any] = field(default_factory=dict)  # name -> node with _target_, applied in order
    objective: Any = MISSING
    data_weight: Any = 1.0  # of the objective's losses beside the terms: a number, or an edit.objectives.Ramp
    # equal parts of the time law, from which successive samples draw their times; 1: no stratification
    strata: int = rule(1, low=1, high=1_000_000)
    terms: dict[str, Any] = field(default_factory=dict)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    matching: Any = None  # node with _target_: a few-step method, in place of the objective's losses and terms
    critic: CriticConfig = field(default_factory=CriticConfig)
    # node with _target_: the procedure (recipes/procedure.py); null: few steps if there is a matching, else diffusion
    recipe: Any = None
    # runs to finish first: lists of key=value words for train.py, or for the module that the first word names. A list
    # may have a name, teacher: [...]; see recipes/config/staged.py
    before: list[Any] = field(default_factory=list)
    # words of the command line for these, by the stage's name: before.teacher.trainer.max_steps=6
    stages: dict[str, Any] = field(default_factory=dict)
    # modules to run afterwards on the artifact, each a list of its name and settings
    after: list[Any] = field(default_factory=list)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    sampler: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    evaluate: Any = None  # the keys of configs/eval.yaml; null: training ends without a report
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    seed: int = rule(0, low=0, high=LAST_SEED)
    log_every: int = rule(10, low=1)  # optimiser steps per row of metrics.csv
    label_drop: float = rule(0.1, low=0, high=1)  # share of conditions replaced by the null condition
    init: str | None = None  # artifact folder or official checkpoint to start from; "": one must be given
    runs: str = "runs"
    # further packages whose classes _target_ may name, each of the kind that its place expects. Importing them runs
    # their code: name only packages of your own. No other key reaches code outside of edit, data and (recipe) recipes
    trusted: list[str] = field(default_factory=list)
    debug: bool = False  # show tracebacks


@dataclass
class Evaluation:
    """What an evaluation measures, and how; configs/eval.yaml has the defaults and explains each key."""

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

    @classmethod
    def of(cls, overrides: Mapping[str, Any]) -> Evaluation:
        """The defaults with some keys changed; where a list is expected, one value stands for a list of one.

        Raises:
            UserError: for an unknown key, a wrong type or a value out of range
        """
        cfg: DictConfig = OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.load(EVALUATION))  # type: ignore
        hints = get_type_hints(cls)
        for key, value in overrides.items():
            if key not in hints:
                raise UserError(f"unknown key '{key}'{suggest(key, hints)}")
            if isinstance(value, ListConfig):
                value = OmegaConf.to_container(value, resolve=True)  # may refer to the run's world
            if str(hints[key]).startswith("list") and not isinstance(value, list | tuple):
                value = [value]
            values = value if isinstance(value, list | tuple) else [value]
            text = any(isinstance(v, str) and "${" not in v for v in values)
            if text and not accepts_text(hints[key]):  # OmegaConf would convert "4"
                raise UserError(f"{key}: expected {spell(hints[key])}, got {value!r}")
            try:
                cfg[key] = value
            except OmegaConfBaseException as error:
                raise UserError(f"{key}: expected {spell(hints[key])}, got {value!r}") from error
        if error := next(mistakes(cfg, "", ()), None):
            raise UserError(error)
        for key in ("guidance", "seed"):
            if not cfg[key]:
                raise UserError(f"{key}: expected at least one value, got an empty list")
        chosen = OmegaConf.to_object(cfg)
        assert isinstance(chosen, cls)
        return chosen
