"""From a command line to a running task: compose the configuration, check it, run, and end with an exit code.

Hydra composes YAML groups under the typed `Root`; `check` refuses a mistyped key, a wrong type or an impossible
combination before anything is built. Torch is not imported: `--help`, the first words of a run and most mistakes are
told without it.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from data.names import typed
from edit.importing import uncollected
from recipes.config.check import check, check_hydra, check_procedure, check_settings
from recipes.config.errors import UserError, failure_of
from recipes.config.explain import explain
from recipes.config.help import help_of
from recipes.config.schema import Root
from recipes.config.sources import register
from recipes.config.words import as_typed, parse_options
from recipes.runtime.traces import Before


@dataclass(frozen=True)
class Opening:
    """What a task does before its job begins. The functions get an unresolved copy of the configuration, and the name
    of the file that was chosen of each group.

    Args:
        known: whether the job's folder alone tells that it is done, which has then been said; called first, before the
            configuration is checked. Not in a sweep.
        announce: says what will be done; called before the configuration is checked, and anything it names imported
        answer: whether the job is done already, and has been answered for; called when all is right but for what the
            procedure itself demands. Not in a sweep.
    """

    known: Callable[[DictConfig], bool]
    announce: Callable[[DictConfig, Mapping[str, str]], Any]
    answer: Callable[[DictConfig], bool]


def launch(
    task: Callable[[DictConfig], Any],
    config_name: str,
    config_dir: Path,
    argv: Sequence[str] | None = None,
    opening: Opening | None = None,
) -> None:
    """Compose, check, then run `task(cfg)` under `hydra.main`. The process ends by `SystemExit` if anything fails.

    Exit codes: 2 for a mistake in the configuration, 1 for a task that failed (in a sweep: any of its jobs; the others
    still run), 130 for Ctrl-C. `debug=true` or HYDRA_FULL_ERROR=1 shows tracebacks. In a sweep `cfg.name` names the
    job's own folder below `cfg.runs`.

    Args:
        task: receives the composed, checked, unresolved configuration
        config_name: the primary YAML file, without suffix
        config_dir: its folder
        argv: replaces `sys.argv[1:]`, for good: launchers of further ranks repeat the command line from there
        opening: what comes before
    """
    words = list(sys.argv[1:] if argv is None else argv)
    full = _full_errors()
    try:
        _launch(task, config_name, config_dir, [as_typed(word) for word in words], opening)
    except UserError as error:
        _say(*str(error).split("\n"))
        sys.exit(2)
    except KeyboardInterrupt:
        _say("interrupted before the run began", label="")
        sys.exit(130)
    except Exception as error:  # of Hydra, about its options, folders and sweeps
        if full or "debug=true" in words:
            traceback.print_exc()
        _say(explain(error, config_dir, [word for word in words if not word.startswith("-")], config_name))
        sys.exit(2 if isinstance(error, ValueError | HydraException) else 1)


def _launch(
    task: Callable[[DictConfig], Any], config_name: str, config_dir: Path, words: list[str], opening: Opening | None
) -> None:
    register()
    args, flags = parse_options(words)
    sweep, before = args.multirun or "hydra.mode=MULTIRUN" in args.overrides, Before(None)
    config_dir = Path(args.config_path or config_dir).resolve()
    if args.help:
        print(help_of(config_dir, args.config_name or config_name))
        return
    if not (args.hydra_help or args.shell_completion or args.info):
        found = _refuse_mistakes(args, config_name, config_dir, sweep, None if sweep or args.cfg else opening)
        if found is None:
            return
        fixed, place = found
        before = Before(place)
        if sweep:  # a job's folder is named after the settings that differ between jobs
            fixed = ",".join(f"'{key}'" for key in (*fixed, "name", "runs"))
            args.overrides.append(f"hydra.job.config.override_dirname.exclude_keys=[{fixed}]")
    sys.argv[1:] = [*args.overrides, *flags]  # Hydra's parser loses settings that follow a flag
    codes, sweeps = [0], set[str]()

    @functools.wraps(task)
    def job(cfg: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN and "name" in cfg and "runs" in cfg:
            with open_dict(cfg):
                cfg.name = os.path.relpath(HydraConfig.get().runtime.output_dir, cfg.runs)
            sweeps.add(HydraConfig.get().sweep.dir)
            if opening is not None:
                opening.announce(deepcopy(cfg), HydraConfig.get().runtime.choices)
        with _hydra_errors(shown), before.watched(Path(HydraConfig.get().runtime.output_dir)):
            codes.append(_guard(_checked(task), cfg))

    shown = os.environ.get("HYDRA_FULL_ERROR")
    with _hydra_errors("1"):  # otherwise Hydra prints errors itself and ends the process
        hydra.main(version_base="1.3", config_path=str(config_dir), config_name=config_name)(job)()
    if len(sweeps) == 1 and not _rank():  # several, if the name is swept
        print(f"next      {typed('python', '-m', 'recipes.sweep', f'runs={sweeps.pop()}')}", flush=True)
    if any(codes):
        sys.exit(max(codes))


@contextmanager
def _hydra_errors(full: str | None) -> Iterator[None]:
    """Set HYDRA_FULL_ERROR while the block runs; None unsets it."""
    before = os.environ.pop("HYDRA_FULL_ERROR", None)
    try:
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _checked(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """The task, preceded by a second check: references to the running job resolve only now."""

    def checked(cfg: DictConfig) -> None:
        if errors := check(cfg):
            raise UserError(errors[0])
        task(cfg)

    return checked


# ---- before the run -------------------------------------------------------------------------------------------------


def _refuse_mistakes(
    args: Any, config_name: str, config_dir: Path, sweep: bool, opening: Opening | None
) -> tuple[list[str], Path | None] | None:
    """Compose and check the run, or each value of a sweep once.

    Returns:
        The keys that the sweep leaves fixed, and the folder of the run or sweep, None where only the job can tell it;
        None: the run has been answered for.
    """
    overrides, name, place = list(args.overrides), args.config_name or config_name, None
    fixed: list[str] = []
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_dir)):
            jobs = [overrides]
            if sweep:
                jobs, fixed = _jobs(overrides)
            for job in jobs:
                cfg = compose(name, [*job, *_further(args)], return_hydra_config=True)
                own = OmegaConf.select(cfg, "hydra")
                with suppress(OmegaConfBaseException):
                    place = Path(OmegaConf.select(cfg, f"hydra.{'sweep' if sweep else 'run'}.dir"))
                with open_dict(cfg):
                    cfg.pop("hydra", None)
                if args.cfg:  # shows the composed configuration, right or wrong
                    continue
                if OmegaConf.get_type(cfg) is not Root:
                    raise UserError(f"{name} is no configuration of a run: its defaults do not begin with root_schema")
                if opening is not None:
                    if opening.known(deepcopy(cfg)):
                        return None
                    opening.announce(deepcopy(cfg), own.runtime.choices)
                with uncollected():  # the classes that it names are imported
                    errors = [*check_hydra(own), *check_settings(cfg)]
                if errors:
                    raise UserError("\n".join(errors))
                if opening is not None and opening.answer(deepcopy(cfg)):
                    return None
                if errors := check_procedure(cfg):
                    raise UserError("\n".join(errors))
    except UserError:
        raise
    except Exception as error:  # words that are no settings raise many types in Hydra
        if _full_errors():
            raise
        raise UserError(explain(error, config_dir, overrides, name)) from error
    return fixed, place


def _further(args: Any) -> list[str]:
    """The setting by which Hydra also looks into --config-dir."""
    return [f"hydra.searchpath=['file://{Path(args.config_dir).resolve()}']"] if args.config_dir else []


def _jobs(overrides: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Jobs in which every swept value occurs at least once (not the product), and the keys that are not swept."""
    loader = GlobalHydra.instance().config_loader()
    columns, fixed = [], []
    for override in OverridesParser.create(loader).parse_overrides(list(overrides)):
        if not override.is_sweep_override():
            columns.append([override.input_line])
            fixed.append(override.key_or_group)
        elif override.is_discrete_sweep():
            key = override.get_key_element()
            columns.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            raise UserError(f"'{override.input_line}' is no list of values: give them, as in seed=0,1,2")
    length = max((len(column) for column in columns), default=1)
    return [[column[min(i, len(column) - 1)] for column in columns] for i in range(length)], fixed


# ---- failures -------------------------------------------------------------------------------------------------------


def _guard(task: Callable[[DictConfig], Any], cfg: DictConfig) -> int:
    """Run the task. Returns 0, or the exit code after printing the failure."""
    try:
        task(cfg)
        return 0
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        failure = failure_of(error, os.path.relpath(HydraConfig.get().runtime.output_dir))
        if _full_errors() or OmegaConf.select(cfg, "debug", default=False):
            traceback.print_exc()
        _say(failure.sentence, everywhere=failure.everywhere, label="" if failure.code == 130 else "error: ")
        if failure.code == 130:
            sys.exit(130)  # ends a sweep, too
        return failure.code


def _full_errors() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def _rank() -> int:
    """This process's rank in torchrun, Lightning's launcher or SLURM; 0 without a launcher."""
    return int(next((os.environ[v] for v in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if os.environ.get(v)), "0"))


def _say(*sentences: str, everywhere: bool = False, label: str = "error: ") -> None:
    """Print one line each on stderr, in colour on a terminal. Other ranks than 0 print only if `everywhere`."""
    from rich.console import Console
    from rich.text import Text

    if rank := _rank():
        if not everywhere:
            return
        label = f"rank {rank}: {label}"
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for sentence in sentences:
        console.print(Text(label, style="bold red").append(sentence, style="not bold default"))
