"""The base of all training procedures: models and their sharding, the optimiser, the average, skipped steps.

Lightning owns the loop, devices, precision, accumulation and strategies (`runtime/trainer.py`). Every random draw of a
step is a pure function of (seed, number of the sample in the run). So resuming is exact, and the loss does not depend
on how many ranks share a batch.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from edit import noise
from edit.denoiser import Denoiser
from edit.edits import grouped, trains
from edit.groups import PLAIN, Group
from edit.objectives import Objective
from edit.stream import Condition
from recipes.roles import Teacher, shard, units_of
from recipes.seen import Sight
from recipes.settings import Training


class Recipe(pl.LightningModule, ABC):
    """Train `denoiser` and keep an exponential moving average of it in `ema`. Subclasses are the procedures.

    Args:
        build: makes the denoiser with its starting weights and edits; called once, inside `configure_model`
        structure: the same without weights, for sharded training; called under `torch.device("meta")`
        objective: the path from data to noise, the predicted quantity, and its loss
        settings: of training
        teacher: a frozen model beside the student; None: there is none
        null: the null condition, a batch of 1; None: the denoiser's own
        sight: frozen models that losses look with; None: there are none
    """

    denoiser: Denoiser
    ema: Denoiser

    def __init__(
        self,
        build: Callable[[], Denoiser],
        structure: Callable[[], Denoiser],
        objective: Objective,
        settings: Training,
        teacher: Teacher | None = None,
        null: Condition | None = None,
        sight: Sight | None = None,
    ):
        super().__init__()
        self.build, self.structure, self.objective = build, structure, objective
        self.settings, self.teacher, self.null = settings, teacher, null
        self.sight = Sight(None, {}) if sight is None else sight
        self.begun = 0  # optimiser steps that the checkpoint holds which this run goes on from
        self.adopted: dict[str, Group] = {}  # what edits say of losses' own parameters, by their names here
        self.losses: dict[str, Tensor] = {}  # means over the current optimiser step, for the log
        self.configured = False

    @property
    def repeats(self) -> int:
        """Optimiser steps in a row that are given the same batch."""
        return 1

    @abstractmethod
    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor: ...

    def kept(self) -> dict[str, Any] | None:
        """What this rank alone knows between two optimiser steps, for its file beside the checkpoint: lists, dicts,
        tensors, numbers and texts. None: nothing. All ranks keep something, or none does."""
        return None

    def restore(self, kept: dict[str, Any] | None) -> None:  # noqa: B027 - most keep nothing
        """Go on from what `kept` gave, its tensors on the CPU; called before a run is continued."""

    def heldout(self, batch: dict[str, Tensor], u: Tensor, eps: Tensor) -> Tensor | None:
        """The loss of each held-out sample by the average, [b], without a graph; None: this procedure has none that
        would say anything.

        Args:
            batch: samples as a step gets them, without `draw`
            u: quantiles of the law of times, b in (0, 1)
            eps: noise, b c *sizes
        """
        return None

    def updated(self) -> None:  # noqa: B027 - few have anything to do
        """Called after each update, before the average follows it."""

    # ---- a batch --------------------------------------------------------------------------------------------------

    def conditions(self, batch: dict[str, Tensor]) -> tuple[Condition, Condition, Condition]:
        """The condition of a batch before and after label drop, and the null condition."""
        whole = Condition.of(batch)
        if not self.settings.label_drop and self.teacher is None:
            return whole, whole, whole  # nothing uses the null condition
        null = self._null(whole, len(batch["draw"]))
        if not self.settings.label_drop:
            return whole, whole, null
        drop = noise.uniform(self.settings.seed, batch["draw"], noise.DROP) < self.settings.label_drop
        return whole, whole.where(drop, null), null

    def _null(self, condition: Condition, count: int) -> Condition:
        if self.null is None:
            return self.denoiser.null(condition)
        return self.null.map(lambda v: v.to(self.device).expand(count, *v.shape[1:]))

    def casting(self) -> AbstractContextManager:
        """Autocast to bf16 as Lightning's, without its cache, which would hold bf16 copies of all weights at once."""
        if not self.settings.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    @property
    def progress(self) -> float:
        """The part of the run that is done, in [0, 1]."""
        return self.trainer.global_step / self.settings.max_steps

    def micro(self, batch_index: int) -> int:
        """The number of a batch in the run, the same on all ranks."""
        accumulate = self.settings.accumulate
        return self.trainer.global_step * accumulate + batch_index % accumulate

    def _seed_dropout(self, batch_index: int) -> None:
        """Seed the global generators, which only dropout and gates inside the model use."""
        seed = (self.settings.seed * 1_000_003 + self.micro(batch_index)) * 4099 + self.global_rank
        torch.default_generator.manual_seed(seed)  # torch.manual_seed costs 1 % of a small step
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def advance(self, *denoisers: Denoiser) -> None:
        """Tell the edits of trained models how far the run is."""
        for denoiser in denoisers:
            for name, edit in denoiser.applied.items():
                edit.advance(self.progress, denoiser.edits[name] if name in denoiser.edits else None)

    def _record(self, batch_index: int, values: dict[str, Tensor]) -> None:
        first = batch_index % self.settings.accumulate == 0
        if first:
            self.losses = {}
        for name, value in values.items():
            value = value.detach() / self.settings.accumulate
            self.losses[name] = value if first else self.losses[name] + value

    # ---- model ----------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if self.configured:  # Lightning calls again on restart
            return
        self.configured = True
        self.denoiser, self.ema = self.make(self.build, self.structure, 2)
        self.prepare(self.denoiser)
        if self.device_mesh is None:
            share_frozen(self.ema, self.denoiser)
        self.configure_parts()
        self.ema.requires_grad_(False).eval()
        self.told = self.denoiser.facts.told  # its guidance scale, as an input
        if self.teacher is not None and self.teacher.placement == "tied":
            others = [name for name, e in self.denoiser.applied.items() if not e.keeps]
            if others or self.denoiser.config != self.denoiser.base:
                raise ValueError(
                    "teacher.placement=tied makes the student without the edits that can be switched off the teacher, "
                    f"but another edit {'(' + others[0] + ') ' if others else ''}changes it: give the teacher's folder "
                    "with teacher.path, or leave that edit out"
                )
        if self.teacher is not None and not self.told and self.teacher.guidance.low != self.teacher.guidance.high:
            raise ValueError(
                "teacher.guidance is a range, but the student has no guidance input that could be told the scale: give "
                "one scale, or apply edit.tuning.guidance.GuidanceInput"
            )
        # skipped steps: in all, and consecutive ones until now; on the device, as reading them costs a synchronisation
        self.register_buffer("skipped", torch.zeros(2))
        self.grad_norm: Tensor | None = None
        self.rate = 0.0  # learning rate of the last optimiser step

    @abstractmethod
    def configure_parts(self) -> None:
        """Make the other parts of the run: teacher, critic, parameters of loss terms."""

    def make(self, build: Callable[[], Denoiser], structure: Callable[[], Denoiser], copies: int) -> list[Denoiser]:
        """Make `copies` equal models. Under FSDP2 they are sharded, and rank 0 alone builds the weights."""
        if self.device_mesh is None:
            with torch.device("cpu"):  # the same weights on every device
                first = build()
            return [first, *(deepcopy(first) for _ in range(copies - 1))]
        state = {}
        if self.global_rank == 0:
            with torch.device("cpu"):  # rank 0 alone holds the whole model, and not on its GPU
                state = build().state_dict()
        half = "bf16" in str(self.trainer.precision)
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None,
            reduce_dtype=torch.float32 if half else None,
            cast_forward_inputs=False,  # times and noisy samples stay in fp32; autocast casts the rest
        )
        device = self.trainer.strategy.root_device
        return [shard(structure, state, device, self._mesh, policy) for _ in range(copies)]

    def prepare(self, denoiser: Denoiser) -> None:
        """Set up a model for training: gradients where its edits leave weights open, checkpointing, compilation."""
        for name, p in denoiser.named_parameters():
            p.requires_grad_(p.requires_grad and trains(denoiser, name))
        denoiser.train().gradient_checkpointing = self.settings.gradient_checkpointing
        if self.settings.compile:
            for unit in units_of(denoiser):
                unit.compile()

    def whole_or_sharded(self, own: nn.Module) -> nn.Module:
        """Parameters of loss terms or of a method: sharded under FSDP2, else as they are."""
        if self.device_mesh is None or next(own.parameters(), None) is None:
            return own
        return fully_shard(own, mesh=self._mesh)  # type: ignore[return-value]

    @property
    def _mesh(self):
        return self.device_mesh["data_parallel"]

    def reshard(self) -> None:
        """Shard all weights again: FSDP2 keeps root weights gathered after a no-grad call, and updates need shards."""
        for m in self.modules():
            if hasattr(m, "reshard") and m is not self:
                m.reshard()

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        if self.device_mesh is not None:
            self.reshard()  # the last step may have asked the average, whose gathered weights are stale by now

    def on_train_start(self) -> None:
        if self.teacher is not None:
            self.teacher.place(self.device)
        self.sight.place(self.device)
        both = zip(self.ema.parameters(), self.denoiser.parameters(), strict=True)
        self.averaged = [(e, p) for e, p in both if p.requires_grad]  # walking the modules is slower
        self.trained = [p for p in self.parameters() if p.requires_grad]

    # ---- optimiser ------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> dict[str, Any]:
        s = self.settings.optimizer
        optimizer = optimizer_of(s.kind)(
            self._groups(), lr=s.lr, betas=tuple(s.betas), eps=s.eps, weight_decay=s.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.settings.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _groups(self) -> list[dict[str, Any]]:
        """One optimiser group per pattern of `optimizer.groups`, by the first that a name matches; one for the rest.

        Each is divided by what edits say of its parameters (`Edit.groups`), in an order that a resumed run finds again:
        an optimiser's state knows its parameters by their places alone.
        """
        s = self.settings.optimizer
        groups, said = dict(s.groups or {}), self._said()
        parts: dict[str, dict[Group, list[nn.Parameter]]] = {pattern: {} for pattern in (*groups, "")}
        for name, p in self.named_parameters():
            if p.requires_grad:
                pattern = next((g for g in groups if re.search(g, name)), "")
                parts[pattern].setdefault(said.get(name, PLAIN), []).append(p)
        if unmet := [g for g in groups if not parts[g]]:
            raise ValueError(f"optimizer.groups: no trainable parameter's name matches {unmet[0]!r}")
        out = []
        for pattern, kinds in parts.items():
            change = dict(groups.get(pattern, {}))
            lr, decay = s.lr * change.get("lr_scale", 1.0), change.get("weight_decay", s.weight_decay)
            for group in sorted(kinds, key=lambda g: g.place):
                betas = tuple(change.get("betas", group.betas or s.betas))
                out.append({"params": kinds[group], "lr": lr, "weight_decay": decay, "betas": betas})
                if group != PLAIN:
                    out[-1] |= {"lr": lr * group.lr, "weight_decay": decay * group.decay}
                if group.kind is not None:
                    out[-1]["kind"] = group.kind
        if not out:
            raise ValueError("nothing to train: the edits freeze every parameter")
        return out

    def _said(self) -> dict[str, Group]:
        """What the edits of all models say of parameters, by their names in the recipe."""
        models = ((role, m) for role, m in self.named_children() if isinstance(m, Denoiser))
        return self.adopted | {f"{role}.{name}": group for role, m in models for name, group in grouped(m).items()}

    def adopt(self, place: str, build: Callable[[Denoiser], Any], own: nn.Module) -> None:
        """Let the edits of the trained model change the start of a loss's new parameters and say how they are trained.

        Args:
            place: of `own` in the recipe
            build: makes the same for another student
            own: before it is sharded
        """
        for edit in self.denoiser.applied.values():
            for name, group in edit.adopt(self.denoiser, build, own).items():
                self.adopted[f"{place}.{name}"] = self.adopted.get(f"{place}.{name}", PLAIN).joined(group)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip by global norm; mark a step with a non-finite gradient to be skipped, without a synchronisation.

        A fused optimiser skips the step where `found_inf` is set, as under a gradient scaler.
        """
        limit = float("inf") if self.settings.clip is None else self.settings.clip
        norms = []
        for parameters in self.clipped():
            if with_gradient := [p for p in parameters if p.grad is not None]:
                norm = torch.nn.utils.clip_grad_norm_(with_gradient, limit)
                norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not norms:  # DeepSpeed keeps and clips gradients elsewhere
            return
        norm = torch.stack(norms).norm()
        bad = (~norm.isfinite()).float()
        getattr(optimizer, "optimizer", optimizer).found_inf = bad
        self.skipped[0] += bad
        self.skipped[1] = (self.skipped[1] + 1) * bad
        self.grad_norm = norm.detach()

    def clipped(self) -> list[list[nn.Parameter]]:
        """The parameters of each role, whose gradients are clipped together."""
        return [self.trained]

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        k = self.trainer.global_step
        self.rate = self.trainer.optimizers[0].param_groups[0]["lr"]  # before the schedule's next step
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.updated()
        if (n := self.updates(k)) is not None:
            decay = self.settings.ema_decay
            decay = min(decay, (1 + n) / (10 + n)) if self.settings.ema_ramp else decay
            averages, values = zip(*((local(e), local(p)) for e, p in self.averaged), strict=True)
            with torch.no_grad():
                torch._foreach_lerp_(averages, values, 1 - decay)

    def updates(self, step: int) -> int | None:
        """How many steps have changed the denoiser before this one; None: this step does not change it."""
        return step

    def check_progress(self) -> None:
        """Stop a run that diverges; called when values are read for the log anyway.

        Raises:
            FloatingPointError: if the last `patience` steps all had a non-finite gradient; under DeepSpeed, which skips
                no steps, at the first non-finite loss
        """
        if self.grad_norm is None and not self.losses["loss"].isfinite():
            raise FloatingPointError(
                f"the loss is {float(self.losses['loss'])} at step {self.trainer.global_step}: go back to an earlier "
                "checkpoint and lower optimizer.lr, or lengthen optimizer.warmup"
            )
        run = int(self.skipped[1].item())
        if run >= self.settings.patience or (run and self.trainer.global_step >= self.settings.max_steps):
            raise FloatingPointError(
                f"the gradient was not finite in the last {run} steps (step {self.trainer.global_step}, loss "
                f"{float(self.losses['loss']):.3g}): lower optimizer.lr, lengthen optimizer.warmup, or clip harder"
            )


def optimizer_of(kind: str) -> Callable[..., torch.optim.Optimizer]:
    """The class of an optimiser that skips a step where its `found_inf` is set."""
    if kind == "adamw8bit":
        from recipes.runtime.adamw8bit import AdamW8bit  # an optional package

        return AdamW8bit
    return partial(torch.optim.AdamW, fused=True)


def share_frozen(copy: nn.Module, original: nn.Module) -> None:
    """Let a copy use the original's frozen parameters; with low-rank additions these are nearly all."""
    for name, p in original.named_parameters():
        if not p.requires_grad:
            owner, _, leaf = name.rpartition(".")
            setattr(copy.get_submodule(owner), leaf, p)


def local(p: Tensor) -> Tensor:
    """The part of a parameter that this rank holds."""
    if isinstance(p, DTensor):
        return p.to_local()
    return p.ds_tensor if hasattr(p, "ds_tensor") else p  # DeepSpeed ZeRO-3
