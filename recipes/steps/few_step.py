"""Few-step distillation: a student learns to reach in a few steps what its teacher reaches in many.

Its models are the student, the teacher and, for some methods, a critic that learns the student's distribution. One
optimiser holds all trained parameters. In each step the method says whose turn it is; parameters without a gradient
stay unchanged. Specification: methods/distillation.md, D3.5-D3.10. The procedure that makes it from a run is
`recipes.few_step.FewSteps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edit import noise
from edit.denoiser import Denoiser
from edit.few_step.method import FewStepMethod
from edit.losses import Draws, Seen
from edit.objectives import Objective
from edit.state_dicts import check_layout
from edit.stream import Condition
from recipes.recipe import Recipe, local, share_frozen
from recipes.roles import Teacher
from recipes.seen import Asked, Sight, edit_losses
from recipes.settings import Training


class FewStep(Recipe):
    """Train a denoiser by a few-step method.

    Args:
        build, structure, objective, settings, teacher, null, sight: as of `Recipe`
        matching: the few-step method
        critic: makes the critic with its starting weights, and its structure alone; None: the method has none
        follow: implicit distribution alignment (SenseFlow, arXiv 2506.00523, with 0.03): the share of the way that the
            critic moves to the student after each of the student's steps; 0: off
    """

    def __init__(
        self,
        build: Callable[[], Denoiser],
        structure: Callable[[], Denoiser],
        objective: Objective,
        settings: Training,
        matching: FewStepMethod,
        teacher: Teacher | None = None,
        null: Condition | None = None,
        critic: tuple[Callable[[], Denoiser], Callable[[], Denoiser]] | None = None,
        follow: float = 0.0,
        sight: Sight | None = None,
    ):
        super().__init__(build, structure, objective, settings, teacher, null, sight)
        self.matching, self.build_critic, self.follow = matching, critic, follow
        self.critic: Denoiser | None = None
        self.own: nn.Module | None = None  # heads and weights of the method

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        self._seed_dropout(batch_index)
        self.advance(self.denoiser, *([] if self.critic is None else [self.critic]))
        asked, seen = self._see(batch, batch_index)
        mine, theirs = self.matching.turns(self.trainer.global_step)
        losses: dict[str, Tensor] = {}
        with self.casting():
            if mine:
                with self.frozen(self.critics):
                    losses |= self.matching.student_losses(seen)
                losses |= edit_losses(self.denoiser, asked.traces["student"])
            if theirs:
                with self.frozen(self.students):
                    found = self.matching.critic_losses(seen)
                if self.critic is not None:
                    found = {**found, **edit_losses(self.critic, asked.traces["critic"])}
                losses |= {f"critic/{k}": v for k, v in found.items()}
        means = {name: loss.mean() for name, loss in losses.items()}
        loss = sum(means.values(), start=torch.zeros((), device=self.device))
        before = self.losses
        self._record(batch_index, {"loss": loss, **means})
        self.losses = {**before, **self.losses}  # keeps those of the other role's last turn
        return loss

    def _see(self, batch: dict[str, Tensor], batch_index: int) -> tuple[Asked, Seen]:
        seed, samples = self.settings.seed, batch["draw"]
        whole, condition, null = self.conditions(batch)
        scale = batch.get("scale", torch.ones(len(samples), device=self.device))
        if self.teacher is not None:
            scale = self.teacher.guidance.scale(noise.uniform(seed, samples, noise.GUIDANCE))
        x = batch.get("x")
        if x is None and self.matching.needs_data:
            raise ValueError(f"{type(self.matching).__name__} starts from data, and this data set has conditions only")
        shape = self.denoiser.sample_shape if x is None else tuple(x.shape[1:])
        asked = Asked(self.objective, self.denoiser, self.ema, self.teacher, self.critic, null, scale, scale)
        return asked, Seen(
            condition,
            null,
            scale,
            Draws(seed, samples, self.micro(batch_index), shape),
            self.progress,
            x,
            *(batch.get(name) for name in ("z", "trajectory", "times")),
            step=self.trainer.global_step,
            whole=whole,
            batch=batch,
            own=self.own,
            **self.sight.of(self.matching),
            **asked.callables(),
        )

    @contextmanager
    def frozen(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Give these parameters no gradient: the loss of one role must not change the other.

        FSDP2 ignores this: gradients of the other role are computed, and `configure_gradient_clipping` drops them.
        """
        parameters = parameters if self.device_mesh is None else []
        try:
            for p in parameters:
                p.requires_grad_(False)
            yield
        finally:
            for p in parameters:
                p.requires_grad_(True)

    # ---- models ---------------------------------------------------------------------------------------------------

    def configure_parts(self) -> None:
        whole_teacher = None
        if self.teacher is not None:
            whole_teacher = self.teacher.configure(self.denoiser, self.matching.teacher_taps, ())
            if self.matching.teacher_taps:  # gradients flow through the teacher
                whole_teacher.gradient_checkpointing = self.settings.gradient_checkpointing
        if self.build_critic is not None:
            (self.critic,) = self.make(*self.build_critic, 1)
            self.prepare(self.critic)
            if self.build_critic[0] is self.build and self.device_mesh is None:
                share_frozen(self.critic, self.denoiser)
        torch.manual_seed(self.settings.seed)  # the same on every rank
        if (own := self.matching.build(self.denoiser, whole_teacher)) is not None:
            self.own = self.whole_or_sharded(own)
        if (
            self.own is not None
            and self.matching.judges(self.own)
            and self.matching.together
            and self.device_mesh is not None
        ):
            raise ValueError(
                f"{type(self.matching).__name__} with together=true: under FSDP2 both roles' losses would reach its "
                "heads in one step; use together=false with every=2 or more"
            )
        if self.follow and self.critic is not None:
            check_layout(dict(self.critic.named_parameters()), dict(self.denoiser.named_parameters()), "the student")

    def on_train_start(self) -> None:
        super().on_train_start()
        judges = [] if self.own is None else self.matching.judges(self.own)
        theirs = [*(() if self.critic is None else self.critic.parameters()), *judges]
        self.critics = [p for p in theirs if p.requires_grad]
        known = {id(p) for p in theirs}
        ours = [*self.denoiser.parameters(), *(() if self.own is None else self.own.parameters())]
        self.students = [p for p in ours if p.requires_grad and id(p) not in known]

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        mine, theirs = self.matching.turns(self.trainer.global_step)
        for p in (*(() if mine else self.students), *(() if theirs else self.critics)):
            p.grad = None
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clipped(self) -> list[list[nn.Parameter]]:
        return [self.students, self.critics]

    def updates(self, step: int) -> int | None:
        mine, _ = self.matching.turns(step)
        return step // self.matching.every if mine else None

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        mine, _ = self.matching.turns(self.trainer.global_step)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if mine and self.follow and self.critic is not None:
            pairs = zip(self.critic.parameters(), self.denoiser.parameters(), strict=True)
            theirs, ours = zip(*((local(c), local(p)) for c, p in pairs if p.requires_grad), strict=True)
            with torch.no_grad():
                torch._foreach_lerp_(theirs, ours, self.follow)
