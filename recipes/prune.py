"""Choose the units to keep, and write the model without the others: the step between a search and its recovery.

    python -m recipes.prune model=runs/dit_digits_deep by=learned search=runs/dit_digits_search out=runs/pruned
    python -m recipes.prune model=runs/dit_digits_deep by=calibration pattern=2:4 out=runs/least_loss

The weights are those of `model`; a search decides only which units stay. pruning.json in `out` tells how the choice was
made, pruning.png shows it. A finished command answers at once; other settings for the same `out` are refused.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from edit.inputs.command import guarded, working
from edit.inputs.limits import LAST_SEED
from edit.inputs.words import parse as parsed
from recipes.config.errors import UserError
from recipes.config.mistakes import mistakes
from recipes.config.values import rule
from recipes.report.drawing import png_of
from recipes.runtime.files import write

if TYPE_CHECKING:
    from torch import Tensor

    from edit.artifacts.checkpoint import Artifact
    from edit.denoiser import Denoiser
    from edit.pruning.patterns import Groups
    from edit.stream import Condition

WAYS = ("learned", "random", "uniform", "influence", "sensitivity", "calibration")


@dataclass
class Pruning:
    model: str = MISSING  # artifact, run or diffusers folder, or hub id of the model to be pruned
    out: str = MISSING  # run folder to write; the artifact is in it
    by: str = rule("learned", of=WAYS)
    search: str | None = None  # by=learned: run of the search
    pattern: str = "1:2"  # of the other ways: N:M, or several with commas between
    seed: int = rule(0, low=0, high=LAST_SEED)  # of by=random, candidates and calibration samples
    candidates: int = rule(64, low=1, high=1_000_000)  # by=calibration: patterns to try
    pick: str = rule("min", of=("min", "median", "max"))  # by=calibration: the pattern with this loss is taken
    samples: int = rule(256, low=1, high=100_000_000)  # training samples to measure on, in whole batches
    batch: int = rule(64, low=1, high=100_000)  # samples at a time
    data: str | None = None  # run folder whose data set is used; null: that of the model
    device: str = "auto"


@guarded(mistakes=(UserError, ValueError, OSError), interrupted="interrupted: nothing was written")
def main(words: list[str]) -> int:
    """The exit code: 0, 1 if pruning failed, 2 for a mistake in the command, 130 after Ctrl-C."""
    if not words or {"--help", "-h"} & set(words):
        defaults = OmegaConf.to_yaml(OmegaConf.structured(Pruning))
        print(f"{__doc__}\nKeys and their defaults (by: {', '.join(WAYS)})\n\n{defaults}")
        return 0 if words else 2
    chosen = parse(words)
    with working(UserError, ValueError, OSError):
        run(chosen)
    return 0


def parse(words: Sequence[str]) -> Pruning:
    """The settings that `key=value` words give.

    Raises:
        UserError: for an unknown key, a wrong value, or one that is missing
    """
    cfg: Any = OmegaConf.structured(Pruning)
    try:
        given = parsed(Pruning, words)
    except ValueError as error:
        raise UserError(str(error)) from error
    for name, value in given.items():
        try:
            cfg[name] = value
        except OmegaConfBaseException as error:  # of half an interpolation, ${
            raise UserError(f"{name}: expected plain text, got {value!r}") from error
    if (error := next(mistakes(cfg, "", ()), None)) is not None:
        raise UserError(error)
    chosen = OmegaConf.to_object(cfg)
    assert isinstance(chosen, Pruning)
    if (chosen.by == "learned") != (chosen.search is not None):
        raise UserError(f"by={chosen.by}, search={chosen.search}: give the run of a search exactly with by=learned")
    return chosen


def run(chosen: Pruning) -> Path:
    """Prune. Returns the run folder.

    Raises:
        UserError: if the folder holds a model that was pruned otherwise, or the search was of another model
        ValueError, FileNotFoundError: if model, search or pattern do not fit
    """
    import edit
    from edit.artifacts.checkpoint import save
    from edit.artifacts.fingerprint import fingerprint
    from edit.pruning.depth import DepthPruning
    from edit.pruning.patterns import groups_of, runs_of_one_kind
    from edit.pruning.tinyfusion import Gates

    out = Path(chosen.out)
    settings = {k: v for k, v in asdict(chosen).items() if k not in ("out", "model", "search", "device", "batch")}
    settings["weights"] = [fingerprint(path) for path in (chosen.model, chosen.search) if path]  # wherever they lie
    if (out / "pruning.json").exists():
        before = json.loads((out / "pruning.json").read_text())
        if other := next((k for k in settings if before["settings"].get(k) != settings[k]), None):
            raise UserError(
                f"{out} holds a model pruned with {other}={before['settings'].get(other)}, this command says "
                f"{settings[other]}: give another out="
            )
        print(f"{out} is complete: units {', '.join(map(str, before['kept']))} stay")
        return out
    artifact = edit.load(chosen.model)
    denoiser = artifact.denoiser
    if any(isinstance(own, Gates) for own in denoiser.edits.values()):
        raise UserError(
            f"model={chosen.model} is a search: give the model that it started from, and the search as search="
        )
    if chosen.search is not None:
        groups, choice = searched(chosen.search, denoiser)
    else:
        groups = groups_of(chosen.pattern, runs_of_one_kind(denoiser))
        choice = judged(chosen, artifact, groups)
    depth, name = len(denoiser.units), "depth"
    while name in denoiser.applied:  # of a model that was pruned before
        name += "_again"
    edit.apply(denoiser, {name: DepthPruning(pattern="listed", units=tuple(choice.kept))})
    made = {"name": out.name, "pruned_from": chosen.model, "by": chosen.by, "kept": choice.kept}
    out.mkdir(parents=True, exist_ok=True)
    save(denoiser, out / "artifact", artifact.objective, artifact.sampler, artifact.data, artifact.run | made)
    picture(out / "pruning.png", chosen, depth, choice)
    record = {"model": chosen.model, "search": chosen.search, "settings": settings, "groups": groups, **asdict(choice)}
    write(out / "pruning.json", json.dumps(record, indent=2) + "\n")  # last: it says that the rest is there
    print(f"kept      units {', '.join(map(str, choice.kept))} of {depth}, by {chosen.by}")
    print(f"pruned    {out / 'artifact'}")
    return out


@dataclass
class Choice:
    """The units that stay, and the measurements that decided it."""

    kept: list[int]
    scores: list[float] | None = None  # of every unit
    losses: list[float] | None = None  # of every pattern tried
    confidence: list[float] | None = None  # of every group, at the end of a search


def searched(path: str, denoiser: Denoiser) -> tuple[Groups, Choice]:
    """The choice of a search, by its averaged logits.

    Raises:
        UserError: if the run was no search, or its weights are not the model's
        ValueError: if its structure is not the model's
    """
    import torch

    from edit.artifacts.checkpoint import load
    from edit.artifacts.weights import split_state, stock_key
    from edit.edits import trains
    from edit.pruning.tinyfusion import Gates, TinyFusion
    from edit.state_dicts import check_layout

    found = load(path).denoiser
    gates = next((own for own in found.edits.values() if isinstance(own, Gates)), None)
    if gates is None:
        raise UserError(f"search={path} is no search: its model has no gates; train one with edits=tinyfusion")
    whole, theirs = (split_state(d, d.state_dict())[0] for d in (denoiser, found))
    check_layout(whole, theirs, f"search={path}")
    rule = next(e for e in found.applied.values() if isinstance(e, TinyFusion))
    names = (n for n, _ in found.model.named_parameters())
    if not any(trains(found, f"model.{n}") for n in names if stock_key(found, n)):  # the weights stayed what they were
        begin = slice(0, 4096)
        same = (
            torch.equal(v.flatten()[begin].to(theirs[k].dtype), theirs[k].flatten()[begin]) for k, v in whole.items()
        )
        if not all(same):
            raise UserError(
                f"search={path} was made with other weights than model=: give the model that it started from"
            )
    gates.kappa.fill_(rule.kappa[1])  # the saved average has kept the first value
    confidence = gates.probabilities().amax(1).tolist()
    return gates.groups, Choice(gates.kept(), confidence=confidence)


# ---- without learning ------------------------------------------------------------------------------------------------


def judged(chosen: Pruning, artifact: Artifact, groups: Groups) -> Choice:
    """The choice of one of the criteria of `edit.pruning.importance`."""
    import torch

    from edit.pruning import importance

    depth = len(artifact.denoiser.units)
    if chosen.by == "random":
        return Choice(importance.draw(groups, torch.Generator().manual_seed(chosen.seed)))
    if chosen.by == "uniform":
        return Choice(importance.even(groups))
    batches = Batches(chosen, artifact)
    if chosen.by == "influence":
        scores = batches.mean(lambda x, eps, x_t, t, c: importance.influence(artifact.denoiser, x_t, t, c))
        return Choice(importance.strongest(scores, groups), scores=scores)
    if chosen.by == "sensitivity":
        scores = batches.losses([[k for k in range(depth) if k != i] for i in range(depth)])
        return Choice(importance.strongest(scores, groups), scores=scores)
    tried = importance.candidates(groups, chosen.candidates, chosen.seed)
    losses = batches.losses(tried)
    order = sorted(range(len(tried)), key=losses.__getitem__)
    taken = order[{"min": 0, "median": (len(order) - 1) // 2, "max": -1}[chosen.pick]]
    return Choice(list(tried[taken]), losses=losses)


class Batches:
    """Calibration samples: the same noisy training samples for every measurement.

    Raises:
        UserError: if the artifact does not say which data the model was trained on
    """

    def __init__(self, chosen: Pruning, artifact: Artifact):
        import edit
        from data.loader import EndlessLoader
        from recipes.data_set import build_data
        from recipes.runtime.machine import pick_device

        source = artifact if chosen.data is None else edit.load(chosen.data)
        self.objective, self.seed = artifact.objective, chosen.seed
        self.device = pick_device({"gpu": "cuda"}.get(chosen.device, chosen.device))  # gpu: as trainer.accelerator says
        self.denoiser = artifact.denoiser.to(self.device)
        size = min(chosen.batch, chosen.samples)
        split = build_data(source).train()
        self.loader = EndlessLoader(split, size, -(-chosen.samples // size), chosen.seed)

    def mean(self, measure: Callable[[Tensor, Tensor, Tensor, Tensor, Condition], Tensor]) -> list[float]:
        """The mean over all samples of measure(x, noise, x_t, t, condition), whose last dimension is the batch."""
        import torch

        from edit import noise
        from edit.stream import Condition

        found = []
        with torch.no_grad():
            for batch in self.loader:
                batch = {k: v.to(self.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
                x, draw = batch["x"], batch["draw"]
                condition = Condition.of(batch)
                t = self.objective.times(noise.uniform(self.seed, draw, noise.TIME))
                eps = noise.gaussian(self.seed, draw, noise.NOISE, tuple(x.shape[1:]))
                found.append(measure(x, eps, self.objective.corrupt(x, eps, t), t, condition))
        return torch.cat(found, -1).mean(-1).tolist()

    def losses(self, patterns: Sequence[Sequence[int]]) -> list[float]:
        """For each pattern, the mean loss of the model with these units alone."""
        import torch

        from edit.pruning.importance import only
        from recipes.report.yardstick import progress

        with progress("losses", len(patterns) * len(self.loader), "batches") as done:

            def each(x: Tensor, eps: Tensor, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
                found = []
                for kept in patterns:
                    with only(self.denoiser, kept):
                        out = self.denoiser(x_t, t, condition)
                    losses = self.objective.losses(out, x, eps, x_t, t)
                    found.append(torch.stack(list(losses.values())).sum(0))
                    done(1)
                return torch.stack(found)

            return self.mean(each)


# ---- the picture -----------------------------------------------------------------------------------------------------


def picture(path: Path, chosen: Pruning, depth: int, choice: Choice) -> None:
    """Draw how units were chosen: confidence over the steps of a search, scores of units, or losses of patterns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[4, 1])
    if choice.confidence is not None:
        assert chosen.search is not None
        for g, (steps, values) in enumerate(confidences(Path(chosen.search) / "metrics.csv")):
            top.plot(steps, values, label=f"group {g}")
        top.set(xlabel="step", ylabel="probability of the likeliest way", ylim=(0, 1.02))
        if top.lines:
            top.legend(fontsize="x-small", ncols=4)
    elif choice.scores is not None:
        top.bar(range(depth), choice.scores, color=["C0" if i in choice.kept else "0.8" for i in range(depth)])
        label = "influence" if chosen.by == "influence" else "loss without it"
        top.set(xlabel="unit", ylabel=label, ylim=(0.9 * min(choice.scores), 1.05 * max(choice.scores)))
    elif choice.losses is not None:
        top.hist(choice.losses, bins=30)
        top.set(xlabel=f"loss right after pruning ({chosen.pick} is taken)", ylabel="patterns")
    else:
        top.set_axis_off()
    bottom.imshow([[float(i in choice.kept) for i in range(depth)]], cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
    bottom.set(yticks=[], xlabel=f"units that stay, by {chosen.by}")
    write(path, png_of(figure))


def confidences(metrics: Path) -> list[tuple[list[int], list[float]]]:
    """Steps and probabilities of every group, as a search has logged them; empty without a log."""
    if not metrics.is_file():
        return []
    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [k for k in rows[0] if "/confidence/" in k] if rows else []
    columns.sort(key=lambda name: int(name.rsplit("/", 1)[1]))
    logged = [[(int(r["step"]), float(r[c])) for r in rows if r[c]] for c in columns]
    return [([step for step, _ in line], [value for _, value in line]) for line in logged]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
