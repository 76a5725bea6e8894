"""Diffusion training: one denoiser, one objective, any edits and terms. The step reads as the algorithm.

Loop, devices, precision, accumulation and strategies are Lightning's (`recipes/trainer.py`). What is random in a step
is a pure function of (seed, number of the sample in the run), so that resuming is exact, and the loss does not depend
on how many ranks share a batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import fields, replace
from math import cos, pi
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from edit import noise
from edit.denoiser import Branch, Condition, Denoiser, Forced, Output
from edit.objectives import Objective, Pass, Term, Weight, weight_at
from recipes.roles import Teacher, shard, union, units_of

CONDITIONS = tuple(f.name for f in fields(Condition))


class Diffusion(pl.LightningModule):
    """Train `denoiser` and keep an exponential moving average of it in `ema`.

    Args:
        build: makes the denoiser with its starting weights and edits; called once, inside `configure_model`
        structure: the same without weights, for sharded training; called under `torch.device("meta")`
        objective: what is predicted and how it is scored
        terms: further losses, by name
        teacher: frozen model that terms compare with; None: no term needs one
        null: one condition (batch of 1) that stands for no condition; None: the denoiser's own
        data_weight: of the objective's own losses, that is of the data beside the terms
        optimizer: lr, betas, weight_decay, eps, warmup, schedule, groups (see `recipes.config.OptimizerConfig`)
        max_steps: optimiser steps of the whole run, for the schedule
        accumulate: batches per optimiser step
        clip: largest gradient norm; None: no clipping
        label_drop: probability with which a sample's condition is replaced by the null condition
        ema_decay: of the average; 0 keeps no history
        ema_ramp: start the decay low, at most (1 + k) / (10 + k) after k updates; for short runs
        compile: compile each unit
        gradient_checkpointing: recompute units in the backward pass
        autocast: run the denoiser in bf16 here, where the trainer does not: DeepSpeed's own bf16 would round the
            average away
        patience: consecutive steps with a non-finite gradient after which the run stops; each is skipped
        seed: of times, noise, label drop and dropout
    """

    denoiser: Denoiser
    ema: Denoiser

    def __init__(
        self,
        build: Callable[[], Denoiser],
        structure: Callable[[], Denoiser],
        objective: Objective,
        terms: Mapping[str, Term],
        optimizer: Any,
        max_steps: int,
        teacher: Teacher | None = None,
        null: Condition | None = None,
        data_weight: Weight = 1.0,
        accumulate: int = 1,
        clip: float | None = 1.0,
        label_drop: float = 0.1,
        ema_decay: float = 0.9999,
        ema_ramp: bool = False,
        compile: bool = False,
        gradient_checkpointing: bool = False,
        autocast: bool = False,
        patience: int = 20,
        seed: int = 0,
    ):
        super().__init__()
        self.build, self.structure = build, structure
        self.objective, self.terms, self.settings = objective, dict(terms), optimizer
        self.max_steps, self.accumulate, self.clip = max_steps, accumulate, clip
        self.label_drop, self.ema_decay, self.ema_ramp = label_drop, ema_decay, ema_ramp
        self.compile_units, self.gradient_checkpointing, self.autocast = compile, gradient_checkpointing, autocast
        self.patience, self.seed_ = patience, seed
        self.teacher, self.null, self.data_weight = teacher, null, data_weight
        self.taps, self.branches = (
            union(getattr(term, k) for term in self.terms.values()) for k in ("taps", "branches")
        )
        self.own = nn.ModuleDict()  # trainable parameters of terms
        self.losses: dict[str, Tensor] = {}  # means over the optimiser step under way, for the log
        self.configured = False

    # ---- the algorithm --------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        x, draw = batch["x"], batch["draw"]  # b c y x, b
        self._seed_dropout(batch_index)
        t = self.objective.times(noise.uniform(self.seed_, draw, noise.TIME))
        eps = noise.gaussian(self.seed_, draw, noise.NOISE, tuple(x.shape[1:]))
        condition = Condition(**{k: batch[k] for k in CONDITIONS if k in batch})
        null = self._null(condition, len(x)) if self.label_drop or self.teacher else condition
        if self.label_drop:
            drop = noise.uniform(self.seed_, draw, noise.DROP) < self.label_drop
            condition = condition.where(drop, null)
        x_t = self.objective.corrupt(x, eps, t)
        progress = self.trainer.global_step / self.max_steps
        with torch.autocast(x.device.type, torch.bfloat16) if self.autocast else nullcontext():
            taught = None
            if self.teacher is not None:  # at the same noisy sample and time, told the same
                scale = self.teacher.guidance.scale(noise.uniform(self.seed_, draw, noise.GUIDANCE))
                taught = self.teacher(self.denoiser, x_t, t, condition, null, scale)
                condition = replace(condition, guidance=scale) if self.told else condition
            forced = {} if taught is None else self._forced(taught, draw, progress)
            out = self.denoiser(x_t, t, condition, taps=self.taps, branches=self.branches, forced=forced)

        weight = weight_at(self.data_weight, progress)
        losses = self.objective.losses(out, x, eps, x_t, t) if weight else {}
        if weight != 1:
            losses = {name: weight * loss for name, loss in losses.items()}
        seen = Pass(out, {**batch, "noise": eps, "x_t": x_t}, t, progress, taught)
        for name, term in self.terms.items():
            own = self.own[name] if name in self.own else None
            losses |= {f"{name}/{k}": v for k, v in term.losses(seen, own).items()}
        watched = {}
        for name, edit in self.denoiser.applied.items():
            losses |= {f"{name}/{k}": v for k, v in edit.losses(out.trace).items()}
            watched |= {f"{name}/{k}": v.float().mean() for k, v in edit.metrics(out.trace).items()}
        means = {name: loss.mean() for name, loss in losses.items()}
        loss = sum(means.values(), start=torch.zeros((), device=x.device))
        if not weight:  # no term may reach the last units, and DDP waits for the gradient of every parameter
            loss = loss + 0.0 * out.sample.float().sum()
        self._record(batch_index, {"loss": loss, **(means if len(means) > 1 else {}), **watched})
        return loss

    def _null(self, condition: Condition, count: int) -> Condition:
        if self.null is None:
            return self.denoiser.null(condition)
        return self.null.map(lambda v: v.to(self.device).expand(count, *v.shape[1:]))

    def _forced(self, taught: Output, draw: Tensor, progress: float) -> dict[int, Forced]:
        """Inputs of the units that terms want to see fed by the teacher."""
        forced = {}
        for term in self.terms.values():
            sources, share = term.forced(progress)
            if not sources or not share:
                continue
            where = noise.uniform(self.seed_, draw, noise.FORCE) < share
            for unit, source in sources.items():
                tokens = Branch(taught.trace[f"unit.{source}"], taught.trace.get(f"unit.{source}.text"))
                forced[unit] = Forced(tokens, where)
        return forced

    def _seed_dropout(self, batch_index: int) -> None:
        """Of dropout and gates inside the model, the only uses of global generators."""
        micro = self.trainer.global_step * self.accumulate + batch_index % self.accumulate
        seed = (self.seed_ * 1_000_003 + micro) * 4099 + self.global_rank
        torch.default_generator.manual_seed(seed)  # torch.manual_seed costs 1 % of a small step
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _record(self, batch_index: int, values: dict[str, Tensor]) -> None:
        first = batch_index % self.accumulate == 0
        if first:
            self.losses = {}
        for name, value in values.items():
            value = value.detach() / self.accumulate
            self.losses[name] = value if first else self.losses[name] + value

    # ---- model ----------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if self.configured:  # Lightning calls again on restart
            return
        self.configured = True
        if self.device_mesh is None:
            with torch.device("cpu"):  # the same weights whatever the device
                self.denoiser = self.build()
            self.ema = deepcopy(self.denoiser)
        else:
            self._configure_sharded()
        whole_teacher = None
        if self.teacher is not None:
            taps, branches = (
                union(getattr(term, k) for term in self.terms.values()) for k in ("teacher_taps", "teacher_branches")
            )
            whole_teacher = self.teacher.configure(self.denoiser, taps, branches)
        torch.manual_seed(self.seed_)  # the same on every rank, also where only rank 0 has built the weights
        for name, term in self.terms.items():
            if (own := term.build(self.denoiser, whole_teacher)) is not None:
                sharded = self.device_mesh is not None and any(True for _ in own.parameters())
                self.own[name] = fully_shard(own, mesh=self._mesh) if sharded else own  # type: ignore[arg-type]
        for name, p in self.denoiser.named_parameters():
            p.requires_grad_(p.requires_grad and all(e.trainable(name) for e in self.denoiser.applied.values()))
        self.ema.requires_grad_(False).eval()
        self.told = bool(self.denoiser.config.get("guidance_embeds"))  # its guidance scale, as an input
        if self.teacher is not None and self.teacher.placement == "tied" and self.denoiser.config != self.denoiser.base:
            raise ValueError(
                "teacher.placement=tied makes the student without its LoRA the teacher, but another edit changes its "
                "structure: give the teacher's folder with teacher.path, or leave that edit out"
            )
        if self.teacher is not None and not self.told and self.teacher.guidance.low != self.teacher.guidance.high:
            raise ValueError(
                "teacher.guidance is a range, but the student has no guidance input that could be told the scale: give "
                "one scale, or apply edit.distillation.student.GuidanceInput"
            )
        self.denoiser.train().gradient_checkpointing = self.gradient_checkpointing
        if self.compile_units:
            for unit in units_of(self.denoiser):
                unit.compile()
        # skipped steps in all, and the present run of them, on the device: reading them costs a synchronisation
        self.register_buffer("skipped", torch.zeros(2))
        self.grad_norm: Tensor | None = None

    def _configure_sharded(self) -> None:
        """FSDP2: build on the meta device, shard, and let rank 0 hand out the weights it alone has made."""
        state = {}
        if self.global_rank == 0:
            with torch.device("cpu"):  # rank 0 alone holds the whole model, and not on its GPU
                state = self.build().state_dict()
        half = "bf16" in str(self.trainer.precision)
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None,
            reduce_dtype=torch.float32 if half else None,
            cast_forward_inputs=False,  # times and noisy samples stay in fp32; autocast does the rest
        )
        mesh = self._mesh
        for name in ("denoiser", "ema"):
            setattr(self, name, shard(self.structure, state, self.trainer.strategy.root_device, mesh, policy))

    @property
    def _mesh(self):
        return self.device_mesh["data_parallel"]

    def reshard(self) -> None:
        """FSDP2 leaves the root gathered after a forward without backward; updates need the shards."""
        for m in self.modules():
            if hasattr(m, "reshard") and m is not self:
                m.reshard()

    def on_train_start(self) -> None:
        if self.teacher is not None:
            self.teacher.place(self.device)
        both = zip(self.ema.parameters(), self.denoiser.parameters(), strict=True)
        self.averaged = [(e, p) for e, p in both if p.requires_grad]  # walking the modules takes longer than averaging

    # ---- optimiser ------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> dict[str, Any]:
        s = self.settings
        optimizer = torch.optim.AdamW(
            self._groups(), lr=s.lr, betas=tuple(s.betas), eps=s.eps, weight_decay=s.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _groups(self) -> list[dict[str, Any]]:
        """One optimiser group per pattern of `optimizer.groups`, the first that a name matches; the rest together."""
        s, groups = self.settings, dict(self.settings.groups or {})
        parts: dict[str, list[nn.Parameter]] = {pattern: [] for pattern in (*groups, "")}
        for name, p in self.named_parameters():
            if p.requires_grad:
                parts[next((g for g in groups if re.search(g, name)), "")].append(p)
        if unmet := [g for g in groups if not parts[g]]:
            raise ValueError(f"optimizer.groups: no trainable parameter's name matches {unmet[0]!r}")
        out = []
        for pattern, members in parts.items():
            if members:
                change = dict(groups.get(pattern, {}))
                lr, decay = s.lr * change.get("lr_scale", 1.0), change.get("weight_decay", s.weight_decay)
                out.append({"params": members, "lr": lr, "weight_decay": decay})
        if not out:
            raise ValueError("nothing to train: the edits freeze every parameter")
        return out

    def _rate(self, step: int) -> float:
        """Factor of the learning rate after `step` optimiser steps."""
        s = self.settings
        if step < s.warmup:
            return (step + 1) / s.warmup
        if s.schedule == "cosine":
            return 0.5 * (1 + cos(pi * min(1.0, (step - s.warmup) / max(1, self.max_steps - s.warmup))))
        return 1.0

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip by global norm, and mark a step with a non-finite gradient to be skipped, without a synchronisation.

        A fused optimiser skips the step when `found_inf` is set, as under a gradient scaler.
        """
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = float("inf") if self.clip is None else self.clip
        norm = torch.nn.utils.clip_grad_norm_(params, limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        bad = (~norm.isfinite()).float()
        getattr(optimizer, "optimizer", optimizer).found_inf = bad
        self.skipped[0] += bad
        self.skipped[1] = (self.skipped[1] + 1) * bad
        self.grad_norm = norm.detach()

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        k = self.trainer.global_step
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        decay = min(self.ema_decay, (1 + k) / (10 + k)) if self.ema_ramp else self.ema_decay
        averages, values = zip(*((local(e), local(p)) for e, p in self.averaged), strict=True)
        with torch.no_grad():
            torch._foreach_lerp_(averages, values, 1 - decay)

    def check_progress(self) -> None:
        """Called where values are read for the log anyway.

        Raises:
            FloatingPointError: if the last `patience` steps all had a non-finite gradient; or at a loss that is not
                finite where gradients are out of sight (DeepSpeed) and no step is skipped
        """
        if self.grad_norm is None and not self.losses["loss"].isfinite():
            raise FloatingPointError(
                f"the loss is {float(self.losses['loss'])} at step {self.trainer.global_step}: go back to an earlier "
                "checkpoint and lower optimizer.lr, or lengthen optimizer.warmup"
            )
        run = int(self.skipped[1].item())
        if run >= self.patience or (run and self.trainer.global_step >= self.max_steps):
            raise FloatingPointError(
                f"the gradient was not finite in the last {run} steps (step {self.trainer.global_step}, loss "
                f"{float(self.losses['loss']):.3g}): lower optimizer.lr, lengthen optimizer.warmup, or clip harder"
            )


def local(p: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    if isinstance(p, DTensor):
        return p.to_local()
    return p.ds_tensor if hasattr(p, "ds_tensor") else p  # DeepSpeed ZeRO-3
