"""Where an artifact comes from: the command, settings and losses of the run that made it, and the papers behind it.

A run folder may be moved, old or damaged: what cannot be read is missing.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

POINTS = 300  # of a curve, at most; more are averaged in neighbours


def origin(folder: Path) -> dict[str, Any] | None:
    """What a run folder tells, as JSON values; None if it is not the folder of a run.

    Returns:
        command: words after `python`, where they were written down
        revision: of the repository, at its start
        config: settings, as config.yaml has them
        losses: `step` and `loss`, the training loss, at most `POINTS` of each
    """
    config = _settings(folder / "config.yaml")
    if config is None:
        return None
    here = _json(folder / "env.json")
    command = here.get("command")
    whole = isinstance(command, list) and all(isinstance(word, str) for word in command)
    return {
        "command": command if whole else None,
        "revision": here.get("revision"),
        "config": config,
        "losses": losses(folder / "metrics.csv"),
    }


def losses(path: Path) -> dict[str, list[float]] | None:
    """The finite losses of a metrics.csv, thinned; None: there are none."""
    try:
        with path.open(newline="") as file:
            seen = [(float(row["step"]), float(row["train/loss"])) for row in csv.DictReader(file) if _numbers(row)]
    except (OSError, ValueError, csv.Error):
        return None
    seen = [(step, loss) for step, loss in seen if isfinite(step) and isfinite(loss)]
    if not seen:
        return None
    size = -(-len(seen) // POINTS)
    parts = [seen[i : i + size] for i in range(0, len(seen), size)]
    return {name: [sum(p[k] for p in part) / len(part) for part in parts] for k, name in enumerate(("step", "loss"))}


def _numbers(row: Mapping[str, Any]) -> bool:
    """Whether a row has a step and a loss; the last one may be torn."""
    try:
        return float(row["step"]) >= 0 and row["train/loss"] is not None and float(row["train/loss"]) is not None
    except (KeyError, TypeError, ValueError):
        return False


def _settings(path: Path) -> dict[str, Any] | None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from edit.inputs.trust import load_yaml

    try:
        found: Any = OmegaConf.to_container(load_yaml(path))
    except (OSError, ValueError, OmegaConfBaseException):
        return None
    return found if isinstance(found, dict) and json_values(found) else None


def json_values(found: Any) -> bool:
    """Whether these can be written into a report: numbers are finite, keys are text."""
    try:
        json.dumps(found, allow_nan=False)
        return True
    except (TypeError, ValueError):
        return False


def _json(path: Path) -> dict[str, Any]:
    from edit.inputs.trust import read_json

    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def methods(*nodes: Any) -> Iterable[str]:
    """Dotted paths of all classes that nested settings name by `_target_`, each once."""
    found: dict[str, None] = {}
    for node in nodes:
        if isinstance(node, Mapping):
            if isinstance(target := node.get("_target_"), str):
                found[target] = None
            found |= dict.fromkeys(methods(*node.values()))
        elif isinstance(node, list | tuple):
            found |= dict.fromkeys(methods(*node))
    return found
