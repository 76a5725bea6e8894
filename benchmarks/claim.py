"""The central comparison of a method against its naive alternatives at equal cost, over several seeds.

    python -m benchmarks.claim flux_tiny_distill
    python -m benchmarks.claim flux_tiny_distill runs=/data/runs seeds=[0] trainer.max_steps=200

A claim is a file of benchmarks/claims: arms (words for train.py), what is measured, and which arm should win, be better
than which other (`better`), or no worse than which other (`within`). Every arm is trained with every seed under
runs/claims/<claim>/<arm>_<seed>; finished runs are not repeated. All of them are then measured with the same noise.

Arms of training-free edits (`variants`, as in eval.py's words) share one model (`model`: words for train.py), which is
trained once; seeds are those of the noise, and each is measured by a report of its own, in <claim>/noise_<seed>.

A claim with both kinds of arms measures them in the same reports, against the arm `reference`: an arm that was trained
with a seed in the report of this noise. There `model.<key>=<value>` are further words for the model's training, all
others for the arms'. `<arm>.<key>=<value>` is a word for one arm alone.

A measure is a name of the report, or, with a slash in it, a column of metrics.csv: the mean of its last tenth. With
`reach` (a column that falls, and an arm) there are two more: the optimiser `steps` and the training `seconds`, previews
and stages before not counted, until an arm's column is first at that arm's last value with the same seed; both are
infinite where it never is.

A claim with `sweep` is about the best value of a setting (`over`) at each value of another (`line`): every arm is one
multirun over all seeds, whose experiment names the values, and the best is the one whose mean over seeds of a figure
(`by`, which falls) is least, of those where no seed diverged. The measure `drift` is the largest over the smallest of
the best values; the page of all runs, with the plot, is <claim>/sweep.html. `bound` bounds a measure of an arm.

Winners are compared seed by seed; an arm is within another's spread where its mean is worse by no more than that one's
standard deviation over seeds; `at_most` bounds a measure of one arm by a multiple of another's, seed by seed. A claim
that does not hold is reported as not holding; the exit code is 0 all the same.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from edit.inputs.command import guarded
from edit.inputs.limits import LAST_SEED
from recipes.report.curves import Curve, read_curves
from recipes.report.sweep_page import natural
from recipes.report.swept import summarise

ROOT = Path(__file__).parents[1]
CLAIMS = Path(__file__).with_name("claims")
REACHED = ("steps", "seconds")  # measures of `reach`


def value_of(result: Mapping[str, Any], measure: str) -> float | None:
    """A measure of one report entry, wherever the report keeps it."""
    for part in ("quality", "compared"):
        if result.get(part) and measure in result[part]:
            return result[part][measure]["value"]
    return result.get("cost", {}).get(measure)


def verdict(winner: Sequence[float], other: Sequence[float], higher: bool) -> dict[str, Any]:
    """Seed by seed: how much better the winner is, and whether it is on every seed."""
    gains = [(a - b) if higher else (b - a) for a, b in zip(winner, other, strict=True)]
    spread = statistics.stdev(gains) if len(gains) > 1 and all(map(isfinite, gains)) else None
    mean = sum(gains) / len(gains)  # no number, where one seed is infinitely better and another infinitely worse
    return {"gain": mean, "spread": spread, "holds": all(g > 0 for g in gains), "gains": gains}


def within(arm: Sequence[float], other: Sequence[float], higher: bool) -> dict[str, Any]:
    """Whether the mean of an arm is worse than another's by no more than the other's spread over seeds."""
    worse = statistics.fmean(other) - statistics.fmean(arm)
    worse = worse if higher else -worse
    spread = statistics.stdev(other) if len(other) > 1 else 0.0
    return {"worse": worse, "spread": spread, "holds": worse <= spread}


def is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LAST_SEED


def run(script: str, *words: str, may_fail: bool = False) -> None:
    print(f"$ python {script} {' '.join(words)}", flush=True)
    code = subprocess.run([sys.executable, script, *words], cwd=ROOT).returncode
    if code and not may_fail:
        sys.exit(f"error: python {script} {' '.join(words)} ended with exit code {code}")


def plain(value: Any) -> Any:
    """The same with null, which JSON has, in place of what is infinite or no number, which JSON has not."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value


@guarded
def main(words: list[str]) -> int:
    names = sorted(p.stem for p in CLAIMS.glob("*.yaml"))
    if not words or words[0] in ("-h", "--help"):
        print(f"{__doc__}\nClaims: {', '.join(names)}\n")
        return 0 if words else 2
    name, *settings = words
    if name not in names:
        raise ValueError(f"there is no claim {name!r}; the claims are {', '.join(names)}")
    own = [word for word in settings if word.partition("=")[0] in ("runs", "seeds")]
    claim: Any = OmegaConf.merge(OmegaConf.load(CLAIMS / f"{name}.yaml"), OmegaConf.from_dotlist(own))
    if not (OmegaConf.is_list(claim.seeds) and claim.seeds and all(map(is_seed, claim.seeds))):
        raise ValueError(f"seeds is a list of whole numbers from 0 to {LAST_SEED}, got {claim.seeds}")
    runs = Path(claim.get("runs", "runs"))
    folder = runs / "claims" / name
    passed = [word for word in settings if word not in own]
    if claim.get("sweep"):
        values = sweep(claim, name, runs, folder, passed)
    elif claim.get("variants") and claim.get("arms"):
        values = mix(claim, name, runs, folder, passed)
    elif claim.get("variants"):
        values = vary(claim, runs, folder, passed)
    else:
        values = evaluate(claim, runs, folder, train(claim, name, runs, passed))
    comparisons = compare(claim, values)
    holds = all(c["holds"] for c in comparisons)
    outcome = {"claim": claim.claim, "seeds": list(claim.seeds), "values": values, "comparisons": comparisons}
    (folder / "claim.json").write_text(json.dumps(plain(outcome | {"holds": holds}), indent=2, allow_nan=False) + "\n")
    show(claim, values, comparisons, holds)
    print(f"\nwritten to {folder / 'claim.json'}")
    return 0


def train(claim: Any, name: str, runs: Path, passed: Sequence[str]) -> dict[str, list[Path]]:
    """Train every arm with every seed; `passed` are further words for train.py, of one arm if they begin with its name.

    Returns:
        The run folders of each arm, in the order of the seeds.
    """
    folders: dict[str, list[Path]] = {}
    arms: Any = OmegaConf.to_container(claim.arms, resolve=False)  # ${...} in them is train.py's
    for arm, settings in arms.items():
        others = [word for word in passed if word.partition(".")[0] not in arms]
        more = [*others, *(word.removeprefix(f"{arm}.") for word in passed if word.startswith(f"{arm}."))]
        for seed in claim.seeds:
            run_name = f"claims/{name}/{arm}_{seed}"
            run("train.py", *settings, f"name={run_name}", f"seed={seed}", f"runs={runs}", "evaluate=null", *more)
            folders.setdefault(arm, []).append(runs / run_name)
    return folders


def evaluate(
    claim: Any, runs: Path, folder: Path, folders: Mapping[str, Sequence[Path]]
) -> dict[str, dict[str, list[float]]]:
    """Measure all runs together, with the report in `folder`.

    Returns:
        By arm and measure, the value of each seed.

    Raises:
        SystemExit: if a run could not be measured, or a measure is missing
    """
    measured = [f"artifact={p}" for paths in folders.values() for p in paths]
    reference = [f"reference={runs / claim.reference}"] if claim.get("reference") else []
    options = [f"{k}={v}" for k, v in claim.evaluate.items()]
    run("eval.py", *measured, *reference, *options, f"out={folder}")
    results = {Path(a["path"]).resolve().parent: a["results"][0] for a in measured_in(folder)}

    def found(path: Path, seed: int, measure: str) -> float:
        if measure in REACHED and "reach" in claim:
            return reached(path, folders[claim.reach.of][seed], claim.reach.column)[REACHED.index(measure)]
        return logged(path, measure) if "/" in measure else required(results[path.resolve()], measure, folder)

    return {
        arm: {m: [found(p, i, m) for i, p in enumerate(paths)] for m in measures_of(claim)}
        for arm, paths in folders.items()
    }


def vary(claim: Any, runs: Path, folder: Path, passed: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Measure training-free edits of one model, with the noise of each seed; `passed` are further words for train.py.

    Returns:
        By arm and measure, the value of each seed.

    Raises:
        SystemExit: if a variant could not be measured, or a measure is missing
    """
    run("train.py", *claim.model, f"runs={runs}", *passed)
    arms: Any = OmegaConf.to_container(claim.variants)
    words = [word for arm, changes in arms.items() for word in spelled(arm, changes)]
    options = [f"{k}={v}" for k, v in claim.evaluate.items()]
    values: dict[str, dict[str, list[float]]] = {arm: {m: [] for m in measures_of(claim)} for arm in arms}
    for seed in claim.seeds:
        out = folder / f"noise_{seed}"
        run("eval.py", f"artifact={runs / claim.artifact}", *words, f"seed={seed}", *options, f"out={out}")
        results = {a["variant"]: a["results"][0] for a in measured_in(out) if "variant" in a}
        for arm, measures in values.items():
            for measure, found in measures.items():
                found.append(required(results[arm], measure, out))
    return values


def mix(claim: Any, name: str, runs: Path, folder: Path, passed: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Measure trained arms and training-free edits of one model together, with the noise of each seed.

    Returns:
        By arm and measure, the value of each seed.

    Raises:
        SystemExit: if a run could not be measured, or a measure is missing
    """
    of_model = [word for word in passed if word.startswith("model.")]
    model = runs / claim.artifact
    run("train.py", *claim.model, f"runs={runs}", *(word.removeprefix("model.") for word in of_model))
    folders = train(claim, name, runs, [word for word in passed if word not in of_model])
    arms: Any = OmegaConf.to_container(claim.variants)
    for arm, changes in arms.items():
        out = folder / arm
        given = {("" if key == "steps" else "edits.") + key: value for key, value in changes.items() if key != "edits"}
        words = [f"{key}={value}" for key, value in given.items()]
        run("-m", "recipes.apply", f"artifact={model}", f"edits={changes.get('edits', 'none')}", *words, f"out={out}")
        folders[arm] = [out] * len(claim.seeds)
    options = [f"{k}={v}" for k, v in claim.evaluate.items()]
    reference = folders.pop(claim.reference)[0]
    values: dict[str, dict[str, list[float]]] = {arm: {m: [] for m in measures_of(claim)} for arm in folders}
    for seed, *paths in zip(claim.seeds, *folders.values(), strict=True):
        out = folder / f"noise_{seed}"
        measured = [f"artifact={p}" for p in (reference, *paths)]
        run("eval.py", *measured, f"reference={reference}", f"seed={seed}", *options, f"out={out}")
        results = {Path(a["path"]).resolve().parent: a["results"][0] for a in measured_in(out)}
        for path, measures in zip(paths, values.values(), strict=True):
            for measure, found in measures.items():
                found.append(required(results[path.resolve()], measure, out))
    return values


def sweep(claim: Any, name: str, runs: Path, folder: Path, passed: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Train every arm as one multirun, and find the best value of the swept setting at each value of the other.

    Returns:
        By arm, one number each: the drift, and the best values.

    Raises:
        SystemExit: if a value of `line` has no runs that all seeds finished
    """
    asked, values = claim.sweep, {}
    for arm, settings in OmegaConf.to_container(claim.arms, resolve=False).items():
        seeds = f"seed={','.join(map(str, claim.seeds))}"
        run("train.py", "-m", *settings, seeds, f"name=claims/{name}/{arm}", f"runs={runs}", *passed, may_fail=True)
        found = summarise(folder / arm, asked.by)
        lines: dict[str, dict[float, float]] = {}
        for setting in found.settings:
            place = dict(zip(found.keys, setting.place, strict=True))
            mine = lines.setdefault(str(place[asked.line]), {})
            if len(setting.jobs) == len(claim.seeds):
                mine[float(place[asked.over])] = setting.mean
        if empty := [line for line, means in lines.items() if not means]:
            sys.exit(f"error: {arm}: at {empty[0]} no {asked.over} has a number of every seed: see {folder / arm}")
        best = {line: min(lines[line], key=lines[line].__getitem__) for line in sorted(lines, key=natural)}
        tried = {value for means in lines.values() for value in means}
        for line in (line for line, value in best.items() if value in (min(tried), max(tried))):
            print(f"{arm}: at {line} the best {asked.over} is the last of those that were tried: try more")
        drift = max(best.values()) / min(best.values())
        values[arm] = {"drift": [drift], **{f"best at {line}": [value] for line, value in best.items()}}
    run("-m", "recipes.sweep", f"runs={folder}", f"by={asked.by}")
    return values


def spelled(arm: str, changes: Mapping[str, Any]) -> list[str]:
    """The words of eval.py for a variant: `edits` names files of configs/edits, the other keys are its settings."""
    given = {f"variant.{arm}.{key}": value for key, value in changes.items() if key != "edits"}
    first = {f"variant.{arm}": changes["edits"]} if "edits" in changes else {}
    return [f"{key}={value}" for key, value in {**first, **given}.items()]


def measures_of(claim: Any) -> list[str]:
    """All that a claim compares."""
    return sorted({*claim.measures, *(measure for _, _, measure, _ in claim.get("at_most", []))})


def measured_in(folder: Path) -> list[dict[str, Any]]:
    """The entries of a report.

    Raises:
        SystemExit: if one could not be measured
    """
    entries = json.loads((folder / "report.json").read_text())["artifacts"]
    if failed := [a["name"] for a in entries if "error" in a]:
        sys.exit(f"error: {', '.join(failed)} could not be measured: see {folder / 'report.json'}")
    return entries


def required(result: Mapping[str, Any], measure: str, folder: Path) -> float:
    """A measure of one entry of the report in `folder`.

    Raises:
        SystemExit: if it has none
    """
    if (value := value_of(result, measure)) is None:
        sys.exit(f"error: the report measures no {measure}: see {folder / 'report.json'}")
    return value


def logged(run: Path, column: str) -> float:
    """The end of a column of metrics.csv: the mean of the last tenth of its values.

    Raises:
        SystemExit: if there is none
    """
    return curves_with(run, column)[column].end


def curves_with(run: Path, column: str) -> dict[str, Curve]:
    """The columns of metrics.csv, this one among them."""
    curves = read_curves(run / "metrics.csv")
    if column not in curves or not curves[column].values:
        sys.exit(f"error: {run / 'metrics.csv'} has no column {column}; there are {', '.join(sorted(curves))}")
    return curves


def reached(run: Path, other: Path, column: str) -> tuple[float, float]:
    """Steps and seconds of training until a column of `run` is first at the last value of `other`; infinite: never.

    Raises:
        SystemExit: if one of them has no such column
    """
    last, curves = curves_with(other, column)[column].values[-1], curves_with(run, column)
    curve = curves[column]
    step = next((step for step, value in zip(curve.steps, curve.values, strict=True) if value <= last), None)
    speed = curves.get("images_per_second")
    if step is None or speed is None:
        return (inf if step is None else step), inf
    images = OmegaConf.load(run / "config.yaml").data.batch_size
    spent = 0.0
    for begin, end, rate in zip((0, *speed.steps[:-1]), speed.steps, speed.values, strict=True):
        spent += max(0, min(end, step) - begin) * images / rate
    return step, spent


def compare(claim: Any, values: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """Every comparison that the claim is made of, and whether it holds."""
    won = [(claim.winner, other, verdict) for other in values if other != claim.winner] if claim.get("winner") else []
    won += [(*pair, verdict) for pair in claim.get("better", [])]
    kept = [(*pair, within) for pair in claim.get("within", [])]
    comparisons = [
        {"arm": arm, "other": other, "measure": measure}
        | judge(values[arm][measure], values[other][measure], direction == "higher")
        for arm, other, judge in (*won, *kept)
        for measure, direction in claim.measures.items()
    ]
    for arm, other, measure, most in claim.get("at_most", []):
        ratio = max(a / b for a, b in zip(values[arm][measure], values[other][measure], strict=True))
        found = {"ratio": ratio, "most": most, "holds": ratio <= most}
        comparisons.append({"arm": arm, "other": other, "measure": measure} | found)
    for arm, measure, most in claim.get("bound", []):
        value = max(values[arm][measure])
        comparisons.append({"arm": arm, "measure": measure, "value": value, "bound": most, "holds": value <= most})
    return comparisons


def show(claim: Any, values: Mapping[str, Any], comparisons: Sequence[Mapping[str, Any]], holds: bool) -> None:
    """The values of every arm and the verdict as markdown, to be kept in configs/RESULTS.md."""

    def cell(numbers: Sequence[float]) -> str:
        finite = len(numbers) > 1 and all(map(isfinite, numbers))
        spread = f" ± {statistics.stdev(numbers):.3g}" if finite else ""
        return f"{statistics.fmean(numbers):.4g}{spread}"

    measures = list(next(iter(values.values())))
    print(f"\n{claim.claim}\n\n| arm | {' | '.join(measures)} |\n|---{'|---' * len(measures)}|")
    for arm, measured in values.items():
        print(f"| {arm} | {' | '.join(cell(measured[m]) for m in measures)} |")
    print()
    for c in comparisons:
        if "bound" in c:
            said = f"{'at most' if c['holds'] else 'NOT at most'} {c['bound']:.4g}, {c['value']:.4g}"
            print(f"{c['arm']}, {c['measure']}: {said}")
            continue
        if "gain" in c:
            said = f"{'better' if c['holds'] else 'NOT better on every seed'}, by {c['gain']:.4g}"
        elif "worse" in c:
            said = (
                f"{'within' if c['holds'] else 'NOT within'} the spread of {c['spread']:.4g}, worse by {c['worse']:.4g}"
            )
        else:
            said = f"{'at most' if c['holds'] else 'NOT at most'} {c['most']:.4g} of it, {c['ratio']:.4g}"
        print(f"{c['arm']} against {c['other']}, {c['measure']}: {said}")
    print(f"\nThe claim {'holds' if holds else 'does NOT hold'} over {len(claim.seeds)} seeds.")


if __name__ == "__main__":
    sys.exit(main())
