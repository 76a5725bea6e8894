"""One training run from its configuration: what train.py does.

The same command continues a run from its last whole checkpoint; a finished run is not trained again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from edit.importing import uncollected
from edit.inputs.command import print_any_name
from recipes.config.errors import UserError
from recipes.config.schema import Evaluation
from recipes.opening import decide, finished, named, say_complete, say_next, told
from recipes.report.run_index import at_failure, write_pages
from recipes.runtime.devices import accelerator_of
from recipes.runtime.files import is_first, locked
from recipes.runtime.run_folder import begin, here, refuse_other_run

if TYPE_CHECKING:
    from recipes.assembly import Run
    from recipes.procedure import Result


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train, save the artifact, evaluate it.

    Returns:
        The evaluation of the artifact on rank 0; empty on other ranks, or if there was nothing left to do.

    Raises:
        SystemExit: with 143, if the run was told to stop before its last step
        UserError: for what the user can mend, in one sentence
    """
    print_any_name()
    out = settle(cfg)
    refuse_other_run(cfg, out)
    if (steps := finished(cfg, out)) is not None:
        with alone(cfg, out):
            return complete(cfg, out, steps) if is_first() else {}
    return perform(cfg, out)


def perform(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """`run` for a run that its folder alone does not tell to be finished."""
    with uncollected():
        from recipes.assembly import assemble  # here, not above: with it come torch and the models
        from recipes.config.chosen import procedure_of

    set_up_torch(cfg)
    procedure, job = procedure_of(cfg), assemble(cfg)
    if procedure.optimises:
        refuse_too_large(job)
    with alone(cfg, out), ExitStack() as held:
        stand = procedure.stand(cfg, out)
        if stand.finished:
            return complete(cfg, out, stand.step) if is_first() else {}
        if is_first():
            if procedure.makes == "artifact":
                print(told(job), flush=True)
            begin(cfg, out, stand.resume is not None)
            held.push(at_failure(out, Path(cfg.runs)))
        result = procedure.perform(job, out, stand)
        if result is None:
            return {}
        from recipes.runtime.loggers import close, log_artifact, log_summary  # with them comes Lightning

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
    out = named(cfg)
    decide(cfg)
    return out


@contextmanager
def alone(cfg: DictConfig, out: Path) -> Iterator[None]:
    """Hold the folder's lock on the first rank.

    Raises:
        UserError: if another process holds it, or has written another run there until now
    """
    if not is_first():
        yield
        return
    with locked(out):
        refuse_other_run(cfg, out)
        yield


def set_up_torch(cfg: DictConfig) -> None:
    import torch

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
        import torch

        capacity = torch.cuda.get_device_properties(0).total_memory / 1e9
    if not capacity:
        return
    from edit.measuring.memory import refuse
    from recipes.plan import draft_of

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
    from edit.artifacts.checkpoint import save
    from edit.artifacts.weights import Unwritable
    from edit.edits import compact

    cfg, data = run.config, OmegaConf.to_container(run.config.data.set)
    provenance = {"name": cfg.name, **result.told, **here()}
    path, denoiser = out / "artifact", compact(result.denoiser, result.state)
    state = result.state if denoiser is result.denoiser else denoiser.state_dict()
    try:
        return save(denoiser, path, run.objective, run.sampler, data, run=provenance, state=state)  # type: ignore
    except Unwritable as error:
        raise UserError(f"no artifact was written: {error}; {cure}") from error


def complete(cfg: DictConfig, out: Path, done: int) -> dict[str, Any]:
    """Answer for a run that is finished; evaluate it if it was stopped between training and evaluation."""
    say_complete(out, done)
    if cfg.evaluate and not (out / "report.json").exists():
        return finish(cfg, out / "artifact")
    say_next(cfg, out)
    return {}


def finish(cfg: DictConfig, artifact: Path) -> dict[str, Any]:
    """Print where the artifact is, evaluate it, and print the commands for the next steps."""
    out, report = artifact.parent, {}
    print(f"artifact  {artifact}", flush=True)
    if cfg.evaluate:
        from recipes.report.evaluate import run as evaluate

        report = evaluate([artifact], Evaluation.of(cfg.evaluate), out)
    write_pages(out, Path(cfg.runs))
    say_next(cfg, out)
    return report


def numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """The qualities that a report measured, by name and guidance weight."""
    return {
        f"{name} w={result['guidance']:g}": measure["value"]
        for artifact in report.get("artifacts", [])
        for result in artifact["results"]
        for name, measure in result["quality"].items()
    }
