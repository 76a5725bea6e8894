"""The beginning of a run, before anything heavy is imported: its first words, and the answers that need no models.

A finished run, a device that is not here and a folder with another run are told by configuration and folder alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.names import legible
from edit.inputs.command import print_any_name
from edit.inputs.trust import read_json
from recipes.config.errors import UserError
from recipes.onward import onward
from recipes.runtime.checkpoint_files import checkpoints, step_of, unchanged
from recipes.runtime.devices import count_devices, precision_of
from recipes.runtime.files import is_first
from recipes.runtime.run_folder import decisive, folder_of, read_config, refuse_other_run

if TYPE_CHECKING:
    from recipes.assembly import Run


def named(cfg: DictConfig) -> Path:
    """Resolve the configuration, in place. Returns the run's folder. Raises UserError if it cannot be made."""
    OmegaConf.resolve(cfg)
    cfg.name = str(cfg.name)  # name=${seed} is a number by now
    return folder_of(cfg)


def decide(cfg: DictConfig) -> None:
    """Decide devices and precision, in place. Raises UserError if the devices are not here."""
    cfg.trainer.devices, cfg.trainer.precision = count_devices(cfg.trainer), precision_of(cfg.trainer)


# ---- answers --------------------------------------------------------------------------------------------------------


def answer(cfg: DictConfig) -> bool:
    """Whether nothing is left to do, which has then been said; for a run whose settings are right.

    Raises:
        UserError: if its devices are not here, or its folder holds another run
    """
    try:
        out = named(cfg)
    except OmegaConfBaseException:  # it refers to the running job, which there is not yet
        return False
    decide(cfg)
    refuse_other_run(cfg, out)
    return answered(cfg, out)


def known(cfg: DictConfig) -> bool:
    """`answer` for settings of which nothing is known but that the folder's run was made with the same: those were
    right. What they leave to the machine is as it was then, so torch is not asked. False: the checks tell more.
    """
    try:
        out = named(cfg)
        if not checkpoints(out / "checkpoints"):
            return False
        made = read_config(out / "config.yaml")
        for key in ("devices", "precision"):
            if cfg.trainer[key] == "auto":
                cfg.trainer[key] = made.trainer[key]
        return decisive(made) == decisive(cfg) and answered(cfg, out)
    except (UserError, OmegaConfBaseException, OSError):
        return False


def answered(cfg: DictConfig, out: Path) -> bool:
    """Whether nothing is left to do for a run, which has then been said."""
    if cfg.before or cfg.after or (cfg.evaluate and not (out / "report.json").exists()):
        return False
    if (steps := finished(cfg, out)) is None:
        return False
    if is_first():
        say_complete(out, steps)
        say_next(cfg, out)
    return True


def finished(cfg: DictConfig, out: Path) -> int | None:
    """The steps of a run whose folder alone tells that it is finished: artifact and newest checkpoint are of the last
    step. None: its procedure must say.

    Args:
        cfg: resolved
        out: the run's folder, which holds no other run
    """
    found, last = checkpoints(out / "checkpoints"), cfg.trainer.max_steps
    if not found or step_of(found[-1]) != last or not (out / "artifact" / "edits.json").is_file():
        return None
    try:
        made = read_json(out / "artifact" / "edits.json").get("run")
    except (ValueError, OSError):
        return None
    whole = isinstance(made, dict) and made.get("step") == last and unchanged(found[-1])
    return last if whole else None


def say_complete(out: Path, steps: int) -> None:
    print(f"{out} is complete{f' ({steps} steps)' * bool(steps)}: a new run needs another name=")


def say_next(cfg: DictConfig, out: Path) -> None:
    for label, command in zip(("next", "", ""), onward(cfg, out), strict=False):
        print(f"{label:<10}{command}", flush=True)


# ---- words ----------------------------------------------------------------------------------------------------------


def announce(cfg: DictConfig, choices: Mapping[str, str]) -> None:
    """Print the first line of a run, on its first rank. Raises UserError if the devices are not here."""
    try:
        line = announced(cfg, named(cfg), choices)
    except Exception:  # anything may be wrong or missing in it: the check that follows tells
        return
    if is_first():
        print_any_name()
        print(line, flush=True)
    if cfg.trainer.devices == "auto" or isinstance(cfg.trainer.devices, int):
        decide(cfg)


def announced(cfg: DictConfig, out: Path, choices: Mapping[str, str]) -> str:
    """The first line of a run, as far as the configuration and the names in its folder tell.

    Args:
        cfg: resolved
        out: the run's folder
        choices: the file that was chosen of each group
    """
    t, found = cfg.trainer, checkpoints(out / "checkpoints")
    size = choices.get("size")
    model = chosen("backbone", cfg.backbone, choices) + (f" {size}" if size not in (None, "null") else "")
    edits = f" with {', '.join(cfg.edits)}" if cfg.edits else ""
    parts = [f"{model}{edits} on {chosen('data', cfg.data.set, choices)}"]
    if cfg.recipe is not None:  # its procedure may know no steps
        parts.append(f"by {chosen('recipe', cfg.recipe, choices)}")
    else:
        batch = cfg.data.batch_size * t.accumulate
        known = isinstance(t.devices, int)
        many = f"{batch * t.devices * t.num_nodes}" if known else f"{batch} samples per device"
        parts.append(f"{t.max_steps} steps of {many}" + (f" from step {step_of(found[-1])}" if found else ""))
    parts += [f"teacher {cfg.teacher.path}"] if cfg.teacher.path else []
    parts += [f"starting from {cfg.init}"] if cfg.init and cfg.init != cfg.teacher.path else []
    return legible(f"training  {cfg.name}: {', '.join(parts)}, into {out}")


def chosen(group: str, node: Mapping[str, Any] | None, choices: Mapping[str, str]) -> str:
    """The name of a group's file, or else of the module that its section names."""
    if (name := choices.get(group)) not in (None, "null"):
        return str(name)
    return str((node or {}).get("_target_", group)).rpartition(".")[0].rpartition(".")[2] or group


def told(run: Run) -> str:
    """What is known as soon as models and data set are: parameters, samples, device and precision."""
    from edit.edits import trains

    t, student = run.config.trainer, run.models.skeleton
    own = dict(student.named_parameters())
    whole = sum(p.numel() for p in own.values())
    trained = sum(p.numel() for name, p in own.items() if p.requires_grad and trains(student, name))
    many = t.devices * t.num_nodes
    where = f"{many} x {t.accelerator}, {t.strategy}" if many > 1 else t.accelerator
    share = "all trained" if trained == whole else f"{trained:,} of them trained"
    return f"model     {whole:,} parameters, {share}; {len(run.models.data.train()):,} samples; {where}, {t.precision}"
