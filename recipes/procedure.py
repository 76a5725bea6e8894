"""What `recipe` in a configuration describes: the procedure by which a run makes its artifact.

A new procedure is a file with a frozen dataclass on `Procedure`, or on `Fit` where Lightning trains a `Recipe`; its
fields are its settings. `recipe: {_target_: recipes.mine.Mine}` chooses it. `recipes.config.chosen` tells the one of a
run that names none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from omegaconf import DictConfig
from torch import Tensor, nn

from edit.denoiser import Denoiser
from edit.importing import uncollected
from edit.losses import Loss
from edit.measuring.probe import Probe
from edit.measuring.turns import Turn
from recipes.assembly import Run
from recipes.models import Models, losses_of
from recipes.runtime.checkpoint_files import newest, step_of
from recipes.runtime.run_folder import refuse_overrun
from recipes.settings import images_per_step

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from recipes.recipe import Recipe


@dataclass(frozen=True)
class Stand:
    """What former commands have left of a run.

    Args:
        finished: the artifact is there, and nothing is left to do before the evaluation
        step: optimiser steps that are done
        resume: checkpoint to go on from; None: from the start
    """

    finished: bool = False
    step: int = 0
    resume: Path | None = None


@dataclass(frozen=True)
class Result:
    """What becomes the artifact.

    Args:
        denoiser: gives structure and edits
        state: its whole state dict
        told: provenance for the artifact, JSON
        loggers: of the run, still open
    """

    denoiser: Denoiser
    state: Mapping[str, Tensor]
    told: Mapping[str, Any] = field(default_factory=dict)
    loggers: list[Logger] = field(default_factory=list)


@dataclass(frozen=True)
class Probed:
    """A run's structures without memory, from which its procedure tells what a step calls.

    Args:
        models: of the run
        config: of the run
        student: with the taps that `Procedure.taps` wants
        teacher: likewise; None: there is none with weights of its own
        own: modules of `Loss.build` on the meta device, by the places of the losses in the configuration
        guided: batches that one call of a teacher takes: 2 with classifier-free guidance
        decoder: of the data set, where a loss asks for pixels; None: no loss does, or it is not here
        notes: what the plan leaves out is appended, a sentence each
    """

    models: Models
    config: DictConfig
    student: Probe
    teacher: Probe | None
    own: Mapping[str, nn.Module | None]
    guided: int
    decoder: nn.Module | None
    notes: list[str]


@dataclass(frozen=True)
class Procedure(ABC):
    """How a run makes its artifact. A subclass is a frozen dataclass; its fields are the procedure's settings."""

    optimises: ClassVar[bool] = True  # its memory is planned as that of training
    makes: ClassVar[str] = "artifact"  # the folder of the run that is there once it is finished, one of `MADE`
    cure: ClassVar[str] = "change the settings"  # where the weights that it made are not finite

    def check(self, cfg: DictConfig) -> Iterator[str]:
        """One sentence for each part of a configuration that this procedure cannot be combined with.

        Args:
            cfg: composed, its values right one by one; references to the running job are not resolved
        """
        yield from ()

    def losses(self, models: Models) -> Mapping[str, Loss]:
        """The losses of a run, by their places in the configuration: for its plan."""
        return losses_of(models)

    def taps(self, models: Models) -> tuple[tuple, tuple]:
        """What student and teacher record in a step, each as `Probe` takes it: taps, branches, maps."""
        return (), ()

    def kinds(self, probed: Probed) -> tuple[Turn, ...]:
        """The kinds of optimiser steps, for the plan; none told: the teacher is asked, then the student is trained.

        Raises:
            ValueError: if they depend on values
        """
        return ()

    def remembered(self, probed: Probed) -> int:
        """Bytes that edits of the student remember of one sample, for the plan."""
        return 0

    @abstractmethod
    def stand(self, cfg: DictConfig, out: Path) -> Stand:
        """How far the run in a folder is.

        Raises:
            UserError: if it cannot be continued
        """

    @abstractmethod
    def perform(self, run: Run, out: Path, stand: Stand) -> Result | None:
        """Do what is left to do; on every rank.

        Args:
            run: all that the configuration resolves to
            out: the run's folder, locked
            stand: how far the run is

        Returns:
            On rank 0, what becomes the artifact; None on the others, and where it has made something else itself.

        Raises:
            SystemExit: with 143, if the run was told to stop before its end
            UserError: for what the user can mend
        """


@dataclass(frozen=True)
class Fit(Procedure):
    """A Lightning fit of a `Recipe`, whose average becomes the artifact."""

    cure: ClassVar[str] = (
        "the checkpoints are kept: remove the newest to go back, and lower optimizer.lr, or lengthen optimizer.warmup"
    )

    @abstractmethod
    def module(self, run: Run) -> Recipe:
        """The LightningModule that is trained; builds no weights."""

    def turns(self, run: Run) -> bool:
        """Whether roles take turns, so that some parameters get no gradient in a step."""
        return False

    def provenance(self, run: Run) -> dict[str, Any]:
        """What the artifact tells besides name, step, seed and images; JSON."""
        return {}

    def stand(self, cfg: DictConfig, out: Path) -> Stand:
        resume = newest(out / "checkpoints")
        done = step_of(resume) if resume else 0
        refuse_overrun(cfg, out, done)
        return Stand(done >= cfg.trainer.max_steps and (out / "artifact").is_dir(), done, resume)

    def perform(self, run: Run, out: Path, stand: Stand) -> Result | None:
        with uncollected():
            from recipes.fitting import fit, full_state  # with it comes Lightning

        cfg, module = run.config, self.module(run)
        trainer = fit(run, module, out, stand.resume, stand.step, self.turns(run))
        state = full_state(module.ema, trainer)
        if not trainer.is_global_zero:
            return None
        images = images_per_step(cfg) * cfg.trainer.max_steps
        told = {"step": trainer.global_step, "seed": cfg.seed, "images": images, **self.provenance(run)}
        return Result(module.ema, state, told, trainer.loggers)
