"""Rollout: training on the sampler's own path, evaluation by evaluation.

    python train.py recipe=rollout "recipe.method={_target_: ...}" init=runs/digits edits=... sampler.solver.steps=10

A batch gives conditions and, by the numbers of its samples, the noise; the run's sampler walks from there to the data
with the student, guidance included. Each evaluation that trains is one optimiser step; those between are made without a
graph on the way to it. The method (`edit.rollout`) says which they are, what is minimised, and how the generation goes
on.

A step is given the same batch until its generation is over. The generation under way, with the memory of all edits, is
in the checkpoint, a file of each rank: a stopped run goes on to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from data.loader import EndlessLoader
from edit.calibrating import OnData
from edit.denoiser import Denoiser
from edit.edits import describe
from edit.inputs.limits import LAST_SEED, Count, check_numbers
from edit.losses import Draws, Loss
from edit.measuring.rollouts import remembered, turns_of
from edit.measuring.turns import Turn
from edit.objectives import Objective
from edit.rollout import Answer, RolloutMethod, Visit, trained
from edit.sampling import Guided, Sampler
from edit.solvers import DDIMSolver, DDPMSolver, DPMSolver, Euler, Heun, Query
from edit.stream import Condition, Output
from edit.walk import Moment, Walk
from recipes.assembly import Run, make_sight
from recipes.calibrate import APART, WITHOUT_END
from recipes.config.errors import UserError
from recipes.fitting import world_size
from recipes.models import Models, made
from recipes.procedure import Fit, Probed
from recipes.recipe import Recipe, Training
from recipes.roles import Teacher
from recipes.seen import Sight, edit_losses


class Rollout(Recipe):
    """Train a denoiser on its own sampling path.

    Args:
        build, structure, objective, settings, teacher, null, sight: as of `Recipe`
        method: what is trained, and how
        sampler: of the generations
        count: evaluations of a generation
        batches: makes what `RolloutMethod.refresh` calibrates on, for a denoiser; the same on every rank
        seed: of the noise; None: the run's
    """

    def __init__(
        self,
        build: Callable[[], Denoiser],
        structure: Callable[[], Denoiser],
        objective: Objective,
        settings: Training,
        method: RolloutMethod,
        sampler: Sampler,
        count: int,
        batches: Callable[[Denoiser], OnData],
        teacher: Teacher | None = None,
        null: Condition | None = None,
        sight: Sight | None = None,
        seed: int | None = None,
    ):
        super().__init__(build, structure, objective, settings, teacher, null, sight)
        self.method, self.sampler, self.batches = method, sampler, batches
        self.updating = trained(method, count)
        self.noise_seed = settings.seed if seed is None else seed
        self.walk: Walk | None = None  # the student's generation under way; None: the next batch begins one
        self.path: Walk | None = None  # the teacher's own, at the same evaluation
        self.left: dict[str, Any] | None = None  # a generation that a checkpoint has, until its batch comes
        self.own: nn.Module | None = None  # parameters and buffers of the method

    @property
    def repeats(self) -> int:
        return len(self.updating)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        self._seed_dropout(batch_index)
        self.advance(self.denoiser)
        self._refresh()
        if self.walk is None:
            self.walk, self.path = self._begin(batch)
        moment = self._pass(self.walk, batch)
        visit = self._visit(moment, batch)
        visit = replace(visit, student=self._ask(moment))
        losses = dict(self.method.losses(visit))
        traces = [out.trace for out in visit.student.outputs.values()]  # type: ignore[union-attr]
        watched: dict[str, Tensor] = {}
        for trace in traces:  # of each guidance branch: their mean
            for name, loss in edit_losses(self.denoiser, [trace]).items():
                losses[name] = losses.get(name, 0.0) + loss.mean() / len(traces)
            for name, edit in self.denoiser.applied.items():
                for k, v in edit.metrics(trace).items():
                    watched[f"{name}/{k}"] = watched.get(f"{name}/{k}", 0.0) + v.float().mean() / len(traces)
        means = {name: loss.mean() for name, loss in losses.items()}
        loss = sum(means.values(), start=torch.zeros((), device=self.device))
        if not loss.requires_grad:
            raise UserError(
                f"recipe.method: at evaluation {moment.step.index} no trained parameter has a part in the losses: let "
                f"{type(self.method).__name__}.trains leave it out, or choose edits that train there"
            )
        self._record(batch_index, {"loss": loss, **(means if len(means) > 1 else {}), **watched})
        with torch.no_grad():
            moment.give(self.method.proceed(visit).detach())
        self.walk.detach()
        if moment.step.index == self.updating[-1]:
            self.walk = self.path = None  # nothing behind it trains
        return loss

    # ---- a generation ---------------------------------------------------------------------------------------------

    def _begin(self, batch: Mapping[str, Tensor]) -> tuple[Walk, Walk | None]:
        """The generations of student and teacher: from the start, or where a checkpoint has left them."""
        kept, self.left = self.left or {}, None
        walk = self._walk(self.denoiser, batch, kept.get("walk"))
        path = None
        if self.method.asks == "path" and "predictions" not in batch:
            path = self._walk(self._teacher, batch, kept.get("path"))
        return walk, path

    @property
    def _teacher(self) -> Denoiser:
        """The model whose dense answers teach."""
        return self.denoiser if self.teacher is None or self.teacher.denoiser is None else self.teacher.denoiser

    def _walk(self, denoiser: Denoiser, batch: Mapping[str, Tensor], state: Mapping[str, Any] | None) -> Walk:
        device = self.device
        return self.sampler.walk(
            denoiser,
            self.objective,
            Condition.of(batch),
            batch.get("number", batch["draw"]),
            self.noise_seed,
            self.null,
            shape=tuple(batch["x"].shape[1:]) if "x" in batch else None,
            state=None if state is None else move_data_to_device(state, device),
        )

    @torch.no_grad()
    def _pass(self, walk: Walk, batch: Mapping[str, Tensor]) -> Moment:
        """The next evaluation that trains; those before it are made."""
        while True:
            moment = walk.moment
            assert moment is not None, "the walk ends with the last evaluation that trains"
            if moment.step.index in self.updating:
                return moment
            visit = self._visit(moment, batch)
            given = self.method.passing(visit)
            if given is None:
                given = self.method.proceed(replace(visit, student=self._ask(moment)))
            moment.give(given)

    def _visit(self, moment: Moment, batch: Mapping[str, Tensor]) -> Visit:
        step, x = moment.step, moment.x
        draws = Draws(self.settings.seed, batch["draw"], self.trainer.global_step, tuple(x.shape[1:]))
        return Visit(
            step,
            x,
            Condition.of(batch),
            draws.of(f"evaluation {step.index}"),
            self.trainer.global_step,
            self.progress,
            batch,
            teacher=self._taught(moment, batch),
            own=self.own,
            **self.sight.of(self.method),
        )

    def _ask(self, moment: Moment) -> Answer:
        """The student's answer, which its edits remember."""
        outputs: dict[str, Any] = {}
        prediction = moment.ask(taps=self.method.taps, look=outputs.__setitem__)
        return Answer(prediction, outputs)

    @torch.no_grad()
    def _taught(self, moment: Moment, batch: Mapping[str, Tensor]) -> Answer | None:
        """The teacher's answer, where the method wants one."""
        outputs: dict[str, Any] = {}
        taps, index = self.method.teacher_taps, moment.step.index
        if self.method.asks == "path" and self.path is not None:
            there = self.path.moment
            assert there is not None and there.step.index == index, "both generations are at the same evaluation"
            prediction = there.ask(dense=True, taps=taps, look=outputs.__setitem__)
            there.give(prediction)
            return Answer(prediction, outputs)
        if self.method.asks == "path":
            depth = len(self.denoiser.units)
            return stored_answer(batch, index, [i % depth for i in taps], self.device)
        if self.method.asks is None or index not in self.updating:
            return None
        if self._teacher is self.denoiser:
            return Answer(moment.ask(dense=True, taps=taps, look=outputs.__setitem__), outputs)
        query = Query(moment.x, moment.step.sigma, moment.end)
        return Answer(self._guided(batch)(query, None, taps, outputs.__setitem__), outputs)

    def _guided(self, batch: Mapping[str, Tensor]) -> Guided:
        """A teacher of its own, guided as the student."""
        return self.sampler.guided(self._teacher, Condition.of(batch), batch["draw"], self.null)

    # ---- between updates ------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """The method's weights and tables anew, if it is time; the average has the same."""
        if not self.method.every or self.trainer.global_step % self.method.every:
            return
        self.denoiser.eval()
        with torch.no_grad():
            self.method.refresh(self.denoiser, self.batches(self.denoiser), self.own)
            theirs = dict(self.ema.named_buffers())
            for name, buffer in self.denoiser.named_buffers():
                theirs[name].copy_(buffer)
        self.denoiser.train()
        if self.device_mesh is not None:
            self.reshard()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Stored features stay where they are: of all evaluations one is needed at a time."""
        far = {k: v for k, v in batch.items() if k.startswith(FEATURES)}
        near = {k: v for k, v in batch.items() if k not in far}
        return {**super().transfer_batch_to_device(near, device, dataloader_idx), **far}

    def updated(self) -> None:
        with torch.no_grad():
            self.method.constrain(self.denoiser, self.own)

    def kept(self) -> dict[str, Any] | None:
        if self.walk is None:
            return None
        walks = {"walk": self.walk} | ({} if self.path is None else {"path": self.path})
        return {name: walk.state(lambda v: v.detach().to("cpu", copy=True)) for name, walk in walks.items()}

    def restore(self, kept: dict[str, Any] | None) -> None:
        self.left = kept

    def configure_parts(self) -> None:
        whole_teacher = None
        if self.teacher is not None:
            whole_teacher = self.teacher.configure(self.denoiser, self.method.teacher_taps, ())
        torch.manual_seed(self.settings.seed)  # the same on every rank
        if (own := self.method.build(self.denoiser, whole_teacher or self.denoiser)) is not None:
            self.own = self.whole_or_sharded(own)


FEATURES = ("predictions", "tap")  # how the names of stored features in a batch begin


def stored_answer(batch: Mapping[str, Tensor], index: int, taps: Collection[int], device: torch.device) -> Answer:
    """The teacher's answer at an evaluation, from stored features, as if its guidance branches had shared a batch.

    Args:
        batch: with `predictions`, b s c *sizes, and of each tap `tap<unit>`, b s k n d
        index: of the evaluation
        taps: units, from 0
        device: of the answer
    """
    prediction = batch["predictions"][:, index].to(device)
    tokens = {f"unit.{unit}": batch[f"tap{unit}"][:, index].to(device) for unit in taps}  # b k n d
    several = any(v.shape[1] > 1 for v in tokens.values())
    trace = {name: v.transpose(0, 1).flatten(0, 1) for name, v in tokens.items()}
    return Answer(prediction, {"joint" if several else "cond": Output(prediction, None, trace)})


def refuse_other_features(stored: Mapping[str, Any], method: RolloutMethod, sampler: Sampler, run: Run) -> None:
    """Raises UserError if stored features are not those of the run's sampler, or lack a tap of the method."""
    times = sampler.solver.times_of(run.objective, tuple(run.models.data.shape))[:-1]
    made, guidance = stored["evaluations"], sampler.guidance if sampler.told is None else sampler.told
    kinds = {"euler": Euler, "heun": Heun, "dpm": DPMSolver, "ddim": DDIMSolver, "ddpm": DDPMSolver}
    same = type(sampler.solver) is kinds[stored["solver"]] and len(made) == len(times)
    if not same or any(abs(a - b) > 1e-6 for a, b in zip(made, times, strict=True)):
        raise UserError(
            f"the stored features are of {stored['solver']} in {stored['steps']} steps with shift {stored['shift']:g}, "
            f"and the sampler is {sampler.solver}: choose it alike"
        )
    if abs(guidance - stored["guidance"]) > 1e-6 or sampler.interval != (0.0, 1.0):
        raise UserError(
            f"the stored features were made at guidance {stored['guidance']:g} at all times, and the sampler guides at "
            f"{guidance:g} in {sampler.interval}: choose it alike"
        )
    depth = len(run.models.skeleton.units)
    if lacking := [unit for unit in method.teacher_taps if unit % depth not in stored["taps"]]:
        raise UserError(
            f"recipe.method wants the teacher's tokens behind unit {lacking[0]}, stored are those of {stored['taps']}: "
            "run data.generate with this tap, or leave data.set.features out"
        )


@dataclass(frozen=True)
class RollingOut(Fit):
    """Training on the sampler's own path by a method of `edit.rollout`.

    Args:
        method: what is trained, and how
        batches: of noisy data that a method's `refresh` sees in a pass, each of data.batch_size samples
        samples: of a generation in `refresh`
    """

    method: RolloutMethod
    batches: Count = 16
    samples: Count = 8

    def __post_init__(self):
        check_numbers(self)
        if not isinstance(self.method, RolloutMethod):
            raise ValueError(f"recipe.method is a section with the _target_ of a RolloutMethod, got {self.method!r}")

    def check(self, cfg: DictConfig) -> Iterator[str]:
        if cfg.matching is not None:
            yield "recipe=rollout trains by recipe.method, and matching by a few-step method: leave one of the two out"
        if cfg.terms:
            yield f"recipe=rollout has the losses of recipe.method: leave out terms.{next(iter(cfg.terms))}"
        if cfg.data_weight != 1.0 or cfg.strata != 1:
            yield "data_weight and strata are of diffusion training: leave them out with recipe=rollout"
        if cfg.critic.follow or cfg.critic.start != "teacher":
            yield "critic: only a few-step method (matching) has one: leave the section out"
        if cfg.teacher.placement == "tied":
            yield (
                "teacher.placement=tied: without another teacher the model itself, dense, is the teacher of a rollout: "
                "leave the section out"
            )
        if self.method.needs_teacher and not OmegaConf.is_missing(cfg.teacher, "path") and cfg.teacher.path is None:
            yield f"recipe.method: {type(self.method).__name__} compares with another model: give teacher.path=..."
        trainer = cfg.trainer
        if trainer.accumulate != 1:
            yield (
                f"trainer.accumulate={trainer.accumulate}: a rollout updates after each evaluation: set "
                "trainer.accumulate=1, and data.batch_size as large as wanted"
            )
        if trainer.gradient_checkpointing:
            yield (
                "trainer.gradient_checkpointing=true computes units again when edits remember the next evaluation "
                "already: set it to false with recipe=rollout"
            )
        if trainer.strategy.startswith("zero"):
            yield (
                f"trainer.strategy={trainer.strategy} keeps weights where a rollout cannot ask a teacher between two "
                "updates: use trainer=ddp or fsdp2"
            )

    def losses(self, models: Models) -> Mapping[str, Loss]:
        return {"recipe.method": self.method}

    def taps(self, models: Models) -> tuple[tuple, tuple]:
        return (self.method.taps,), (self.method.teacher_taps,)

    def kinds(self, probed: Probed) -> tuple[Turn, ...]:
        sampler, objective = made(probed.config.sampler), made(probed.config.objective)
        times = sampler.solver.times_of(objective, probed.student.shape)
        student, taps = probed.student, self.method.teacher_taps
        teacher = "student" if probed.teacher is None else "teacher"
        if self.method.asks == "path" and getattr(probed.models.data, "features", False):
            teacher = None
        elif self.method.asks == "path":
            branches = 1 + (sampler.guidance != 1)
            tokens = sum(v[0].numel() for v in (probed.teacher or student).tapped(taps).values()) if taps else 0
            each = 2 * (math.prod(student.shape) + branches * tokens) * (len(times) - 1)
            probed.notes.append(
                f"its teacher's answers, stored by data.generate taps=..., would take {each / 1e6:.3g} MB per sample "
                "in 16 bits and save the calls of the teacher"
            )
        if self.method.every:
            probed.notes.append(
                f"the generations from which recipe.method makes its values anew every {self.method.every} updates are "
                "not counted"
            )
        return turns_of(self.method, sampler, times, student.denoiser, teacher)

    def remembered(self, probed: Probed) -> int:
        sampler, objective = made(probed.config.sampler), made(probed.config.objective)
        student = probed.student
        found = remembered(student.denoiser, sampler, objective, student.shape, student.condition)
        if found is None:
            probed.notes.append(
                "what edits remember between evaluations depends on values: it is neither known nor counted"
            )
        return found or 0

    def module(self, run: Run) -> Rollout:
        models, method = run.models, self.method
        times = run.sampler.solver.times_of(run.objective, tuple(models.data.shape))
        if method.asks is not None and run.sampler.perturbation:
            raise UserError(
                f"sampler.perturbation={run.sampler.perturbation:g}: a dense teacher has no perturbed branch: set it "
                "to 0 while training"
            )
        if models.teacher is not None and models.teacher.guidance.high != 1 and run.sampler.told is None:
            raise UserError(
                "teacher.guidance: a rollout guides its teacher as the student, by sampler.guidance: leave it out"
            )
        try:
            method.check(models.skeleton, run.sampler, times)
            trained(method, len(times) - 1)
        except ValueError as error:
            raise UserError(f"recipe.method: {error}") from error
        stored = getattr(models.data, "stored", None) or {}
        if "taps" not in stored or not getattr(models.data, "features", False):
            stored = {}
        if stored and method.asks == "path":
            refuse_other_features(stored, method, run.sampler, run)
        return Rollout(
            *models.student,
            run.objective,
            run.training,
            method,
            run.sampler,
            len(times) - 1,
            lambda denoiser: self.calibration(run, denoiser),
            models.teacher,
            run.null,
            make_sight(models.data, {"recipe.method": method}),
            stored.get("seed"),
        )

    def calibration(self, run: Run, denoiser: Denoiser) -> OnData:
        """Noisy data and generations, the same on every rank, at each call, and however many ranks share a batch."""
        cfg = run.config
        return OnData(
            denoiser,
            run.objective,
            run.sampler,
            lambda: EndlessLoader(run.models.data.train(), cfg.data.batch_size, WITHOUT_END, cfg.seed),
            batches=self.batches * world_size(cfg),
            samples=self.samples,
            seed=(cfg.seed + APART) % (LAST_SEED + 1),
            negative=run.null,
            title="recipe.method",
        )

    def turns(self, run: Run) -> bool:
        return True  # an evaluation may reach some of the parameters alone

    def provenance(self, run: Run) -> dict[str, Any]:
        return {"recipe": describe(self), "teacher": OmegaConf.to_container(run.config.teacher)}
