"""Run folders that no run has made, with numbers that are known: what pages, lists and sweeps are tested on."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

CONFIG = {
    "backbone": {"_target_": "edit.backbones.dit.DiTConfig", "depth": 2, "hidden_size": 32},
    "data": {"set": {"_target_": "data.sets.digits.Digits"}, "batch_size": 16},
    "edits": {},
    "terms": {},
    "matching": None,
    "recipe": None,
    "init": None,
    "teacher": {"path": None},
    "objective": {"_target_": "edit.objectives.FlowMatching"},
    "optimizer": {"lr": 1e-3},
    "trainer": {"max_steps": 20, "devices": 1, "num_nodes": 1, "accumulate": 1},
    "seed": 0,
}


def made_run(
    root: Path,
    name: str,
    changes: Mapping[str, Any] = {},
    losses: Sequence[float] = (2.0, 1.0),
    frechet: Mapping[float, float] = {},
    artifact: bool = True,
    command: Sequence[str] = (),
    pictures: int = 0,
    columns: Mapping[str, Sequence[float]] = {},
    when: float | None = None,
) -> Path:
    """Make a run folder.

    Args:
        root: folder of all runs
        name: of the run, below it
        changes: dotted keys of the configuration and their values
        losses: of the rows of metrics.csv, the last of which is at trainer.max_steps
        frechet: Fréchet distance by guidance weight; empty: there is no report
        artifact: whether the run came to its end
        command: words that started it
        pictures: grids of samples, evenly spaced up to the last step
        columns: further columns of metrics.csv
        when: seconds since 1970 at which its files were written
    """
    folder = root / name
    folder.mkdir(parents=True)
    config = json.loads(json.dumps(CONFIG)) | {"name": name, "runs": str(root)}
    for key, value in changes.items():
        *sections, last = key.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "env.json").write_text(json.dumps({"device": "cpu (test)", "torch": "2.0", "command": list(command)}))
    steps = config["trainer"]["max_steps"]
    rows = ["step,train/loss,lr,images_per_second" + "".join(f",{c}" for c in columns)]
    for i, loss in enumerate(losses):
        more = "".join(f",{values[i]}" for values in columns.values())
        rows.append(f"{(i + 1) * steps // len(losses)},{loss},0.001,32.0{more}")
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    for i in range(pictures):
        file = folder / f"samples/step_{(i + 1) * steps // pictures:06d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (418, 166), (40 * i, 90, 160)).save(file)
    if artifact:
        told = {
            "backbone": "edit.backbones.dit.DiT",
            "edits": config["edits"],
            "data": config["data"]["set"],
            "run": {"name": name, "step": steps},
        }
        (folder / "artifact").mkdir()
        (folder / "artifact/edits.json").write_text(json.dumps(told))
    if frechet:
        results = [result(w, value) for w, value in frechet.items()]
        (folder / "report.json").write_text(json.dumps({"artifacts": [{"name": name, "results": results}]}))
        (folder / "report.html").write_text("<!doctype html><title>report</title>")
    if when is not None:
        for file in (*folder.glob("*.*"), *folder.glob("artifact/*")):
            os.utime(file, (when, when))
    return folder


def result(guidance: float, frechet: float, accuracy: float = 0.9) -> dict[str, Any]:
    """A row of a report."""
    return {
        "guidance": guidance,
        "n": 100,
        "quality": {"frechet": {"value": frechet, "spread": 0.1}, "accuracy": {"value": accuracy, "spread": None}},
        "cost": {"macs_per_image": 2_000_000_000, "generation": {"median": 0.02}, "parameters": 1_230_000},
    }
