"""A report as `recipes.report.evaluate` makes it, for tests of pages, tables and plots."""

from pathlib import Path
from typing import Any

import torch

from recipes.report.grids import save_grid


def measure(value: float, spread: float = 0.1) -> dict[str, Any]:
    return {"value": value, "spread": spread, "over": "20 resamplings"}


def entry(name: str, distances: dict[float, float], macs: int, real: str = "abc") -> dict[str, Any]:
    """One artifact, with a Fréchet distance for each guidance weight."""
    time = {"median": 0.02, "low": 0.019, "high": 0.021, "count": 10}
    return {
        "name": name,
        "data": {"_target_": "data.sets.digits.Digits"},
        "extractor": {"name": "judge", "hash": "0123", "width": 64, "rule": "no resizing"},
        "reference": {
            "split": "held-out",
            "n": 360,
            "hash": real,
            "floor": 0.3,
            "nearest": 2.1,
            "judge": {"hash": "0123", "accuracy": 0.99, "n": 360},
            "grid": "grids/real.png",
        },
        "results": [
            {
                "guidance": w,
                "quality": {"frechet": measure(distance), "accuracy": measure(0.98)},
                "compared": None,
                "cost": {"macs_per_image": macs, "generation": time, "parameters": 1_280_000},
                "grid": "grids/a.png",
            }
            for w, distance in distances.items()
        ],
    }


def small_report(folder: Path) -> dict[str, Any]:
    """Two artifacts, the first at two guidance weights, and one that failed; their grids are written."""
    for name in ("a", "real"):
        save_grid(torch.zeros(4, 1, 8, 8, 3, dtype=torch.uint8), folder / f"grids/{name}.png", 2)
    return {
        "format": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "environment": {"device": "cpu", "edit": "0.1.0"},
        "settings": {"n": 100, "seed": [0], "batch": 50},
        "artifacts": [
            entry("<slow> & right", {1.0: 1.5, 1.5: 2.5}, 4_000_000_000),
            entry("fast", {1.0: 3.5}, 1_000_000_000),
            {"name": "broken", "path": "runs/broken", "error": "it holds no <weights>"},
        ],
    }


def whole_report(folder: Path, variants: int = 10) -> dict[str, Any]:
    """Columns of all kinds, a plain artifact and variants, each at two weights, and grids with captions."""
    report = small_report(folder)
    plain = entry("a run", {1.0: 12.5, 1.5: 13.5}, 4_000_000_000)
    names = [f"a run + cache{k}" for k in range(variants)]
    made = [entry(name, {1.0: 14.0 + k, 1.5: 15.0 + k}, 10**9 * (k + 1)) for k, name in enumerate(names)]
    for a in made:
        a |= {"variant": a["name"][-6:], "of": "a run", "changes": "reuse interval=5 branches=[attention,feed]"}
    report["artifacts"] = [plain, *made]
    report["command"] = ["eval.py", "artifact=runs/a run", *(f"variant.cache{k}=reuse" for k in range(variants))]
    for a in report["artifacts"]:
        for result in a["results"]:
            _complete(result, compared="of" in a)
    plain["papers"] = {"DiTConfig": ["2212.09748"], "Reuse": ["2407.01425"]}
    plain["origin"] = {
        "command": ["train.py", "name=a run"],
        "revision": "0123456789abcdef" * 2,
        "config": {"optimizer": {"lr": 0.1, "betas": [0.9, 0.95]}, "teacher": None},
        "losses": {"step": [10, 20, 30], "loss": [2.0, 1.0, 0.5]},
    }
    wide = torch.zeros(16, 1, 32, 32, 3, dtype=torch.uint8)
    told = [f"a small purple square left of a large yellow triangle, number {k}" for k in range(16)]
    save_grid(wide, folder / "grids/a.png", 8, told)
    for a in report["artifacts"][:2]:
        a["reference"]["prompts"] = {"count": 9, "real": 0.9, "chance": 0.1, "shown": told}
    return report


def _complete(result: dict[str, Any], compared: bool) -> None:
    time = {"median": 0.9, "low": 0.3, "high": 1.2, "count": 10}  # unsteady
    parts = ("accuracy", "prompt_count", "prompt_colour", "prompt_kind", "prompt_size", "prompt_place")
    result["quality"] |= {f"prompt_{part}".replace("prompt_prompt", "prompt"): measure(0.5) for part in parts}
    result["quality"] |= {"precision": measure(0.5), "recall": measure(0.5), "nearest_train": measure(25.0)}
    result["compared"] = {k: measure(30.0) for k in ("psnr", "ssim", "perceptual")} if compared else None
    result["cost"] |= {"evaluations": 20, "activated": 640_000, "share": 0.5, "counted": 60, "forward": time}
    result["cost"] |= {"images_per_second": 123.0, "peak_memory": 2**30, "resident": 2**29}
    speed = {"median": 1.7, "low": 1.6, "high": 1.8, "count": 10}
    result["cost"]["speed"] = {"plain": speed, "dense": speed} if compared else {}
