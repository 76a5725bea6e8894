"""What to do with a finished run: commands that work for it as they are printed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data.names import legible, our_script, setting, typed
from edit.inputs.trust import load_yaml, read_json
from recipes.config import composed

CONFIGS = Path(__file__).parents[1] / "configs"
EMBEDDED = "dit_digits"  # the world of the default run, which names none
MOST = 3


def onward(cfg: DictConfig, out: Path) -> list[str]:
    """Up to three commands that bring something new: the report if there is none, a comparison, a run that starts from
    this one, an export.

    Args:
        cfg: of the run, resolved
        out: its folder, with the artifact
    """
    if not (out / "artifact").exists():  # its procedure makes something else
        return []
    measured = (out / "report.json").exists()
    first = [] if measured else [typed("python", our_script("eval.py"), f"artifact={out}")]
    made = artifact_of(out)
    if made is None:
        return first
    further = [*compared(cfg, out, made), *continued(cfg, out, made), *exported(out, made)]
    return [*first, *further][:MOST]


def artifact_of(out: Path) -> Mapping[str, Any] | None:
    """edits.json and config.json of the run's artifact; None: they cannot be read."""
    try:
        files = [read_json(out / "artifact" / name) for name in ("edits.json", "config.json")]
    except (ValueError, OSError):
        return None
    return {**files[0], "stock": files[1]} if all(isinstance(f, Mapping) for f in files) else None


def compared(cfg: DictConfig, out: Path, made: Mapping[str, Any]) -> Iterator[str]:
    """With the model that it was made from, if that is a run; else with a cache, which a model without edits takes."""
    origin = next((p for p in (cfg.teacher.path, cfg.init) if p and is_run(Path(p), out)), None)
    name = Path("reports", cfg.name)
    if origin is not None:
        yield typed("python", our_script("eval.py"), f"artifact={out}", f"reference={origin}", f"out={name}")
    elif not made.get("edits") and evaluations(made) > 1:
        yield typed("python", our_script("eval.py"), f"artifact={out}", "variant.fast=reuse", f"out={name}_reuse")


def evaluations(made: Mapping[str, Any]) -> int:
    solver = (made.get("sampler") or {}).get("solver") or {}
    return solver["steps"] if isinstance(solver.get("steps"), int) else 0


def is_run(path: Path, out: Path) -> bool:
    """Whether a path is that of another run with an artifact."""
    return (path / "artifact" / "edits.json").is_file() and os.path.realpath(path) != os.path.realpath(out)


def continued(cfg: DictConfig, out: Path, made: Mapping[str, Any]) -> Iterator[str]:
    """A student of half the units, where this is the whole model of a world. It skips the world's own teacher, which
    might have other settings."""
    world = cfg.world.name or EMBEDDED
    if made.get("edits") or made.get("folded") or not is_of(cfg, world):
        return
    if legible(str(out)) != str(out):  # Hydra cannot read it
        return
    runs = [] if cfg.runs == "runs" else [setting("runs", cfg.runs)]
    if world == EMBEDDED:
        yield typed("python", our_script("train.py"), f"experiment={world}/depth", setting("init", out), *runs)
    elif os.path.realpath(cfg.world.path) == os.path.realpath(out) and not composed.unfit(CONFIGS, world, "distill"):
        yield typed("python", our_script("train.py"), f"experiment={world}/distill", "before=[]", *runs)


def is_of(cfg: DictConfig, world: str) -> bool:
    """Whether backbone and data set are those of a world, as its file names them."""
    chosen = {"backbone": EMBEDDED, "data": "digits"}
    try:
        lines = load_yaml(CONFIGS / "world" / f"{world}.yaml").get("defaults") or []
        for line in (OmegaConf.to_container(line) for line in lines if OmegaConf.is_dict(line)):
            chosen |= {key.removeprefix("override /"): name for key, name in line.items()}
        backbone = composed.read(CONFIGS, "backbone", chosen["backbone"])
        data = composed.read(CONFIGS, "data", chosen["data"]) or {}
    except (ValueError, OSError):
        return False
    return backbone == OmegaConf.to_container(cfg.backbone) and data.get("set") == OmegaConf.to_container(cfg.data.set)


def exported(out: Path, made: Mapping[str, Any]) -> Iterator[str]:
    """As a folder of stock `diffusers`, where that has this model."""
    stock = str(made["stock"].get("_class_name", ""))
    if not made.get("edits") and stock and not stock.startswith("edit."):
        yield typed("python", "-m", "recipes.export", f"artifact={out}", f"out={Path('exported', out.name)}")
