"""One training run from its configuration: what train.py does.

The same command continues a run from its last whole checkpoint; a finished run is not trained again.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from data.names import our_script, typed
from edit.artifacts.checkpoint import save
from edit.artifacts.weights import Unwritable
from edit.edits import compact
from edit.inputs.command import print_any_name
from edit.measuring.memory import refuse
from recipes.assembly import Run, assemble
from recipes.config.chosen import procedure_of
from recipes.config.errors import UserError
from recipes.config.schema import Evaluation
from recipes.plan import draft_of
from recipes.procedure import Result
from recipes.report.evaluate import run as evaluate
from recipes.report.run_index import at_failure, write_pages
from recipes.runtime.files import is_first, locked
from recipes.runtime.loggers import close, log_artifact, log_summary
from recipes.runtime.run_folder import begin, folder_of, here, refuse_other_run
from recipes.runtime.trainer import accelerator_of, count_devices, precision_of


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train, save the artifact, evaluate it.

    Returns:
        The evaluation of the artifact on rank 0; empty on other ranks, or if there was nothing left to do.

    Raises:
        SystemExit: with 143, if the run was told to stop before its last step
        UserError: for what the user can mend, in one sentence
    """
    quiet()
    print_any_name()
    out = settle(cfg)
    refuse_other_run(cfg, out)
    set_up_torch(cfg)
    procedure, job = procedure_of(cfg), assemble(cfg)
    if procedure.optimises:
        refuse_too_large(job)
    with ExitStack() as held:
        if is_first():
            held.enter_context(locked(out))
            refuse_other_run(cfg, out)  # again: another process may have written there until now
        stand = procedure.stand(cfg, out)
        first_rank = rank_zero_only.rank in (0, None)
        if stand.finished:
            return complete(cfg, out, stand.step) if first_rank else {}
        if first_rank:
            begin(cfg, out, stand.resume is not None)
            held.push(at_failure(out, Path(cfg.runs)))
        result = procedure.perform(job, out, stand)
        if result is None:
            return {}
        artifact = keep(job, result, out, procedure.cure)
        log_artifact(result.loggers, artifact)  # before the evaluation, which may fail
        try:
            report = finish(cfg, artifact)
            log_summary(result.loggers, numbers(report))
        finally:
            close(result.loggers)
        return report


# ---- before the first step ------------------------------------------------------------------------------------------


def settle(cfg: DictConfig) -> Path:
    """Decide, in place, what the configuration leaves to this machine. Returns the run's folder.

    Raises:
        UserError: if the folder cannot be made, or the devices are not here
    """
    OmegaConf.resolve(cfg)
    cfg.name = str(cfg.name)  # name=${seed} is a number by now
    out = folder_of(cfg)
    cfg.trainer.devices, cfg.trainer.precision = count_devices(cfg.trainer), precision_of(cfg.trainer)
    return out


def set_up_torch(cfg: DictConfig) -> None:
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    torch.manual_seed(cfg.seed)


def refuse_too_large(run: Run) -> None:
    """Refuse a run that would end for lack of memory. A plan that cannot be made stops nothing.

    Raises:
        UserError: with settings that would make it fit
    """
    trainer = run.config.trainer
    capacity = trainer.memory
    if capacity is None and accelerator_of(trainer) == "gpu":
        capacity = torch.cuda.get_device_properties(0).total_memory / 1e9
    if not capacity:
        return
    try:
        draft = draft_of(run.models, run.config, [])
        if draft.plan().total <= capacity * 1e9:
            return
    except Exception as error:  # an edit may do anything that cannot be followed without weights
        print(f"memory    not planned: {' '.join(str(error).split())}", flush=True)
        return
    try:
        refuse(draft, capacity * 1e9)
    except ValueError as error:
        raise UserError(f"{error}; trainer.memory=0 launches it all the same") from error


# ---- finishing ------------------------------------------------------------------------------------------------------


def keep(run: Run, result: Result, out: Path, cure: str) -> Path:
    """Save what the procedure has made, as it is at inference (`Edit.compact`), as the run's artifact: its folder.

    Raises:
        UserError: if its weights are not finite, with the cure
    """
    cfg, data = run.config, OmegaConf.to_container(run.config.data.set)
    told = {"name": cfg.name, **result.told, **here()}
    path, denoiser = out / "artifact", compact(result.denoiser, result.state)
    state = result.state if denoiser is result.denoiser else denoiser.state_dict()
    try:
        return save(denoiser, path, run.objective, run.sampler, data, run=told, state=state)  # type: ignore
    except Unwritable as error:
        raise UserError(f"no artifact was written: {error}; {cure}") from error


def complete(cfg: DictConfig, out: Path, done: int) -> dict[str, Any]:
    """Answer for a run that is finished; evaluate it if it was stopped between training and evaluation."""
    print(f"{out} is complete{f' ({done} steps)' * bool(done)}: a new run needs another name=")
    if cfg.evaluate and not (out / "report.json").exists():
        return finish(cfg, out / "artifact")
    print(f"next      {typed('python', our_script('eval.py'), f'artifact={out}')}")
    return {}


def finish(cfg: DictConfig, artifact: Path) -> dict[str, Any]:
    """Print where the artifact is, evaluate it, and print the command for the next step."""
    out = artifact.parent
    print(f"artifact  {artifact}", flush=True)
    report = evaluate([artifact], Evaluation.of(cfg.evaluate), out) if cfg.evaluate else {}
    write_pages(out, Path(cfg.runs))
    print(f"next      {typed('python', our_script('eval.py'), f'artifact={out}')}", flush=True)
    return report


def numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """The qualities that a report measured, by name and guidance weight."""
    return {
        f"{name} w={result['guidance']:g}": measure["value"]
        for artifact in report.get("artifacts", [])
        for result in artifact["results"]
        for name, measure in result["quality"].items()
    }


def quiet() -> None:
    """Silence Lightning's advice about loaders, loggers and tips, which does not concern this program."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    # units hand `cond` on as FSDP2 gave it to them; nothing writes into it
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
