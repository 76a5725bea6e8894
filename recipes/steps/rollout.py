"""Rollout: training on the sampler's own path, evaluation by evaluation.

The procedure that makes it from a run is `recipes.rollout.RollingOut`.

A batch gives conditions and, by the numbers of its samples, the noise; the run's sampler walks from there to the data
with the student, guidance included. Each evaluation that trains is one optimiser step; those between are made without a
graph on the way to it. The method (`edit.rollout`) says which they are, what is minimised, and how the generation goes
on.

A step is given the same batch until its generation is over. The generation under way, with the memory of all edits, is
in the checkpoint, a file of each rank: a stopped run goes on to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from edit.calibrating import OnData
from edit.denoiser import Denoiser
from edit.losses import Draws
from edit.objectives import Objective
from edit.rollout import Answer, RolloutMethod, Visit, trained
from edit.sampling import Guided, Sampler
from edit.solvers import Query
from edit.stream import Condition, Output
from edit.walk import Moment, Walk
from recipes.config.errors import UserError
from recipes.recipe import Recipe
from recipes.roles import Teacher
from recipes.seen import Sight, edit_losses
from recipes.settings import Training


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
        watched = dict(self.method.metrics(visit))
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
