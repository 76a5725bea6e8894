"""A small encoder of images, trained without labels: what REPA aligns with on worlds that no DINOv2 has seen.

    python train.py experiment=dit_pixels/encoder      leaves runs/dit_pixels_encoder/encoder

The folder is a model of `timm`, as `edit.alignment.encoder.Encoder` and `timm.create_model("local-dir:...")` read it.
Its patches are the tokens of the run's backbone, whose weights are not made. Where the data have classes, a linear
probe of the mean token tells how good it is, beside one of the raw pixels and of an untrained ViT. A command that was
stopped begins again, a finished one is not run again. The step is in `recipes.steps.encoder`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from data.loader import EndlessLoader
from edit.data_set import Split, collate
from edit.inputs.limits import Count, Limits, Positive, check_numbers
from recipes.assembly import Run
from recipes.calibrate import shown
from recipes.config.errors import UserError
from recipes.procedure import Procedure, Result, Stand
from recipes.runtime.devices import accelerator_of
from recipes.runtime.files import is_first
from recipes.runtime.run_folder import read_config
from recipes.steps import encoder as steps

PROBED = 2000  # images at most that a probe is fitted on, and is tried on
PART = 64  # of them are decoded at once
WIDE = 4096  # numbers of an image at most whose raw pixels are probed


@dataclass(frozen=True)
class TrainingEncoder(Procedure):
    """Self-supervised training of a small ViT; no denoiser is made.

    Args:
        width: channels of a token, a multiple of 4 and of the heads
        depth: blocks
        heads: of an attention
        dropped: share of the patches that a view lacks
        temperature: of SimCLR's softmax
    """

    width: Count = 64
    depth: Count = 2
    heads: Count = 2
    dropped: Annotated[float, Limits(0, below=1)] = 0.5
    temperature: Positive = 0.2

    optimises: ClassVar[bool] = False
    makes: ClassVar[str] = "encoder"

    def __post_init__(self):
        check_numbers(self)
        if self.width % 4 or self.width % self.heads:
            raise ValueError(
                f"recipe.width={self.width} is no multiple of 4 (sines and cosines of rows and columns) and of "
                f"recipe.heads={self.heads}: choose one that is"
            )

    def check(self, cfg: DictConfig) -> Iterator[str]:
        if find_spec("timm") is None:
            yield "recipe=encoder trains a model of timm, which is not installed: pip install 'edit-dit[vision]'"
        for place, given in {"matching": cfg.matching, **{k: cfg[k] or None for k in ("terms", "edits")}}.items():
            if given is not None:
                yield f"recipe=encoder trains an encoder and no denoiser: leave {place} out"
        if cfg.teacher.path is not None or cfg.teacher.placement == "tied":
            yield "recipe=encoder learns from images alone: leave the teacher out"
        if cfg.evaluate is not None:
            yield "recipe=encoder makes no denoiser that could be evaluated: set evaluate=null"
        if cfg.optimizer.kind != "adamw" or cfg.optimizer.groups:
            yield "recipe=encoder trains with one group of AdamW: leave optimizer.kind and optimizer.groups out"
        if cfg.data.batch_size < 2:
            yield "recipe=encoder tells images apart: set data.batch_size to at least 2"
        trainer = cfg.trainer
        if trainer.strategy != "single" or trainer.num_nodes > 1 or trainer.accumulate != 1:
            yield (
                "recipe=encoder is the work of one device, a batch in each step: choose trainer=cpu or trainer=gpu, "
                "and trainer.accumulate=1"
            )

    def stand(self, cfg: DictConfig, out: Path) -> Stand:
        if not is_first() or int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise UserError("recipe=encoder is the work of one process: start it without torchrun or srun")
        if not (out / self.makes).is_dir():
            return Stand()
        done, wanted = read_config(out / "config.yaml").trainer.max_steps, cfg.trainer.max_steps
        if done != wanted:  # other runs may be given a later end, and go on
            raise UserError(
                f"{out} holds an encoder of {done} steps, this command says trainer.max_steps={wanted}: give the new "
                "one another name=, or restore the setting"
            )
        return Stand(finished=True, step=done)

    def perform(self, run: Run, out: Path, stand: Stand) -> Result | None:
        from recipes.runtime.loggers import close, make_loggers  # with them comes Lightning

        cfg, training = run.config, run.training
        device = torch.device("cuda" if accelerator_of(cfg.trainer) == "gpu" else "cpu")
        pixels = decoder(run, device)
        told = steps.arguments(*sizes(run, pixels), self.width, self.depth, self.heads)
        loggers = make_loggers(cfg.logger, out, cfg.name, OmegaConf.to_container(cfg))  # type: ignore[arg-type]
        loggers[0].resume(0)  # type: ignore[attr-defined]
        torch.manual_seed(cfg.seed)
        model = steps.new(told, self.dropped).to(device)
        print(f"encoder   {sum(p.numel() for p in model.parameters()):,} parameters, {told['img_size']} px", flush=True)
        probed = Probed.of(run, pixels)
        found: dict[str, float] = {}
        if probed is not None:
            found = {**probed.pixels(), "probe/untrained": probed.score(model, device)}
        for step, row in self.train(run, model, pixels, device):
            for logger in loggers:
                logger.log_metrics(row, step)
        if probed is not None:
            found["probe/encoder"] = probed.score(model, device)
            for logger in loggers:
                logger.log_metrics(found, training.max_steps)
        steps.save(model.cpu().eval(), out / self.makes, told)
        close(loggers)
        told_scores = ", ".join(f"{name.partition('/')[2]} {100 * value:.1f} %" for name, value in found.items())
        print(f"encoder   {out / self.makes}" + f"; held-out classes by a linear probe: {told_scores}" * bool(found))
        return None

    def train(
        self, run: Run, model: Any, pixels: Callable[[Tensor], Tensor], device: torch.device
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Train in place; gives the step and a row of the log every `log_every` steps.

        Raises:
            UserError: if the loss is no number
        """
        cfg, training, s = run.config, run.training, run.config.optimizer
        head = steps.head(self.width).to(device)
        parameters = [*model.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(
            parameters, lr=s.lr, betas=tuple(s.betas), eps=s.eps, weight_decay=s.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.rate)
        draws = torch.Generator().manual_seed(cfg.seed)
        loader = EndlessLoader(
            run.models.data.train(), cfg.data.batch_size, training.max_steps, cfg.seed, workers=cfg.data.workers
        )
        half = torch.autocast(device.type, torch.bfloat16, enabled="bf16" in cfg.trainer.precision)
        model.train()
        since, images = time.perf_counter(), 0
        with shown() as tell:
            for step, batch in enumerate(loader, 1):
                x = pixels(batch["x"])
                with half:
                    z = head(steps.pooled(model, torch.cat((steps.view(x, draws), steps.view(x, draws)))))
                loss = steps.nt_xent(z, self.temperature)
                optimizer.zero_grad()
                loss.backward()
                if training.clip is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, training.clip)
                rate = float(schedule.get_last_lr()[0])
                optimizer.step()
                schedule.step()
                images += len(x)
                tell("training the encoder", step, training.max_steps)
                if step % cfg.log_every == 0 or step == training.max_steps:
                    value = loss.item()
                    if value != value:
                        raise UserError(f"the loss is no number at step {step}: lower optimizer.lr")
                    speed = images / (time.perf_counter() - since)
                    yield step, {"loss": value, "lr": rate, "images_per_second": speed}
                    since, images = time.perf_counter(), 0


# ---- images ---------------------------------------------------------------------------------------------------------


def decoder(run: Run, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What makes pixels b c y x in [-1, 1], c = 1 or 3, of samples.

    Raises:
        UserError: if the samples are no images and cannot be decoded
    """
    data = run.models.data
    if len(data.shape) != 3 or getattr(data, "buckets", None):
        raise UserError("recipe=encoder takes images of one size: choose such data")
    try:
        decode = getattr(data, "decoder", nn.Identity)().to(device)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"recipe=encoder looks at pixels: {error}") from error

    @torch.no_grad()
    def pixels(x: Tensor) -> Tensor:
        return decode(x.to(device)).clamp(-1, 1)

    return pixels


def sizes(run: Run, pixels: Callable[[Tensor], Tensor]) -> tuple[list[int], int]:
    """Rows and columns of an image, and the side of a patch for which the encoder's grid is that of the model's tokens.

    Raises:
        UserError: if there is none
    """
    channels, *size = pixels(run.models.data.train().sample(0, 0)["x"][None]).shape[1:]
    with torch.device("meta"):
        condition = run.condition(torch.arange(1, device="cpu")).map(lambda v: v.to("meta"))
        grid = run.models.skeleton(torch.empty(1, *run.models.data.shape), torch.empty(1), condition).grid
    assert grid is not None, "every forward tells it"
    patch = size[0] // grid[1]
    if channels not in (1, 3) or patch < 1 or [patch * n for n in grid[1:]] != size:
        raise UserError(
            f"recipe=encoder cuts images into the model's {grid[1]} x {grid[2]} tokens, and these have {channels} "
            f"channels of {size[0]} x {size[1]} pixels: choose a backbone whose tokens are squares of whole pixels"
        )
    return size, patch


@dataclass(frozen=True)
class Probed:
    """Labelled images, of which training saw no label: for a linear probe."""

    train: Tensor  # b c y x, on the CPU
    held: Tensor
    labels: Tensor
    truth: Tensor

    @classmethod
    def of(cls, run: Run, pixels: Callable[[Tensor], Tensor]) -> Probed | None:
        """Those of a run; None: its data have no classes, or hold none out."""
        data, held = run.models.data, run.models.data.heldout()
        if data.num_classes is None or held is None:
            return None
        train, tried = (evenly(split) for split in (data.train(), held))
        seen = (torch.cat([pixels(part).cpu() for part in split["x"].split(PART)]) for split in (train, tried))
        return cls(*seen, train["label"], tried["label"])

    def pixels(self) -> dict[str, float]:
        """The share by raw pixels; none where they are too many."""
        if self.train[0].numel() > WIDE:
            return {}
        score = steps.probe(self.train.flatten(1), self.labels, self.held.flatten(1), self.truth)
        return {"probe/pixels": score}

    def score(self, model: Any, device: torch.device) -> float:
        """The share by the model's mean token."""
        own, tried = (steps.features(model, x, device) for x in (self.train, self.held))
        return steps.probe(own, self.labels, tried, self.truth)


def evenly(split: Split) -> dict[str, Any]:
    """At most `PROBED` samples, from all parts of a split."""
    count = min(len(split), PROBED)
    return collate([split.sample(i * len(split) // count, i) for i in range(count)])
